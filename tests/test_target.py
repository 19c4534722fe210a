"""The frozen target: features, labels, what is refused; packed documents get what they get alone, whatever attends."""

from dataclasses import replace
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.loading import default_layer_ids, read_tensors
from peagle_train.target_model.packed import (
    Way,
    choose_way,
    document_bounds,
    packed_attention,
    plan_runs,
    varlen_serves,
)
from tests.helpers import seeded
from tests.tiny import VOCAB, make_target


@pytest.mark.parametrize("layer_ids", [None, [0], [1, 2, 4, 5]])
def test_features_are_the_streams_entering_the_layers_and_the_last_hidden_state_is_after_the_norm(
    tiny_target, layer_ids
):
    target = FrozenTarget.load(str(tiny_target), dtype="float64", layer_ids=layer_ids)
    ids, positions = packed([[13]])
    features, last = target.features(ids, positions)
    states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(features, torch.cat([states[i] for i in layer_ids or [2, 3, 4]], dim=-1))
    assert torch.equal(last, states[-1])  # transformers' last entry is after the final norm
    assert target.final_norm() is target.model.model.norm


def test_head_rows_times_last_hidden_are_the_models_own_logits_without_all_of_which_features_come(tiny_target):
    target = FrozenTarget.load(str(tiny_target), dtype="float64")
    ids, positions = packed([[9]])
    handle = target.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    _, last = target.features(ids, positions)
    target.check()
    handle.remove()
    assert all(not layer._forward_pre_hooks for layer in target.layers)
    rows = torch.tensor([3, 17, 58])
    assert torch.allclose(last @ target.head_rows(rows).T, target.model(input_ids=ids).logits[..., rows], atol=1e-12)


def test_weights_that_are_damaged_and_logits_that_are_changed_after_the_head_are_caught(tiny_target):
    for name in ("model.layers.2.mlp.down_proj.weight", "model.norm.weight"):
        broken = FrozenTarget.load(str(tiny_target), dtype="float32")
        broken.model.get_parameter(name).data[:1] = float("inf")
        with pytest.raises(ValueError, match="that are not finite"):
            broken.check()
    changed = FrozenTarget.load(str(tiny_target), dtype="float32")
    changed.model.register_forward_hook(lambda *given: replace(given[2], logits=given[2].logits / 2))
    with pytest.raises(ValueError, match="changes its logits"):
        changed.check()
    assert changed.model.get_output_embeddings() is changed.head


def test_targets_with_wrong_labels_or_features_and_layers_that_are_not_the_targets_are_refused():
    for layers, changes, message in (
        (6, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        (6, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (6, {"layer_types": ["linear_attention"] * 6}, "state runs across packed documents"),
        (4, {}, "too few for the default feature layers"),
    ):
        model: Any = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}))
        for name, value in changes.items():
            setattr(model.config, name, value)
        with pytest.raises(ValueError, match=message):
            FrozenTarget(model)
    for ids in ([], [3, 2, 1], [1, 1, 2], [0, 1, 4], [-1, 0, 1]):
        with pytest.raises(ValueError, match="layer_ids"):
            FrozenTarget(model, ids)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised head or embeddings"):
        FrozenTarget(model, [0])
    # vLLM's, if they are three
    assert [default_layer_ids(n) for n in (6, 7, 30)] == [[2, 3, 4], [2, 3, 4], [2, 15, 27]]


def test_folders_that_hold_no_target_are_refused_in_one_line(tiny_target, tmp_path):
    other, mine = make_target(tmp_path / "other", num_hidden_layers=7), tmp_path / "mine"
    weights = (tiny_target / "model.safetensors").read_bytes()
    mine.mkdir()
    for name, content, message in (
        ("README.md", b"", "is not a folder of a Hugging Face model"),
        ("config.json", (other / "config.json").read_bytes(), "no file named model.safetensors"),
        ("model.safetensors", weights[: len(weights) // 2], "cannot be loaded"),
        ("model.safetensors", weights, "do not fit its config"),
    ):
        (mine / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            FrozenTarget.load(str(mine))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("what", ["exact", "rounded", "leaks"])
def test_a_document_that_rounding_moves_is_kept_packed_and_one_that_its_neighbour_moves_is_not(what, dtype):
    """Of six documents in two sequences of 13 tokens, the second is far off what it gives alone, or the last one reads the
    first token of its sequence. Models in 16 bits do the first by themselves, in 32 none does.
    """
    table = torch.randn(64, 8, generator=seeded(0)).to(dtype)

    def features(ids_BL: Tensor, position_BL: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        found = table[ids_BL] + position_BL[..., None]
        if not way.apart and what == "rounded":
            found[0, 6:11] *= 1.5
        if not way.apart and what == "leaks":
            found[1, 10:] += table[ids_BL[1, 0]]
        return found, found

    way = choose_way("Name", features, Way(apart=False), 64)
    assert way.apart == (what == "leaks" or (what == "rounded" and dtype == torch.float32))


# Packed documents

ROWS = [[7, 1, 11, 2], [13, 3, 5]]
"""Lengths of the documents of a batch's sequences."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
WINDOW = {**SHAPE, "sliding_window": 5}
MODELS: dict[str, Any] = {
    "llama": ("llama", SHAPE),
    "qwen3": ("qwen3", SHAPE),
    "mistral, all layers sliding": ("mistral", WINDOW),
    "gemma3, some layers sliding": ("gemma3_text", WINDOW),
    "gpt-oss, sinks": ("gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 6, "n_head": 2, "n_positions": 64}),
}


def make(name: str, chunk_tokens: int | None = None) -> FrozenTarget:
    kind, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    # gpt-oss's grouped product knows no float64
    return FrozenTarget(model.float() if kind == "gpt_oss" else model.double(), chunk_tokens=chunk_tokens)


def packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, int64 [B, L]."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return torch.randint(0, VOCAB, positions.shape, generator=seeded(1)), positions


def alone(model: Any, layer_ids: list[int], rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The same documents one by one through the whole model, by attention that has one row without a mask to do."""
    out = []
    for ids, lengths in zip(packed(rows)[0], rows, strict=True):
        states = [model(input_ids=part[None], output_hidden_states=True).hidden_states for part in ids.split(lengths)]
        out.append([torch.cat([s[i][0] for s in states]) for i in (*layer_ids, -1)])
    features, last = torch.stack([torch.cat(row[:3], dim=-1) for row in out]), torch.stack([row[3] for row in out])
    return features, last


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """torch's own for one document, with a mask: each position sees the `window` last ones up to itself.

    query: [Q, heads, D], of the last positions. key, value: [K, key heads, D], of all positions.
    """
    Q, K = query.shape[0], key.shape[0]
    back = torch.arange(K - Q, K)[:, None] - torch.arange(K)
    states = (x.transpose(0, 1) for x in (query, key, value))
    seen = (back >= 0) & (back < (window or K))
    return scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None, window_size: tuple[int, int]
) -> Tensor:  # fmt: skip
    """torch's varlen_attn, which has no kernel for a CPU, as its documentation describes it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert query.shape[1] == key.shape[1]  # torch 2.11's has no enable_gqa
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True)
    return torch.cat([attend(query[a:b], key[c:d], value[c:d], scale, window) for (a, b), (c, d) in parts])


@pytest.fixture(params=["one by one", "varlen_attn"])
def kernel(request, monkeypatch):
    if request.param != "one by one":
        monkeypatch.setattr("peagle_train.target_model.packed.varlen_attn", varlen)
        monkeypatch.setattr("peagle_train.target_model.packed.varlen_serves", lambda *_: True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [None, 1, 65, 500])
def test_packed_documents_and_chunks_get_what_one_document_with_a_mask_gives(window):
    for lengths, K in (
        ([1], 1), ([97], 97), ([1, 65, 1, 1, 131, 2], 201), ([64, 128], 192),
        ([1], 2), ([1], 131), ([65], 131), ([130], 131),  # of the last Q positions, which see those before
    ):  # fmt: skip
        Q, generator, bounds = sum(lengths), seeded(0), [0, *accumulate(lengths)]
        shapes = (Q, 4, 8), (K, 2, 8), (K, 2, 8)
        states = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
        told = {"documents": bounds, "bounds": torch.tensor(bounds, dtype=torch.int32), "sliding_window": window}
        layer = nn.Identity()
        layer.config = LlamaConfig()  # type: ignore[assignment]
        found, _ = packed_attention(layer, *(x.transpose(0, 1)[None] for x in states), None, 0.3, **told)
        parts = zip(*(x.split(lengths) for x in states), strict=True) if Q == K else [states]
        assert torch.allclose(found[0], torch.cat([attend(*part, 0.3, window) for part in parts]), atol=1e-13)


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
def test_no_mask_of_tokens_by_tokens_is_made_and_nothing_waits_for_the_device(name, chunk_tokens):
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


def test_a_model_that_does_not_heed_bounds_gets_one_document_at_a_time_from_the_check_on(caplog):
    target = make("qwen3")
    forward = target.base.forward

    @wraps(forward)
    def leaking(documents: Any = None, **given: Any) -> Any:
        """From one sequence to the next, not within one."""
        between = given["position_ids"].shape[1] // 2
        return forward(documents=documents and [bound for bound in documents if bound != between], **given)

    target.base.forward = leaking
    target.check()
    assert "at a time" in caplog.text and target.way == Way(apart=True)
    target.base.forward = lambda documents=None, **given: forward(**given)
    with pytest.raises(ValueError, match=r"bounds of documents.* target\.check"):
        target.features(*packed(ROWS), Way(apart=False))


def test_a_sliding_layer_that_does_not_tell_its_window_is_refused():
    windows = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    layer, states = nn.Identity(), torch.zeros(1, 2, 6, 8)
    layer.config, layer.layer_idx = LlamaConfig(num_hidden_layers=2, **windows), 1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="its window"):
        packed_attention(layer, states, states, states, None, documents=[0, 6], bounds=torch.tensor([0, 6]))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_whole_or_in_chunks_get_what_they_get_alone(name):
    target = make(name, chunk_tokens=8)
    target.check()
    # transformers' gpt-oss does not isolate packed documents.
    assert target.way.apart == name.startswith("gpt-oss")
    apart, calls = target.way.apart, list[int]()
    target.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: calls.append(ids[0].numel()))
    for rows, ways in (
        (ROWS, {Way(apart), Way(apart=True), Way(apart, 5)}),
        ([[29]], {Way(apart, 8), Way(apart, 29)}),
        ([[7, 1, 12, 1, 1, 1]], {Way(apart, 1), Way(apart=True, chunk_tokens=5)}),
    ):
        right = alone(target.model, target.layer_ids, rows)
        for way in ways:
            target.way = way
            calls.clear()
            found = target.features(*packed(rows))
            # Nobody reads a document of one token: such ones are left out where others run apart.
            read = torch.tensor([[n > way.apart for n in row for _ in range(n)] for row in rows])
            assert max(calls) <= (way.chunk_tokens or sum(map(sum, rows))) and sum(calls) == int(read.sum())
            for ours, expected in zip(found, right, strict=True):
                # Norms and rotary tables compute in float32, whatever the model's dtype.
                atol = (1e-4 if name.startswith("gpt-oss") else 2e-6) * float(expected.abs().max())
                assert torch.allclose(ours[read], expected[read], atol=atol), (rows, way)


def test_short_documents_share_a_forward_and_long_ones_run_alone_over_a_cache():
    def plan(bounds: list[int], chunk_tokens: int | None, apart: bool = False) -> list[list[int]]:
        """Where each run's spans begin, and its end."""
        return [[run[0].start, *(span.stop for span in run)] for run in plan_runs(bounds, Way(apart, chunk_tokens))]

    bounds = document_bounds(packed([[3, 2, 1, 9, 1, 4, 4, 1, 4]])[1])
    assert bounds == [0, 3, 5, 6, 15, 16, 20, 24, 25, 29]
    assert document_bounds(torch.zeros(2, 3, dtype=torch.int64)) == [*range(7)]
    assert plan(bounds, 4) == [[0, 3], [3, 6], [6, 10, 14, 15], [15, 16], [16, 20], [20, 24], [24, 25], [25, 29]]
    assert plan(bounds, 9) == [[0, 6], [6, 15], [15, 24], [24, 29]]
    assert plan(bounds, None) == [[0, 29]]
    assert plan(bounds, None, apart=True) == [[0, 3], [3, 5], [6, 15], [16, 20], [20, 24], [25, 29]]
    assert plan([0, 1], None, apart=True) == [[0, 1]], "a text of one token is no padding"


def test_a_cache_that_is_not_read_is_caught_at_the_start():
    target = make("llama", chunk_tokens=8)
    forward = target.base.forward
    target.base.forward = lambda cache=None, **given: forward(**given)
    with pytest.raises(ValueError, match="gives other features in chunks"):
        target.check()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral, all layers sliding", "gemma3, some layers sliding"])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_on_a_gpu_the_kernel_serves_and_nothing_waits_for_it(name, chunk_tokens):
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


@pytest.mark.parametrize("stored, asked", [("wte.weight", "transformer.wte.weight"), ("m.e.w", "e.w"), ("e.w", "e.w")])
def test_a_tensor_is_found_whichever_side_has_the_models_prefix(stored, asked, tmp_path):
    save_file({stored: torch.arange(3.0), f"{stored}x": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path, {asked})[asked].tolist() == [0, 1, 2]
