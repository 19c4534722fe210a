"""The collator: exact batches, fixed shapes, and draws that nothing but (seed, epoch, row) decides."""

import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from peagle_train.core.collator import CODCollator
from peagle_train.core.partition import segment_capacity
from tests import oracles
from tests.helpers import ENVIRONMENT, elements_of, make_rows

# Two documents and, in rows of 8 columns, one column of padding.
IDS, MASK = [10, 11, 12, 13, 20, 21, 22], [0, 1, 1, 1, 0, 0, 1]
DOCUMENTS = [0, 0, 0, 0, 1, 1, 1]
ROW = {"input_ids": IDS, "loss_mask": MASK, "document_ids": DOCUMENTS, "row_key": 77}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_batch_of_a_small_packed_row_is_this_one_with_uniform_segments() -> None:
    # r = 1 keeps every chain: all supervised rows but each document's first start one, and chains end with documents.
    batch = CODCollator(8, num_depths=3, down_sample_ratio=1.0, num_segments=2, boundaries="uniform")([ROW])
    left, right = [0] * 6, [0] * 9  # 12 elements fit into 4 columns: 4 of each depth
    expected = {
        "input_ids": [10, 11, 12, 13, 20, 21, 22, 0],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 0],
        "document_ids": [0, 0, 0, 0, 1, 1, 1, -1],
        # Column 3 is token 13, which no row reads; columns 0 to 3 own the rollouts that start behind anchors 0 to 2.
        "anchor": [0, 1, 2, 0, 0, 1, *left, 4, 5, 4, *right],
        "depth": [0, 0, 0, 1, 2, 1, *[-1] * 6, 0, 0, 1, *[-1] * 9],
        "segment_ids": [0] * 12 + [1] * 12,
        "supervised": [1, 1, 1, 1, 1, 1, *left, 0, 1, 1, *right],
        "supervised_per_depth": [4, 3, 1],
        "row_key": 77,
    }
    typed = {name: torch.tensor([values]) for name, values in expected.items()}
    assert_equal(batch, {**typed, "supervised": typed["supervised"].bool()})


def test_the_batch_of_a_small_packed_row_is_this_one_with_balanced_segments() -> None:
    collator = CODCollator(8, num_depths=3, down_sample_ratio=1.0, num_segments=4, pad_token_id=9)
    batch = collator([ROW, {"input_ids": [5], "loss_mask": [1], "row_key": -1}])
    # 21 elements at most: 4 * (8 - 2) hold them. Columns 0 to 4 bring 1 + 3 + 2 + 0 + 1 elements, column 5 two.
    assert collator.capacity == 8
    none = [0] * 16
    expected = {
        "input_ids": [[10, 11, 12, 13, 20, 21, 22, 9], [5, 9, 9, 9, 9, 9, 9, 9]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0], [0] * 8],
        "document_ids": [[0, 0, 0, 0, 1, 1, 1, -1], [0] + [-1] * 7],
        "anchor": [[0, 1, 2, 4, 0, 0, 1, 0, 5, 4, 0, 0, 0, 0, 0, 0, *none], [0] * 32],
        "depth": [[0, 0, 0, 0, 1, 2, 1, -1, 0, 1, *[-1] * 6, *[-1] * 16], [-1] * 32],
        "segment_ids": [[0] * 8 + [1] * 8 + [2] * 8 + [3] * 8] * 2,
        "supervised": [[1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, *none], [0] * 32],
        "supervised_per_depth": [[4, 3, 1], [0, 0, 0]],
        "row_key": [77, -1],
    }
    typed = {name: torch.tensor(values) for name, values in expected.items()}
    assert_equal(batch, {**typed, "supervised": typed["supervised"].bool()})


@st.composite
def rows(draw: st.DrawFn, L: int) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 12), max_size=5).filter(lambda n: sum(n) <= L))
    n = sum(lengths)
    return {
        "input_ids": draw(st.lists(st.integers(0, 999), min_size=n, max_size=n)),
        "loss_mask": draw(st.lists(st.integers(0, 1), min_size=n, max_size=n) | st.just([1] * n)),
        "document_ids": [i for i, length in enumerate(lengths) for _ in range(length)],
        "row_key": draw(st.integers(-(2**63), 2**63 - 1)),
        "epoch": draw(st.integers(0, 5)),
    }


@given(
    given_rows=st.lists(rows(L=29), min_size=1, max_size=3),
    S=st.integers(1, 29),
    K=st.integers(1, 8),
    boundaries=st.sampled_from(["balanced", "uniform"]),
    ratio=st.sampled_from([0.5, 0.8, 1.0]),
    multiple=st.sampled_from([1, 1, 7, 128]),
)
@settings(max_examples=120, deadline=None)
def test_any_batch_holds_every_drawn_element_once_in_its_segment_and_in_order(
    given_rows: list[dict[str, Any]], S: int, K: int, boundaries: str, ratio: float, multiple: int
) -> None:
    L, floor = 29, 0.2
    options: dict[str, Any] = {"num_depths": K, "down_sample_ratio": ratio, "down_sample_ratio_min": floor}
    collator = CODCollator(L, num_segments=S, boundaries=boundaries, capacity_multiple=multiple, **options)
    batch, B = collator(given_rows), len(given_rows)
    C = math.ceil(segment_capacity(L, K, ratio, floor, S, boundaries) / multiple) * multiple
    # The same draw, uncut: its elements may be told from the batch of a single segment.
    uncut = CODCollator(L, num_segments=1, **options)(given_rows)

    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    columns = dict.fromkeys(("input_ids", "position_ids", "document_ids"), (B, L))
    assert shapes == {
        **columns,
        **dict.fromkeys(("anchor", "depth", "segment_ids", "supervised"), (B, S * C)),
        "supervised_per_depth": (B, K),
        "row_key": (B,),
    }
    assert {n: t.dtype for n, t in batch.items()} == dict.fromkeys(batch, torch.int64) | {"supervised": torch.bool}
    assert batch["segment_ids"].tolist() == [[i // C for i in range(S * C)]] * B

    for b, row in enumerate(given_rows):
        n = len(row["input_ids"])
        documents, mask = row["document_ids"] + [-1] * (L - n), row["loss_mask"] + [0] * (L - n)
        assert batch["input_ids"][b].tolist() == row["input_ids"] + [0] * (L - n)
        assert batch["document_ids"][b].tolist() == documents
        assert batch["position_ids"][b].tolist() == oracles.positions(documents)
        assert batch["row_key"][b] == row["row_key"]

        elements = elements_of(uncut, b)
        assert [a for a, d in elements if d == 0] == oracles.drafter_rows(documents)
        if boundaries == "uniform":
            bounds = [-(-s * L // S) for s in range(S + 1)]
        else:
            bounds = oracles.cut_greedily(elements, L, S, C)
        expected = oracles.flat_order(elements, bounds)
        learned = [d for a, d in elements if mask[a + d + 1]]
        assert batch["supervised_per_depth"][b].tolist() == [learned.count(d) for d in range(K)]
        for s in range(S):
            slots = slice(s * C, (s + 1) * C)
            padding = C - len(expected[s])
            anchor, depth = batch["anchor"][b, slots].tolist(), batch["depth"][b, slots].tolist()
            assert anchor == [a for a, _ in expected[s]] + [0] * padding
            assert depth == [d for _, d in expected[s]] + [-1] * padding
            supervised = [bool(mask[a + d + 1]) for a, d in expected[s]]
            assert batch["supervised"][b, slots].tolist() == supervised + [False] * padding


def test_a_lone_rows_elements_are_the_slow_draws() -> None:
    """The generator is private, so take many keys: each must give a draw that some seed gives to the oracle."""
    collator = CODCollator(5, num_depths=2, down_sample_ratio=0.5, down_sample_ratio_min=0.0)
    found, possible = set(), set()
    for key in range(200):
        batch = collator([{"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 1, 1, 1, 1], "row_key": key}])
        found.add(tuple(sorted(elements_of(batch, 0))))
        g = torch.Generator().manual_seed(key)
        possible.add(tuple(sorted(oracles.draw_packed([0, 1, 1, 1, 1], [0] * 5, 2, 0.5, 0.0, g))))
    assert found == possible and len(found) == 3  # one of the three pool positions 1, 2 and 3


# The draw


ROWS = [{**row, "row_key": i} for i, row in enumerate(make_rows(24, documents=2, batch_size=6))]
"""Picklable without this module, so that spawned workers need only the package."""


def new_collator(**options: Any) -> CODCollator:
    return CODCollator(24, num_depths=5, num_segments=3, **options)


def elements(batch: dict[str, Tensor]) -> list[list[tuple[int, int]]]:
    return [sorted(elements_of(batch, b)) for b in range(batch["anchor"].shape[0])]


def expected_batches(epoch: int, batch_size: int = 2) -> list[dict[str, Tensor]]:
    collator = new_collator()
    collator.set_epoch(epoch)
    return [collator(ROWS[i : i + batch_size]) for i in range(0, len(ROWS), batch_size)]


def assert_batches(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert_equal(one, other)


@pytest.mark.parametrize(
    ("num_workers", "context"),
    [(0, None), (1, "fork"), (2, "fork"), (4, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_draw_what_the_main_process_draws(num_workers: int, context: str | None) -> None:
    collator = new_collator()
    collator.set_epoch(3)
    loader = DataLoader(
        ROWS, batch_size=2, collate_fn=collator, num_workers=num_workers, multiprocessing_context=context
    )
    assert_batches(list(loader), expected_batches(epoch=3))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_set_epoch_reaches_persistent_workers(context: str) -> None:
    collator = new_collator()
    loader = DataLoader(
        ROWS, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context=context, persistent_workers=True
    )
    for epoch in (0, 1, 7):
        collator.set_epoch(epoch)
        assert collator.epoch == epoch
        assert_batches(list(loader), expected_batches(epoch))
    assert elements(expected_batches(0)[0]) != elements(expected_batches(1)[0])


def test_a_rows_draw_depends_on_neither_its_batch_nor_its_place_nor_what_came_before() -> None:
    collator = new_collator()
    together = elements(collator(ROWS))
    backwards = elements(collator(ROWS[::-1]))[::-1]
    alone = [elements(collator([row]))[0] for row in ROWS]
    assert together == backwards == alone


def test_the_draw_depends_on_seed_epoch_and_key_each() -> None:
    def drawn(seed: int, epoch: int, key: int | str) -> list[tuple[int, int]]:
        return elements(new_collator(seed=seed)([{**ROWS[0], "epoch": epoch, "row_key": key}]))[0]

    draws = [drawn(*case) for case in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, "0"), (-5, 0, 0)]]
    assert all(draws.count(d) == 1 for d in draws)
    assert drawn(0, 0, 0) == draws[0]


def test_the_draw_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    new_collator()(ROWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rows_own_epoch_wins() -> None:
    collator, other = new_collator(), new_collator()
    collator.set_epoch(9)
    other.set_epoch(4)
    with_epoch = [{**row, "epoch": 4} for row in ROWS]
    assert_equal(collator(with_epoch), other(ROWS))
    assert elements(collator(with_epoch)) != elements(collator(ROWS))


def test_a_pickled_collator_draws_the_same() -> None:
    collator = new_collator(seed=3, boundaries="uniform", pad_token_id=7, down_sample_ratio=0.8)
    collator.set_epoch(2)
    copy = pickle.loads(pickle.dumps(collator))
    assert copy.epoch == 2 and vars(copy).keys() == vars(collator).keys()
    assert_equal(copy(ROWS), collator(ROWS))


def test_segments_change_the_order_of_a_draw_not_the_draw() -> None:
    flat = elements(CODCollator(24, num_depths=5)(ROWS))
    for S in (2, 5, 24):
        for boundaries in ("balanced", "uniform"):
            assert elements(CODCollator(24, num_depths=5, num_segments=S, boundaries=boundaries)(ROWS)) == flat


# Rows


def test_nested_documents_are_the_same_as_document_ids() -> None:
    nested = {"input_ids": [IDS[:4], IDS[4:]], "loss_mask": [MASK[:4], MASK[4:]], "row_key": 77}
    assert_equal(new_collator()([nested]), new_collator()([ROW]))
    tensors = {name: [torch.tensor(part) for part in nested[name]] for name in ("input_ids", "loss_mask")}
    assert_equal(new_collator()([{**tensors, "row_key": 77}]), new_collator()([ROW]))


def test_a_row_may_be_lists_or_tensors_of_any_integer_type() -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        tensors = {name: torch.tensor(ROW[name], dtype=dtype) for name in ("input_ids", "loss_mask", "document_ids")}
        assert_equal(new_collator()([{**tensors, "row_key": 77}]), new_collator()([ROW]))
    as_bool = {**ROW, "loss_mask": [m == 1 for m in MASK]}
    assert_equal(new_collator()([as_bool]), new_collator()([ROW]))
    as_arrays = {**ROW, "input_ids": torch.tensor(IDS).numpy(), "loss_mask": torch.tensor(MASK).bool().numpy()}
    assert_equal(new_collator()([as_arrays]), new_collator()([ROW]))


def test_document_ids_name_runs_and_negative_ones_are_padding() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "loss_mask": [1] * 8, "document_ids": [7, 7, 3, 3, 7, 7, -2, -1]}
    batch = CODCollator(8, num_depths=2)([row])
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 2, 2, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 0, 0]]
    assert sorted(elements_of(batch, 0)) == [(0, 0), (2, 0), (4, 0)]


def test_without_document_ids_a_row_is_one_document() -> None:
    batch = CODCollator(8, num_depths=2)([{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}])
    assert batch["document_ids"].tolist() == [[0, 0, 0, -1, -1, -1, -1, -1]]


def test_labels_stand_in_for_a_mask_and_a_mask_wins() -> None:
    labels = [i if m else -100 for i, m in zip(IDS, MASK, strict=True)]
    collator = new_collator()
    for values in (labels, torch.tensor(labels)):
        row = {**ROW, "labels": values}
        expected = collator([ROW])
        assert expected["supervised"].any()
        assert_equal(collator([{n: v for n, v in row.items() if n != "loss_mask"}]), expected)
        assert_equal(collator([{**row, "labels": IDS}]), expected)
    nested = {"input_ids": [IDS[:4], IDS[4:]], "labels": [labels[:4], labels[4:]], "row_key": 77}
    assert_equal(collator([nested]), collator([ROW]))


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (1, 2)])
def test_zeros_of_an_attention_mask_are_padding_on_either_side(left: int, right: int) -> None:
    ids, mask = list(range(1, 12)), [0, *[1] * 10]
    padded = {
        "input_ids": [99] * left + ids + [99] * right,
        "attention_mask": [0] * left + [1] * 11 + [0] * right,
        "labels": [-100] * left + [i if m else -100 for i, m in zip(ids, mask, strict=True)] + [-100] * right,
    }
    batch = new_collator(down_sample_ratio=1.0)([padded])
    plain = new_collator(down_sample_ratio=1.0)([{"input_ids": ids, "loss_mask": mask}])
    assert sorted((a - left, d) for a, d in elements_of(batch, 0)) == sorted(elements_of(plain, 0))
    assert batch["document_ids"][0].tolist() == [-1] * left + [0] * 11 + [-1] * (24 - left - 11)
    assert batch["position_ids"][0, left : left + 11].tolist() == list(range(11))
    assert torch.equal(batch["supervised_per_depth"], plain["supervised_per_depth"])


def test_an_attention_mask_of_nested_documents_pads_each() -> None:
    nested = {
        "input_ids": [[1, 2, 3, 0], [4, 5]],
        "loss_mask": [[0, 1, 1, 1], [1, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1]],
    }
    assert new_collator()([nested])["document_ids"][0, :6].tolist() == [0, 0, 0, -1, 1, 1]


WARNED = "set_epoch before each pass"


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_forgotten_set_epoch_is_warned_about_once(tmp_path: Path, num_workers: int, shuffle: bool) -> None:
    # A file, which workers that are forked for each pass write into, too.
    log, logger = tmp_path / "log", logging.getLogger("peagle_train.core.collator")
    handler = logging.FileHandler(log)
    logger.addHandler(handler)
    try:
        generator, collator = torch.Generator().manual_seed(0), new_collator()
        loader = DataLoader(
            ROWS,
            batch_size=2,
            shuffle=shuffle,
            generator=generator,
            collate_fn=collator,
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
        )
        for epoch in range(3):
            collator.set_epoch(epoch)
            list(loader)
        assert log.read_text() == ""
        for _ in range(3):
            list(loader)
        assert log.read_text().count(WARNED) == 1
        collator.set_epoch(4)
        for _ in range(2):
            list(loader)
        assert log.read_text().count(WARNED) == 1, "once is enough"
    finally:
        logger.removeHandler(handler)
        handler.close()


def test_rows_that_know_their_epoch_may_come_again(caplog: pytest.LogCaptureFixture) -> None:
    collator = new_collator()
    for _ in range(3):
        collator([{**row, "epoch": 2} for row in ROWS])
    collator([ROWS[0], ROWS[0]])  # twice in one batch is no second pass
    assert WARNED not in caplog.text


def test_a_missing_row_key_is_a_hash_of_the_ids_and_a_string_is_hashed() -> None:
    bare = {name: values for name, values in ROW.items() if name != "row_key"}
    changed = {**bare, "input_ids": [10, 11, 12, 13, 20, 21, 23]}
    named = [{**bare, "row_key": key} for key in ("a", "b", 5, "5")]
    keys = new_collator()([bare, changed, *named, bare])["row_key"].tolist()
    assert keys[0] == keys[-1] and len(set(keys[:-1])) == 6 and keys[4] == 5
    assert keys[0] == new_collator()([{**bare, "loss_mask": [0] * 7}])["row_key"].item()
    # Always the same number, in every process and version: resumed runs depend on it.
    assert keys[2] == 7304431660483791845
    assert min(keys) >= 0


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [], "loss_mask": []},
        {"input_ids": [4], "loss_mask": [1]},
        {"input_ids": [[4], [], [5], [6]], "loss_mask": [[1], [], [1], [0]]},
        {"input_ids": [[], []], "loss_mask": [[], []]},
        {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1], "document_ids": [-1, -1, -1]},
    ],
)
def test_empty_rows_and_documents_of_one_token_have_no_elements(row: dict[str, Any]) -> None:
    for boundaries in ("balanced", "uniform"):
        batch = CODCollator(8, num_depths=4, num_segments=3, boundaries=boundaries)([row])
        assert (batch["depth"] == -1).all() and not batch["supervised"].any() and (batch["anchor"] == 0).all()
    given = row["input_ids"]
    ids = [i for part in given for i in part] if given and isinstance(given[0], list) else given
    assert batch["input_ids"].tolist() == [ids + [0] * (8 - len(ids))]


def test_a_row_with_nothing_supervised_has_its_depth_0_elements_alone() -> None:
    batch = new_collator()([{"input_ids": [1] * 20, "loss_mask": [0] * 20}])
    assert sorted(elements_of(batch, 0)) == [(p, 0) for p in range(19)] and not batch["supervised"].any()


def test_a_mask_on_the_first_token_alone_supervises_nothing() -> None:
    # The first token of a document is read by no row.
    batch = new_collator()([{"input_ids": [1] * 20, "loss_mask": [1] + [0] * 19}])
    assert not batch["supervised"].any()


def test_a_row_may_fill_max_length_exactly() -> None:
    batch = CODCollator(8, num_depths=8)([{"input_ids": list(range(8)), "loss_mask": [1] * 8}])
    assert batch["input_ids"].tolist() == [list(range(8))]
    assert sum(d == 0 for _, d in elements_of(batch, 0)) == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": [1] * 25, "loss_mask": [1] * 25, "row_key": 8},
            "row 8 has 25 tokens but max_length is 24: split",
        ),
        ({"input_ids": [1, 2, 3], "loss_mask": [1, 1]}, "a row has 3 input_ids but 2 in loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1], "document_ids": [0]}, "2 input_ids but 1 in document_ids"),
        ({"input_ids": [1.0, 2.0], "loss_mask": [1, 1]}, "input_ids must be a flat list of ints, not torch.float"),
        ({"input_ids": [1, 2], "loss_mask": [1.0, 0.0]}, "loss_mask must be a flat list of ints"),
        (
            {"input_ids": torch.ones(2, 2, dtype=torch.int64), "loss_mask": [1, 1]},
            r"flat list of ints, not torch.int64 of shape \(2, 2\)",
        ),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask holds values other than 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [1, -1]}, "loss_mask holds values other than 0 and 1"),
        ({"input_ids": [1, 2]}, "a row has no 'loss_mask'; it has 'input_ids'"),
        ({"loss_mask": [1, 2]}, "a row has no 'input_ids'; it has 'loss_mask'"),
        ({}, "a row has no 'input_ids'; it has no fields .*remove_unused_columns=False"),
        ({"labels": [1, 2]}, "no 'input_ids'; it has 'labels' .*remove_unused_columns=False"),
        ({"input_ids": [1, 2], "labels": [-100]}, "2 input_ids but 1 in labels"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels differ from input_ids: .* unshifted"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "2 input_ids but 1 in attention_mask"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 2]}, "attention_mask holds values other than 0"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [[1, 1], [1, 1]]}, "attention_mask must be a flat"),
        (
            {"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]], "attention_mask": [1, 1, 1]},
            "attention_mask must be nested",
        ),
        ({"input_ids": [[1, 2], [3]], "loss_mask": [0, 1, 1]}, "loss_mask must be nested alike"),
        ({"input_ids": [[1, 2], [3]], "loss_mask": [[0, 1]]}, "loss_mask must be nested alike"),
        ({"input_ids": [[1, 2], [3]], "loss_mask": [[0], [1, 1]]}, "2 input_ids but 1 in loss_mask"),
        (
            {"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "document_ids": [0, 0]},
            "several documents .* and document_ids: give one",
        ),
        ({"input_ids": [1, 2], "loss_mask": [1, 1], "row_key": 2**63}, "row_key is 9223372036854775808; it must fit"),
    ],
)
def test_a_row_that_is_wrong_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_collator()([ROWS[0], row])


def test_a_batch_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="given no rows; a batch has at least 1"):
        new_collator()([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 7}, r"max_length is 7; it must be at least num_depths \(8\)"),
        ({"num_segments": 0}, "num_segments is 0; it must lie in 1..24"),
        ({"num_segments": 25}, "num_segments is 25; it must lie in 1..24"),
        ({"boundaries": "even"}, "boundaries is 'even'"),
        ({"num_depths": 0}, "num_depths is 0"),
        ({"down_sample_ratio": 0}, "down_sample_ratio is 0"),
        ({"down_sample_ratio_min": 2}, "down_sample_ratio_min is 2"),
    ],
)
def test_a_collator_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CODCollator(**{"max_length": 24, **options})


def test_importing_the_collator_imports_torch_and_nothing_else_that_is_heavy() -> None:
    heavy = ("transformers", "accelerate", "datasets", "safetensors", "yaml")
    code = (
        "import sys, peagle_train.core.collator\nfrom peagle_train import CODCollator\n"
        f"print('torch' in sys.modules, [m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "True []\n", result.stderr


def test_ids_may_be_numpys_ints_or_scalar_tensors() -> None:
    import numpy as np

    plain = CODCollator(8, num_depths=2)([{"input_ids": [3, 1, 2], "loss_mask": [0, 1, 1]}])
    for convert in (np.int64, torch.tensor):
        ids, mask = [convert(i) for i in (3, 1, 2)], [convert(m) for m in (0, 1, 1)]
        other = CODCollator(8, num_depths=2)([{"input_ids": ids, "loss_mask": mask}])
        assert all(torch.equal(plain[name], other[name]) for name in plain)
