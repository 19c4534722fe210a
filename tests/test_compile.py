"""Compiled passes: one graph each, whatever the data, and the same numbers as eager ones."""

from functools import partial
from typing import Any

import pytest
import torch

from peagle_train.core import plan
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.passes import recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, relay_step
from tests.helpers import K, L, assert_same, make_batch, make_draft, make_rows, make_target, outcome_of
from tests.runs import drafter, lines, run, same_tensors
from tests.tiny import write_rows


@pytest.mark.parametrize(
    ("backend", "mode", "batches", "dtype", "tolerance", "window"),
    [
        ("aot_eager", "relay", 4, torch.float64, 1e-10, K),
        ("aot_eager", "recompute", 2, torch.float64, 1e-10, None),
        pytest.param("inductor", "relay", 2, torch.float32, 1e-3, None, marks=pytest.mark.slow),
    ],
)
def test_ragged_batches_compile_a_graph_for_each_pass_and_agree_with_eager(
    backend, mode, batches, dtype, tolerance, window, monkeypatch
):
    monkeypatch.setattr(plan, "GRID", 4)  # so that a window's context is shorter than a row
    draft = make_draft(dtype, layer_type="qwen3", fc_norm=True, sliding_window=window)
    compiled = CompiledDraft(draft, backend)
    options: dict[str, Any] = {"buffers": RelayBuffers()} if mode == "relay" else {}
    options["chunk_rows"] = 1024 if backend == "inductor" else 70  # chunks are unrolled
    step = partial(relay_step if mode == "relay" else recompute_step, compiled, **options)
    for i in range(batches):
        rows = make_rows(L, documents=1 + i % 3, batch_size=2, prompt=0.2 * i, padding=11 * i, seed=i)
        flat, cut = make_batch(rows, L), make_batch(rows, L, 3)
        target = make_target(flat, dtype)
        expected = outcome_of(recompute_step, draft, flat, target, scale=0.1)
        found = outcome_of(lambda _, *given: step(*given, scale=0.1), draft, cut, target)
        assert_same(found, expected, tolerance)
        with torch.no_grad():
            assert step(cut, target, backward=None).hits.tolist() == expected.hits
    assert compiled.graphs == {"keys and values": int(mode == "relay"), "training": 1, "evaluation": 1}
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
        steps = lines(tmp_path / name / "run", "train")
        assert [step["recompiles"] for step in steps] == [0 if compiled else None] * 3
    ours, theirs = (drafter(tmp_path / name / "run" / "final") for name in ("compiled", "eager"))
    assert same_tensors(ours, theirs, 1e-8)
