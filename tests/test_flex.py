"""The CUDA path's attention, forced onto the CPU: real values, the graphs of a GPU, none of its kernels."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._dynamo.testing import CompileCounterWithBackend

from peagle_train.core import attention, flex
from peagle_train.core import plan as core_plan
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.flex import kernel_options
from peagle_train.core.passes import recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, relay_step
from tests.helpers import make_batch, make_draft, make_rows, make_target, outcome_of, relative_error

L = 61


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Flex compiled by a backend that has a backward on the CPU, which Inductor has not; counts its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    original = torch_flex.flex_attention  # in a function of its own, so that it is compiled anew
    monkeypatch.setattr(flex, "flex_attention", lambda *tensors, **options: original(*tensors, **options))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # torch refuses gradients on the CPU
    return counter


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, segments, compiled, bf16, window",
    [
        ("relay", 3, False, False, 7),
        ("relay", 3, True, True, 9),
        ("recompute", 2, False, True, None),
        ("recompute", 1, True, False, None),
    ],
)
def test_the_cuda_path_gives_the_flat_passs_gradients(graphs, monkeypatch, mode, segments, compiled, bf16, window):
    draft, buffers, sizes = make_draft(torch.float32, sliding_window=window), RelayBuffers(), set[int]()
    monkeypatch.setattr(core_plan, "GRID", 4)  # so that a window's context is shorter than a row
    runner = CompiledDraft(draft, "aot_eager") if compiled else draft
    for batch_number, prompt in enumerate((0.3, 0.35)):
        rows = make_rows(L, documents=3, batch_size=2, prompt=prompt, padding=7 + batch_number)
        flat, cut = make_batch(rows, L), make_batch(rows, L, segments)
        target = make_target(flat, torch.float32)
        monkeypatch.setattr(attention, "uses_flex", lambda device: False)
        draft.gradient_checkpointing = False
        expected = outcome_of(recompute_step, draft, flat, target, scale=0.1)
        monkeypatch.setattr(attention, "uses_flex", lambda device: True)
        draft.gradient_checkpointing = True
        plan = plan_segments(cut, static=True, pad_context=True, window=window, layers=2)
        sizes |= {segment.num_elements for segment in plan.segments}
        step: Any = functools.partial(relay_step, buffers=buffers) if mode == "relay" else recompute_step
        run = functools.partial(step, runner, cut, target, scale=0.1, plan=plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = outcome_of(lambda *_: run(), draft, cut, target)  # noqa: B023
        assert found.untouched == expected.untouched
        assert relative_error(found.gradients, expected.gradients) < (0.1 if bf16 else 1e-4)
    if isinstance(runner, CompiledDraft):
        assert runner.graphs == {"keys and values": int(mode == "relay"), "training": len(sizes), "evaluation": 0}
        assert runner.graphs.recompiles == 0
        assert graphs.frame_count == 0, "flex was compiled by itself, beside the passes"
    else:
        assert graphs.frame_count == 2  # with and without a gradient, or with and without the queries left out


def test_flex_is_compiled_for_as_many_shapes_as_come(graphs):
    """torch gives up after 8 by default, and attends densely from then on."""
    for n in range(1, 11):
        query = torch.randn(1, 2, n, 8)
        mask = torch_flex.create_block_mask(lambda b, h, q, k: q >= k, 1, None, n, n, device="cpu")
        flex.flex(query, query, query, mask)
    assert graphs.frame_count == 10


@pytest.mark.parametrize(
    "queries, head_dim, itemsize, capability, given",
    [
        (1, 64, 2, (8, 0), {"BACKEND"}),
        (128, 128, 2, (8, 0), set()),
        (128, 256, 2, (9, 0), set()),
        (128, 128, 4, (9, 0), set()),
        (127, 96, 2, (9, 0), {"BACKEND", "bwd_BLOCK_M1"}),
        (8576, 128, 2, (9, 0), {"bwd_BLOCK_M1"}),
    ],
)
def test_kernel_options_are_given_where_flexs_own_choice_fails_or_spills(
    queries, head_dim, itemsize, capability, given
):
    options = kernel_options(queries, head_dim, itemsize, capability)
    assert options.keys() & {"BACKEND", "bwd_BLOCK_M1"} == given


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("step", [relay_step, recompute_step])
def test_a_pass_has_all_its_tables_before_it_runs(monkeypatch, step, layers):
    def attend(query, key, value, *_: Any, **__: Any) -> Any:
        return query + 0 * (key.sum() + value.sum())

    monkeypatch.setattr(attention, "uses_flex", lambda device: True)
    monkeypatch.setattr(flex, "flex", attend)
    monkeypatch.setattr(flex, "flex_tables", None)  # what attention would make them with; inside a graph they break it
    batch = make_batch(make_rows(L), L, 3)
    step(make_draft(num_hidden_layers=layers), batch, make_target(batch))
