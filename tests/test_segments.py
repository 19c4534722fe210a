"""The flat pass against loops over elements, and Algorithm 1's segments against the flat pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peagle_train.core.passes import TargetOutputs
from peagle_train.core.plan import padding_share, plan_segments
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import context_chunks, relay_step
from tests import oracles
from tests.helpers import (
    GRID,
    MASK_TOKEN,
    VOCAB,
    K,
    L,
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
    relative_error,
)


def by_hand(draft: Any, rows: list[dict], batch: dict[str, Tensor], target: Any, kind: str, scale: float) -> Outcome:
    """What a step must give, by the oracle drafter and the naive loss, row after row."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in draft.named_parameters()}
    total, hits, totals = torch.zeros((), dtype=torch.float64), [0] * K, [0] * K
    for b, row in enumerate(rows):
        elements = elements_of(batch, b)
        features, last_hidden = target.features[b], target.last_hidden[b]
        loss, *counts = oracles.step(weights, draft.config, row, elements, features, last_hidden, target.head, kind)
        total = total + loss
        for sums, by_depth in zip((hits, totals), counts):
            for d, count in enumerate(by_depth):
                sums[d] += count
    grads = torch.autograd.grad(total * scale, list(weights.values()))
    return Outcome(total.detach(), hits, totals, dict(zip(weights, grads)), [])


@pytest.mark.parametrize(
    ("rows", "shape", "kind"),
    [
        ({}, {}, "kl"),
        ({"documents": 3, "batch_size": 2}, {"num_key_value_heads": 4}, "kl"),
        ({"documents": 3, "prompt": 0.5}, {"num_hidden_layers": 1}, "soft_ce"),
        ({"prompt": 0.5, "batch_size": 2, "padding": 0}, {"norm_before_residual": True}, "hard_ce"),
        ({"documents": 2, "padding": 9}, {"num_hidden_layers": 4, "num_key_value_heads": 1}, "kl"),
        ({"prompt": 0.6}, {"sliding_window": K}, "kl"),
        ({"documents": 3, "batch_size": 2}, {"num_hidden_layers": 1, "sliding_window": K + 1}, "kl"),
        ({"documents": 2, "prompt": 0.8}, {"num_hidden_layers": 3, "sliding_window": K + 1}, "kl"),
    ],
    ids=str,
)
def test_the_flat_pass_is_what_loops_over_elements_give(rows: dict[str, Any], shape: dict[str, Any], kind: str) -> None:
    draft, made = make_draft(**shape), make_rows(L, **rows)
    batch = make_batch(made, L, K=K)
    target = make_target(batch)
    found = outcome_of(recompute_step, draft, batch, target, scale=0.1, loss=kind, chunk_rows=7)
    expected = by_hand(draft, made, batch, target, kind, scale=0.1)
    assert 0 < sum(found.hits) < sum(found.totals) and found.untouched == []
    assert_same(found, expected)


@pytest.mark.parametrize("window", [None, K])
@pytest.mark.parametrize("case", GRID[::5], ids=case_name)
def test_a_static_plan_gives_what_the_flat_pass_gives(case: dict[str, Any], window: int | None) -> None:
    draft, batch, flat_batch, target = build({**case, "sliding_window": window})
    expected = outcome_of(recompute_step, draft, flat_batch, target, scale=0.1)
    plan = plan_segments(batch, static=True, window=window, layers=case["num_hidden_layers"])
    assert_same(outcome_of(recompute_step, draft, batch, target, scale=0.1, plan=plan), expected)


@pytest.mark.parametrize("kind", ["soft_ce", "hard_ce"])
def test_every_loss_survives_the_cut(kind: str) -> None:
    draft, rows = make_draft(), make_rows(L, documents=2, batch_size=2)
    batch = make_batch(rows, L, 5, K)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, make_batch(rows, L, 1, K), target, loss=kind)
    assert_same(outcome_of(recompute_step, draft, batch, target, loss=kind), expected)


def test_every_supervised_element_is_in_one_pass_and_the_counts_are_the_batches() -> None:
    batch = make_batch(make_rows(L, documents=3, batch_size=2, prompt=0.4), L, 6, K)
    plan = plan_segments(batch)
    chosen = []
    for segment in plan.segments:
        n = segment.num_elements
        for i in segment.supervised.tolist():
            chosen.append((i // n, segment.columns.start + i % n))
    assert sorted(chosen) == [(b, i) for b, i in batch["supervised"].nonzero().tolist()]
    assert plan.num_supervised == len(chosen) == sum(plan.supervised_per_depth.tolist())
    by_depth = [int((batch["supervised"] & (batch["depth"] == d)).sum()) for d in range(K)]
    assert plan.supervised_per_depth.tolist() == by_depth


@pytest.mark.parametrize(("S", "most"), [(1, 1.2), (2, 1.2), (4, 1.15), (16, 1.15)])
def test_a_half_supervised_sequence_of_8k_runs_few_slots_more_than_it_has_elements(S: int, most: float) -> None:
    n = 8192
    half, chat = torch.arange(n) >= n // 2, torch.arange(n) % 1024 >= 512
    for i, mask in enumerate((half, ~half, chat)):
        row = {"input_ids": [1] * n, "loss_mask": mask.long(), "row_key": i}
        batch = make_batch([row], n, S, 8)
        plan = plan_segments(batch, static=True)
        slots, elements = sum(s.num_elements for s in plan.segments), int((batch["depth"] >= 0).sum())
        assert plan.num_elements <= slots <= most * elements
        assert padding_share([plan, plan]) == pytest.approx(1 - plan.num_elements / slots)


@pytest.mark.parametrize("S", [1, 2, 4, 9])
def test_static_plans_have_eight_sizes_at_most_and_hold_every_element(S: int) -> None:
    n, sizes = 1000, set()
    for supervised in range(0, n + 1, 20):
        row = {"input_ids": [1] * n, "loss_mask": [0] * (n - supervised) + [1] * supervised}
        batch = make_batch([row], n, S, 8)
        plan = plan_segments(batch, static=True)
        sizes |= {s.num_elements for s in plan.segments}
        held = sum(int((batch["depth"][:, s.columns] >= 0).sum()) for s in plan.segments)
        assert held == (int((batch["depth"] >= 0).sum()) if supervised else 0)
    assert len(sizes) == 1 if S == 9 else 1 < len(sizes) <= 8


@pytest.mark.parametrize("step", [recompute_step, relay_step])
@pytest.mark.parametrize("S", [1, 2])
def test_passes_of_several_sizes_give_what_the_flat_pass_gives(step: Any, S: int) -> None:
    length = 300
    draft, rows = make_draft(), make_rows(length, documents=2, batch_size=2, prompt=0.6)
    batch, flat_batch = make_batch(rows, length, S, K), make_batch(rows, length, 1, K)
    target = make_target(batch)
    plan = plan_segments(batch, static=True, pad_context=True)
    assert plan.segments[-1].num_elements < plan.capacity
    expected = outcome_of(recompute_step, draft, flat_batch, target)
    assert_same(outcome_of(step, draft, batch, target, plan=plan), expected)


@pytest.mark.parametrize("S", [1, 2, 7])
def test_a_static_plan_asks_features_for_no_more_slots_than_a_row_has_columns(S: int) -> None:
    batch = make_batch(make_rows(L, documents=3, batch_size=2, prompt=0.3), L, S, K)
    for segment in plan_segments(batch, static=True).segments:
        assert 0 < segment.num_depth0 <= L
        assert not (batch["depth"][:, segment.columns][:, segment.num_depth0 :] == 0).any()


@pytest.mark.parametrize(("window", "layers"), [(None, 2), (K, 1), (K + 1, 2)])
@pytest.mark.parametrize("boundaries", ["balanced", "uniform"])
@pytest.mark.parametrize("S", [1, 4, 9, 37])
def test_a_plan_says_what_its_segments_hold(S: int, boundaries: str, window: int | None, layers: int) -> None:
    rows = make_rows(L, documents=3, batch_size=3, prompt=0.7)
    batch = make_batch(rows, L, S, K, boundaries=boundaries)
    plan = plan_segments(batch, window=window, layers=layers)
    C, held, needed = batch["anchor"].shape[1] // S, [], []
    for b, row in enumerate(rows):
        who = [(row["document_ids"][a], a, d) for a, d in elements_of(batch, b)]
        learned = [bool(row["loss_mask"][a + d + 1]) for _, a, d in who]
        needed.append(oracles.reached(who, learned, window, layers))
        slots = zip(batch["segment_ids"][b].tolist(), batch["anchor"][b].tolist(), batch["depth"][b].tolist())
        parts: list[list[oracles.Who]] = [[] for _ in range(S)]
        for s, a, d in slots:
            if d >= 0:
                parts[s].append((row["document_ids"][a], a, d))
        held.append(parts)
    found = {segment.columns.start // C: segment for segment in plan.segments}
    assert [*found] == [s for s in range(S) if any(needed[b] & {*held[b][s]} for b in range(3))]
    for s, segment in found.items():
        first = min(i for b in range(3) for i, one in enumerate(held[b][s]) if one in needed[b])
        own = [held[b][s][first:] for b in range(3)]
        counts = [sum(d == 0 for *_, d in elements) for elements in own]
        earlier = [[one for t in range(s) for one in held[b][t] if one[2] == 0] for b in range(3)]
        everyone = [one for elements in own for one in elements]
        assert segment.columns == slice(s * C + first, s * C + first + max(map(len, own)))
        assert (segment.num_depth0, segment.first_rollout) == (max(counts), min(counts))
        assert segment.context_end.tolist() == [max((a for _, a, _ in ones), default=-1) + 1 for ones in earlier]
        assert segment.anchors == slice(min(a for _, a, _ in everyone), max(a for _, a, _ in everyone) + 1)
        assert all(segment.labels.start <= a + d + 1 < segment.labels.stop for _, a, d in everyone)
        start, P = plan.context(segment.context_end, segment.reads_from)
        lengths = []
        for b in range(3):
            read = [key for key in earlier[b] if key in needed[b]]
            read = [key for key in read if any(oracles.sees(q, key, window) for q in {*own[b]} & needed[b])]
            lengths.append(max((int(segment.context_end[b]) - a for _, a, _ in read), default=0))
            assert all(start[b] <= a < start[b] + P for _, a, _ in read)
        assert P == max(lengths)
    run = sum(int((batch["depth"][:, segment.columns] >= 0).sum()) for segment in plan.segments)
    assert plan.num_elements == run


@pytest.mark.parametrize("step", [recompute_step, relay_step])
@pytest.mark.parametrize("S", [1, 4, 16])
def test_of_a_long_sequence_whose_end_is_learned_little_more_than_the_windows_reach_is_run(step: Any, S: int) -> None:
    n, layers, window = 8192, 2, 128
    mask = torch.arange(n) >= n - n // 100
    batch = make_batch([{"input_ids": [1] * n, "loss_mask": mask.long()}], n, S, K)
    draft, target = make_draft(torch.float32, num_hidden_layers=layers, sliding_window=window), make_target(batch)
    run = torch.zeros(n, dtype=torch.bool)

    def watch(_: Any, arguments: Any) -> None:
        position, depth = arguments[1], arguments[3].depth
        run[position[depth == 0]] = True

    draft.register_forward_pre_hook(watch)
    step(draft, batch, target)
    reach = layers * (window - 1)
    first = n - n // 100 - 1 - reach
    assert run[first : n - 1].all() and not run[:first].any() and run.sum() <= 0.1 * n


@pytest.mark.parametrize("S", [1, 16])
def test_of_131072_tokens_whose_last_hundredth_is_learned_a_tenth_of_the_positions_is_run_at_most(S: int) -> None:
    n = 131_072
    mask = torch.arange(n) >= n - n // 100
    batch = make_batch([{"input_ids": [1] * n, "loss_mask": mask.long()}], n, S, 8)
    plan, run = plan_segments(batch, window=2048, layers=4), torch.zeros(n, dtype=torch.bool)
    for segment in plan.segments:
        run[batch["anchor"][:, segment.columns][batch["depth"][:, segment.columns] == 0]] = True
    for chunk in context_chunks(plan):
        run[chunk] = True
    assert run[n - n // 100 - 1 : n - 1].all() and 0.01 * n < run.sum() <= 0.1 * n
    assert all(plan.context(s.context_end, s.reads_from)[1] <= 2047 for s in plan.segments)


def test_segments_without_labels_are_not_run_and_every_pass_runs_its_context_again() -> None:
    rows = [{"input_ids": [1] * 32, "loss_mask": [0] * 17 + [1] * 15}]
    batch = make_batch(rows, 32, 8, K, boundaries="uniform")
    draft, plan = make_draft(), plan_segments(batch)
    with calls_of(draft) as passes, calls_of(draft.layers[-1].self_attn.q_proj) as queries:
        outcome_of(recompute_step, draft, batch, make_target(batch), plan=plan)
    own = [s.num_elements for s in plan.segments[4:]]
    assert passes == [n + first for n, first in zip(own, (16, 20, 24, 28))]
    assert queries == own  # the last layer leaves the context out


def test_evaluating_gives_the_same_sums_and_no_gradient() -> None:
    draft, batch = make_draft(), make_batch(make_rows(L, documents=2, batch_size=2), L, 5, K)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, batch, target)
    with torch.no_grad():
        found = outcome_of(recompute_step, draft, batch, target, backward=None)
    assert torch.equal(found.loss, expected.loss)
    assert (found.hits, found.totals) == (expected.hits, expected.totals)
    assert len(found.untouched) == len(found.gradients)


def test_the_scale_reaches_the_gradients_but_not_the_sums_and_may_be_a_tensor() -> None:
    draft, batch = make_draft(), make_batch(make_rows(L), L, 3, K)
    target = make_target(batch)
    one = outcome_of(recompute_step, draft, batch, target)
    for scale in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        quarter = outcome_of(recompute_step, draft, batch, target, scale=scale)
        assert torch.equal(quarter.loss, one.loss)
        assert relative_error(quarter.gradients, {n: g / 4 for n, g in one.gradients.items()}) <= 1e-14


def test_gradients_accumulate_over_steps() -> None:
    draft = make_draft()
    batches = [make_batch(make_rows(L, seed=seed), L, 3, K) for seed in (1, 2)]
    target = make_target(batches[0])
    alone = [outcome_of(recompute_step, draft, batch, target).gradients for batch in batches]
    for batch in batches:
        recompute_step(draft, batch, target)
    together = {name: p.grad for name, p in draft.named_parameters()}
    assert relative_error(together, {name: alone[0][name] + alone[1][name] for name in together}) <= 1e-13


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
        found = outcome_of(recompute_step, draft, batch, target)
    assert (found.loss.item(), found.hits, found.totals, passes) == (0, [0] * K, [0] * K, [])
    assert len(found.untouched) == len(found.gradients)
    idle = outcome_of(recompute_step, draft, batch, target, min_passes=2)
    assert idle.untouched == [] and all((g == 0).all() for g in idle.gradients.values())


def test_idle_passes_change_nothing() -> None:
    draft, batch = make_draft(), make_batch(make_rows(L, documents=2, batch_size=2), L, 3, K)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, batch, target)
    with calls_of(draft) as passes:
        found = outcome_of(recompute_step, draft, batch, target, min_passes=7)
    assert len(passes) == 7 and passes[-1] == 1
    assert (found.hits, found.totals) == (expected.hits, expected.totals) and torch.equal(found.loss, expected.loss)
    assert all(torch.equal(found.gradients[n], g) for n, g in expected.gradients.items())
    with calls_of(draft) as passes:
        outcome_of(recompute_step, draft, batch, target, min_passes=2)
    assert len(passes) == 3  # what is needed runs, whatever the minimum


def test_activation_checkpointing_changes_nothing() -> None:
    draft, batch = make_draft(num_hidden_layers=3), make_batch(make_rows(L, documents=2), L, 4, K)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, batch, target)
    draft.gradient_checkpointing = True
    assert_same(outcome_of(recompute_step, draft, batch, target), expected, 1e-13)


def test_what_the_target_says_of_columns_that_nothing_reads_changes_nothing() -> None:
    """Padding columns, each document's last features, and the hidden states behind unsupervised elements."""
    draft, rows = make_draft(), make_rows(L, documents=3, batch_size=2, prompt=0.5, padding=4)
    batch = make_batch(rows, L, 4, K)
    target = make_target(batch)
    expected = outcome_of(recompute_step, draft, batch, target)
    features_read = torch.zeros(2, L, dtype=torch.bool)
    labels_read = features_read.clone()
    for b, row in enumerate(rows):
        features_read[b, oracles.drafter_rows(row["document_ids"])] = True
        labels_read[b, [a + d + 1 for a, d in elements_of(batch, b) if row["loss_mask"][a + d + 1]]] = True
    target.features[~features_read] = 1e6
    target.last_hidden[~labels_read] = float("nan")
    assert_same(outcome_of(recompute_step, draft, batch, target), expected, 0)


def test_under_bfloat16_autocast_segments_are_as_near_to_float64_as_the_flat_pass() -> None:
    rows = make_rows(L, documents=2, batch_size=2)
    flat_batch, batch = make_batch(rows, L, 1, K), make_batch(rows, L, 8, K)
    exact = outcome_of(recompute_step, make_draft(), flat_batch, make_target(batch), scale=0.01)
    draft, target = make_draft(torch.float32), make_target(batch, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = outcome_of(recompute_step, draft, flat_batch, target, scale=0.01)
        cut = outcome_of(recompute_step, draft, batch, target, scale=0.01)
    size = distance(exact.gradients, {n: torch.zeros_like(g) for n, g in exact.gradients.items()})
    flat_error = distance(flat.gradients, exact.gradients)
    assert 1e-3 < flat_error / size < 0.1
    assert distance(cut.gradients, exact.gradients) <= 1.5 * flat_error
    assert {g.dtype for g in cut.gradients.values()} == {torch.float32} and cut.loss.dtype == torch.float32
    assert abs(cut.loss.item() / exact.loss.item() - 1) < 0.01


STEPS = [recompute_step, relay_step]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("drawn", [1, K])
def test_a_step_counts_by_the_batchs_own_depths_whichever_were_drawn(step: Any, drawn: int) -> None:
    rows = make_rows(L) if drawn == K else [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}]
    draft, batch = make_draft(), make_batch(rows, L, 3, K)
    assert int(batch["depth"].max()) + 1 == drawn
    stats = step(draft, batch, make_target(batch), backward=None)
    assert stats.totals.tolist() == batch["supervised_per_depth"][0].tolist() and len(stats.hits) == K


@pytest.mark.parametrize("step", STEPS)
def test_a_window_shorter_than_the_batchs_depths_is_refused(step: Any) -> None:
    batch = make_batch(make_rows(L), L, 3, K)
    step(make_draft(sliding_window=K), batch, make_target(batch), backward=None)
    with pytest.raises(ValueError, match=f"sliding_window is {K - 1}"):
        step(make_draft(sliding_window=K - 1), batch, make_target(batch))


@pytest.mark.parametrize("step", STEPS)
def test_outputs_of_the_target_that_are_not_the_batchs_are_refused(step: Any) -> None:
    draft, batch = make_draft(), make_batch(make_rows(L, batch_size=2, padding=4), L, 3, K)
    right = make_target(batch)
    longest = L - 4  # the rows' real tokens
    expected = step(draft, batch, right, backward=None).loss
    short = TargetOutputs(right.features[:, :longest], right.last_hidden[:, :longest], right.head)
    assert torch.equal(step(draft, batch, short, backward=None).loss, expected), "padding may be left out"
    wrong: list[tuple[str, TargetOutputs]] = [
        ("features", replace(right, features=right.features[:, : longest - 1])),
        ("last_hidden", replace(right, last_hidden=right.last_hidden[:, : longest - 1])),
        ("features", replace(right, features=right.features[:1])),
        ("last_hidden", replace(right, last_hidden=right.last_hidden.repeat(2, 1, 1))),
        ("features", replace(right, features=right.features.repeat(1, 2, 1))),
        ("features", replace(right, features=right.features[0])),
        ("features", replace(right, features=right.features[..., 1:])),
        ("last_hidden", replace(right, last_hidden=right.last_hidden[..., 1:])),
        ("head", replace(right, head=right.head[1:])),
    ]
    for name, target in wrong:
        with pytest.raises(ValueError, match=f"the target's {name} ha"):
            step(draft, batch, target)


@pytest.mark.parametrize("step", STEPS)
def test_tokens_that_the_drafter_cannot_read_are_refused_where_they_are_no_padding(step: Any) -> None:
    draft, rows = make_draft(), make_rows(L, batch_size=2, padding=4)
    padded_with_the_mask = make_batch(rows, L, 3, K, pad_token_id=MASK_TOKEN)
    step(draft, padded_with_the_mask, make_target(padded_with_the_mask), backward=None)
    for token, word in ((VOCAB, f"token {VOCAB}; .* 0..{VOCAB - 1}"), (-3, "token -3"), (MASK_TOKEN, "the mask token")):
        rows[1]["input_ids"][7] = token
        batch = make_batch(rows, L, 3, K)
        with pytest.raises(ValueError, match=word):
            step(draft, batch, make_target(batch))
