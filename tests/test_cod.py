"""COD draws: the reference's bit for bit, and packed rows."""

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peagle_train.core.cod import drafter_rows, generate_cod_sample_indices, sample_packed_row
from tests import oracles
from tests.helpers import GOLDEN_DRAWS, RANDOM_DRAWS, golden_arguments, pairs, seeded, sha256


@pytest.mark.parametrize("case", GOLDEN_DRAWS, ids=lambda case: f"seed{case['seed']}")
def test_the_reference_draws_are_reproduced_bit_for_bit_from_the_global_generator_or_a_given_one(case):
    assert len(GOLDEN_DRAWS) == 13 and sum("anchor" in case for case in GOLDEN_DRAWS) == 9
    torch.manual_seed(case["seed"])
    drawn = generate_cod_sample_indices(*golden_arguments(case))
    before = torch.get_rng_state()
    for anchor, depth in (drawn, generate_cod_sample_indices(*golden_arguments(case), generator=seeded(case["seed"]))):
        assert (anchor.dtype, depth.dtype, anchor.shape) == (torch.int64, torch.int64, (case["total"],))
        assert (sha256(anchor), sha256(depth)) == (case["anchor_sha256"], case["depth_sha256"])
        if "anchor" in case:
            assert (anchor.tolist(), depth.tolist()) == (case["anchor"], case["depth"])
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_random_arguments_and_the_generators_state_after_them_are_the_references():
    assert len(RANDOM_DRAWS) == 300
    for case in RANDOM_DRAWS:
        generator = seeded(case["seed"])
        anchor, depth = generate_cod_sample_indices(*golden_arguments(case), generator=generator)
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()[:8]
        found = sha256(anchor), sha256(depth), int.from_bytes(state, "little")
        assert found == (case["anchor_sha256"], case["depth_sha256"], case["rng_state"]), case


def test_4096_supervised_rows_give_the_published_numbers_of_elements_by_default():
    _, depth = generate_cod_sample_indices(4096, torch.ones(4096), generator=seeded(0))
    assert torch.bincount(depth).tolist() == [4096, 2866, 2006, 1403, 982, 818, 818, 817]


@given(
    mask=st.lists(st.integers(0, 1), min_size=1, max_size=70),
    K=st.integers(1, 9),
    ratio=st.sampled_from([0.3, 0.5, 0.7, 0.8, 1.0]),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    zero_out=st.booleans(),
    seed=st.integers(0, 2**31),
    most=st.none() | st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_any_draw_is_the_slow_ones(mask, K, ratio, floor, zero_out, seed, most):
    n = len(mask)
    generator, slow = seeded(seed), seeded(seed)
    found = generate_cod_sample_indices(n, torch.tensor(mask), K, ratio, floor, zero_out, generator, most)
    assert pairs(*found) == oracles.draw(n, mask, K, ratio, floor, slow, zero_out, most)
    assert torch.equal(generator.get_state(), slow.get_state())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_a_mask_may_be_flat_or_one_row_and_of_any_dtype(dtype):
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1]).to(dtype)
    flat = generate_cod_sample_indices(7, mask, generator=seeded(5))
    row = generate_cod_sample_indices(7, mask[None], generator=seeded(5))
    assert pairs(*flat) == pairs(*row) == oracles.draw(7, mask.int().tolist(), 8, 0.7, 0.2, seeded(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, torch.ones(0)), "seq_length is 0"),
        ((5, torch.ones(4)), r"loss_mask has shape \(4,\); expected \(5,\) or \(1, 5\)"),
        ((5, torch.ones(2, 5)), r"loss_mask has shape \(2, 5\)"),
        ((5, torch.ones(5, 1)), r"loss_mask has shape \(5, 1\)"),
        ((5, torch.ones(5), 0), "num_depths is 0"),
        ((5, torch.ones(5), 8, 0.0), "down_sample_ratio is 0.0"),
        ((5, torch.ones(5), 8, 1.1), "down_sample_ratio is 1.1"),
        ((5, torch.ones(5), 8, float("nan")), "down_sample_ratio is nan"),
        ((5, torch.ones(5), 8, 0.7, -0.1), "down_sample_ratio_min is -0.1"),
        ((5, torch.ones(5), 8, 0.7, 1.5), "down_sample_ratio_min is 1.5"),
        ((5, torch.ones(5), 8, 0.7, 0.2, True, None, 0), "max_anchors is 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_cod_sample_indices(*arguments)


# Packed rows


def packed(lengths: list[int], padding: int) -> Tensor:
    return torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding)


@pytest.mark.parametrize("padding", [0, 1, 64])
@pytest.mark.parametrize("n", [2, 7, 128])
def test_a_lone_document_gets_the_references_draw_of_its_rows_padded_or_not(n, padding):
    mask = (torch.rand(n, generator=seeded(n)) < 0.8).long()
    for K, ratio, floor in [(8, 0.7, 0.2), (3, 1.0, 0.0)]:
        reference = generate_cod_sample_indices(n - 1, mask[1:], K, ratio, floor, generator=seeded(17))
        padded_mask = torch.cat([mask, torch.zeros(padding, dtype=torch.int64)])
        found = sample_packed_row(padded_mask, packed([n], padding), K, ratio, floor, seeded(17))
        assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])


@st.composite
def packed_rows(draw: st.DrawFn) -> Any:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    mask = draw(st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths)))
    padding = draw(st.integers(0, 4))
    return packed(lengths, padding).tolist(), mask + [0] * padding


@given(
    row=packed_rows(),
    K=st.integers(1, 6),
    ratio=st.sampled_from([0.5, 0.8, 1.0]),
    seed=st.integers(0, 2**31),
    most=st.none() | st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_any_packed_rows_draw_is_the_slow_one_and_stays_inside_its_documents(row, K, ratio, seed, most):
    documents, mask = row
    generator, slow = seeded(seed), seeded(seed)
    found = pairs(*sample_packed_row(torch.tensor(mask), torch.tensor(documents), K, ratio, 0.2, generator, most))
    assert found == oracles.draw_packed(mask, documents, K, ratio, 0.2, slow, most)
    assert torch.equal(generator.get_state(), slow.get_state())
    firsts = [0] + [p for p in range(1, len(documents)) if documents[p] != documents[p - 1]]
    for anchor, depth in found:
        # Anchor, every ancestor's position, and the token behind the last one: all of one document.
        assert anchor + depth + 1 < len(documents)
        assert len({documents[p] for p in range(anchor, anchor + depth + 2)} - {-1}) == 1
        assert depth == 0 or (anchor + depth not in firsts and mask[anchor + depth + 1] == 1)


def test_the_first_row_of_a_document_is_in_no_pool_but_counts_as_valid_and_a_small_pool_is_no_draw():
    # Two documents of three tokens: rows 0, 1, 3, 4, all supervised, so n_valid is 4 and depth 1 keeps
    # int((4 - 1) * 1.0) = 3 of a pool of 2: {1, 4}. Without rows 0 and 3 in n_valid it would keep only 1.
    generator = seeded(0)
    before = generator.get_state()
    found = pairs(*sample_packed_row(torch.ones(6), packed([3, 3], 0), 3, 1.0, 0.0, generator))
    assert found == [(0, 0), (1, 0), (3, 0), (4, 0), (0, 1), (3, 1)]
    assert torch.equal(generator.get_state(), before)


def test_rows_without_elements_or_without_pools_are_drawn_too():
    for documents in [packed([], 3), packed([1], 0), packed([1, 1, 1], 1), packed([], 0), packed([], 1)]:
        anchor, depth = sample_packed_row(torch.ones(documents.numel()), documents, 4, 0.7, 0.2, seeded(0))
        assert anchor.shape == depth.shape == (0,) and anchor.dtype == depth.dtype == torch.int64
    anchor, depth = sample_packed_row(torch.zeros(6), packed([6], 0), 4, 0.7, 0.2, seeded(0))
    assert pairs(anchor, depth) == [(p, 0) for p in range(5)]


def test_drafter_rows_are_the_columns_whose_right_neighbour_is_of_their_document():
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 3, 3, 5, 5, 5, 5]])
    assert drafter_rows(documents).int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1, 0]]
