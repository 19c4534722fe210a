"""Compiled passes: one graph each, whatever the data, and the same numbers as eager ones."""

import json
from typing import Any

import pytest
import torch

from peagle_train.core import plan
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.plan import plan_segments
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import RelayBuffers, relay_step
from tests.helpers import K, L, make_batch, make_draft, make_target, outcome_of
from tests.runs import drafter, run
from tests.tiny import write_rows


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


def run_ragged_batches(
    backend: str, mode: str, seeds: list[int], dtype: torch.dtype, tolerance: float, window: int | None = None
) -> CompiledDraft:
    draft = make_draft(dtype, layer_type="qwen3", fc_norm=True, sliding_window=window)
    compiled, options = CompiledDraft(draft, backend), {"buffers": RelayBuffers()} if mode == "relay" else {}
    step: Any = relay_step if mode == "relay" else recompute_step
    settings: dict[str, Any] = {
        "scale": 0.1,
        "chunk_rows": 1024 if backend == "inductor" else 70,
    }  # chunks are unrolled
    for seed in seeds:
        rows = ragged_rows(seed, 2)
        flat, cut = make_batch(rows, L), make_batch(rows, L, 3)
        target = make_target(flat, dtype, seed)
        expected = outcome_of(recompute_step, draft, flat, target, scale=0.1)
        draft.zero_grad()
        stats = step(compiled, cut, target, **settings, **options)
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in draft.named_parameters()}
        assert stats.hits.tolist() == expected.hits and stats.totals.tolist() == expected.totals
        assert abs(stats.loss - expected.loss) <= tolerance * max(1.0, float(expected.loss))
        for name, gradient in expected.gradients.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
            assert error < tolerance, (name, float(error))
        draft.zero_grad()
        if mode == "relay":
            with torch.no_grad():
                evaluated = relay_step(compiled, cut, target, backward=None, **settings, **options)
            assert evaluated.hits.tolist() == expected.hits
    return compiled


@pytest.mark.parametrize(
    ("backend", "mode", "seeds", "dtype", "tolerance", "window"),
    [
        ("aot_eager", "relay", [0, 1, 2, 3], torch.float64, 1e-10, K),
        ("aot_eager", "recompute", [0, 1], torch.float64, 1e-10, None),
        pytest.param("inductor", "relay", [0, 1], torch.float32, 1e-3, None, marks=pytest.mark.slow),
    ],
)
def test_ragged_batches_compile_a_graph_for_each_pass_and_agree_with_eager(
    backend, mode, seeds, dtype, tolerance, window, monkeypatch
):
    monkeypatch.setattr(plan, "GRID", 4)  # so that a window's context is shorter than a row
    compiled = run_ragged_batches(backend, mode, seeds, dtype, tolerance, window)
    relay = int(mode == "relay")
    assert compiled.graphs == {"keys and values": relay, "training": 1, "evaluation": relay}
    assert compiled.graphs.recompiles == 0


def test_a_graph_is_compiled_for_each_size_of_the_static_plans_and_again_with_a_warning_for_another_shape(caplog):
    length, sizes = 400, set()
    compiled = CompiledDraft(make_draft(num_hidden_layers=1), "aot_eager")
    for supervised in (length, 0.1 * length, length):
        mask = (torch.arange(1, length + 1) > length - supervised).long()
        batch = make_batch([{"input_ids": torch.arange(length) % 47, "loss_mask": mask}], length)
        relay_step(compiled, batch, make_target(batch), chunk_rows=2048)
        sizes |= {segment.num_elements for segment in plan_segments(batch, static=True).segments}
    assert compiled.graphs["training"] == len(sizes) == 2 and compiled.graphs.recompiles == 0
    assert "compiled again" not in caplog.text
    batch = make_batch([{"input_ids": torch.arange(length) % 47, "loss_mask": mask}] * 2, length)
    relay_step(compiled, batch, make_target(batch), chunk_rows=2048)
    assert compiled.graphs.recompiles > 0
    assert "the training pass was compiled again" in caplog.text


def test_a_compiled_run_learns_what_an_eager_one_does_and_recompiles_nothing(tmp_path, tiny):
    data = {"eval_sources": [str(write_rows(tmp_path / "held_out.jsonl", [30, 7]))]}
    for name, compiled in (("eager", False), ("compiled", True)):
        train = {"max_steps": 3, "eval_steps": 2, "compile": compiled, "compile_backend": "aot_eager"}
        run(tiny(tmp_path / name, data=data, train=train, draft={"num_layers": 1}))
        metrics = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(m["recompiles"] == (0 if compiled else None) for m in metrics if m["kind"] == "train")
    ours, theirs = (drafter(tmp_path / name / "run" / "final") for name in ("compiled", "eager"))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-8), name
