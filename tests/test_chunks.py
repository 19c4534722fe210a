"""The target in chunks: what the whole gives, for every architecture that takes a cache of keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peagle_train.target_model.chunks import Run, document_bounds, plan_runs
from peagle_train.target_model.frozen import FrozenTarget
from tests.tiny import VOCAB

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
WINDOW = {**SHAPE, "sliding_window": 5}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mistral, all layers sliding": lambda: MistralForCausalLM(MistralConfig(**WINDOW)),
    "gemma3, some layers sliding": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOW)),
    "gpt-oss, sinks": lambda: GptOssForCausalLM(GptOssConfig(**WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=6, n_head=2, n_positions=64)),
}
DOCUMENTS = {
    "one": [[29]],
    "one token": [[1]],
    "packed, padded": [[7, 1, 12, 1, 1, 1]],
    "two rows": [[1, 10, 2], [13]],
}


def make(name: str, chunk_tokens: int | None = None) -> FrozenTarget:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # gpt-oss's grouped product knows no float64
        model = MODELS[name]().float() if name.startswith("gpt-oss") else MODELS[name]().double()
    return FrozenTarget(model, chunk_tokens=chunk_tokens)


def tokens(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    return torch.randint(0, VOCAB, positions.shape, generator=torch.Generator().manual_seed(0)), positions


@contextmanager
def sizes_of_calls(target: FrozenTarget) -> Iterator[list[tuple[int, bool]]]:
    """(tokens, whether with a cache) of each of the base model's calls."""
    calls: list[tuple[int, bool]] = []
    handle = target.base.register_forward_pre_hook(
        lambda _, __, given: calls.append((given["input_ids"].numel(), given["use_cache"])), with_kwargs=True
    )
    yield calls
    handle.remove()


@pytest.mark.parametrize("model", MODELS)
def test_chunks_give_what_the_whole_gives(model: str) -> None:
    target = make(model)
    target.check()
    assert target.apart == model.startswith("gpt-oss")  # transformers' gpt-oss does not isolate packed documents
    for documents in DOCUMENTS.values():
        ids, positions = tokens(documents)
        target.chunk_tokens = None
        features, last = target.features(ids, positions)
        longest = max(n for row in documents for n in row)
        for chunk in {1, 2, 3, 5, 7, max(1, longest - 1), longest, longest + 1}:
            target.chunk_tokens = chunk
            with sizes_of_calls(target) as calls:
                chunked, chunked_last = target.features(ids, positions)
            assert max(n for n, _ in calls) <= chunk and sum(n for n, _ in calls) == ids.numel()
            # Norms and rotary tables compute in float32, whatever the model's dtype.
            tolerance = 1e-4 if features.dtype == torch.float32 else 2e-6
            # Nobody reads a document of one token: such ones run together where others run apart.
            read = (
                torch.cat([torch.tensor([n]).repeat(n) for row in documents for n in row]).view_as(ids) > target.apart
            )
            for ours, whole in ((chunked[read], features[read]), (chunked_last[read], last[read])):
                if not whole.numel():
                    continue
                assert (ours - whole).abs().max() <= tolerance * whole.abs().max(), (documents, chunk)


def test_float64_agrees_to_rounding() -> None:
    target = make("llama")
    ids, positions = tokens([[7, 1, 12, 29]])
    features, last = target.features(ids, positions)
    for chunk in (1, 2, 5, 13, 28):
        target.chunk_tokens = chunk
        chunked, chunked_last = target.features(ids, positions)
        assert (chunked - features).abs().max() < 1e-12 * features.abs().max()
        assert (chunked_last - last).abs().max() < 1e-12 * last.abs().max()


def test_short_documents_share_a_forward_and_long_ones_run_alone_over_a_cache() -> None:
    bounds = document_bounds(tokens([[3, 2, 1, 9, 1, 4, 4, 1, 4]])[1])
    assert bounds == [0, 3, 5, 6, 15, 16, 20, 24, 25, 29]
    assert plan_runs(bounds, 4) == [
        Run(0, 3, None), Run(3, 6, None), Run(6, 15, 4), Run(15, 16, None), Run(16, 20, None), Run(20, 24, None),
        Run(24, 25, None), Run(25, 29, None),
    ]  # fmt: skip
    assert plan_runs(bounds, 9) == [Run(0, 6, None), Run(6, 15, None), Run(15, 24, None), Run(24, 29, None)]
    assert document_bounds(torch.zeros(2, 3, dtype=torch.int64)) == [*range(7)]
    assert plan_runs([*range(7)], 6) == [Run(0, 6, None)]
    assert [(r.start, r.stop) for r in plan_runs(bounds, None, apart=True)] == [
        (0, 3), (3, 5), (5, 6), (6, 15), (15, 16), (16, 20), (20, 24), (24, 25), (25, 29)
    ]  # fmt: skip
    assert plan_runs([*range(6)], 3, apart=True) == [Run(0, 3, None), Run(3, 5, None)]
    assert plan_runs(document_bounds(torch.arange(5)[None].expand(2, -1)), 5) == [Run(0, 5, None), Run(5, 10, None)]


def test_a_batch_that_fits_a_chunk_is_one_forward_without_a_cache() -> None:
    target = make("llama", chunk_tokens=29)
    with sizes_of_calls(target) as calls:
        target.features(*tokens([[28, 1]]))
        target.features(*tokens([[28, 2]]))
    assert calls == [(29, False), (28, False), (2, False)]


@pytest.mark.parametrize("block", [1, 3, 256])
def test_blocks_of_queries_give_what_the_whole_gives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Any, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        widest.append(0 if attn_mask is None else attn_mask.shape[-2])
        return attention(*given, attn_mask=attn_mask, **named)

    target = make("llama")
    ids, positions = tokens([[29, 4]])
    features, last = target.features(ids, positions)
    monkeypatch.setattr("peagle_train.target_model.attention.CPU_BLOCK", block)
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    for chunk in (5, 7, 28):
        target.chunk_tokens = chunk
        chunked, chunked_last = target.features(ids, positions)
        assert (chunked - features).abs().max() < 1e-12 * features.abs().max()
        assert (chunked_last - last).abs().max() < 1e-12 * last.abs().max()
    assert target.config._attn_implementation == "sdpa" and max(widest) <= max(block, 4)


@pytest.mark.parametrize("model", MODELS)
def test_the_check_at_the_start_passes_in_chunks(model: str) -> None:
    make(model, chunk_tokens=8).check()


def test_a_cache_that_is_not_read_is_caught_at_the_start() -> None:
    target = make("llama", chunk_tokens=8)
    original = target.base.forward

    def forgetful(cache: Any = None, **given: Any) -> Any:
        return original(**given)

    target.base.forward = forgetful  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="gives other features in chunks"):
        target.check()


def test_layers_of_another_kind_are_refused_at_the_start() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_chunk_size=4))
    FrozenTarget(model)
    with pytest.raises(ValueError, match=r"target.chunk_tokens is given, but .* set target\.chunk_tokens to null"):
        model.config.layer_types = ["chunked_attention"] * 6
        FrozenTarget(model, chunk_tokens=4)
