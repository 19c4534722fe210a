"""What the relay runs, what it leaves out, and what it keeps between passes and steps. That it is exact: test_segments."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from peagle_train.core.passes import recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, context_chunks, relay_step
from tests.helpers import (
    K,
    L,
    LiveBytes,
    assert_same,
    calls_of,
    make_batch,
    make_draft,
    make_rows,
    make_target,
    outcome_of,
)


def prompt_first() -> dict[str, Tensor]:
    """32 columns in eight segments of four; none of the first four segments has a label."""
    rows = [{"input_ids": list(range(32)), "loss_mask": [0] * 17 + [1] * 15}]
    return make_batch(rows, 32, 8, K, boundaries="uniform")


def test_a_prompt_is_run_for_its_keys_and_values_and_nothing_else():
    draft, batch = make_draft(num_hidden_layers=3), prompt_first()
    target, plan = make_target(batch), plan_segments(batch)
    first_q, last_q = draft.layers[0].self_attn.q_proj, draft.layers[2].self_attn.q_proj
    has_grad: list[bool] = []
    draft.register_forward_hook(lambda _, __, output: has_grad.append(output.keys_values[0][0].requires_grad))
    with calls_of(draft) as passes, calls_of(first_q) as first, calls_of(last_q) as last:
        expected = outcome_of(relay_step, draft, batch, target, plan=plan)
    own = [segment.num_elements for segment in plan.segments]
    context = passes[: len(passes) - 8]
    # Pass A: each column left of the last segment once, without gradients, in runs no longer than the longest segment.
    assert sum(context) == 28 and len(context) == -(-28 // max(own)) and max(context) <= max(own)
    assert has_grad == [False] * len(context) + [True] * 8
    # Pass B: each element once, from the right.
    assert passes[len(context) :] == own[::-1] and sum(own) == int((batch["depth"] >= 0).sum())
    assert first == passes
    # The last layer's queries: of the segments with labels alone.
    assert last == own[:3:-1]
    with torch.no_grad(), calls_of(last_q) as last, calls_of(draft) as passes:
        found = outcome_of(relay_step, draft, batch, target, backward=None)
    assert last == passes[-4:] == own[:3:-1]
    assert torch.equal(found.loss, expected.loss) and found.hits == expected.hits
    # Algorithm 1: these segments alone, each with all that lies left of it again, which the last layer leaves out.
    with calls_of(last_q) as last, calls_of(draft) as passes:
        outcome_of(recompute_step, draft, batch, target, plan=plan)
    assert passes == [n + first for n, first in zip(own[4:], (16, 20, 24, 28))] and last == own[4:]


@pytest.mark.parametrize(
    ("masks", "needed", "columns"),
    [
        # Two documents of 16 columns; eight segments of four columns.
        ([[0] * 32], [], []),
        ([[1] * 32], [0, 1, 2, 3, 4, 5, 6, 7], [*range(28)]),
        # The last document begins with a segment, which so reads nothing of its past.
        ([[0] * 16 + [1] * 16], [4, 5, 6, 7], [*range(16, 28)]),
        ([[1] * 16 + [0] * 16], [0, 1, 2, 3], [*range(12)]),
        # A label in one place needs its document's columns to the left, and nothing else.
        ([[0] * 10 + [1] + [0] * 21], [0, 1, 2], [*range(8)]),
        ([[0] * 26 + [1] + [0] * 5], [4, 5, 6], [*range(16, 24)]),
        # The first label is in the first columns of a document: nobody reads anything.
        ([[0] * 17 + [1] + [0] * 14], [4], []),
        # Rows of a batch need what each of them needs.
        ([[0] * 10 + [1] + [0] * 21, [0] * 26 + [1] + [0] * 5], [0, 1, 2, 4, 5, 6], [*range(8), *range(16, 24)]),
    ],
)
def test_segments_and_columns_that_nobody_learns_from_or_reads_are_left_out(masks, needed, columns):
    rows = [{"input_ids": list(range(32)), "loss_mask": mask, "document_ids": [0] * 16 + [1] * 16} for mask in masks]
    batch, draft = make_batch(rows, 32, 8, K, boundaries="uniform"), make_draft()
    C, target = batch["depth"].shape[1] // 8, make_target(batch)
    expected = outcome_of(recompute_step, draft, make_batch(rows, 32, 1, K), target)
    for static in (False, True):
        plan = plan_segments(batch, static=static)
        assert [segment.columns.start // C for segment in plan.segments] == needed
        chunks = context_chunks(plan)
        run = sorted({column for chunk in chunks for column in range(chunk.start, chunk.stop)})
        if static and columns:  # whole runs, which may reach over the end
            assert set(columns) <= set(run) and len({chunk.stop - chunk.start for chunk in chunks}) == 1
        else:
            assert run == columns and sum(c.stop - c.start for c in chunks) == len(run)
        with calls_of(draft) as passes:
            assert_same(outcome_of(relay_step, draft, batch, target, plan=plan), expected)
        assert len(passes) == len(chunks) + len(needed)


@pytest.mark.parametrize("make", [prompt_first, lambda: make_batch(make_rows(L, 2, 2), L, 3, K)])
def test_idle_passes_change_nothing(make):
    draft, batch = make_draft(), make()
    target, plan = make_target(batch), plan_segments(batch)
    expected = outcome_of(relay_step, draft, batch, target)
    # (0, 0) asks for no more passes, but for every parameter in each.
    with calls_of(draft) as passes:
        needed = outcome_of(relay_step, draft, batch, target, plan=plan, min_passes=(0, 0))
    chunks = len(context_chunks(plan))
    assert len(passes) == chunks + len(plan.segments)
    assert_same(needed, expected, 1e-13)
    with calls_of(draft) as passes:
        found = outcome_of(relay_step, draft, batch, target, min_passes=(chunks + 3, len(plan.segments) + 2))
    assert len(passes) == chunks + len(plan.segments) + 5 and passes.count(1) >= 5
    assert_same(found, needed, 0)
    with torch.no_grad():
        evaluated = outcome_of(relay_step, draft, batch, target, backward=None, min_passes=(9, 9))
    assert torch.equal(evaluated.loss, expected.loss) and evaluated.hits == expected.hits
    missing: list[list[str]] = []

    def backward(tensors: Any, gradients: Any) -> None:
        draft.zero_grad(set_to_none=True)
        torch.autograd.backward(tensors, gradients)
        missing.append([name for name, p in draft.named_parameters() if p.grad is None])

    relay_step(draft, batch, target, backward=backward, min_passes=(0, 0))
    assert missing == [[]] * len(plan.segments)


# Buffers


def spoil(buffers: RelayBuffers) -> None:
    """As a step that was not finite may leave them."""
    for pair in [*buffers.keys_values, *buffers.gradients]:
        for tensor in pair:
            tensor.fill_(float("nan"))


@pytest.mark.parametrize(
    ("S", "pad_context", "window", "prompt"),
    [(16, False, None, 0), (3, True, None, 0.6), (16, True, 64, 0), (7, False, 30, 0)],
)
def test_what_an_earlier_batch_left_behind_is_not_read(S, pad_context, window, prompt):
    draft, buffers = make_draft(sliding_window=window), RelayBuffers()
    length = 150  # in 16 segments, pass A's chunks are shorter than the grid that contexts are padded to
    rows = make_rows(length, documents=3, batch_size=2, prompt=prompt)
    learned_at_the_start = [{"input_ids": list(range(40)) * 3, "loss_mask": [0] * 5 + [1] * 20 + [0] * 95}] * 2
    for given_rows in (rows, learned_at_the_start):
        batch = make_batch(given_rows, length, S)
        target = make_target(batch)
        expected = outcome_of(relay_step, draft, batch, target)
        plan = plan_segments(batch, static=True, pad_context=pad_context, window=window, layers=2)
        if S == 3 and given_rows is rows:  # passes of several sizes
            assert plan.segments[-1].num_elements < plan.capacity
        assert_same(outcome_of(recompute_step, draft, batch, target, plan=plan), expected)
        for _ in range(2):
            assert_same(outcome_of(relay_step, draft, batch, target, plan=plan, buffers=buffers), expected)
            spoil(buffers)


def test_kept_buffers_give_what_fresh_ones_give_in_any_order_of_shapes_and_dtypes():
    kept, float64, float32 = RelayBuffers(), torch.float64, torch.float32
    shapes = [(2, 5, float64), (2, 3, float64), (2, 9, float32), (1, 4, float32), (3, 4, float64), (2, 5, float64)]
    for seed, (B, S, dtype) in enumerate(shapes):
        # Longer and shorter rows in turn: what a step leaves in the buffers must not reach the next one.
        rows = make_rows(L, documents=1 + seed % 3, batch_size=B, prompt=0.3, padding=(0, 17, 5)[seed % 3], seed=seed)
        batch, draft = make_batch(rows, L, S, K), make_draft(dtype)
        target = make_target(batch, dtype, seed=seed)
        fresh = outcome_of(relay_step, draft, batch, target)
        assert_same(outcome_of(relay_step, draft, batch, target, buffers=kept), fresh, 0)
        assert kept.keys_values[0][0].dtype == kept.gradients[0][0].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome_of(relay_step, make_draft(float32), batch, make_target(batch, float32), buffers=kept)
    assert (kept.keys_values[0][0].dtype, kept.gradients[0][0].dtype) == (torch.bfloat16, float32)


@pytest.mark.parametrize(("window", "owed"), [(None, L), (9, 8), (2 * L, L)])
def test_buffers_are_allocated_once_for_batches_of_one_shape(window, owed):
    draft, buffers, addresses = make_draft(sliding_window=window), RelayBuffers(), set()
    for seed in range(2):
        batch = make_batch(make_rows(L, seed=seed), L, 4, K)
        outcome_of(relay_step, draft, batch, make_target(batch), buffers=buffers)
        everything = [t for pairs in (buffers.keys_values, buffers.gradients) for pair in pairs for t in pair]
        assert [tuple(t.shape) for t in everything] == [(1, 2, L, 8)] * 4 + [(1, 2, owed, 8)] * 4
        addresses.add(tuple(t.data_ptr() for t in everything))
    assert len(addresses) == 1


def test_a_later_step_needs_no_more_memory_than_the_first_and_leaves_nothing_behind():
    draft, buffers, peaks = make_draft(), RelayBuffers(), []
    batch = make_batch(make_rows(L, documents=3, batch_size=2), L, 5, K)
    target = make_target(batch)
    relay_step(draft, batch, target, buffers=buffers)  # makes the gradients and the buffers
    for _ in range(3):
        draft.zero_grad(set_to_none=False)
        with LiveBytes() as live:
            relay_step(draft, batch, target, buffers=buffers)
        assert live.held <= 1024  # the statistics that it returned
        peaks.append(live.peak)
    assert len(set(peaks)) == 1 and peaks[0] > 50_000


def test_a_segments_hidden_states_are_gone_when_its_backward_begins_and_its_leaves_gradients_after():
    draft, batch, alive = make_draft(), make_batch(make_rows(L), L, 4, K), list[Any]()
    leaves: list[Tensor] = []

    def watch(_: Any, arguments: Any, named: Any, output: Any) -> None:
        alive.extend([] if output.hidden is None else [weakref.ref(output.hidden)])
        leaves.extend(t for pair in named["context"] or () for t in pair if t.requires_grad)

    def backward(tensors: Any, gradients: Any) -> None:
        assert alive[-1]() is None
        torch.autograd.backward(tensors, gradients)

    draft.register_forward_hook(watch, with_kwargs=True)
    relay_step(draft, batch, make_target(batch), backward=backward)
    assert len(alive) >= 3 and leaves and all(leaf.grad is None for leaf in leaves)
