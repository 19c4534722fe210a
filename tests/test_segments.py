"""Both steps against loops over elements and against the flat pass, and the plan of their passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peagle_train.core.passes import TargetOutputs, recompute_step
from peagle_train.core.plan import padding_share, plan_segments
from peagle_train.core.relay import relay_step
from tests import oracles
from tests.helpers import (
    MASK_TOKEN,
    VOCAB,
    K,
    L,
    Outcome,
    assert_same,
    calls_of,
    distance,
    elements_of,
    make_batch,
    make_draft,
    make_rows,
    make_target,
    outcome_of,
    relative_error,
)

STEPS = [recompute_step, relay_step]

# Every pair of (layers, segments), the rest in turn: periods without a common divisor, so that values mix.
GRID = [
    {
        "num_hidden_layers": layers,
        "S": S,
        "boundaries": ("balanced", "uniform")[i % 2],
        "documents": (1, 3, 3)[i % 3],
        "prompt": (0.0, 0.5, 0.0, 0.9, 0.5)[i % 5],
        "batch_size": (1, 2, 2, 1, 2, 1, 2)[i % 7],
        "num_key_value_heads": (2, 4)[i // 2 % 2],
        "ratio": (0.8, 0.5, 1.0)[i // 3 % 3],
        "padding": (2, 0, 11)[i // 2 % 3],
        "sliding_window": (None, K, K + 1, 64, L)[i // 3 % 5],
        "norm_before_residual": i % 11 == 3,
        "num_aux_hidden_states": (3, 1, 5, 2)[i // 3 % 4],
        "layer_type": ("llama", "qwen3")[i // 5 % 2],
        "static": i // 2 % 2,
        "pad_context": i // 4 % 2 == 0,
        **({}, {"fc_norm": True}, {}, {"norm_before_fc": True})[i // 7 % 4],
    }
    for i, (layers, S) in enumerate([(n, S) for n in (1, 2, 4) for S in (2, 3, 4, 7, 8, 16, 1) for _ in range(2)])
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case.values())))
def test_relay_and_algorithm_1_give_what_the_flat_pass_gives_with_a_static_plan_too(case):
    case = dict(case)
    rows = make_rows(L, **{name: case.pop(name) for name in ("documents", "prompt", "batch_size", "padding")})
    S, boundaries, ratio, static, pad_context = (
        case.pop(name) for name in ("S", "boundaries", "ratio", "static", "pad_context")
    )
    flat = make_batch(rows, L, 1, K, down_sample_ratio=ratio)
    batch = make_batch(rows, L, S, K, boundaries=boundaries, down_sample_ratio=ratio)
    draft, target = make_draft(**case), make_target(batch, layers=case["num_aux_hidden_states"])
    expected = outcome_of(recompute_step, draft, flat, target, scale=0.1)
    assert sum(expected.totals) > 0
    plan = plan_segments(batch, True, pad_context, case["sliding_window"], case["num_hidden_layers"])
    assert all(segment.num_depth0 == min(segment.num_elements, L) for segment in plan.segments)
    for step, made in ((relay_step, None), (recompute_step, None), (STEPS[static], plan)):
        assert_same(outcome_of(step, draft, batch, target, scale=0.1, chunk_rows=7, plan=made), expected)


@given(
    rows=st.lists(oracles.packed_rows(26, MASK_TOKEN), min_size=1, max_size=3),
    S=st.integers(1, 26),
    depths=st.integers(1, 6),
    ratio=st.sampled_from([0.5, 0.8, 1.0]),
    boundaries=st.sampled_from(["balanced", "uniform"]),
    layers=st.integers(1, 3),
    wider=st.integers(0, 9) | st.none(),
)
@settings(max_examples=30, deadline=None)
def test_any_rows_in_any_segments_give_what_the_flat_pass_gives(rows, S, depths, ratio, boundaries, layers, wider):
    draft = make_draft(num_hidden_layers=layers, sliding_window=None if wider is None else depths + wider)
    batch = make_batch(rows, 26, S, depths, boundaries=boundaries, down_sample_ratio=ratio)
    flat, target = make_batch(rows, 26, 1, depths, down_sample_ratio=ratio), make_target(batch)
    expected = outcome_of(recompute_step, draft, flat, target, scale=0.1)
    for step in STEPS:
        assert_same(outcome_of(step, draft, batch, target, scale=0.1, chunk_rows=5), expected)


def by_hand(
    draft: Any, rows: list[dict], batch: dict[str, Tensor], target: Any, loss: str = "kl", depth_decay: float = 1.0
) -> Outcome:
    """What a step with a scale of 0.1 must give, by the oracle drafter and the naive loss, row after row."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in draft.named_parameters()}
    total, sums = torch.zeros((), dtype=torch.float64), [[0] * K, [0] * K]
    for b, row in enumerate(rows):
        given = elements_of(batch, b), target.features[b], target.last_hidden[b], target.head
        of_row, *counts = oracles.step(weights, draft.config, row, *given, loss, depth_decay)
        total = total + of_row
        for own, by_depth in zip(sums, counts):
            own[: len(by_depth)] = [a + b for a, b in zip(own, by_depth)]
    grads = torch.autograd.grad(total * 0.1, list(weights.values()))
    return Outcome(total.detach(), *sums, dict(zip(weights, grads)), [])


@pytest.mark.parametrize(
    ("rows", "shape", "options"),
    [
        ({}, {}, {"depth_decay": 0.5}),
        ({"documents": 3, "batch_size": 2}, {"num_key_value_heads": 4}, {"loss": "tv"}),
        ({"documents": 3, "prompt": 0.5}, {"num_hidden_layers": 1}, {"loss": "soft_ce"}),
        ({"prompt": 0.5, "batch_size": 2, "padding": 0}, {"norm_before_residual": True}, {"loss": "hard_ce"}),
        ({"documents": 2, "padding": 9}, {"num_hidden_layers": 4, "num_key_value_heads": 1}, {}),
        ({"prompt": 0.6}, {"sliding_window": K}, {"loss": "lk", "depth_decay": 0.8}),
        ({"documents": 2, "prompt": 0.8}, {"num_hidden_layers": 3, "sliding_window": K + 1}, {}),
    ],
    ids=str,
)
def test_the_flat_pass_and_segments_are_what_loops_over_elements_give(rows, shape, options):
    length = 26
    draft, made = make_draft(**shape), make_rows(length, **rows)
    flat, cut = make_batch(made, length), make_batch(made, length, 5)
    target = make_target(flat)
    expected = by_hand(draft, made, flat, target, **options)
    assert sum(expected.hits) < sum(expected.totals)
    static = plan_segments(cut, True, None, draft.config.sliding_window, draft.config.num_hidden_layers)
    for step, batch, plan in ((recompute_step, flat, None), (recompute_step, cut, static), (relay_step, cut, static)):
        found = outcome_of(step, draft, batch, target, scale=0.1, chunk_rows=7, plan=plan, **options)
        assert found.untouched == []
        assert_same(found, expected)


# The plan


@pytest.mark.parametrize(("S", "most"), [(1, 1.2), (2, 1.2), (16, 1.15)])
def test_a_half_supervised_sequence_of_8k_runs_few_slots_more_than_it_has_elements(S, most):
    n = 8192
    half, chat = torch.arange(n) >= n // 2, torch.arange(n) % 1024 >= 512
    for i, mask in enumerate((half, ~half, chat)):
        batch = make_batch([{"input_ids": [1] * n, "loss_mask": mask.long(), "row_key": i}], n, S, 8)
        plan = plan_segments(batch, static=True)
        slots, elements = sum(s.num_elements for s in plan.segments), int((batch["depth"] >= 0).sum())
        assert plan.num_elements <= slots <= most * elements
        assert padding_share([plan, plan]) == pytest.approx(1 - plan.num_elements / slots)


@pytest.mark.parametrize("S", [1, 4, 9])
def test_static_plans_have_eight_sizes_at_most_and_hold_every_element(S):
    n, sizes = 1000, set()
    for supervised in range(0, n + 1, 50):
        batch = make_batch([{"input_ids": [1] * n, "loss_mask": [0] * (n - supervised) + [1] * supervised}], n, S, 8)
        plan = plan_segments(batch, static=True)
        sizes |= {s.num_elements for s in plan.segments}
        assert plan.num_elements == (int((batch["depth"] >= 0).sum()) if supervised else 0)
    assert len(sizes) == 1 if S == 9 else 1 < len(sizes) <= 8


@pytest.mark.parametrize(
    ("S", "boundaries", "window", "layers"),
    [
        (1, "balanced", None, 2),
        (4, "balanced", K, 1),
        (9, "balanced", K + 1, 2),
        (9, "uniform", None, 1),
        (37, "uniform", K, 2),
    ],
)
def test_a_plan_says_what_its_segments_hold(S, boundaries, window, layers):
    rows = make_rows(L, documents=3, batch_size=3, prompt=0.7)
    batch = make_batch(rows, L, S, K, boundaries=boundaries)
    plan = plan_segments(batch, window=window, layers=layers)
    C, held, needed = batch["anchor"].shape[1] // S, [], []
    for b, row in enumerate(rows):
        who = [(row["document_ids"][a], a, d) for a, d in elements_of(batch, b)]
        learned = [bool(row["loss_mask"][a + d + 1]) for _, a, d in who]
        needed.append(oracles.reached(who, learned, window, layers))
        parts: list[list[oracles.Who]] = [[] for _ in range(S)]
        for s, a, d in zip(batch["segment_ids"][b].tolist(), batch["anchor"][b].tolist(), batch["depth"][b].tolist()):
            if d >= 0:
                parts[s].append((row["document_ids"][a], a, d))
        held.append(parts)
    found = {segment.columns.start // C: segment for segment in plan.segments}
    assert [*found] == [s for s in range(S) if any(needed[b] & {*held[b][s]} for b in range(3))]
    for s, segment in found.items():
        first = min(i for b in range(3) for i, one in enumerate(held[b][s]) if one in needed[b])
        own = [held[b][s][first:] for b in range(3)]
        earlier = [[one for t in range(s) for one in held[b][t] if one[2] == 0] for b in range(3)]
        assert segment.columns == slice(s * C + first, s * C + first + max(map(len, own)))
        start, _, P = plan.context(segment.context_end, segment.reads_from)
        lengths = []
        for b in range(3):
            read = [key for key in earlier[b] if key in needed[b]]
            read = [key for key in read if any(oracles.sees(q, key, window) for q in {*own[b]} & needed[b])]
            lengths.append(max((int(segment.context_end[b]) - a for _, a, _ in read), default=0))
            assert all(start[b] <= a < start[b] + P for _, a, _ in read)
        assert P == max(lengths)
    run = sum(int((batch["depth"][:, segment.columns] >= 0).sum()) for segment in plan.segments)
    assert plan.num_elements == run and plan.num_supervised == int(batch["supervised"].sum())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("S", [1, 5])
def test_of_a_long_sequence_whose_end_is_learned_little_more_than_the_windows_reach_is_run(step, S):
    n, learned, layers, window = 2048, 21, 2, 64
    mask = torch.arange(n) >= n - learned
    batch = make_batch([{"input_ids": [1] * n, "loss_mask": mask.long()}], n, S, K)
    draft, target = make_draft(torch.float32, num_hidden_layers=layers, sliding_window=window), make_target(batch)
    run = torch.zeros(n, dtype=torch.bool)

    def watch(_: Any, arguments: Any) -> None:
        position, depth = arguments[1], arguments[3].depth
        run[position[depth == 0]] = True

    draft.register_forward_pre_hook(watch)
    step(draft, batch, target)
    first = n - learned - 1 - layers * (window - 1)
    assert run[first : n - 1].all() and not run[:first].any() and run.sum() <= 0.1 * n


# What goes in and comes out


@pytest.mark.parametrize("step", STEPS)
def test_the_scale_reaches_the_gradients_alone_which_add_up_and_evaluating_makes_none(step):
    draft = make_draft()
    batches = [make_batch(make_rows(L, documents=2, batch_size=2, seed=seed), L, 5) for seed in (1, 2)]
    target = make_target(batches[0])
    one, other = (outcome_of(step, draft, batch, target) for batch in batches)
    for scale in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        quarter = outcome_of(step, draft, batches[0], target, scale=scale)
        assert torch.equal(quarter.loss, one.loss)
        assert relative_error(quarter.gradients, {n: g / 4 for n, g in one.gradients.items()}) <= 1e-14
    with torch.no_grad():
        found = outcome_of(step, draft, batches[0], target, backward=None)
    assert torch.equal(found.loss, one.loss) and (found.hits, found.totals) == (one.hits, one.totals)
    assert len(found.untouched) == len(found.gradients)
    for batch in batches:
        step(draft, batch, target)
    together = {name: p.grad for name, p in draft.named_parameters()}
    assert relative_error(together, {n: one.gradients[n] + other.gradients[n] for n in together}) <= 1e-13


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("S", [1, 8])
def test_a_batch_with_nothing_supervised_has_loss_zero_and_no_gradient(step, S):
    masked, empty, one = ({"input_ids": [1] * n, "loss_mask": [n == 1] * n} for n in (30, 0, 1))
    for row in (masked, empty, one):
        draft, batch = make_draft(), make_batch([row, row], L, S, K)
        target = make_target(batch)
        with calls_of(draft) as passes:
            found = outcome_of(step, draft, batch, target)
        assert (found.loss.item(), found.hits, found.totals, passes) == (0, [0] * K, [0] * K, [])
        assert len(found.untouched) == len(found.gradients)
        idle = outcome_of(step, draft, batch, target, min_passes=(2, 3) if step is relay_step else 2)
        assert idle.untouched == [] and all((g == 0).all() for g in idle.gradients.values())


@pytest.mark.parametrize("step", STEPS)
def test_what_the_target_says_of_columns_that_nothing_reads_changes_nothing(step):
    """Padding columns, each document's last features, and the hidden states behind unsupervised elements."""
    draft, rows = make_draft(), make_rows(L, documents=3, batch_size=2, prompt=0.5, padding=4)
    batch = make_batch(rows, L, 4, K)
    target = make_target(batch)
    expected = outcome_of(step, draft, batch, target)
    features_read = torch.zeros(2, L, dtype=torch.bool)
    labels_read = features_read.clone()
    for b, row in enumerate(rows):
        features_read[b, oracles.drafter_rows(row["document_ids"])] = True
        labels_read[b, [a + d + 1 for a, d in elements_of(batch, b) if row["loss_mask"][a + d + 1]]] = True
    target.features[~features_read] = 1e6
    target.last_hidden[~labels_read] = float("nan")
    assert_same(outcome_of(step, draft, batch, target), expected, 0)


def test_under_bfloat16_autocast_segments_are_as_near_to_float64_as_the_flat_pass():
    rows = make_rows(L, documents=2, batch_size=2)
    flat_batch, batch = make_batch(rows, L, 1, K), make_batch(rows, L, 8, K)
    exact = outcome_of(recompute_step, make_draft(), flat_batch, make_target(batch), scale=0.01)
    draft, target = make_draft(torch.float32), make_target(batch, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = outcome_of(recompute_step, draft, flat_batch, target, scale=0.01)
        cut = [outcome_of(step, draft, batch, target, scale=0.01) for step in STEPS]
    size = distance(exact.gradients, {n: torch.zeros_like(g) for n, g in exact.gradients.items()})
    flat_error = distance(flat.gradients, exact.gradients)
    assert 1e-3 < flat_error / size < 0.1
    for found in cut:
        assert distance(found.gradients, exact.gradients) <= 1.5 * flat_error
        assert {g.dtype for g in found.gradients.values()} == {torch.float32} and found.loss.dtype == torch.float32
        assert abs(found.loss.item() / exact.loss.item() - 1) < 0.01
        # Tensor by tensor too, with room for luck: none is lost in a few far-off elements of the others.
        for name, expected in exact.gradients.items():
            one, other = (float((o.gradients[name].double() - expected).norm()) for o in (found, flat))
            assert one <= 2.5 * other + 1e-3 * float(expected.norm()), name


@pytest.mark.parametrize("step", STEPS)
def test_what_does_not_fit_the_drafter_or_the_batch_is_refused(step):
    draft, rows = make_draft(), make_rows(L, batch_size=2, padding=4)
    batch = make_batch(rows, L, 3, K)
    right, longest = make_target(batch), L - 4  # the rows' real tokens
    expected = step(draft, batch, right, backward=None).loss
    short = TargetOutputs(right.features[:, :longest], right.last_hidden[:, :longest], right.head)
    assert torch.equal(step(draft, batch, short, backward=None).loss, expected), "padding may be left out"
    features, last_hidden = right.features, right.last_hidden
    for name, wrong in [
        ("features", features[:, : longest - 1]),
        ("features", features.repeat(1, 2, 1)),
        ("features", features[0]),
        ("last_hidden", last_hidden.repeat(2, 1, 1)),
        ("last_hidden", last_hidden[..., 1:]),
        ("head", right.head[1:]),
    ]:
        with pytest.raises(ValueError, match=f"the target's {name} has"):
            step(draft, batch, replace(right, **{name: wrong}))
    step(make_draft(sliding_window=K), batch, right, backward=None)
    with pytest.raises(ValueError, match=f"sliding_window is {K - 1}"):
        step(make_draft(sliding_window=K - 1), batch, right)
    padded_with_the_mask = make_batch(rows, L, 3, K, pad_token_id=MASK_TOKEN)
    step(draft, padded_with_the_mask, right, backward=None)
    for token, word in (
        (VOCAB, f"to {VOCAB}; .* 0..{VOCAB - 1}"),
        (-3, "input_ids are -3"),
        (MASK_TOKEN, "the mask token"),
    ):
        rows[1]["input_ids"][7] = token
        with pytest.raises(ValueError, match=word):
            step(draft, make_batch(rows, L, 3, K), right)
