"""Sequences: the held-out split, and packing without losing a token."""

import hashlib
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from peagle_train.core.cod import drafter_rows
from peagle_train.core.collator import CODCollator
from peagle_train.data.packing import PackedRows, held_out_documents, times_an_epoch
from peagle_train.data.sampler import StepBatchSampler
from peagle_train.data.vocab import count_supervised
from tests.documents import Document, pack_documents, table_of


def document(ids: list[int], mask: list[int] | None = None, key: str = "0" * 64) -> Document:
    mask = [0] + [1] * (len(ids) - 1) if mask is None else mask
    return Document(torch.tensor(ids), torch.tensor(mask, dtype=torch.uint8), "test", key)


def keys(count: int) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(count)), np.uint8).reshape(-1, 32)


def test_about_the_fraction_is_held_out_whatever_the_others_are_and_it_only_grows_with_the_fraction() -> None:
    held_out = held_out_documents(keys(2000), 0.1)
    assert 150 < held_out.sum() < 250
    assert np.array_equal(held_out_documents(keys(2000)[250:100:-3], 0.1), held_out[250:100:-3])
    more = held_out_documents(keys(2000), 0.2)
    assert more[held_out].all() and more.sum() > held_out.sum()
    assert not held_out_documents(keys(9), 0.0).any() and held_out_documents(keys(0), 0.5).size == 0


def all_rows(rows: PackedRows) -> list[dict[str, Any]]:
    return [rows[i] for i in range(len(rows))]


def pieces_of(rows: PackedRows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    pieces = []
    for row in all_rows(rows):
        for piece in row["document_ids"].unique().tolist():
            inside = row["document_ids"] == piece
            pieces.append((tuple(row["input_ids"][inside].tolist()), tuple(row["loss_mask"][inside].tolist())))
    return pieces


def slow_best_fit_spaces(lengths: list[int], capacity: int) -> list[int]:
    """The space each row has left, by looking at every row for every piece."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        if not fitting:
            spaces.append(capacity)
            fitting = [len(spaces) - 1]
        spaces[min(fitting, key=lambda row: spaces[row])] -= length
    return sorted(spaces)


bits = st.lists(st.integers(0, 1), min_size=1, max_size=23)


@settings(max_examples=80, deadline=None)
@given(st.lists(bits, max_size=12), st.integers(1, 9), st.booleans())
def test_packing_loses_nothing_and_fills_rows_as_a_slow_packer_does(
    masks: list[list[int]], max_length: int, pack: bool
) -> None:
    documents = [document([100 * i + j for j in range(len(mask))], mask) for i, mask in enumerate(masks)]
    rows, report = pack_documents(documents, max_length, pack)

    expected = [
        (tuple(d.input_ids[at : at + max_length].tolist()), tuple(d.loss_mask[at : at + max_length].tolist()))
        for d in documents
        for at in range(0, d.input_ids.numel(), max_length)
    ]
    assert Counter(pieces_of(rows)) == Counter(expected)
    lengths = [len(ids) for ids, _ in expected]
    spaces = [max_length - row["input_ids"].numel() for row in all_rows(rows)]
    if pack:
        assert sorted(spaces) == slow_best_fit_spaces(lengths, max_length)
    else:
        assert pieces_of(rows) == expected and len(rows) == len(expected)

    supervised = 0  # counted as section 3 of the contract counts it
    for row in all_rows(rows):
        is_row = drafter_rows(row["document_ids"]).tolist()
        supervised += sum(row["loss_mask"][p + 1].item() for p in range(len(is_row)) if is_row[p])
    assert report.supervised == supervised
    assert report.lost_at_splits == sum(sum(mask[1:]) for mask in masks) - supervised
    assert (report.documents, report.pieces, report.rows) == (len(masks), len(expected), len(rows))
    assert report.tokens == sum(map(len, masks))
    assert report.split_documents == sum(len(mask) > max_length for mask in masks)
    assert report.fill == pytest.approx(report.tokens / (len(rows) * max_length) if len(rows) else 0)


def test_a_row_has_the_collators_fields_and_types() -> None:
    rows, _ = pack_documents([document([5, 6, 7]), document([8, 9])], 5)
    row = rows[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert row["loss_mask"].tolist() == [0, 1, 1, 0, 1]
    assert row["document_ids"].tolist() == [0, 0, 0, 1, 1]
    assert {row[name].dtype for name in ("input_ids", "loss_mask", "document_ids")} == {torch.int64}
    assert "epoch" not in row and rows[7, 0]["epoch"] == 7
    assert type(row["row_key"]) is int and 0 <= row["row_key"] < 2**63


def test_index_minus_one_is_an_empty_row_and_other_indices_outside_are_errors() -> None:
    rows, _ = pack_documents([document([5, 6, 7])], 5)
    empty = rows[3, -1]
    assert (empty["row_key"], empty["epoch"]) == (0, 3)
    for name in ("input_ids", "loss_mask", "document_ids"):
        assert empty[name].shape == (0,) and empty[name].dtype == torch.int64
    for index in (1, -2):
        with pytest.raises(IndexError):
            rows[index]


def test_a_rows_key_depends_on_its_content_alone() -> None:
    def key(*documents: Document, max_length: int = 8) -> int:
        return int(pack_documents(documents, max_length)[0][0]["row_key"])

    base = key(document([1, 2, 3, 4]))
    assert base == key(document([1, 2, 3, 4], key="f" * 64), max_length=4) == 8061358075994652352
    others = [
        key(document([1, 2, 3, 5])),
        key(document([1, 2, 3, 4], [0, 1, 1, 0])),
        key(document([1, 2], [0, 1]), document([3, 4], [1, 1])),
    ]
    assert len({base, *others}) == 4


def test_limit_takes_a_fixed_sample_in_order_and_shares_the_tokens() -> None:
    documents = [document([i] * (i % 5 + 1)) for i in range(40)]
    rows, _ = pack_documents(documents, 5, pack=False)
    limited = rows.limit(7)
    keys = [row["row_key"] for row in all_rows(rows)]
    chosen = [row["row_key"] for row in all_rows(limited)]
    assert len(limited) == 7 and len(rows) == 40
    assert sorted(chosen) == sorted(keys)[:7] and chosen == [key for key in keys if key in chosen]
    assert all(
        torch.equal(row["input_ids"], rows[keys.index(row["row_key"])]["input_ids"]) for row in all_rows(limited)
    )
    assert [row["row_key"] for row in all_rows(limited.limit(3))] == [k for k in chosen if k in sorted(chosen)[:3]]
    assert [row["row_key"] for row in all_rows(rows.limit(None))] == keys


def test_more_than_a_million_tokens_are_counted_across_the_parts_that_they_are_counted_in() -> None:
    rng = np.random.default_rng(0)
    lengths = [2**20 - 3, 7, 1, 2**20 + 1, 5]
    documents = [
        Document(torch.full((n,), i), torch.from_numpy(rng.integers(0, 2, n, np.uint8))) for i, n in enumerate(lengths)
    ]
    expected = [times * int(d.loss_mask.sum()) for times, d in zip((2, 0, 1, 1, 3), documents)]
    counts = count_supervised(table_of(documents), np.array([2, 0, 1, 1, 3]), 5)
    assert counts.dtype == torch.int64 and counts.tolist() == expected


def test_a_weight_says_how_often_each_document_comes_and_its_key_decides_about_the_rest() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (4000, 32), dtype=np.uint8)
    for weight, whole, share in ((1.0, 1, 0.0), (0.5, 0, 0.5), (2.0, 2, 0.0), (2.25, 2, 0.25)):
        times = times_an_epoch(keys, np.full(4000, weight))
        assert set(times.tolist()) <= {whole, whole + 1}
        assert float((times == whole + 1).mean()) == pytest.approx(share, abs=0.03)
        assert np.array_equal(times[100:200], times_an_epoch(keys[100:200], np.full(100, weight)))
        more = times_an_epoch(keys, np.full(4000, weight + 0.1))
        assert (more >= times).all(), "a larger weight only adds"
    mixed = times_an_epoch(keys, np.where(np.arange(4000) < 2000, 0.5, 3.0))
    assert mixed[:2000].max() == 1 and set(mixed[2000:].tolist()) == {3}


def test_sequences_reach_the_collator_through_a_data_loader() -> None:
    documents = [document(list(range(1, n + 1))) for n in (3, 9, 17, 2, 1, 6)]
    rows, _ = pack_documents(documents, 16)
    assert len(pickle.loads(pickle.dumps(rows))) == len(rows)
    sampler = StepBatchSampler(len(rows), batch_size=2, accumulation=2, seed=1, num_steps=2)
    loader = DataLoader(rows, batch_sampler=sampler, num_workers=2, collate_fn=CODCollator(16, num_depths=4))
    batches = list(loader)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 16)] * 4
    for epoch in (batches[:2], batches[2:]):
        tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in epoch)
        assert tokens == 38
