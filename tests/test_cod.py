"""COD draws: the reference's bit for bit, and packed rows."""

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peagle_train.core.cod import drafter_rows, generate_cod_sample_indices, keep_counts, sample_packed_row
from tests import oracles
from tests.helpers import GOLDEN_DRAWS, RANDOM_DRAWS, golden_arguments, golden_mask, pairs, seeded, sha256


@pytest.mark.parametrize("case", GOLDEN_DRAWS, ids=lambda case: f"seed{case['seed']}")
def test_the_reference_draws_are_reproduced_bit_for_bit(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    anchor, depth = generate_cod_sample_indices(*golden_arguments(case))
    assert (anchor.dtype, depth.dtype, anchor.shape) == (torch.int64, torch.int64, (case["total"],))
    assert (sha256(anchor), sha256(depth)) == (case["anchor_sha256"], case["depth_sha256"])
    if "anchor" in case:
        assert (anchor.tolist(), depth.tolist()) == (case["anchor"], case["depth"])


def test_draws_of_random_arguments_and_the_generators_state_after_them_are_the_references() -> None:
    assert len(RANDOM_DRAWS) == 300
    for case in RANDOM_DRAWS:
        generator = seeded(case["seed"])
        anchor, depth = generate_cod_sample_indices(*golden_arguments(case), generator=generator)
        state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()[:8]
        found = sha256(anchor), sha256(depth), int.from_bytes(state, "little")
        assert found == (case["anchor_sha256"], case["depth_sha256"], case["rng_state"]), case


def test_a_pool_smaller_than_the_sample_is_taken_whole_and_the_generator_does_not_move() -> None:
    # Two documents of four tokens. Rows 0, 2, 4 and 6 are supervised: depth 1 is to keep int((4 - 1) * 1.0) = 3. Rows 0 and
    # 4 are the first of their documents, so the pool is {2, 6}.
    generator = seeded(0)
    before = generator.get_state()
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    unshifted = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    found = pairs(*sample_packed_row(unshifted, documents, 2, 1.0, 0.0, generator))
    assert [e for e in found if e[1] > 0] == [(1, 1), (5, 1)]
    assert torch.equal(generator.get_state(), before)


def test_the_golden_file_holds_all_its_cases_and_some_as_lists() -> None:
    assert len(GOLDEN_DRAWS) == 13
    assert sum("anchor" in case for case in GOLDEN_DRAWS) == 9


@pytest.mark.parametrize("case", GOLDEN_DRAWS, ids=lambda case: f"seed{case['seed']}")
def test_a_generator_draws_what_the_global_one_draws_from_the_same_seed(case: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    anchor, depth = generate_cod_sample_indices(*golden_arguments(case), generator=seeded(case["seed"]))
    assert (sha256(anchor), sha256(depth)) == (case["anchor_sha256"], case["depth_sha256"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", GOLDEN_DRAWS, ids=lambda case: f"seed{case['seed']}")
def test_every_chain_is_complete_and_supervised_and_depth_major(case: dict[str, Any]) -> None:
    mask = golden_mask(case)[0].tolist()
    found = pairs(*generate_cod_sample_indices(*golden_arguments(case), generator=seeded(99)))
    present = set(found)
    assert len(present) == len(found)
    assert all((a, d - 1) in present for a, d in found if d > 0)
    assert all(mask[a + d] == 1 and a >= 0 for a, d in found if d > 0)
    assert [e for e in found if e[1] == 0] == [(p, 0) for p in range(case["seq_length"])]
    assert found == sorted(found, key=lambda e: (e[1], e[0] + e[1]))


def test_4096_supervised_rows_give_the_published_numbers_of_elements() -> None:
    _, depth = generate_cod_sample_indices(4096, torch.ones(4096), 8, 0.7, 0.2, generator=seeded(0))
    assert torch.bincount(depth).tolist() == [4096, 2866, 2006, 1403, 982, 818, 818, 817]


def test_the_defaults_are_eight_depths_a_ratio_of_seven_tenths_and_a_floor_of_a_fifth() -> None:
    _, depth = generate_cod_sample_indices(4096, torch.ones(4096), generator=seeded(0))
    assert torch.bincount(depth).tolist() == [4096, 2866, 2006, 1403, 982, 818, 818, 817]


def test_sampling_stops_at_the_first_depth_that_keeps_nothing() -> None:
    # int((6 - d) * 0.5 ** d) is 2, 1, 0, ...: depth 3 ends the draw, however many depths are asked for.
    assert keep_counts(6, 8, 0.5, 0.0) == [2, 1]
    _, depth = generate_cod_sample_indices(6, torch.ones(6), 8, 0.5, 0.0, generator=seeded(0))
    assert torch.bincount(depth).tolist() == [6, 2, 1]


def test_a_depth_keeps_at_most_the_chains_that_can_still_grow() -> None:
    # Supervised runs of one: no chain reaches depth 2, although its size would be 1.
    mask = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    anchor, depth = generate_cod_sample_indices(7, mask, 4, 1.0, 0.0, generator=seeded(3))
    deep = [e for e in pairs(anchor, depth) if e[1] > 0]
    assert len(deep) == 2 and {d for _, d in deep} == {1} and {a for a, _ in deep} < {0, 2, 4}


def test_position_zero_counts_as_valid_but_starts_no_chain() -> None:
    # Three supervised rows: depth 1 keeps int((3 - 1) * 1.0) = 2, which are all of {1, 2}.
    mask = torch.tensor([1, 1, 1, 0])
    found = pairs(*generate_cod_sample_indices(4, mask, 3, 1.0, 0.0, generator=seeded(0)))
    assert found == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (0, 2)]


def test_without_the_filter_position_zero_is_in_the_pool_as_in_the_reference() -> None:
    mask = torch.tensor([1, 0, 0, 1, 1])
    found = pairs(*generate_cod_sample_indices(5, mask, 3, 1.0, 1.0, False, generator=seeded(0)))
    expected = oracles.draw(5, mask.tolist(), 3, 1.0, 1.0, seeded(0), zero_out=False)
    assert found == expected
    anchors = {
        a
        for seed in range(20)
        for a, _ in pairs(*generate_cod_sample_indices(5, mask, 2, 1.0, 1.0, False, generator=seeded(seed)))
    }
    assert -1 in anchors


@given(
    mask=st.lists(st.integers(0, 1), min_size=1, max_size=70),
    K=st.integers(1, 9),
    ratio=st.sampled_from([0.3, 0.5, 0.7, 0.8, 1.0]),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    zero_out=st.booleans(),
    seed=st.integers(0, 2**31),
    most=st.none() | st.integers(1, 30),
)
@settings(max_examples=150, deadline=None)
def test_any_draw_is_the_slow_ones(
    mask: list[int], K: int, ratio: float, floor: float, zero_out: bool, seed: int, most: int | None
) -> None:
    n = len(mask)
    generator, slow = seeded(seed), seeded(seed)
    found = generate_cod_sample_indices(n, torch.tensor(mask), K, ratio, floor, zero_out, generator, most)
    assert pairs(*found) == oracles.draw(n, mask, K, ratio, floor, slow, zero_out, most)
    assert torch.equal(generator.get_state(), slow.get_state())


def test_rollouts_start_at_no_more_anchors_than_asked_for_and_depth_0_stays_whole() -> None:
    anchor, depth = generate_cod_sample_indices(500, torch.ones(500), 4, 0.8, 0.0, generator=seeded(0), max_anchors=31)
    assert torch.bincount(depth).tolist() == [500, int(30 * 0.8), int(29 * 0.64), int(28 * 0.512)]
    others = generate_cod_sample_indices(500, torch.ones(500), 4, 0.8, 0.0, generator=seeded(1), max_anchors=31)
    assert set(anchor[depth > 0].tolist()) != set(others[0][others[1] > 0].tolist())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_a_mask_may_be_flat_or_one_row_and_of_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1]).to(dtype)
    flat = generate_cod_sample_indices(7, mask, generator=seeded(5))
    row = generate_cod_sample_indices(7, mask[None], generator=seeded(5))
    assert pairs(*flat) == pairs(*row) == oracles.draw(7, mask.int().tolist(), 8, 0.7, 0.2, seeded(5))
    assert mask.tolist() == torch.tensor([0, 1, 1, 0, 1, 1, 1]).to(dtype).tolist()


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
def test_arguments_out_of_range_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_cod_sample_indices(*arguments)


def packed(lengths: list[int], padding: int) -> Tensor:
    ids = [i for i, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(ids + [-1] * padding)


@pytest.mark.parametrize("padding", [0, 1, 5, 64])
@pytest.mark.parametrize("n", [2, 3, 7, 31, 128])
def test_a_lone_document_gets_the_references_draw_of_its_rows_padded_or_not(n: int, padding: int) -> None:
    g = seeded(n)
    mask = (torch.rand(n, generator=g) < 0.8).long()
    for K, ratio, floor in [(8, 0.7, 0.2), (5, 0.8, 0.0), (3, 1.0, 0.0)]:
        reference = generate_cod_sample_indices(n - 1, mask[1:], K, ratio, floor, generator=seeded(17))
        padded_mask = torch.cat([mask, torch.zeros(padding, dtype=torch.int64)])
        found = sample_packed_row(padded_mask, packed([n], padding), K, ratio, floor, seeded(17))
        assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])
        assert found[0].dtype == found[1].dtype == torch.int64


packed_rows = st.lists(st.integers(1, 12), min_size=1, max_size=6).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.lists(st.integers(0, 1), min_size=sum(lengths), max_size=sum(lengths)), st.integers(0, 4)
    )
)


@given(
    row=packed_rows,
    K=st.integers(1, 6),
    ratio=st.sampled_from([0.5, 0.8, 1.0]),
    seed=st.integers(0, 2**31),
    most=st.none() | st.integers(1, 20),
)
@settings(max_examples=150, deadline=None)
def test_any_packed_rows_draw_is_the_slow_one_and_stays_inside_its_documents(
    row: tuple[list[int], list[int], int], K: int, ratio: float, seed: int, most: int | None
) -> None:
    lengths, mask, padding = row
    documents, mask = packed(lengths, padding).tolist(), mask + [0] * padding
    floor = 0.2
    found = pairs(*sample_packed_row(torch.tensor(mask), torch.tensor(documents), K, ratio, floor, seeded(seed), most))
    assert found == oracles.draw_packed(mask, documents, K, ratio, floor, seeded(seed), most)
    firsts = [0] + [p for p in range(1, len(documents)) if documents[p] != documents[p - 1]]
    for anchor, depth in found:
        # Anchor, every ancestor's position, and the token behind the last one: all of one document.
        assert len({documents[p] for p in range(anchor, anchor + depth + 2)} - {-1}) == 1
        assert anchor + depth + 1 < len(documents)
        assert depth == 0 or (anchor + depth not in firsts and mask[anchor + depth + 1] == 1)


def test_the_first_row_of_a_document_is_in_no_pool_but_counts_as_valid() -> None:
    # Two documents of three tokens: rows 0, 1, 3, 4, all supervised, so n_valid is 4 and depth 1 keeps
    # int((4 - 1) * 1.0) = 3 of a pool of 2: {1, 4}. Without rows 0 and 3 in n_valid it would keep only 1.
    found = pairs(*sample_packed_row(torch.ones(6), packed([3, 3], 0), 3, 1.0, 0.0, seeded(0)))
    assert found == [(0, 0), (1, 0), (3, 0), (4, 0), (0, 1), (3, 1)]


def test_the_sizes_of_a_packed_row_follow_from_all_its_supervised_rows() -> None:
    mask, documents = torch.ones(400, dtype=torch.int64), packed([100, 100, 100, 100], 0)
    _, depth = sample_packed_row(mask, documents, 4, 0.7, 0.2, seeded(0))
    # 4 * 99 rows, all of them valid.
    assert torch.bincount(depth).tolist() == [396, *(int((396 - d) * 0.7**d) for d in (1, 2, 3))]


def test_rows_without_elements_or_without_pools_are_drawn_too() -> None:
    for documents in [packed([], 3), packed([1], 0), packed([1, 1, 1], 1), packed([], 0), packed([], 1)]:
        anchor, depth = sample_packed_row(torch.ones(documents.numel()), documents, 4, 0.7, 0.2, seeded(0))
        assert anchor.shape == depth.shape == (0,) and anchor.dtype == depth.dtype == torch.int64
    anchor, depth = sample_packed_row(torch.zeros(6), packed([6], 0), 4, 0.7, 0.2, seeded(0))
    assert pairs(anchor, depth) == [(p, 0) for p in range(5)]


def test_drafter_rows_are_the_columns_whose_right_neighbour_is_of_their_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [5, 5, 3, 3, 5, 5, 5, 5]])
    assert drafter_rows(documents).int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1, 0]]
    for row in documents:
        assert drafter_rows(row).nonzero().flatten().tolist() == oracles.drafter_rows(row.tolist())
