"""Packed documents in the target: each gets what it gets alone, whatever a batch holds, whatever attends, and in chunks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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

from peagle_train.target_model.attention import packed_attention, varlen_serves
from peagle_train.target_model.chunks import Way, document_bounds, plan_runs
from peagle_train.target_model.frozen import FrozenTarget
from tests.tiny import VOCAB, make_target

ROWS = [[7, 1, 11, 2], [13, 3, 5]]
"""Lengths of the documents of a batch's sequences."""

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


def make(name: str, chunk_tokens: int | None = None) -> FrozenTarget:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # gpt-oss's grouped product knows no float64
        model = MODELS[name]().float() if name.startswith("gpt-oss") else MODELS[name]().double()
    return FrozenTarget(model, chunk_tokens=chunk_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, int64 [B, L]."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return torch.randint(0, VOCAB, positions.shape, generator=torch.Generator().manual_seed(1)), positions


def alone(model: Any, layer_ids: list[int], rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The same documents one by one through the whole model, by attention that has one row without a mask to do."""
    out = []
    for ids, lengths in zip(packed(rows)[0], rows, strict=True):
        states = [model(input_ids=part[None], output_hidden_states=True).hidden_states for part in ids.split(lengths)]
        out.append([torch.cat([s[i][0] for s in states]) for i in (*layer_ids, -1)])
    features, last = torch.stack([torch.cat(row[:3], dim=-1) for row in out]), torch.stack([row[3] for row in out])
    return features, last


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
    """What a causal kernel gives for one document, written out: position i sees the `window` last ones up to itself.

    query: [Q, heads, D], of the last positions. key, value: [K, key heads, D], of all positions.
    """
    groups, Q, K = query.shape[1] // key.shape[1], query.shape[0], key.shape[0]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[2] ** -0.5 if scale is None else scale)
    back = torch.arange(K - Q, K)[:, None] - torch.arange(K)
    hidden = (back < 0) | (back >= (window or K))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


CALLS: list[int] = []
"""Documents of each call of the next function."""


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False
) -> Tensor:  # fmt: skip
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    CALLS.append(cu_seqlens_q.numel() - 1)
    return torch.cat([attend(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(cu_seqlens_q.tolist())])


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False) -> Tensor:
    return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts stand-ins for the functions of flash-attn where transformers looks for them, as it has no kernel for a CPU; all
    else is transformers' own code.
    """
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    vars(padding).update(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.is_flash_attn_2_available", lambda: True)
    CALLS.clear()
    return CALLS


def flash_target(folder: Path) -> FrozenTarget:
    model: Any = FrozenTarget.load(str(folder), dtype="float64").model
    model.config._attn_implementation = "flash_attention_2"  # transformers' own check asks for a GPU
    return FrozenTarget(model)


@pytest.mark.parametrize("rows", [ROWS, [[1], [1]], [[4, 4], [8], [1, 7]]])
def test_flash_attention_keeps_the_documents_of_several_rows_apart(
    rows: list[list[int]], folder: Path, calls: list[int]
) -> None:
    model: Any = FrozenTarget.load(str(folder), dtype="float64").model
    model.config._attn_implementation = "flash_attention_2"  # transformers' own check asks for a GPU
    target = FrozenTarget(model)
    features, last = target.features(*packed(rows))
    assert calls == [sum(map(len, rows))] * 6  # one call a layer, for all documents of the batch
    expected, expected_last = alone(FrozenTarget.load(str(folder), dtype="float64").model, target.layer_ids, rows)
    assert torch.allclose(features, expected, atol=1e-12) and torch.allclose(last, expected_last, atol=1e-12)
    target.check()
    assert not target.way.apart


class Layer:
    """What attention looks at of the module that it works for."""

    class config:
        layer_types = None

    is_causal = True


def run_packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **given: Any) -> Tensor:
    """[Q, heads, D] from [Q, heads, D] and [K, key heads, D], as transformers would call it."""
    states = [x.transpose(0, 1)[None] for x in (query, key, value)]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    told = {"documents": tuple(bounds), "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}
    out, _ = packed_attention(Layer(), *states, None, max_length_q=max(lengths), dropout=0.0, **told, **given)  # type: ignore[arg-type]
    return out[0]


def random_states(Q: int, K: int, value_D: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (Q, 4, 8), (K, 2, 8), (K, 2, value_D)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
) -> Tensor:  # fmt: skip
    """torch's varlen_attn, which has no kernel for a CPU, as its documentation describes it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True)
    return torch.cat([attend(query[a:b], key[c:d], value[c:d], scale, window) for (a, b), (c, d) in parts])


def old_varlen(*given: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """The same on torch 2.11, which has no `enable_gqa`."""
    return varlen(*given, scale=scale, window_size=window_size)


@pytest.fixture(params=["one by one", "varlen_attn", "varlen_attn of torch 2.11"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one by one":
        is_old, module = "2.11" in request.param, "peagle_train.target_model.attention"
        monkeypatch.setattr(f"{module}.varlen_attn", old_varlen if is_old else varlen)
        monkeypatch.setattr(f"{module}.HAS_GQA", not is_old)
        monkeypatch.setattr(f"{module}.varlen_serves", lambda *_: True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 1, 3, 65, 500])
@pytest.mark.parametrize("lengths", [[1], [97], [1, 65, 1, 1, 131, 2], [64, 128]])
def test_packed_documents_get_what_attention_written_out_gives(lengths: list[int], window: int | None) -> None:
    states = random_states(sum(lengths), sum(lengths), value_D=5)
    found = run_packed_attention(*states, lengths, scaling=0.3, sliding_window=window)
    parts = zip(*(x.split(lengths) for x in states), strict=True)
    assert torch.allclose(found, torch.cat([attend(*part, 0.3, window) for part in parts]), atol=1e-13)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 1, 3, 65, 500])
@pytest.mark.parametrize(("Q", "K"), [(1, 2), (1, 131), (65, 131), (130, 131)])
def test_a_chunk_gets_what_attention_to_all_before_it_written_out_gives(Q: int, K: int, window: int | None) -> None:
    states = random_states(Q, K)
    found = run_packed_attention(*states, [Q], sliding_window=window)
    assert torch.allclose(found, attend(*states, window=window), atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_get_what_they_get_alone(name: str) -> None:
    target = make(name)
    # transformers' gpt-oss does not isolate packed documents.
    assert target.way.apart == name.startswith("gpt-oss")
    for way in {target.way, Way(apart=True)}:
        found = target.features(*packed(ROWS), way)
        for ours, right in zip(found, alone(target.model, target.layer_ids, ROWS), strict=True):
            read = torch.tensor([[n > way.apart for n in row for _ in range(n)] for row in ROWS])
            # Norms and rotary tables compute in float32, whatever the model's dtype.
            atol = (1e-5 if name.startswith("gpt-oss") else 2e-6) * float(right.abs().max())
            assert torch.allclose(ours[read], right[read], atol=atol)


class Watched(TorchDispatchMode):
    """The largest boolean tensor that is made inside, and how often a value is read (for which a GPU is waited for)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_mask, self.reads = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bool:
            self.largest_mask = max(self.largest_mask, out.numel())
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return out


@pytest.mark.parametrize(("name", "chunk_tokens"), [("llama", 29), ("gemma3, some layers sliding", None)])
def test_no_mask_of_tokens_by_tokens_is_made_and_nothing_waits_for_the_device(
    name: str, chunk_tokens: int | None
) -> None:
    target = make(name, chunk_tokens)
    forward = target.base.forward
    watched = Watched()

    @wraps(forward)  # whose arguments say what a cache is called
    def watching(**given: Any) -> Any:
        with watched:
            return forward(**given)

    target.base.forward = watching  # type: ignore[method-assign]
    rows = [[70, 1, 129], [90, 110]]
    target.features(*packed(rows))
    # Of a document in a window, or in chunks: a block of its queries by as many keys as they see.
    assert watched.reads == 0 and 0 < watched.largest_mask <= 64 * 192


@pytest.mark.parametrize(
    ("what", "chunk_tokens"), [("lost", 8), ("wrong", None), ("leaks, of several sequences only", None)]
)
def test_a_model_that_does_not_heed_bounds_gets_one_document_at_a_time_from_the_check_on(
    what: str, chunk_tokens: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    target, good = make("qwen3", chunk_tokens), make("qwen3")
    forward = target.base.forward

    @wraps(forward)
    def deaf(documents: Any = None, **given: Any) -> Any:
        if documents is None:
            return forward(**given)
        if what == "lost":
            return forward(**given)
        own = given["position_ids"].shape[1] // 2
        bounds = documents[::2] if what == "wrong" else [b for b in documents if b != own]
        return forward(documents=bounds, **given)

    target.base.forward = deaf
    if what == "lost":
        with pytest.raises(ValueError, match=r"bounds of documents.* target\.check"):
            target.features(*packed(ROWS))
    target.check()
    assert "one document at a time" in caplog.text and target.way == Way(apart=True, chunk_tokens=chunk_tokens)
    read = torch.tensor([[n > 1 for n in row for _ in range(n)] for row in ROWS])  # nobody reads one of a single token
    for found, expected in zip(target.features(*packed(ROWS)), good.features(*packed(ROWS)), strict=True):
        assert torch.allclose(found[read], expected[read], atol=2e-6 * float(expected.abs().max()))


@contextmanager
def sizes_of_calls(target: FrozenTarget) -> Iterator[list[tuple[int, bool]]]:
    """(tokens, whether with a cache) of each of the base model's calls."""
    calls: list[tuple[int, bool]] = []
    handle = target.base.register_forward_pre_hook(
        lambda _, __, given: calls.append((given["input_ids"].numel(), given["use_cache"])), with_kwargs=True
    )
    yield calls
    handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_what_the_whole_gives(name: str) -> None:
    target = make(name, chunk_tokens=8)
    target.check()
    for rows in ([[29]], [[1]], [[7, 1, 12, 1, 1, 1]], [[1, 10, 2], [13]]):
        target.way = replace(target.way, chunk_tokens=None)
        whole = target.features(*packed(rows))
        for chunk in (1, 5, 29):
            target.way = replace(target.way, chunk_tokens=chunk)
            with sizes_of_calls(target) as calls:
                chunked = target.features(*packed(rows))
            assert max(n for n, _ in calls) <= chunk and sum(n for n, _ in calls) == sum(map(sum, rows))
            # Nobody reads a document of one token: such ones run together where others run apart.
            read = torch.tensor([[n > target.way.apart for n in row for _ in range(n)] for row in rows])
            for ours, theirs in zip(chunked, whole, strict=True):
                # Norms and rotary tables compute in float32, whatever the model's dtype.
                tolerance = 1e-4 if theirs.dtype == torch.float32 else 1e-12 if name == "llama" else 2e-6
                assert torch.allclose(ours[read], theirs[read], atol=tolerance * float(theirs.abs().max())), (
                    rows,
                    chunk,
                )


def spans(*bounds: int) -> list[list[slice]]:
    return [[slice(*pair)] for pair in pairwise(bounds)]


def test_short_documents_share_a_forward_and_long_ones_run_alone_over_a_cache() -> None:
    def plan(bounds: list[int], chunk_tokens: int | None, apart: bool = False) -> list[list[slice]]:
        return plan_runs(bounds, Way(apart, chunk_tokens))

    bounds = document_bounds(packed([[3, 2, 1, 9, 1, 4, 4, 1, 4]])[1])
    assert bounds == [0, 3, 5, 6, 15, 16, 20, 24, 25, 29]
    long = [slice(6, 10), slice(10, 14), slice(14, 15)]
    assert plan(bounds, 4) == [*spans(0, 3, 6), long, *spans(15, 16, 20, 24, 25, 29)]
    assert plan(bounds, 9) == spans(0, 6, 15, 24, 29)
    assert plan(bounds, None) == spans(0, 29)
    assert document_bounds(torch.zeros(2, 3, dtype=torch.int64)) == [*range(7)]
    assert plan(bounds, None, apart=True) == spans(*bounds)
    assert plan([*range(6)], 3, apart=True) == spans(0, 3, 5)
    assert plan(document_bounds(torch.arange(5)[None].expand(2, -1)), 5) == spans(0, 5, 10)


def test_a_batch_that_fits_a_chunk_is_one_forward_without_a_cache() -> None:
    target = make("llama", chunk_tokens=29)
    with sizes_of_calls(target) as calls:
        target.features(*packed([[28, 1]]))
        target.features(*packed([[28, 2]]))
        target.features(*packed([[30]]))
    assert calls == [(29, False), (28, False), (2, False), (29, True), (1, True)]


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
    model.config.layer_types = ["chunked_attention"] * 6
    with pytest.raises(ValueError, match=r"chunked_attention.* set target\.chunk_tokens to null"):
        FrozenTarget(model, chunk_tokens=4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral, all layers sliding", "gemma3, some layers sliding"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_on_a_gpu_the_kernel_serves_and_nothing_waits_for_it(name: str, chunk_tokens: int | None) -> None:
    assert varlen_serves("cuda", torch.bfloat16, 8, 8)
    target, right = make(name, chunk_tokens), make(name)
    target.model.to("cuda", torch.bfloat16)
    target.check()
    assert not target.way.apart
    target.features(*packed(ROWS))  # libraries make their buffers
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = target.features(*packed(ROWS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(found, right.features(*packed(ROWS)), strict=True):
        assert (ours.cpu() - expected).norm() < 0.03 * expected.norm()
