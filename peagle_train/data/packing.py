"""From documents to sequences: which documents are held out, how often the others come, and packing without loss.

A *document* is an example's tokens, a *piece* is a part of one that fits a sequence (most documents are one piece), a
*sequence* is what the collator gets: whole pieces side by side, at most max_length tokens. D: documents.
"""

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peagle_train.core.cod import hash63
from peagle_train.data.documents import Documents, SourceReport, TokenStore, read_documents, store_documents
from peagle_train.data.encode import Encoder

EMPTY_ROW = -1  # the index of no sequence, which has no tokens
_CHUNK_TOKENS = 2**20


def held_out_documents(keys_D32: np.ndarray, eval_fraction: float) -> np.ndarray:
    """bool [D]: whether a document is held out, about `eval_fraction` of them. Its own key (uint8, sha256) decides, so it
    lands on the same side on every machine and whatever the others are.
    """
    return _lies_below(keys_D32[:, :8], eval_fraction)


def _lies_below(bytes_D8: np.ndarray, fraction_D: np.ndarray | float) -> np.ndarray:
    """bool [D]: whether 8 bytes, read as a number in [0, 1), lie below the fraction, itself in [0, 1)."""
    numbers_D = np.ascontiguousarray(bytes_D8).view(">u8").reshape(-1)
    return numbers_D < np.ceil(np.asarray(fraction_D) * 2.0**64).astype(np.uint64)


@dataclass(frozen=True)
class PackReport:
    """What packing made of the documents."""

    documents: int  # packed
    pieces: int  # parts they were cut into
    split_documents: int  # documents longer than max_length
    rows: int  # sequences
    tokens: int  # in all sequences: those of the documents, every one
    supervised: int  # drafter rows with a loss: tokens with mask 1, without the first of each piece
    lost_at_splits: int  # drafter rows with a loss that the documents had and the pieces do not
    fill: float  # share of sequences * max_length that is tokens

    def describe(self) -> str:
        text = f"{self.documents} documents in {self.rows} sequences, {self.fill:.1%} full"
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        if self.split_documents:
            text += f"; {self.split_documents} documents longer than a sequence were split ({self.pieces} pieces,"
            text += f" {self.lost_at_splits} supervised tokens lost at the cuts)"
        return text


class PackedRows(Dataset[dict[str, Any]]):
    """Sequences of whole pieces, kept flat so that loader processes share them.

    `rows[i]` or `rows[epoch, i]` is a dict of
        input_ids, loss_mask, document_ids: int64 [n]; document ids are 0, 1, ... within the sequence.
        row_key: int, 63 bits of the sha256 of the sequence's content: the same on every machine.
        epoch: int, when given.
    Index -1 (`EMPTY_ROW`) is a sequence of no tokens with row_key 0.
    """

    def __init__(self, store: TokenStore, layout: dict[str, np.ndarray]) -> None:
        """`layout`: where in the store the tokens are, all int64: piece_starts, piece_lengths [pieces]; row_firsts,
        row_ends [sequences], each one's pieces; row_keys [sequences], their content's, hashed here if they are missing.
        """
        self._store, self.layout = store, layout
        if "row_keys" not in layout:
            contents = (b"".join(v.astype("<i8").tobytes() for v in self._tokens(i)) for i in range(len(self)))
            self.layout = {**layout, "row_keys": np.array([*map(hash63, contents)], dtype=np.int64)}

    def __len__(self) -> int:
        return self.layout["row_firsts"].size

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = index if isinstance(index, tuple) else (None, index)
        empty = (np.zeros(0, np.int64),) * 3
        tokens, key = (empty, 0) if i == EMPTY_ROW else (self._tokens(i), int(self.layout["row_keys"][i]))
        names = "input_ids", "loss_mask", "document_ids"
        row: dict[str, Any] = {n: torch.from_numpy(values) for n, values in zip(names, tokens, strict=True)}
        row["row_key"] = key
        return row if epoch is None else {**row, "epoch": epoch}

    def fingerprint(self) -> str:
        """sha256 over all sequences' keys in order, in hex: the same where and only where the sequences are."""
        return hashlib.sha256(self.layout["row_keys"].astype("<i8").tobytes()).hexdigest()

    def limit(self, max_rows: int | None) -> "PackedRows":
        """At most `max_rows` of these, in order, without a copy: those of the lowest keys, since the first ones are
        no fair sample (packing sorts by length).
        """
        chosen = np.sort(np.argsort(self.layout["row_keys"], kind="stable")[:max_rows])
        layout = {n: v[chosen] if n.startswith("row") else v for n, v in self.layout.items()}
        return PackedRows(self._store, layout)

    def _tokens(self, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, mask and document ids: int64 [n] each."""
        first, last = (int(self.layout[name][sequence]) for name in ("row_firsts", "row_ends"))
        starts, lengths = (self.layout[name][first:last] for name in ("piece_starts", "piece_lengths"))
        pieces = [slice(start, start + length) for start, length in zip(starts.tolist(), lengths.tolist())]
        ids, mask = (np.concatenate([values[piece] for piece in pieces], dtype=np.int64) for values in self._store)
        return ids, mask, np.repeat(np.arange(last - first), lengths)


def pack_table(
    table: Documents, times_D: np.ndarray, max_length: int, pack: bool = True
) -> tuple[PackedRows, PackReport]:
    """Put documents, each as often as `times_D` (int64) says, into sequences of at most `max_length` tokens; none is lost.

    Longer documents are cut into pieces of `max_length`, each from then on a document of its own. The first token of a
    later piece keeps its loss mask, but like every first token it is no drafter row (`lost_at_splits`). With `pack`,
    the longest piece comes first, each in the fullest sequence that has room for it; without, each piece is a sequence.
    C: copies of documents, P: pieces.
    """
    mask_n = table.store.mask_n
    document_C = np.repeat(np.arange(times_D.size), times_D)
    pieces_C = -(-table.lengths_D[document_C] // max_length)
    document_P = np.repeat(document_C, pieces_C)
    offset_P = max_length * (np.arange(document_P.size) - np.repeat(pieces_C.cumsum() - pieces_C, pieces_C))
    start_P = table.starts_D[document_P] + offset_P
    length_P = np.minimum(table.lengths_D[document_P] - offset_P, max_length)
    sequences = _best_fit_decreasing(length_P, max_length) if pack else [[piece] for piece in range(length_P.size)]
    placed = np.array([piece for sequence in sequences for piece in sequence], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    layout = {"piece_starts": start_P[placed], "piece_lengths": length_P[placed]}
    layout |= {"row_firsts": offsets[:-1], "row_ends": offsets[1:]}
    tokens, firsts_P = int(length_P.sum()), mask_n[start_P].astype(np.int64)
    learned_D = np.add.reduceat(mask_n, table.starts_D, dtype=np.int64) if times_D.size else times_D
    report = PackReport(
        documents=document_C.size,
        pieces=length_P.size,
        split_documents=int((pieces_C > 1).sum()),
        rows=len(sequences),
        tokens=tokens,
        supervised=int((learned_D * times_D).sum() - firsts_P.sum()),
        lost_at_splits=int(firsts_P[offset_P > 0].sum()),
        fill=tokens / (len(sequences) * max_length) if sequences else 0.0,
    )
    return PackedRows(table.store, layout), report


def _best_fit_decreasing(length_P: np.ndarray, capacity: int) -> list[list[int]]:
    """Pieces by sequence: the longest first, each where the least space remains."""
    sequences: list[list[int]] = []
    spaces: list[int] = []  # ascending: the amounts of space that any sequence has left
    sequences_with: dict[int, list[list[int]]] = {}  # those sequences, by space
    order = np.argsort(-length_P, kind="stable")
    for piece, length in zip(order.tolist(), length_P[order].tolist()):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            sequence, space = list[int](), capacity
            sequences.append(sequence)
        else:
            space = spaces[at]
            sequence = sequences_with[space].pop()
            if not sequences_with[space]:
                del sequences_with[space], spaces[at]
        sequence.append(piece)
        space -= length
        if space not in sequences_with:
            insort(spaces, space)
            sequences_with[space] = []
        sequences_with[space].append(sequence)
    return sequences


def count_supervised(documents: Documents, times_D: np.ndarray, vocab_size: int) -> Tensor:
    """int64 [V]: how often each token occurs with a loss mask of 1, documents counted as often as `times_D` says."""
    store, starts_D, counts_V = documents.store, documents.starts_D, np.zeros(vocab_size, np.int64)
    for first in range(0, store.ids_n.size, _CHUNK_TOKENS):
        ids_n = store.ids_n[first : first + _CHUNK_TOKENS]
        document_n = np.searchsorted(starts_D, np.arange(first, first + ids_n.size), side="right") - 1
        weights_n = store.mask_n[first : first + _CHUNK_TOKENS] * times_D[document_n]
        counts_V += np.bincount(ids_n, weights_n, vocab_size).astype(np.int64)  # float64 is exact up to 2**53
    return torch.from_numpy(counts_V)


class TrainingData(NamedTuple):
    """Sequences to train on and sequences to evaluate on."""

    train_rows: PackedRows  # every sequence of an epoch
    eval_rows: PackedRows  # may be empty
    counts_V: Tensor  # int64 [V]: how often each of the target's tokens is supervised in train_rows
    report: PackReport  # of train_rows
    lines: list[str]  # what was read, skipped and packed


def make_data(encoder: Encoder, found: dict[str, SourceReport], folder: Path | None = None) -> TrainingData:
    """Read and pack what is trained on and held out. `folder`: for the tokens (None: memory). ValueError: a mistake."""
    data, tables, lines = encoder.data, {}, list[str]()
    for role, report in found.items():
        tables[role] = store_documents(read_documents(report, encoder), folder and folder / role)
        lines.append(f"data: {report.describe()}")
    table = tables["sources"]
    # Weight 2.25 is twice, and a third time for the quarter of the documents that their keys choose (by other bytes than
    # those that hold documents out).
    times_D = table.weights_D.astype(np.int64) + _lies_below(table.keys_D32[:, 8:16], table.weights_D % 1)
    if "eval_sources" in tables:
        eval_table = tables["eval_sources"]
        eval_times_D = np.ones_like(eval_table.lengths_D)
        held_out = {key.tobytes() for key in eval_table.keys_D32}
        is_out_D = np.array([key.tobytes() in held_out for key in table.keys_D32], dtype=bool)
        if in_both := int(is_out_D.sum()):
            lines.append(f"data: {in_both} documents of data.sources are in data.eval_sources too: not trained on")
    else:
        is_out_D = held_out_documents(table.keys_D32, data.eval_fraction)
        usable = np.flatnonzero((times_D > 0) & (table.lengths_D > 1))
        if data.eval_fraction > 0 and usable.size > 1 and not is_out_D.any():
            # Small data are evaluated, too: on the document that a larger fraction would hold out first.
            is_out_D[min(usable, key=lambda d: table.keys_D32[d].tobytes())] = True
        eval_table, eval_times_D = table, is_out_D.astype(np.int64)
    times_D[is_out_D] = 0
    train_rows, packed = pack_table(table, times_D, data.max_length, data.pack)
    if packed.supervised == 0:
        others = f"{int(is_out_D.sum())} of {is_out_D.size} are held out, others not taken by their source's weight"
        raise ValueError(f"nothing to learn from in the {packed.documents} documents to train on; {others}")
    eval_rows, eval_report = pack_table(eval_table, eval_times_D, data.max_length, data.pack)
    lines += [f"train: {packed.describe()}"] + [f"held out: {eval_report.describe()}"] * (len(eval_rows) > 0)
    counts_V = count_supervised(table, times_D, encoder.vocab_size)
    return TrainingData(train_rows, eval_rows, counts_V, packed, lines)
