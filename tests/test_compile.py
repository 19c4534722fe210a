"""Compiled passes: one graph each, whatever the data, and the same numbers as eager ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from peagle_train.core import plan
from peagle_train.core.collator import CODCollator
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import TargetOutputs
from peagle_train.core.plan import plan_segments
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import RelayBuffers, relay_step
from peagle_train.serving.start import draw_weights
from tests.tiny import make_target, write_recipe, write_rows

L, K = 37, 5


def make_draft(layers: int = 2, dtype: torch.dtype = torch.float64, window: int | None = None) -> PEagleDraft:
    config = PEagleDraftConfig(
        vocab_size=48, hidden_size=16, target_hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, num_hidden_layers=layers, draft_vocab_size=30, ptd_token_id=47, initializer_range=0.2,
        layer_type="llama" if layers == 1 else "qwen3", fc_norm=layers > 1,
        sliding_window=window,
    )  # fmt: skip
    draft = PEagleDraft(config).to(dtype)
    draw_weights(draft, seed=0)
    return draft


def ragged_rows(seed: int, batch_size: int) -> list[dict[str, Any]]:
    """Rows of every length from 1 to L, with one to three documents and any share of them supervised."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(batch_size):
        n, documents = draw(1, L + 1), draw(1, 4)
        first_supervised = draw(0, n + 1)
        ids = torch.randint(0, 47, (n,), generator=generator)
        mask = (torch.arange(n) >= first_supervised).long()
        rows.append({"input_ids": ids, "loss_mask": mask, "document_ids": torch.arange(n) * documents // n})
    return rows


def random_target(seed: int, batch_size: int, dtype: torch.dtype) -> TargetOutputs:
    generator = torch.Generator().manual_seed(1000 + seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return TargetOutputs(random(batch_size, L, 36), random(batch_size, L, 12), random(30, 12))


def run_ragged_batches(
    backend: str, mode: str, batches: int, dtype: torch.dtype, tolerance: float, window: int | None = None
) -> CompiledDraft:
    draft = make_draft(dtype=dtype, window=window)
    compiled, buffers, batch_size = CompiledDraft(draft, backend), RelayBuffers(), 2
    for seed in range(batches):
        rows, target = ragged_rows(seed, batch_size), random_target(seed, batch_size, dtype)
        flat = CODCollator(L, num_depths=K, down_sample_ratio=0.8)(rows)
        cut = CODCollator(L, num_depths=K, down_sample_ratio=0.8, num_segments=3)(rows)
        expected = recompute_step(draft, flat, target, scale=0.1)
        gradients = {n: p.grad for n, p in draft.named_parameters()}
        draft.zero_grad()
        chunk_rows = 1024 if backend == "inductor" else 70  # chunks are unrolled: many of them take long to compile
        settings: dict[str, Any] = {"scale": 0.1, "chunk_rows": chunk_rows}
        if mode == "relay":
            found = relay_step(compiled, cut, target, buffers=buffers, **settings)
        else:
            found = recompute_step(compiled, cut, target, **settings)
        assert torch.equal(found.hits, expected.hits) and torch.equal(found.totals, expected.totals)
        assert abs(found.loss - expected.loss) <= tolerance * max(1.0, float(expected.loss))
        for name, parameter in draft.named_parameters():
            reference = gradients[name]
            if reference is None:
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            assert parameter.grad is not None, name
            error = (parameter.grad - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
            assert error < tolerance, (name, float(error))
        draft.zero_grad()
        with torch.no_grad():
            evaluated = relay_step(compiled, cut, target, buffers=buffers, backward=None, **settings)
        assert torch.equal(evaluated.hits, expected.hits)
    return compiled


def test_eight_ragged_batches_compile_three_graphs_and_agree_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GRID", 4)  # so that a window's context is shorter than a row
    compiled = run_ragged_batches("aot_eager", "relay", 8, torch.float64, 1e-10, window=K)
    assert compiled.graphs == {"keys and values": 1, "training": 1, "evaluation": 1} and compiled.recompiles == 0


def test_algorithm_1_compiles_to_one_graph_too() -> None:
    compiled = run_ragged_batches("aot_eager", "recompute", 3, torch.float64, 1e-10)
    assert compiled.graphs["training"] == 1 and compiled.recompiles == 0


def test_a_graph_is_compiled_for_each_size_of_the_static_plans_and_none_again(caplog: pytest.LogCaptureFixture) -> None:
    draft, length, sizes = make_draft(layers=1), 400, set()
    compiled = CompiledDraft(draft, "aot_eager")
    collator = CODCollator(length, num_depths=K, down_sample_ratio=0.8)
    for supervised in (length, 0.4 * length, 0.1 * length, length, 0.4 * length):
        ids = torch.arange(length) % 47
        batch = collator(
            [{"input_ids": ids, "loss_mask": (ids.new_ones(length).cumsum(0) > length - supervised).long()}]
        )
        generator = torch.Generator().manual_seed(0)
        shapes = (1, length, 36), (1, length, 12), (30, 12)
        outputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        relay_step(compiled, batch, TargetOutputs(*outputs), chunk_rows=1024)
        sizes |= {segment.num_elements for segment in plan_segments(batch, static=True).segments}
    assert compiled.graphs["training"] == len(sizes) == 3 and compiled.recompiles == 0
    assert "compiled again" not in caplog.text


@pytest.mark.slow
def test_inductor_compiles_three_graphs_and_agrees_with_eager_to_rounding() -> None:
    compiled = run_ragged_batches("inductor", "relay", 6, torch.float32, 1e-3)
    assert compiled.graphs == {"keys and values": 1, "training": 1, "evaluation": 1}


def test_a_shape_that_changes_is_counted_and_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    draft = make_draft(layers=1)
    compiled = CompiledDraft(draft, "aot_eager")
    for batch_size in (1, 2):
        batch = CODCollator(L, num_depths=K, num_segments=2)(ragged_rows(3, batch_size))
        relay_step(compiled, batch, random_target(3, batch_size, torch.float64))
    assert compiled.recompiles > 0
    assert "compiled again" in caplog.text and "size mismatch at index 0. expected 1, actual 2" in caplog.text


def test_a_compiled_run_learns_what_an_eager_one_does_and_recompiles_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from peagle_train.__main__ import main

    target = make_target(tmp_path / "target")
    rows = write_rows(tmp_path / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 7], prompt=0.3)
    weights = []
    for name, compiled in (("eager", False), ("compiled", True)):
        AcceleratorState._reset_state(reset_partial_state=True)
        train = {"max_steps": 8, "eval_steps": 3, "compile": compiled, "compile_backend": "aot_eager"}
        data = {"eval_fraction": 0.3}
        recipe = write_recipe(tmp_path, target, rows, tmp_path / name, data=data, train=train)
        assert main([str(recipe)]) == 0
        weights.append(load_file(tmp_path / name / "final" / "model.safetensors"))
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        expected = 0 if compiled else None
        assert all(m["recompiles"] == expected for m in metrics if m["kind"] == "train")
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, rtol=0, atol=1e-8), name


@pytest.mark.parametrize("pad_context", [False, True])
@pytest.mark.parametrize("mode", ["relay", "recompute"])
def test_static_sizes_change_nothing_but_the_padding(mode: str, pad_context: bool) -> None:
    draft = make_draft()
    for seed in range(6):
        rows, target = ragged_rows(seed, 2), random_target(seed, 2, torch.float64)
        batch = CODCollator(L, num_depths=K, down_sample_ratio=0.8, num_segments=4)(rows)
        gradients = []
        for made in (plan_segments(batch), plan_segments(batch, static=True, pad_context=pad_context)):
            step: Any = relay_step if mode == "relay" else recompute_step
            step(draft, batch, target, plan=made)
            gradients.append(
                {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in draft.named_parameters()}
            )
            draft.zero_grad()
        assert all(s.num_depth0 == min(s.num_elements, L) for s in made.segments)
        for name, gradient in gradients[0].items():
            error = (gradients[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
            assert error < 1e-10, (name, float(error))
