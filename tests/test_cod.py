"""COD draws, the reference's bit for bit; segments and capacities of a row. Any packed rows: test_collator."""

import hashlib

import pytest
import torch
from torch import Tensor

from peagle_train.core.cod import (
    assign_cod_segments,
    generate_cod_sample_indices,
    sample_packed_row,
    segment_capacity,
)
from tests.helpers import GOLDEN_DRAWS, RANDOM_DRAWS, golden_arguments, seeded, sha256


def test_draws_their_segments_and_the_generators_state_after_them_are_the_references_bit_for_bit():
    assert (len(GOLDEN_DRAWS), len(RANDOM_DRAWS)) == (13, 300)
    assert any(case["num_segments"] > case["seq_length"] for case in RANDOM_DRAWS)
    for case in GOLDEN_DRAWS + RANDOM_DRAWS:
        generator = seeded(case["seed"])
        anchor, depth = generate_cod_sample_indices(*golden_arguments(case), generator=generator)
        segment = assign_cod_segments(anchor, depth, case["seq_length"], case["num_segments"])
        assert anchor.dtype == depth.dtype == segment.dtype == torch.int64
        found = sha256(anchor), sha256(depth), sha256(segment)
        assert found == (case["anchor_sha256"], case["depth_sha256"], case["segment_sha256"]), case
        if "rng_state" in case:
            state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()[:8]
            assert int.from_bytes(state, "little") == case["rng_state"], case
        torch.manual_seed(case["seed"])  # without a generator, torch's own; a mask may be flat and of any dtype
        length, mask, *settings = golden_arguments(case)
        drawn = generate_cod_sample_indices(length, mask[0].bool(), *settings)
        assert torch.equal(drawn[0], anchor) and torch.equal(drawn[1], depth)


def test_4096_supervised_rows_give_the_published_numbers_of_elements_by_default():
    anchor, depth = generate_cod_sample_indices(4096, torch.ones(4096), generator=seeded(0))
    assert torch.bincount(depth).tolist() == [4096, 2866, 2006, 1403, 982, 818, 818, 817]
    # As many anchors as there are is no limit, and draws nothing.
    limited = generate_cod_sample_indices(4096, torch.ones(4096), generator=seeded(0), max_anchors=4096)
    assert torch.equal(limited[0], anchor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, torch.ones(4)), r"loss_mask has shape \(4,\), but seq_length is 5"),
        ((5, torch.ones(2, 5)), r"loss_mask has shape \(2, 5\)"),
        ((5, torch.ones(5), 0), "num_depths is 0"),
        ((5, torch.ones(5), 8, 0.0), "down_sample_ratio is 0.0"),
        ((5, torch.ones(5), 8, float("nan")), "down_sample_ratio is nan"),
        ((5, torch.ones(5), 8, 0.7, -0.1), "down_sample_ratio_min is -0.1"),
        ((5, torch.ones(5), 8, 0.7, 1.5), "down_sample_ratio_min is 1.5"),
        ((9, torch.ones(9), 8, 0.7, 0.2, True, None, 0), "max_anchors is 0"),
        ((9, torch.ones(9), 8, 0.7, 0.2, True, None, -1), "max_anchors is -1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_cod_sample_indices(*arguments)


# Packed rows


def packed(lengths: list[int], padding: int) -> Tensor:
    return torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding)


@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("n", [2, 7, 128])
def test_a_lone_document_gets_the_references_draw_of_its_rows_padded_or_not(n, padding):
    mask = (torch.rand(n, generator=seeded(n)) < 0.8).long()
    for K, ratio, floor in [(8, 0.7, 0.2), (3, 1.0, 0.0)]:
        reference = generate_cod_sample_indices(n - 1, mask[1:], K, ratio, floor, generator=seeded(17))
        padded_mask = torch.cat([mask, torch.zeros(padding, dtype=torch.int64)])
        found = sample_packed_row(padded_mask, packed([n], padding), K, ratio, floor, seeded(17))
        assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])


def test_the_capacities_of_a_row_are_the_formulas():
    # L = 16, K = 4, r = 0.7, floor 0.2: at most 16, int(15 * 0.7), int(14 * 0.49), int(13 * 0.343) elements.
    assert segment_capacity(16, 4, 0.7, 0.2, 1) == segment_capacity(16, 4, 0.7, 0.2, 1, "uniform") == 16 + 10 + 6 + 4
    assert segment_capacity(16, 4, 0.7, 0.2, 3) == 12 + 3
    assert segment_capacity(16, 4, 0.7, 0.2, 5) == 8 + 3  # 36 / 5 rounded up
    assert segment_capacity(16, 4, 0.7, 0.2, 3, "uniform") == 6 + 6 + 6 + 4  # width 16 / 3 rounded up
    assert segment_capacity(16, 4, 0.7, 0.2, 16, "uniform") == 4
    # Eight anchors: int(7 * 0.7), int(6 * 0.49), int(5 * 0.343).
    assert segment_capacity(16, 4, 0.7, 0.2, 1, max_anchors=8) == 16 + 4 + 2 + 1
    assert segment_capacity(16, 4, 0.7, 0.2, 1, max_anchors=99) == 36
    assert segment_capacity(16, 1, 0.7, 0.2, 4) == segment_capacity(16, 1, 0.7, 0.2, 4, "uniform") == 4
