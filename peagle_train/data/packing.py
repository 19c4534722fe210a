"""From documents to rows: packing into rows of at most max_length tokens.

A *document* is what was read, a *piece* is a part of one that fits a row (most documents are one piece), a
*row* is what the collator gets: whole pieces side by side.
"""

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peagle_train.data.documents import Document, DocumentTable, SourceReport, TokenStore, load_documents
from peagle_train.data.sampler import EMPTY_ROW

# ---- choice
# Which documents are held out, and how often each other one comes in an epoch: decided by their own keys.


def held_out_documents(keys_D32: np.ndarray, eval_fraction: float) -> np.ndarray:
    """bool [D]: whether a document is held out, about `eval_fraction` of them.

    Its own key decides, so it lands on the same side on every machine and whatever the others are.

    Args:
        keys_D32: uint8, sha256 of each document.

    Raises:
        ValueError: a fraction outside of [0, 1), or one that leaves nothing to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must lie in [0, 1)")
    held_out_D = _lies_below(keys_D32[:, :8], eval_fraction)
    if held_out_D.size and held_out_D.all():
        raise ValueError(f"data.eval_fraction {eval_fraction} holds out all {held_out_D.size} documents: lower it")
    return held_out_D


def _lies_below(bytes_D8: np.ndarray, fraction: float) -> np.ndarray:
    """bool [D]: whether 8 bytes, read as a number in [0, 1), lie below the fraction, itself in [0, 1)."""
    numbers_D = np.ascontiguousarray(bytes_D8).view(">u8").reshape(-1)
    return numbers_D < np.uint64(math.ceil(fraction * 2**64))


def split_train_eval(documents: Sequence[Document], eval_fraction: float) -> tuple[list[Document], list[Document]]:
    """Those to train on and those that `held_out_documents` holds out."""
    keys_D32 = np.frombuffer(bytes.fromhex("".join(d.key for d in documents)), dtype=np.uint8).reshape(-1, 32)
    held_out_D = held_out_documents(keys_D32, eval_fraction)
    train = [document for document, is_out in zip(documents, held_out_D, strict=True) if not is_out]
    return train, [document for document, is_out in zip(documents, held_out_D, strict=True) if is_out]


def times_an_epoch(keys_D32: np.ndarray, weights_D: np.ndarray) -> np.ndarray:
    """int64 [D]: how often each document is packed.

    Weight 2.25 is twice, and a third time for that quarter of the documents that their keys choose (by other bytes than
    those that hold documents out).
    """
    whole_D = np.floor(weights_D)
    times_D = whole_D.astype(np.int64)
    for weight in np.unique(weights_D).tolist():
        is_more_D = (weights_D == weight) & _lies_below(keys_D32[:, 8:16], weight - math.floor(weight))
        times_D += is_more_D
    return times_D


# ---- packing
# From documents to rows: packing into rows of at most max_length tokens.
#
# A *document* is what was read, a *piece* is a part of one that fits a row (most documents are one piece), a
# *row* is what the collator gets: whole pieces side by side.

__all__ = [
    "Document",
    "PackReport",
    "PackedRows",
    "SourceReport",
    "held_out_documents",
    "load_documents",
    "pack_documents",
    "pack_table",
    "split_train_eval",
]


@dataclass(frozen=True)
class PackReport:
    """What packing made of the documents."""

    documents: int
    """Documents packed."""
    pieces: int
    """Parts they were cut into."""
    split_documents: int
    """Documents longer than max_length."""
    rows: int
    """Rows of at most max_length tokens."""
    tokens: int
    """Tokens in all rows: those of the documents, every one."""
    supervised: int
    """Drafter rows with a loss: tokens with mask 1, without the first of each piece."""
    lost_at_splits: int
    """Drafter rows with a loss that the documents had and the pieces do not."""
    fill: float
    """Share of rows * max_length that is tokens."""
    repeats: int = 0
    """Of `documents`, those that are there once more because of their source's weight."""
    left_out_by_weight: int = 0
    """Documents that are not packed because of their source's weight."""

    def describe(self) -> str:
        """One line."""
        text = f"{self.documents} documents in {self.rows} rows, {self.fill:.1%} full"
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        if self.split_documents:
            text += (
                f"; {self.split_documents} documents longer than a row were split ({self.pieces} pieces in"
                f" all, {self.lost_at_splits} supervised rows lost at the cuts)"
            )
        if self.repeats:
            text += f"; {self.repeats} of the documents are repeats, by their source's weight"
        if self.left_out_by_weight:
            text += f"; {self.left_out_by_weight} documents left out by their source's weight"
        return text


class PackedRows(Dataset[dict[str, Any]]):
    """Rows of whole pieces, kept flat so that loader processes share them.

    `rows[i]` or `rows[epoch, i]` is a dict of
        input_ids, loss_mask, document_ids: int64 [n]; document ids are 0, 1, ... within the row.
        row_key: int, 63 bits of the sha256 of the row's content: the same on every machine.
        epoch: int, when given.
    Index -1 (`EMPTY_ROW`) is a row of no tokens with row_key 0.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Sequence[int]]) -> None:
        """`pieces`: (ids, mask) of each; `rows`: which pieces each row has, in order."""
        placed = [pieces[piece] for row in rows for piece in row]
        ids = torch.cat([torch.zeros(0).int(), *(ids.to(torch.int32) for ids, _ in placed)])
        mask = torch.cat([torch.zeros(0).byte(), *(mask.to(torch.uint8) for _, mask in placed)])
        lengths = torch.tensor([ids.numel() for ids, _ in placed], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        self._place(TokenStore([(ids, mask)]), starts, lengths, _offsets([len(row) for row in rows]))

    @classmethod
    def at(cls, store: TokenStore, layout: dict[str, Tensor]) -> "PackedRows":
        """Rows of the store's tokens, where `layout` (see there) says."""
        rows = cls.__new__(cls)
        rows._place(
            store, layout["piece_starts"], layout["piece_lengths"], layout["row_offsets"], layout.get("row_keys")
        )
        return rows

    def layout(self) -> dict[str, Tensor]:
        """Where all rows' tokens are, whatever `limit` says.

        piece_starts, piece_lengths: int64 [pieces], in the store. row_offsets: int64 [rows + 1], each row's pieces.
        row_keys: int64 [rows].
        """
        return {
            "piece_starts": self._piece_starts,
            "piece_lengths": self._piece_lengths,
            "row_offsets": self._row_offsets,
            "row_keys": self._keys,
        }

    def _place(
        self, store: TokenStore, starts: Tensor, lengths: Tensor, row_offsets: Tensor, keys: Tensor | None = None
    ) -> None:
        self._store, self._piece_starts, self._piece_lengths, self._row_offsets = store, starts, lengths, row_offsets
        self._index = torch.arange(row_offsets.numel() - 1)
        if keys is None:
            keys = torch.tensor([self._content_key(row) for row in self._index.tolist()], dtype=torch.int64)
        self._keys = keys

    def __len__(self) -> int:
        return self._index.numel()

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = index if isinstance(index, tuple) else (None, index)
        if not -1 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        if i == EMPTY_ROW:
            tokens, row_key = {name: torch.zeros(0, dtype=torch.int64) for name in _TOKEN_FIELDS}, 0
        else:
            stored = int(self._index[i])
            tokens, row_key = (
                dict(zip(_TOKEN_FIELDS, self._tokens(stored), strict=True)),
                int(self._keys[stored]),
            )
        row = {**tokens, "row_key": row_key}
        return row if epoch is None else {**row, "epoch": epoch}

    def fingerprint(self) -> str:
        """sha256 over all rows' keys in order, in hex: the same where and only where the rows are."""
        return hashlib.sha256(self._keys[self._index].numpy().astype("<i8").tobytes()).hexdigest()

    def limit(self, max_rows: int | None) -> "PackedRows":
        """At most `max_rows` of these rows, in their order, without a copy: those of the lowest keys.

        Packing sorts rows by length, so that the first ones would be no fair sample.
        """
        if max_rows is None or max_rows >= len(self):
            return self
        limited = PackedRows.__new__(PackedRows)
        limited.__dict__.update(self.__dict__)
        lowest = torch.sort(self._keys[self._index], stable=True).indices[:max_rows]
        limited._index = self._index[lowest.sort().values]
        return limited

    def _tokens(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        first, last = self._row_offsets[row : row + 2].tolist()
        lengths = self._piece_lengths[first:last]
        pieces = [
            self._store.piece(start, length)
            for start, length in zip(self._piece_starts[first:last].tolist(), lengths.tolist(), strict=True)
        ]
        ids, mask = (torch.cat(parts).to(torch.int64) for parts in zip(*pieces, strict=True))
        return ids, mask, torch.arange(last - first).repeat_interleave(lengths)

    def _content_key(self, row: int) -> int:
        content = b"".join(values.numpy().astype("<i8").tobytes() for values in self._tokens(row))
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


_TOKEN_FIELDS = ("input_ids", "loss_mask", "document_ids")


def pack_documents(documents: Sequence[Document], max_length: int, pack: bool = True) -> tuple[PackedRows, PackReport]:
    """`pack_table` of a few documents, once each."""
    ids = torch.cat([torch.zeros(0).int(), *(document.input_ids.int() for document in documents)])
    mask = torch.cat([torch.zeros(0).byte(), *(document.loss_mask for document in documents)])
    shard = {
        "input_ids": ids,
        "loss_mask": mask,
        "lengths": torch.tensor([document.input_ids.numel() for document in documents], dtype=torch.int32),
        "sources": torch.zeros(len(documents), dtype=torch.int32),
        "keys": torch.zeros((len(documents), 32), dtype=torch.uint8),
    }
    return pack_table(DocumentTable.of([shard]), np.ones(len(documents), np.int64), max_length, pack)


def pack_table(
    table: DocumentTable, times_D: np.ndarray, max_length: int, pack: bool = True
) -> tuple[PackedRows, PackReport]:
    """Put documents, each as often as `times_D` (int64) says, into rows of at most `max_length` tokens; none is lost.

    Longer documents are cut into pieces of `max_length`, each from then on a document of its own. The first
    token of a later piece keeps its loss mask, but like every first token it is no drafter row:
    `lost_at_splits` counts those. Pieces of one token are kept, although they have no drafter row. With
    `pack`, the longest piece comes first, each in the fullest row that has room for it; without, each piece
    is a row.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    # Every document is cut, in order; then the pieces are taken as often as their documents are.
    cuts_D = -(-table.lengths_D // max_length)
    document_P = np.repeat(np.arange(len(table)), cuts_D)
    behind_P = (np.arange(document_P.size) - np.repeat(cuts_D.cumsum() - cuts_D, cuts_D)) * max_length
    starts_P = table.starts_D[document_P] + behind_P
    lengths_P = np.minimum(max_length, table.lengths_D[document_P] - behind_P)
    supervised_P = _supervised(table.store, starts_P)
    supervised_D = _supervised(table.store, table.starts_D)

    pieces_Q = _repeated(cuts_D, times_D)
    lengths_Q = lengths_P[pieces_Q]
    lengths = lengths_Q.tolist()
    rows = _best_fit_decreasing(lengths, max_length) if pack else [[piece] for piece in range(len(lengths))]
    placed = np.array([piece for row in rows for piece in row], dtype=np.int64)
    layout = {
        "piece_starts": torch.from_numpy(starts_P[pieces_Q][placed]),
        "piece_lengths": torch.from_numpy(lengths_Q[placed]),
        "row_offsets": _offsets([len(row) for row in rows]),
    }
    tokens, supervised = int(lengths_Q.sum()), int(supervised_P[pieces_Q].sum())
    report = PackReport(
        documents=int(times_D.sum()),
        pieces=len(lengths),
        split_documents=int(times_D[cuts_D > 1].sum()),
        rows=len(rows),
        tokens=tokens,
        supervised=supervised,
        lost_at_splits=int((supervised_D * times_D).sum()) - supervised,
        fill=tokens / (len(rows) * max_length) if rows else 0.0,
        repeats=int(np.maximum(times_D - 1, 0).sum()),
    )
    return PackedRows.at(table.store, layout), report


def _repeated(sizes_D: np.ndarray, times_D: np.ndarray) -> np.ndarray:
    """int64: indices of runs of `sizes_D` consecutive items, each run as a whole `times_D` times."""
    first_D = sizes_D.cumsum() - sizes_D
    run_R = np.repeat(np.arange(sizes_D.size), times_D)
    within = np.arange(sizes_D[run_R].sum()) - np.repeat(sizes_D[run_R].cumsum() - sizes_D[run_R], sizes_D[run_R])
    return np.repeat(first_D[run_R], sizes_D[run_R]) + within


def _supervised(store: TokenStore, starts: np.ndarray) -> np.ndarray:
    """int64: tokens with mask 1, but the first, of each of the runs that begin at `starts` and together fill the store."""
    counts = []
    for (_, mask), begin, end in zip(store.shards, store.starts, store.starts[1:], strict=False):
        own = starts[(starts >= begin) & (starts < end)] - begin
        if own.size:
            values = mask.numpy()
            counts.append(np.add.reduceat(values, own, dtype=np.int64) - values[own])
    return np.concatenate([np.zeros(0, np.int64), *counts])


def _best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices into `lengths` by row: the longest first, each where the least space is left behind it."""
    rows: list[list[int]] = []
    spaces: list[int] = []  # ascending: the amounts of space that any row has left
    rows_with: dict[int, list[int]] = {}  # those rows, by space
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        at = bisect_left(spaces, lengths[piece])
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        rows[row].append(piece)
        space -= lengths[piece]
        assert space >= 0, "a piece is longer than a row"
        if space > 0 and space not in rows_with:
            insort(spaces, space)
            rows_with[space] = []
        if space > 0:
            rows_with[space].append(row)
    return rows


def _offsets(sizes: Sequence[int]) -> Tensor:
    """int64 [n + 1]: where each of n consecutive runs begins, then where the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64).cumsum(0)])
