"""From documents to rows: the held-out split, and packing into rows of at most max_length tokens.

A *document* is what was read, a *piece* is a part of one that fits a row (most documents are one piece), a
*row* is what the collator gets: whole pieces side by side.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peagle_train.sampler import EMPTY_ROW
from peagle_train.sources import Document, SourceReport, load_documents

__all__ = [
    "Document",
    "PackReport",
    "PackedRows",
    "SourceReport",
    "load_documents",
    "pack_documents",
    "split_train_eval",
]


def split_train_eval(documents: Sequence[Document], eval_fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out about `eval_fraction` of the documents.

    A document's own key decides, so it lands on the same side on every machine and whatever the others are.

    Raises:
        ValueError: a fraction outside of [0, 1), or one that leaves nothing to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must lie in [0, 1)")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        is_held_out = int(document.key[:16], 16) < eval_fraction * 2**64
        (held_out if is_held_out else train).append(document)
    if documents and not train:
        raise ValueError(f"data.eval_fraction {eval_fraction} holds out all {len(documents)} documents: lower it")
    return train, held_out


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

    def describe(self) -> str:
        """One line."""
        text = f"{self.documents} documents in {self.rows} rows, {self.fill:.1%} full"
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        if self.split_documents:
            text += (
                f"; {self.split_documents} documents longer than a row were split ({self.pieces} pieces in"
                f" all, {self.lost_at_splits} supervised rows lost at the cuts)"
            )
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
        empty = torch.zeros(0)
        self._ids = torch.cat([empty.int(), *(ids.to(torch.int32) for ids, _ in placed)])
        self._mask = torch.cat([empty.byte(), *(mask.to(torch.uint8) for _, mask in placed)])
        self._piece_offsets = _offsets([ids.numel() for ids, _ in placed])
        self._row_offsets = _offsets([len(row) for row in rows])
        self._index = torch.arange(len(rows))
        self._keys = torch.tensor([self._content_key(row) for row in range(len(rows))], dtype=torch.int64)

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
        bounds = self._piece_offsets[first : last + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        documents_n = torch.arange(last - first).repeat_interleave(bounds.diff())
        return self._ids[start:end].to(torch.int64), self._mask[start:end].to(torch.int64), documents_n

    def _content_key(self, row: int) -> int:
        content = b"".join(values.numpy().astype("<i8").tobytes() for values in self._tokens(row))
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


_TOKEN_FIELDS = ("input_ids", "loss_mask", "document_ids")


def pack_documents(documents: Sequence[Document], max_length: int, pack: bool = True) -> tuple[PackedRows, PackReport]:
    """Put documents into rows of at most `max_length` tokens; no token is lost.

    Longer documents are cut into pieces of `max_length`, each from then on a document of its own. The first
    token of a later piece keeps its loss mask, but like every first token it is no drafter row:
    `lost_at_splits` counts those. Pieces of one token are kept, although they have no drafter row. With
    `pack`, the longest piece comes first, each in the fullest row that has room for it; without, each piece
    is a row.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    pieces: list[tuple[Tensor, Tensor]] = []
    split_documents = supervised_whole = 0
    for document in documents:
        cuts = range(0, document.input_ids.numel(), max_length)
        pieces += [
            (document.input_ids[cut : cut + max_length], document.loss_mask[cut : cut + max_length]) for cut in cuts
        ]
        split_documents += len(cuts) > 1
        supervised_whole += int(document.loss_mask[1:].sum())
    lengths = [ids.numel() for ids, _ in pieces]
    rows = _best_fit_decreasing(lengths, max_length) if pack else [[piece] for piece in range(len(pieces))]
    supervised = sum(int(mask[1:].sum()) for _, mask in pieces)
    report = PackReport(
        documents=len(documents),
        pieces=len(pieces),
        split_documents=split_documents,
        rows=len(rows),
        tokens=sum(lengths),
        supervised=supervised,
        lost_at_splits=supervised_whole - supervised,
        fill=sum(lengths) / (len(rows) * max_length) if rows else 0.0,
    )
    return PackedRows(pieces, rows), report


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
