"""Relay against the flat pass: every gradient, what it runs and what it leaves out, and whole trainings."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peagle_train.core.passes import TargetOutputs
from peagle_train.core.plan import plan_segments
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import RelayBuffers, context_chunks, relay_step
from tests import oracles
from tests.helpers import (
    GRID,
    MASK_TOKEN,
    WINDOWS,
    K,
    L,
    LiveBytes,
    Outcome,
    assert_same,
    build,
    calls_of,
    case_name,
    distance,
    elements_of,
    make_batch,
    make_draft,
    make_rows,
    make_target,
    outcome_of,
)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", GRID, ids=case_name)
def test_relay_and_algorithm_1_give_what_the_flat_pass_gives(case: dict[str, Any], window: int | None) -> None:
    draft, batch, flat_batch, target = build({**case, "sliding_window": window})
    expected = outcome_of(recompute_step, draft, flat_batch, target, scale=0.1)
    assert sum(expected.totals) > 0
    for step in (relay_step, recompute_step):
        assert_same(outcome_of(step, draft, batch, target, scale=0.1, chunk_rows=7), expected)


@pytest.mark.parametrize("kind, decay", [("kl", 0.5), ("tv", 1.0), ("lk", 0.8)])
def test_losses_and_their_decay_by_depth_are_those_of_the_contract(kind: str, decay: float) -> None:
    draft, rows = make_draft(), make_rows(26, documents=2)
    batch, target = make_batch(rows, 26, 4), None
    target = make_target(batch)
    options = {"scale": 0.1, "loss": kind, "depth_decay": decay}
    weights = {name: p.detach().requires_grad_() for name, p in draft.named_parameters()}
    total, hits, totals = oracles.step(
        weights, draft.config, rows[0], elements_of(batch, 0), target.features[0], target.last_hidden[0], target.head,
        kind, decay,
    )  # fmt: skip
    (total * 0.1).backward()
    for static in (False, True):
        for step in (relay_step, recompute_step):
            found = outcome_of(step, draft, batch, target, plan=plan_segments(batch, static=static), **options)
            assert (found.hits, found.totals) == (hits, totals)
            assert abs(float(found.loss - total.detach())) <= 1e-10 * float(total.detach())
            for name, gradient in found.gradients.items():
                expected = weights[name].grad
                assert expected is not None
                assert float((gradient - expected).abs().max()) <= 1e-10 * float(expected.abs().max()), name


@pytest.mark.parametrize("window", [None, K])
@pytest.mark.parametrize("case", GRID[::5], ids=case_name)
def test_a_static_plan_gives_what_the_flat_pass_gives(case: dict[str, Any], window: int | None) -> None:
    draft, batch, flat_batch, target = build({**case, "sliding_window": window})
    expected = outcome_of(recompute_step, draft, flat_batch, target, scale=0.1)
    plan = plan_segments(batch, static=True, window=window, layers=case["num_hidden_layers"])
    assert_same(outcome_of(relay_step, draft, batch, target, scale=0.1, plan=plan), expected)


@pytest.mark.parametrize("S, pad_context, window", [(16, False, None), (3, True, None), (16, True, 64), (7, False, 30)])
@pytest.mark.parametrize("seed", range(2))
def test_what_an_earlier_batch_left_behind_is_not_read(
    seed: int, S: int, pad_context: bool, window: int | None
) -> None:
    draft, buffers = make_draft(sliding_window=window), RelayBuffers()
    length = 150  # in 16 segments, pass A's chunks are shorter than the grid that contexts are padded to
    batch = make_batch(make_rows(length, documents=1 + 2 * seed, batch_size=1 + seed % 2, seed=seed), length, S)
    target = make_target(batch)
    expected = outcome_of(relay_step, draft, batch, target)
    plan = plan_segments(batch, static=True, pad_context=pad_context, window=window, layers=2)
    for _ in range(2):
        assert_same(outcome_of(relay_step, draft, batch, target, plan=plan, buffers=buffers), expected)
        for pair in [*buffers.keys_values, *buffers.gradients]:  # as a step that was not finite may
            for tensor in pair:
                tensor.fill_(float("nan"))


@pytest.mark.parametrize("pad_context", [False, True])
def test_nor_is_it_where_only_the_first_segment_has_something_to_learn(pad_context: bool) -> None:
    draft, buffers, length = make_draft(), RelayBuffers(), 150
    rows = [{"input_ids": list(range(40)) * 3, "loss_mask": [0] * 5 + [1] * 20 + [0] * 95}]
    full = make_batch(make_rows(length, seed=1), length, 3)
    outcome_of(relay_step, draft, full, make_target(full), buffers=buffers)
    for pair in buffers.keys_values:
        for tensor in pair:
            tensor.fill_(float("nan"))
    batch = make_batch(rows, length, 3, boundaries="uniform")
    plan = plan_segments(batch, static=True, pad_context=pad_context)
    expected = outcome_of(relay_step, draft, batch, make_target(batch))
    assert_same(outcome_of(relay_step, draft, batch, make_target(batch), plan=plan, buffers=buffers), expected)


@st.composite
def packed_rows(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 14), max_size=4).filter(lambda n: sum(n) <= 26))
    n = sum(lengths)
    mask = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n) | st.just([1] * n) | st.just([0] * n))
    ids = draw(st.lists(st.integers(0, MASK_TOKEN - 1), min_size=n, max_size=n))
    documents = [i for i, length in enumerate(lengths) for _ in range(length)]
    return {"input_ids": ids, "loss_mask": mask, "document_ids": documents}


@given(
    rows=st.lists(packed_rows(), min_size=1, max_size=3),
    S=st.integers(1, 26),
    depths=st.integers(1, 6),
    ratio=st.sampled_from([0.5, 0.8, 1.0]),
    boundaries=st.sampled_from(["balanced", "uniform"]),
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    wider=st.integers(0, 9) | st.none(),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_in_any_segments_give_what_the_flat_pass_gives(
    rows: list[dict[str, Any]],
    S: int,
    depths: int,
    ratio: float,
    boundaries: str,
    layers: int,
    kv_heads: int,
    wider: int | None,
) -> None:
    window = None if wider is None else depths + wider
    draft = make_draft(num_hidden_layers=layers, num_key_value_heads=kv_heads, sliding_window=window)
    batch = make_batch(rows, 26, S, depths, boundaries=boundaries, down_sample_ratio=ratio)
    flat_batch = make_batch(rows, 26, 1, depths, down_sample_ratio=ratio)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, flat_batch, target, scale=0.1)
    for step in (relay_step, recompute_step):
        assert_same(outcome_of(step, draft, batch, target, scale=0.1, chunk_rows=5), expected)


def prompt_first(boundaries: str = "uniform") -> dict[str, Tensor]:
    """32 columns in eight segments of four; none of the first four segments has a label."""
    rows = [{"input_ids": list(range(32)), "loss_mask": [0] * 17 + [1] * 15}]
    return make_batch(rows, 32, 8, K, boundaries=boundaries)


def test_a_prompt_is_run_for_its_keys_and_values_and_nothing_else() -> None:
    draft, batch = make_draft(num_hidden_layers=3), prompt_first()
    target, plan = make_target(batch), plan_segments(batch)
    first_q, last_q = draft.layers[0].self_attn.q_proj, draft.layers[2].self_attn.q_proj
    with calls_of(draft) as passes, calls_of(first_q) as first, calls_of(last_q) as last:
        outcome_of(relay_step, draft, batch, target, plan=plan)
    own = [segment.num_elements for segment in plan.segments]
    context = passes[: len(passes) - 8]
    # Pass A: each column left of the last segment once, in runs no longer than the longest segment.
    assert sum(context) == 28 and len(context) == -(-28 // max(own)) and max(context) <= max(own)
    # Pass B: each element once, from the right.
    assert passes[len(context) :] == own[::-1] and sum(own) == int((batch["depth"] >= 0).sum())
    assert first == passes
    # The last layer's queries: of the segments with labels alone.
    assert last == own[:3:-1]


def test_evaluating_runs_only_the_segments_with_labels_and_gives_the_same_sums() -> None:
    draft, batch = make_draft(), prompt_first()
    target = make_target(batch)
    expected = outcome_of(relay_step, draft, batch, target)
    with torch.no_grad(), calls_of(draft.layers[1].self_attn.q_proj) as queries, calls_of(draft) as passes:
        found = outcome_of(relay_step, draft, batch, target, backward=None)
    own = [segment.num_elements for segment in plan_segments(batch).segments]
    assert queries == own[:3:-1] and passes[-4:] == queries
    assert torch.equal(found.loss, expected.loss) and (found.hits, found.totals) == (expected.hits, expected.totals)
    assert len(found.untouched) == len(found.gradients)


def test_every_element_runs_with_grad_once_and_never_with_every_column_at_once() -> None:
    batch = make_batch(make_rows(L, documents=2), L, 7, K)
    draft, plan = make_draft(), plan_segments(batch)
    with_grad: list[int] = []
    handle = draft.register_forward_hook(
        lambda _, arguments, output: with_grad.append(
            arguments[0].shape[1] if output.keys_values[0][0].requires_grad else 0
        )
    )
    outcome_of(relay_step, draft, batch, make_target(batch), plan=plan)
    handle.remove()
    assert sum(with_grad) == int((batch["depth"] >= 0).sum())
    assert max(with_grad) == max(segment.num_elements for segment in plan.segments) <= batch["depth"].shape[1] // 7


def starts(batch: dict[str, Tensor], S: int) -> list[int]:
    """Numbers of the segments that relay trains."""
    C = batch["depth"].shape[1] // S
    return [segment.columns.start // C for segment in plan_segments(batch).segments]


@pytest.mark.parametrize(
    ("masks", "needed"),
    [
        # Two documents of 16 columns; eight segments of four columns.
        ([[0] * 32], []),
        ([[1] * 32], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([[0] * 16 + [1] * 16], [4, 5, 6, 7]),
        ([[1] * 16 + [0] * 16], [0, 1, 2, 3]),
        # A label in one place needs its document's columns to the left, and nothing else.
        ([[0] * 10 + [1] + [0] * 21], [0, 1, 2]),
        ([[0] * 26 + [1] + [0] * 5], [4, 5, 6]),
        ([[0] * 10 + [1] + [0] * 15 + [1] + [0] * 5], [0, 1, 2, 4, 5, 6]),
        # Rows of a batch need what each of them needs.
        ([[0] * 10 + [1] + [0] * 21, [0] * 26 + [1] + [0] * 5], [0, 1, 2, 4, 5, 6]),
    ],
)
def test_segments_that_nobody_learns_from_or_reads_are_left_out(masks: list[list[int]], needed: list[int]) -> None:
    rows = [{"input_ids": list(range(32)), "loss_mask": mask, "document_ids": [0] * 16 + [1] * 16} for mask in masks]
    batch = make_batch(rows, 32, 8, K, boundaries="uniform")
    assert starts(batch, 8) == needed
    draft, target = make_draft(), make_target(batch)
    with calls_of(draft) as passes:
        found = outcome_of(relay_step, draft, batch, target)
    plan = plan_segments(batch)
    assert len(passes) - len(context_chunks(plan)) == len(needed)
    expected = outcome_of(recompute_step, draft, make_batch(rows, 32, 1, K), target)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("masks", "columns"),
    [
        ([[0] * 16 + [1] * 16], [*range(16, 28)]),
        # The last document begins with a segment, which so reads nothing of its past.
        ([[1] * 16 + [0] * 16], [*range(12)]),
        ([[0] * 26 + [1] + [0] * 5], [*range(16, 24)]),
        # The first label is in the first columns of a document: nobody reads anything.
        ([[0] * 17 + [1] + [0] * 14], []),
        ([[0] * 10 + [1] + [0] * 21, [0] * 26 + [1] + [0] * 5], [*range(8), *range(16, 24)]),
    ],
)
def test_pass_a_runs_the_columns_that_are_read_and_no_others(masks: list[list[int]], columns: list[int]) -> None:
    rows = [{"input_ids": list(range(32)), "loss_mask": mask, "document_ids": [0] * 16 + [1] * 16} for mask in masks]
    batch = make_batch(rows, 32, 8, K, boundaries="uniform")
    for static in (False, True):
        plan = plan_segments(batch, static=static)
        chunks = context_chunks(plan)
        run = sorted({column for chunk in chunks for column in range(chunk.start, chunk.stop)})
        if static and columns:  # whole runs, which may reach over the end
            assert set(columns) <= set(run) and len({chunk.stop - chunk.start for chunk in chunks}) == 1
        else:
            assert run == columns and sum(c.stop - c.start for c in chunks) == len(run)
        found = outcome_of(relay_step, make_draft(), batch, make_target(batch), plan=plan)
        assert_same(found, outcome_of(recompute_step, make_draft(), make_batch(rows, 32, 1, K), make_target(batch)))


@pytest.mark.parametrize("S", [1, 8])
@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1] * 30, "loss_mask": [0] * 30},
        {"input_ids": [], "loss_mask": []},
        {"input_ids": [4], "loss_mask": [1]},
    ],
    ids=["masked", "empty", "one token"],
)
def test_a_batch_with_nothing_supervised_has_loss_zero_and_no_gradient(row: dict[str, Any], S: int) -> None:
    draft, batch = make_draft(), make_batch([row, row], L, S, K)
    target = make_target(batch)
    with calls_of(draft) as passes:
        found = outcome_of(relay_step, draft, batch, target)
    assert (found.loss.item(), found.hits, found.totals, passes) == (0, [0] * K, [0] * K, [])
    assert len(found.untouched) == len(found.gradients)
    idle = outcome_of(relay_step, draft, batch, target, min_passes=(2, 3))
    assert idle.untouched == [] and all((g == 0).all() for g in idle.gradients.values())


@pytest.mark.parametrize("make", [prompt_first, lambda: make_batch(make_rows(L, 2, 2), L, 3, K)])
def test_idle_passes_change_nothing(make: Any) -> None:
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


def test_with_a_minimum_every_parameter_gets_a_gradient_in_every_pass() -> None:
    draft, batch = make_draft(), prompt_first()
    missing: list[list[str]] = []

    def backward(tensors: Any, gradients: Any) -> None:
        draft.zero_grad(set_to_none=True)
        torch.autograd.backward(tensors, gradients)
        missing.append([name for name, p in draft.named_parameters() if p.grad is None])

    relay_step(draft, batch, make_target(batch), backward=backward, min_passes=(0, 0))
    assert missing == [[]] * 8


def test_kept_buffers_give_what_fresh_ones_give() -> None:
    draft, kept = make_draft(), RelayBuffers()
    shapes = [(2, 5), (2, 9), (2, 3), (2, 1), (2, 7), (1, 3), (1, 4), (3, 4), (2, 5)]
    for seed, (B, S) in enumerate(shapes):
        # Longer and shorter rows in turn: what a step leaves in the buffers must not reach the next one.
        rows = make_rows(L, documents=1 + seed % 3, batch_size=B, prompt=0.3, padding=(0, 17, 5)[seed % 3], seed=seed)
        batch = make_batch(rows, L, S, K)
        target = make_target(batch, seed=seed)
        fresh = outcome_of(relay_step, draft, batch, target, buffers=RelayBuffers())
        assert_same(outcome_of(relay_step, draft, batch, target, buffers=kept), fresh, 0)


@pytest.mark.parametrize(("window", "owed"), [(None, L), (9, 8), (2 * L, L)])
def test_buffers_are_allocated_once_for_batches_of_one_shape(window: int | None, owed: int) -> None:
    draft, buffers, addresses = make_draft(sliding_window=window), RelayBuffers(), set()
    for seed in range(3):
        batch = make_batch(make_rows(L, seed=seed), L, 4, K)
        outcome_of(relay_step, draft, batch, make_target(batch), buffers=buffers)
        everything = [t for pairs in (buffers.keys_values, buffers.gradients) for pair in pairs for t in pair]
        assert [tuple(t.shape) for t in everything] == [(1, 2, L, 8)] * 4 + [(1, 2, owed, 8)] * 4
        addresses.add(tuple(t.data_ptr() for t in everything))
    assert len(addresses) == 1


def test_a_later_step_needs_no_more_memory_than_the_first_and_leaves_nothing_behind() -> None:
    draft, buffers, peaks = make_draft(), RelayBuffers(), []
    batches = [make_batch(make_rows(L, documents=d, batch_size=2, seed=d), L, 5, K) for d in (1, 3)]
    targets = [make_target(batch) for batch in batches]
    for batch, target in zip(batches, targets):  # makes the gradients and the buffers
        relay_step(draft, batch, target, buffers=buffers)
    for i in range(6):
        draft.zero_grad(set_to_none=False)
        with LiveBytes() as live:
            relay_step(draft, batches[i % 2], targets[i % 2], buffers=buffers)
        assert live.held <= 1024  # the statistics that it returned
        peaks.append(live.peak)
    assert set(peaks[2:]) == set(peaks[:2])
    assert max(peaks) > 50_000, "nothing was counted"


def test_a_segments_hidden_states_are_gone_when_its_backward_begins_and_its_leaves_gradients_after() -> None:
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


def test_buffers_follow_a_drafters_dtype_and_keep_gradients_in_float32() -> None:
    buffers = RelayBuffers()
    for dtype in (torch.float64, torch.float32, torch.float64):
        batch = make_batch(make_rows(L), L, 4, K)
        draft, target = make_draft(dtype), make_target(batch, dtype)
        fresh = outcome_of(relay_step, draft, batch, target)
        assert_same(outcome_of(relay_step, draft, batch, target, buffers=buffers), fresh, 0)
        assert buffers.keys_values[0][0].dtype == buffers.gradients[0][0].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draft, target = make_draft(torch.float32), make_target(batch, torch.float32)
        outcome_of(relay_step, draft, batch, target, buffers=buffers)
    assert (buffers.keys_values[0][0].dtype, buffers.gradients[0][0].dtype) == (torch.bfloat16, torch.float32)


def test_activation_checkpointing_changes_nothing() -> None:
    draft, batch = make_draft(num_hidden_layers=3), make_batch(make_rows(L, documents=2, batch_size=2), L, 5, K)
    target = make_target(batch)
    expected = outcome_of(relay_step, draft, batch, target)
    draft.gradient_checkpointing = True
    with calls_of(draft.layers[1].self_attn.k_proj) as calls:
        assert_same(outcome_of(relay_step, draft, batch, target), expected, 1e-13)
    passes = len(plan_segments(batch).segments)
    assert len(calls) == 2 * passes + len(context_chunks(plan_segments(batch)))


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    batch = make_batch(make_rows(L, documents=2), L, 5, K)
    target, draft = make_target(batch), make_draft()
    expected = outcome_of(relay_step, draft, batch, target)
    frozen = ("embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.k_proj.weight")
    for name in frozen:
        draft.get_parameter(name).requires_grad_(False)
    found = outcome_of(relay_step, draft, batch, target)
    assert sorted(found.untouched) == sorted(frozen)
    zeros = {name: torch.zeros_like(expected.gradients[name]) for name in frozen}
    assert_same(
        found, Outcome(expected.loss, expected.hits, expected.totals, {**expected.gradients, **zeros}, []), 1e-13
    )


def test_the_plan_may_be_made_before_and_the_scale_be_a_tensor() -> None:
    draft, batch = make_draft(), make_batch(make_rows(L, documents=2, batch_size=2), L, 5, K)
    target = make_target(batch)
    expected = outcome_of(relay_step, draft, batch, target, scale=0.25)
    scale = torch.tensor(0.25, dtype=torch.float64)
    found = outcome_of(relay_step, draft, batch, target, scale=scale, plan=plan_segments(batch))
    assert_same(found, expected, 0)


def test_target_outputs_may_be_views_of_something_larger() -> None:
    """As they lie where the target's batch was longer, or where three layers' states are one tensor."""
    draft, batch = make_draft(), make_batch(make_rows(L, documents=2, batch_size=2), L, 5, K)
    target = make_target(batch)
    expected = outcome_of(relay_step, draft, batch, target)

    def strided(t: Tensor) -> Tensor:
        large = torch.full((t.shape[1] + 3, t.shape[0] + 1, t.shape[2] + 2), float("nan"), dtype=t.dtype)
        view = large.transpose(0, 1)[: t.shape[0], 1 : t.shape[1] + 1, 2:]
        return view.copy_(t)

    views = TargetOutputs(strided(target.features), strided(target.last_hidden), target.head)
    assert_same(outcome_of(relay_step, draft, batch, views), expected, 1e-13)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_under_bfloat16_autocast_relay_is_as_near_to_float64_as_the_flat_pass(ratio: float) -> None:
    rows = make_rows(L, documents=2, batch_size=2)
    flat_batch = make_batch(rows, L, 1, K, down_sample_ratio=ratio)
    batch = make_batch(rows, L, 8, K, down_sample_ratio=ratio)
    exact = outcome_of(recompute_step, make_draft(), flat_batch, make_target(batch), scale=0.01)
    draft, target = make_draft(torch.float32), make_target(batch, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = outcome_of(recompute_step, draft, flat_batch, target, scale=0.01)
        relay = outcome_of(relay_step, draft, batch, target, scale=0.01)
    assert distance(relay.gradients, exact.gradients) <= 1.5 * distance(flat.gradients, exact.gradients)
    # Tensor by tensor too, with room for luck: none is lost in a few far-off elements of the others.
    for name, expected in exact.gradients.items():
        one, other = (float((o.gradients[name].double() - expected).norm()) for o in (relay, flat))
        assert one <= 2.5 * other + 1e-3 * float(expected.norm()), name


# Whole trainings


def trained(step: Any, S: int, dtype: torch.dtype, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after AdamW on a new draw of the same four rows every epoch."""
    draft, buffers = make_draft(dtype), RelayBuffers()
    before = {name: p.detach().clone() for name, p in draft.named_parameters()}
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    rows = make_rows(L, documents=2, batch_size=4, prompt=0.2)
    options = {"buffers": buffers} if step is relay_step else {}
    for i in range(steps):
        chosen = [{**row, "epoch": i // 2} for row in rows[i % 2 * 2 : i % 2 * 2 + 2]]
        batch = make_batch(chosen, L, S, K)
        target = make_target(batch, dtype, seed=i % 2)
        count = int(batch["supervised"].sum())
        optimizer.zero_grad(set_to_none=True)
        step(draft, batch, target, scale=1 / count, **options)
        optimizer.step()
    return before, {name: p.detach() for name, p in draft.named_parameters()}


CUTS = [(relay_step, 8), (recompute_step, 8)]


@pytest.mark.slow
def test_thirty_steps_in_float64_end_at_the_same_weights_however_the_batches_are_cut() -> None:
    before, flat = trained(recompute_step, 1, torch.float64, 30)
    assert distance(flat, before) > 1
    for step, S in CUTS:
        _, cut = trained(step, S, torch.float64, 30)
        assert max(float((cut[name] - flat[name]).abs().max()) for name in flat) <= 1e-8


@pytest.mark.slow
def test_twenty_steps_in_float32_end_within_a_thousandth_of_the_way_of_each_other() -> None:
    before, flat = trained(recompute_step, 1, torch.float32, 20)
    _, cut = trained(relay_step, 8, torch.float32, 20)
    assert distance(cut, flat) <= 1e-3 * distance(flat, before)
