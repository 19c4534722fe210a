"""The collator: exact batches, fixed shapes, and draws that nothing but (seed, epoch, row) decides."""

import hashlib
import math
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from peagle_train.core.cod import segment_capacity
from peagle_train.core.collator import CODCollator
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


def test_the_batch_of_a_small_packed_row_is_this_one():
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


def generator_of(*words: int) -> torch.Generator:
    """Seeded by 63 bits of the sha256 of the words, so that a resumed run of a later version draws what it would have."""
    digest = hashlib.sha256(",".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@given(
    given_rows=st.lists(oracles.packed_rows(29, 999), min_size=1, max_size=3),
    first_key=st.integers(-(2**63), 2**63 - 4),
    S=st.integers(1, 29),
    K=st.integers(1, 8),
    boundaries=st.sampled_from(["balanced", "uniform"]),
    ratio=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    most=st.none() | st.integers(1, 20),
    multiple=st.sampled_from([1, 1, 7, 128]),
)
@settings(max_examples=150, deadline=None)
def test_any_batch_holds_every_drawn_element_once_in_its_segment_and_in_order(
    given_rows, first_key, S, K, boundaries, ratio, floor, most, multiple
):
    L, B = 29, len(given_rows)
    given_rows = [{**row, "row_key": first_key + b, "epoch": b} for b, row in enumerate(given_rows)]
    collator = CODCollator(L, K, ratio, floor, S, boundaries, capacity_multiple=multiple, max_anchors=most)
    batch = collator(given_rows)
    C = math.ceil(segment_capacity(L, K, ratio, floor, S, boundaries, most) / multiple) * multiple  # see test_cod

    assert batch["anchor"].shape == (B, S * C)
    assert batch["segment_ids"].tolist() == [[i // C for i in range(S * C)]] * B

    for b, row in enumerate(given_rows):
        n = len(row["input_ids"])
        documents, mask = row["document_ids"] + [-1] * (L - n), row["loss_mask"] + [0] * (L - n)
        assert batch["input_ids"][b].tolist() == row["input_ids"] + [0] * (L - n)
        assert batch["document_ids"][b].tolist() == documents
        assert batch["position_ids"][b].tolist() == oracles.positions(documents)
        assert batch["row_key"][b] == row["row_key"]

        generator = generator_of(0, row["epoch"], row["row_key"])
        elements = oracles.draw_packed(mask, documents, K, ratio, floor, generator, most)
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


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_workers_that_live_on_draw_what_the_main_process_draws_in_each_epoch(context):
    collator, workers = new_collator(), 2 if context else 0
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(ROWS, batch_size=2, collate_fn=collator, multiprocessing_context=context, **options)
    for epoch in (0, 1, 7):
        collator.set_epoch(epoch)
        assert collator.epoch == epoch
        for one, other in zip(list(loader), expected_batches(epoch), strict=True):
            assert_equal(one, other)
    assert elements(expected_batches(0)[0]) != elements(expected_batches(1)[0])


def test_a_rows_draw_depends_on_seed_epoch_and_key_each_and_on_nothing_else():
    def drawn(seed: int, epoch: int, key: int | str) -> list[tuple[int, int]]:
        return elements(new_collator(seed=seed)([{**ROWS[0], "epoch": epoch, "row_key": key}]))[0]

    before, collator = torch.get_rng_state(), new_collator()
    draws = [drawn(*case) for case in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, "0"), (-5, 0, 0)]]
    assert all(draws.count(d) == 1 for d in draws)
    assert elements(collator(ROWS)) == elements(collator(ROWS[::-1]))[::-1]
    assert elements(collator(ROWS)) == [elements(collator([row]))[0] for row in ROWS]
    assert torch.equal(torch.get_rng_state(), before)


# Rows


def test_a_row_may_be_nested_lists_tensors_or_arrays_of_any_integer_type():
    names = ("input_ids", "loss_mask", "document_ids")
    nested = {name: [ROW[name][:4], ROW[name][4:]] for name in names[:2]} | {"attention_mask": [[1] * 4, [1] * 3]}
    variants: list[dict[str, Any]] = [
        nested,
        {name: [torch.tensor(part) for part in parts] for name, parts in nested.items()},
        *({n: torch.tensor(ROW[n], dtype=d) for n in names} for d in (torch.int64, torch.int32, torch.uint8)),
        {**ROW, "loss_mask": [m == 1 for m in MASK]},
        {**ROW, "input_ids": torch.tensor(IDS).numpy(), "loss_mask": torch.tensor(MASK).bool().numpy()},
        *({n: [convert(i) for i in ROW[n]] for n in names} for convert in (numpy.int64, torch.tensor)),
    ]
    for row in variants:
        assert_equal(new_collator()([{**row, "row_key": 77}]), new_collator()([ROW]))


def test_document_ids_name_runs_negative_ones_are_padding_and_without_them_a_row_is_one_document():
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "loss_mask": [1] * 8, "document_ids": [7, 7, 3, 3, 7, 7, -2, -1]}
    batch = CODCollator(8, num_depths=2)([row, {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}])
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 2, 2, -1, -1], [0, 0, 0, -1, -1, -1, -1, -1]]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert sorted(elements_of(batch, 0)) == [(0, 0), (2, 0), (4, 0)]


def test_labels_stand_in_for_a_mask_and_a_mask_wins():
    labels = [i if m else -100 for i, m in zip(IDS, MASK, strict=True)]
    collator = new_collator()
    expected = collator([ROW])
    assert expected["supervised"].any()
    for values in (labels, torch.tensor(labels)):
        row = {**ROW, "labels": values}
        assert_equal(collator([{n: v for n, v in row.items() if n != "loss_mask"}]), expected)
        assert_equal(collator([{**row, "labels": IDS}]), expected)
    nested = {"input_ids": [IDS[:4], IDS[4:]], "labels": [labels[:4], labels[4:]], "row_key": 77}
    assert_equal(collator([nested]), expected)


def test_zeros_of_an_attention_mask_are_padding_on_either_side():
    ids, mask, nothing = list(range(1, 12)), [0, *[1] * 10], [-100]
    padded = {
        "input_ids": [99] + ids + [99, 99],
        "attention_mask": [0] + [1] * 11 + [0, 0],
        "labels": nothing + [i if m else -100 for i, m in zip(ids, mask, strict=True)] + nothing * 2,
    }
    batch = new_collator(down_sample_ratio=1.0)([padded])
    plain = new_collator(down_sample_ratio=1.0)([{"input_ids": ids, "loss_mask": mask}])
    assert sorted((a - 1, d) for a, d in elements_of(batch, 0)) == sorted(elements_of(plain, 0))
    assert batch["document_ids"][0].tolist() == [-1] + [0] * 11 + [-1] * 12
    assert batch["position_ids"][0, 1:12].tolist() == list(range(11))


def test_a_missing_row_key_is_a_hash_of_the_ids_and_a_string_is_hashed():
    bare = {name: values for name, values in ROW.items() if name != "row_key"}
    changed = {**bare, "input_ids": [10, 11, 12, 13, 20, 21, 23]}
    named = [{**bare, "row_key": key} for key in ("a", "b", 5, "5")]
    keys = new_collator()([bare, changed, *named, bare])["row_key"].tolist()
    assert keys[0] == keys[-1] and len(set(keys[:-1])) == 6 and keys[4] == 5
    assert keys[0] == new_collator()([{**bare, "loss_mask": [0] * 7}])["row_key"].item()
    # Always the same number, in every process and version: resumed runs depend on it.
    assert keys[2] == 7304431660483791845
    assert min(keys) >= 0


@pytest.mark.parametrize("boundaries", ["balanced", "uniform"])
def test_empty_rows_and_documents_of_one_token_have_no_elements(boundaries):
    for row, ids in [
        ({"input_ids": [], "loss_mask": []}, []),
        ({"input_ids": [4], "loss_mask": [1]}, [4]),
        ({"input_ids": [[4], [], [5], [6]], "loss_mask": [[1], [], [1], [0]]}, [4, 5, 6]),
        ({"input_ids": [[], []], "loss_mask": [[], []]}, []),
        ({"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1], "document_ids": [-1, -1, -1]}, [1, 2, 3]),
    ]:
        batch = CODCollator(8, num_depths=4, num_segments=3, boundaries=boundaries)([row])
        assert (batch["depth"] == -1).all() and not batch["supervised"].any() and (batch["anchor"] == 0).all()
        assert batch["input_ids"].tolist() == [ids + [0] * (8 - len(ids))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1] * 25, "loss_mask": [1] * 25, "row_key": 8}, "row 8 has 25 tokens but max_length is 24"),
        ({"input_ids": [1, 2, 3], "loss_mask": [1, 1]}, r"lengths \[3\], its loss_mask \[2\]"),
        ({"input_ids": [[1, 2], [3]], "loss_mask": [[0], [1, 1]]}, r"lengths \[2, 1\], its loss_mask \[1, 2\]"),
        (
            {"input_ids": [[1]], "labels": [[1]], "attention_mask": [1]},
            "attention_mask must be a list of ints, or as many",
        ),
        ({"input_ids": [1.0, 2.0], "loss_mask": [1, 1]}, "input_ids must be a list of ints, .* not torch.float"),
        ({"input_ids": torch.ones(2, 2).long(), "loss_mask": [1, 1]}, r"not torch.int64 of shape \(2, 2\)"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask holds values other than 0 and 1"),
        ({"input_ids": [1, 2]}, "a row has no 'loss_mask'; it has 'input_ids'"),
        ({}, "a row has no 'input_ids'; it has no fields .*remove_unused_columns=False"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels differ from input_ids: .* unshifted"),
        (  # it would be read as one document
            {"input_ids": [1, 2, 3], "loss_mask": [1] * 3, "attention_mask": [1, 1, 2]},
            "attention_mask holds values other than 0 and 1",
        ),
    ],
)
def test_a_row_that_is_wrong_says_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        new_collator()([ROWS[0], row])


def test_a_collator_that_cannot_be_and_a_batch_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        new_collator()([])
    for options, message in (
        ({"num_segments": 0}, "num_segments is 0; it must lie in 1..24"),
        ({"num_segments": 25}, "num_segments is 25; it must lie in 1..24"),
        ({"boundaries": "even"}, "boundaries is 'even'; it must be balanced or uniform"),
        ({"num_depths": 0}, "num_depths is 0"),
        ({"max_anchors": 0}, "max_anchors is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CODCollator(**{"max_length": 24, **options})


def test_importing_the_collator_imports_torch_and_nothing_else_that_is_heavy():
    heavy = ("transformers", "accelerate", "datasets", "safetensors", "yaml")
    code = (
        "import sys, peagle_train.core.collator\nfrom peagle_train import CODCollator\n"
        f"print('torch' in sys.modules, [m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "True []\n", result.stderr
