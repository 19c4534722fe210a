"""CODCollator: rows of tokens in, fixed-shape COD-flattened batches with segment ids out.

Imports torch alone. B: rows of a batch, L: columns (max_length), S: segments, C: elements per segment, T: elements of a
row, N = S * C, K: depths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.cod import (
    Boundaries,
    assign_cod_segments,
    balanced_boundaries,
    hash63,
    sample_packed_row,
    seeded,
    segment_capacity,
    segments_of,
)

Row = Mapping[str, Any]


@dataclass(eq=False)
class CODCollator:
    """Turn rows into one batch whose shapes and dtypes never change.

    A row is a mapping with
        input_ids: n <= max_length token ids (list or 1-D tensor), or a list of such: several documents.
        loss_mask: 0/1 for each id, 1 on the tokens to learn from (nested as input_ids is). Without it,
        labels: input_ids, unshifted, -100 on tokens not to learn from.
        attention_mask (optional): 0/1 for each id, 0 on padding (nested as input_ids is).
        document_ids (optional): one int for each id, equal for neighbours of one document, negative for padding.
        row_key (optional): int or str that names the row; without it, a hash of its ids.
        epoch (optional): overrides `set_epoch`, for samplers that know it.

    A batch is a plain dict of tensors:
        input_ids    int64 [B, L]  unshifted, padded with pad_token_id
        position_ids int64 [B, L]  restarting at 0 with every document, 0 on padding
        document_ids int64 [B, L]  0, 1, ... within a row, -1 on padding
        anchor       int64 [B, N]  column of the element's depth-0 ancestor (0 on padding)
        depth        int64 [B, N]  -1 on padding
        segment_ids  int64 [B, N]  ascending: segment s lies in columns s * C to (s + 1) * C
        supervised   bool  [B, N]  whether the element has a loss
        supervised_per_depth  int64 [B, K]  how many of each depth do
        row_key      int64 [B]
    Within a segment: depth-0 elements by anchor, then every rollout contiguous by depth, then padding.

    The draw of a row depends on (seed, epoch, row key) alone, never on the batch, the worker or the rank.

    Args:
        max_length: L. Longer rows are a ValueError: the data set splits rows, the collator never does.
        num_depths, down_sample_ratio, down_sample_ratio_min: see `generate_cod_sample_indices`.
        num_segments: S in 1..max_length.
        boundaries: "balanced" (cut by element count) or "uniform" (Algorithm 1 as published).
        seed: any int.
        pad_token_id: fills input_ids after a sequence's end; never read by an element.
        capacity_multiple: C is rounded up to a multiple of this: of 128 for CUDA, whose attention works in such blocks.
        max_anchors: rollouts start at no more than this many anchors of a row, drawn for each epoch; None: at all.
    """

    max_length: int
    num_depths: int = 8
    down_sample_ratio: float = 0.7
    down_sample_ratio_min: float = 0.2
    num_segments: int = 1
    boundaries: Boundaries = "balanced"
    seed: int = 0
    pad_token_id: int = 0
    capacity_multiple: int = 1
    max_anchors: int | None = None

    def __post_init__(self) -> None:
        self._draw = (self.num_depths, self.down_sample_ratio, self.down_sample_ratio_min)
        C = segment_capacity(self.max_length, *self._draw, self.num_segments, self.boundaries, self.max_anchors)
        self.capacity = -(-C // self.capacity_multiple) * self.capacity_multiple
        # Shared memory: set_epoch reaches workers that live on (persistent_workers).
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Rows collated from now on draw for this epoch. Call it before iterating over the DataLoader."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        if len(rows) == 0:
            raise ValueError("CODCollator was given no rows; a batch has at least 1")
        collated = [self._collate_row(row) for row in rows]
        return {name: torch.stack([row[name] for row in collated]) for name in collated[0]}

    def _collate_row(self, row: Row) -> dict[str, Tensor]:
        ids_n, mask_n, documents_n = _read_row(row)
        length, L = ids_n.numel(), self.max_length
        if length > L:
            raise ValueError(
                f"row {row.get('row_key', '?')} has {length} tokens but max_length is {L}: split rows in the data set, or"
                " raise max_length"
            )
        key = row.get("row_key")
        if key is None:
            key = hash63(ids_n.numpy().tobytes())
        elif isinstance(key, str):
            key = hash63(key.encode())

        def padded(values_n: Tensor, fill: int) -> Tensor:
            return torch.cat([values_n, values_n.new_full((L - length,), fill)])

        documents_L, position_L = _number_documents(padded(documents_n, -1))
        mask_L = padded(mask_n, 0)
        generator = seeded(self.seed, int(row.get("epoch", self.epoch)), int(key))
        anchor_T, depth_T = sample_packed_row(mask_L, documents_L, *self._draw, generator, self.max_anchors)
        if self.boundaries == "uniform":
            segment_T = assign_cod_segments(anchor_T, depth_T, L, self.num_segments)
        else:
            bounds = balanced_boundaries(anchor_T, depth_T, L, self.num_segments, self.capacity)
            segment_T = segments_of(anchor_T, depth_T, bounds)
        supervised_T = (depth_T > 0) | (mask_L[anchor_T + 1] != 0)

        # One integer that sorts by segment, then depth-0 before rollouts, then anchor, then depth.
        order_key_T = (segment_T * 2 + (depth_T > 0)) * L + anchor_T
        order_T = (order_key_T * self.num_depths + depth_T).argsort()
        counts_S = torch.bincount(segment_T, minlength=self.num_segments)
        assert int(counts_S.max()) <= self.capacity, "a segment holds more elements than its static capacity"
        sorted_segment_T = segment_T[order_T]
        first_S = counts_S.cumsum(0) - counts_S
        slot_T = sorted_segment_T * self.capacity + torch.arange(order_T.numel()) - first_S[sorted_segment_T]

        def placed(values_T: Tensor, fill: int) -> Tensor:
            out_N = values_T.new_full((self.num_segments * self.capacity,), fill)
            out_N[slot_T] = values_T[order_T]
            return out_N

        return {
            "input_ids": padded(ids_n, self.pad_token_id),
            "position_ids": position_L,
            "document_ids": documents_L,
            "anchor": placed(anchor_T, 0),
            "depth": placed(depth_T, -1),
            "segment_ids": torch.arange(self.num_segments).repeat_interleave(self.capacity),
            "supervised": placed(supervised_T, False),
            "supervised_per_depth": torch.bincount(depth_T[supervised_T], minlength=self.num_depths),
            "row_key": torch.tensor(int(key)),
        }


def _read_row(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and documents of a row, each [n], ids and documents int64; ValueError names what is wrong."""
    mask_name = "labels" if "labels" in row and row.get("loss_mask") is None else "loss_mask"
    for name in ("input_ids", mask_name):
        if row.get(name) is None:
            has = f"it has {', '.join(map(repr, row)) or 'no fields'}"
            raise ValueError(
                f"a row has no {name!r}; {has} (a Trainer removes some unless remove_unused_columns=False)"
            )
    first = row["input_ids"][:1]
    is_nested = isinstance(first, (list, tuple)) and any(torch.as_tensor(part).dim() for part in first)
    if is_nested and row.get("document_ids") is not None:
        raise ValueError("a row gives several documents (nested input_ids) and document_ids: give one of the two")
    given: dict[str, Tensor] = {}
    lengths: list[int] = []
    for name in ("input_ids", mask_name, "attention_mask", "document_ids"):
        if row.get(name) is not None:
            parts = [_integers(name, part) for part in (row[name] if is_nested else [row[name]])]
            found = [part.numel() for part in parts]
            lengths = lengths or found
            if found != lengths:
                raise ValueError(f"a row's input_ids have lengths {lengths}, its {name} {found}: they must match")
            given[name] = torch.cat(parts)
    ids_n, mask_n = given["input_ids"], given[mask_name]
    if mask_name == "labels":
        is_learned_n = mask_n != -100
        if (is_learned_n & (mask_n != ids_n)).any():
            raise ValueError("labels differ from input_ids: give the same ids, unshifted, or -100")
        mask_n = is_learned_n.long()
    for name, values_n in ((mask_name, mask_n), ("attention_mask", given.get("attention_mask"))):
        if values_n is not None and ((values_n != 0) & (values_n != 1)).any():
            raise ValueError(f"{name} holds values other than 0 and 1")
    documents_n = given.get("document_ids")
    if documents_n is None:
        documents_n = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    if "attention_mask" in given:
        documents_n = documents_n.masked_fill(given["attention_mask"] == 0, -1)
    return ids_n, mask_n, documents_n


def _integers(name: str, values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.dim() != 1 or tensor.is_floating_point():
        is_now = f"not {tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be a list of ints, or as many such lists as input_ids has, {is_now}")
    return tensor.to("cpu", torch.int64)


def _number_documents(given_L: Tensor) -> tuple[Tensor, Tensor]:
    """Documents numbered 0, 1, ... by runs of equal ids, so that an id used twice names two documents, and positions
    within them; ids below 0 are padding: document -1, position 0.
    """
    is_token_L, column_L = given_L >= 0, torch.arange(given_L.numel())
    is_start_L = torch.ones_like(is_token_L)
    is_start_L[1:] = given_L[1:] != given_L[:-1]
    number_L = (is_start_L & is_token_L).cumsum(0) - 1
    start_L = torch.where(is_start_L, column_L, 0).cummax(0).values
    return torch.where(is_token_L, number_L, -1), torch.where(is_token_L, column_L - start_L, 0)
