"""Segments: Algorithm 1's ids, capacities that always hold, and the greedy cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.core.cod import generate_cod_sample_indices
from peagle_train.core.partition import (
    assign_cod_segments,
    balanced_boundaries,
    max_elements,
    segment_capacity,
    segments_of,
)
from tests import oracles
from tests.helpers import GOLDEN_DRAWS, RANDOM_DRAWS, golden_arguments, pairs, seeded, sha256


def test_the_references_segments_are_reproduced_bit_for_bit_more_segments_than_columns_too():
    assert any(case["num_segments"] > case["seq_length"] for case in RANDOM_DRAWS)
    for case in GOLDEN_DRAWS + RANDOM_DRAWS:
        anchor, depth = generate_cod_sample_indices(*golden_arguments(case), generator=seeded(case["seed"]))
        segment = assign_cod_segments(anchor, depth, case["seq_length"], case["num_segments"])
        assert segment.dtype == torch.int64 and sha256(segment) == case["segment_sha256"], case


@given(
    mask=st.lists(st.integers(0, 1), min_size=2, max_size=60) | st.integers(2, 60).map(lambda n: [1] * n),
    K=st.integers(1, 8),
    r=st.sampled_from([0.3, 0.5, 0.7, 0.8, 1.0]),
    r_min=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    most=st.none() | st.integers(1, 40),
)
@settings(max_examples=120, deadline=None)
def test_any_draw_in_any_order_fits_into_the_static_capacity_however_it_is_cut(mask, K, r, r_min, seed, share, most):
    L = len(mask)
    S, generator = 1 + round(share * (L - 1)), seeded(seed)
    drawn = generate_cod_sample_indices(L, torch.tensor(mask), K, r, r_min, generator=generator, max_anchors=most)
    order = torch.randperm(drawn[0].numel(), generator=generator)
    anchor, depth = (t[order] for t in drawn)
    assert anchor.numel() <= max_elements(L, K, r, r_min, most) <= oracles.most_elements(L, K, r, r_min)

    uniform = assign_cod_segments(anchor, depth, L, S)
    assert int(torch.bincount(uniform).max()) <= segment_capacity(L, K, r, r_min, S, "uniform", most)
    bounds = torch.tensor([-(-s * L // S) for s in range(S + 1)])  # column p is in segment p * S // L
    assert uniform.tolist() == [oracles.segment_of(e, bounds.tolist()) for e in pairs(anchor, depth)]
    assert torch.equal(uniform, segments_of(anchor, depth, bounds))

    C = segment_capacity(L, K, r, r_min, S, "balanced", most)
    bounds = balanced_boundaries(anchor, depth, L, S, C)
    balanced = segments_of(anchor, depth, bounds)
    assert bounds.tolist() == oracles.cut_greedily(pairs(anchor, depth), L, S, C)
    assert bounds.shape == (S + 1,) and bounds[0] == 0 and bounds[-1] == L
    assert balanced.tolist() == [oracles.segment_of(e, bounds.tolist()) for e in pairs(anchor, depth)]
    assert int(torch.bincount(balanced, minlength=S).max()) <= C


def test_the_capacities_of_a_row_are_the_formulas():
    # L = 16, K = 4, r = 0.7, floor 0.2: at most 16, int(15 * 0.7), int(14 * 0.49), int(13 * 0.343) elements.
    assert max_elements(16, 4, 0.7, 0.2) == 16 + 10 + 6 + 4
    assert segment_capacity(16, 4, 0.7, 0.2, 1) == segment_capacity(16, 4, 0.7, 0.2, 1, "uniform") == 36
    assert segment_capacity(16, 4, 0.7, 0.2, 3) == 12 + 3
    assert segment_capacity(16, 4, 0.7, 0.2, 5) == 8 + 3  # 36 / 5 rounded up
    assert segment_capacity(16, 4, 0.7, 0.2, 3, "uniform") == 6 + 6 + 6 + 4  # width 16 / 3 rounded up
    assert segment_capacity(16, 4, 0.7, 0.2, 16, "uniform") == 4
    assert max_elements(16, 4, 0.7, 0.2, 8) == 16 + 4 + 2 + 1  # eight anchors: int(7 * 0.7), int(6 * 0.49), ...
    assert max_elements(16, 4, 0.7, 0.2, 99) == max_elements(16, 4, 0.7, 0.2)
    assert segment_capacity(16, 1, 0.7, 0.2, 4) == segment_capacity(16, 1, 0.7, 0.2, 4, "uniform") == 4
    for L, K, S in [(37, 8, 5), (64, 2, 64), (101, 8, 7)]:  # the least that the formula allows
        C, T = segment_capacity(L, K, 0.8, 0.0, S), oracles.most_elements(L, K, 0.8, 0.0)
        assert S * (C - (K - 1)) >= T > S * (C - 1 - (K - 1))


def test_empty_rows_are_cut_too():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert balanced_boundaries(nothing, nothing, 8, 3, 9).tolist() == [0, 8, 8, 8]
    assert segments_of(nothing, nothing, torch.tensor([0, 8, 8, 8])).shape == (0,)
    assert assign_cod_segments(nothing, nothing, 8, 3).shape == (0,)


def test_a_capacity_that_is_too_small_is_noticed_and_wrong_numbers_and_kinds_of_segments_are_named():
    anchor, depth = generate_cod_sample_indices(20, torch.ones(20), generator=seeded(0))
    with pytest.raises(AssertionError, match="do not hold"):
        balanced_boundaries(anchor, depth, 20, 2, 9)
    for S in (0, -1, 9):
        with pytest.raises(ValueError, match=f"num_segments is {S}; it must lie in 1..8"):
            segment_capacity(8, 4, 0.7, 0.2, S)
    with pytest.raises(ValueError, match="num_segments is 0; it must be at least 1"):
        assign_cod_segments(anchor, depth, 8, 0)
    with pytest.raises(ValueError, match="boundaries is 'equal'; it must be one of balanced, uniform"):
        segment_capacity(8, 4, 0.7, 0.2, 2, "equal")
