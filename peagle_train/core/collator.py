"""CODCollator: rows of tokens in, fixed-shape COD-flattened batches with segment ids out.

Imports torch alone. B: rows of a batch, L: columns (max_length), S: segments, C: elements per segment, T: elements of a
row, N = S * C, K: depths.
"""

import logging
from collections.abc import Mapping, Sequence
from numbers import Number
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

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
_KNOWN = ("features", "last_hidden")


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
        features, last_hidden (optional, floats [n, ...]): the target's, where they are known; the batch then holds them as
            [B, L, ...], in their dtype, zeros on padding.

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

    def __init__(
        self,
        max_length: int,
        num_depths: int = 8,
        down_sample_ratio: float = 0.7,
        down_sample_ratio_min: float = 0.2,
        num_segments: int = 1,
        boundaries: Boundaries = "balanced",
        seed: int = 0,
        pad_token_id: int = 0,
        capacity_multiple: int = 1,
        max_anchors: int | None = None,
    ) -> None:
        self.max_length = max_length
        self.num_depths = num_depths
        self.down_sample_ratio = down_sample_ratio
        self.down_sample_ratio_min = down_sample_ratio_min
        self.num_segments = num_segments
        self.boundaries = boundaries
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.max_anchors = max_anchors
        capacity = segment_capacity(
            max_length, num_depths, down_sample_ratio, down_sample_ratio_min, num_segments, boundaries, max_anchors
        )
        self.capacity = -(-capacity // capacity_multiple) * capacity_multiple
        # Shared memory: set_epoch reaches workers that live on (persistent_workers), and what others saw is kept.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._first_key = torch.zeros(2, dtype=torch.int64).share_memory_()
        """[key of the epoch's first row; 0: none yet, 1: known, 2: warned about]"""

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Rows collated from now on draw for this epoch. Call it before iterating over the DataLoader."""
        self._epoch.fill_(epoch)
        self._first_key[1] &= 2

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        if len(rows) == 0:
            raise ValueError("CODCollator was given no rows; a batch has at least 1")
        collated = [self._collate_row(row) for row in rows]
        batch = {name: torch.stack([row[name] for row in collated]) for name in collated[0]}
        if not any("epoch" in row for row in rows):
            self._notice_second_pass(batch["row_key"])
        return batch

    def _notice_second_pass(self, key_B: Tensor) -> None:
        """Warn, once, where the epoch's first row comes again: `set_epoch` was forgotten."""
        first_key, state = self._first_key.tolist()
        if state == 0:
            self._first_key[:] = torch.tensor([int(key_B[0]), 1])
        elif state == 1 and bool((key_B == first_key).any()):
            self._first_key[1] = 2
            logger.warning(
                "row %d came again in epoch %d and was drawn as before: call the collator's set_epoch before each pass",
                first_key,
                self.epoch,
            )

    def _collate_row(self, row: Row) -> dict[str, Tensor]:
        ids_n, mask_n, documents_n = _read_row(row)
        length = ids_n.numel()
        if length > self.max_length:
            raise ValueError(
                f"row {row.get('row_key', '?')} has {length} tokens but max_length is {self.max_length}: split rows in"
                " the data set, or raise max_length"
            )
        key = _row_key(row.get("row_key"), ids_n)

        def padded(values_n: Tensor, fill: int) -> Tensor:
            out_L = torch.full((self.max_length,), fill, dtype=torch.int64)
            out_L[:length] = values_n
            return out_L

        documents_L = padded(documents_n, -1)
        mask_L = padded(mask_n, 0)
        anchor_T, depth_T = sample_packed_row(
            mask_L,
            documents_L,
            self.num_depths,
            self.down_sample_ratio,
            self.down_sample_ratio_min,
            seeded(self.seed, int(row.get("epoch", self.epoch)), key),
            self.max_anchors,
        )
        segment_T = self._segments(anchor_T, depth_T)
        supervised_T = (depth_T > 0) | (mask_L[anchor_T + 1] != 0)

        # One integer that sorts by segment, then depth-0 before rollouts, then anchor, then depth.
        order_key_T = (segment_T * 2 + (depth_T > 0)) * self.max_length + anchor_T
        order_T = (order_key_T * self.num_depths + depth_T).argsort()
        counts_S = torch.bincount(segment_T, minlength=self.num_segments)
        assert int(counts_S.max()) <= self.capacity, "a segment holds more elements than its static capacity"
        sorted_segment_T = segment_T[order_T]
        first_S = counts_S.cumsum(0) - counts_S
        slot_T = sorted_segment_T * self.capacity + torch.arange(order_T.numel()) - first_S[sorted_segment_T]

        def placed(values_T: Tensor, fill: int | bool, dtype: torch.dtype) -> Tensor:
            out_N = torch.full((self.num_segments * self.capacity,), fill, dtype=dtype)
            out_N[slot_T] = values_T[order_T]
            return out_N

        known = {name: _padded_floats(name, row[name], length, self.max_length) for name in _KNOWN if name in row}
        return {
            **known,
            "input_ids": padded(ids_n, self.pad_token_id),
            "position_ids": _positions(documents_L),
            "document_ids": documents_L,
            "anchor": placed(anchor_T, 0, torch.int64),
            "depth": placed(depth_T, -1, torch.int64),
            "segment_ids": torch.arange(self.num_segments).repeat_interleave(self.capacity),
            "supervised": placed(supervised_T, False, torch.bool),
            "supervised_per_depth": torch.bincount(depth_T[supervised_T], minlength=self.num_depths),
            "row_key": torch.tensor(key, dtype=torch.int64),
        }

    def _segments(self, anchor_T: Tensor, depth_T: Tensor) -> Tensor:
        if self.boundaries == "uniform":
            return assign_cod_segments(anchor_T, depth_T, self.max_length, self.num_segments)
        bounds = balanced_boundaries(anchor_T, depth_T, self.max_length, self.num_segments, self.capacity)
        return segments_of(anchor_T, depth_T, bounds)


def _read_row(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and run-numbered documents of a row, each int64 [n]; ValueError names what is wrong."""
    mask_name = "labels" if "labels" in row and "loss_mask" not in row else "loss_mask"
    for name in ("input_ids", mask_name):
        if name not in row:
            has = f"it has {', '.join(map(repr, row)) or 'no fields'}"
            raise ValueError(
                f"a row has no {name!r}; {has} (a Trainer removes some unless remove_unused_columns=False)"
            )
    optional = [name for name in ("attention_mask", "document_ids") if row.get(name) is not None]
    is_nested = _is_nested(row["input_ids"])
    if is_nested and "document_ids" in optional:
        raise ValueError("a row gives several documents (nested input_ids) and document_ids: give one of the two")
    lengths: list[int] = []
    given: dict[str, Tensor] = {}
    for name in ("input_ids", mask_name, *optional):
        values = row[name] if is_nested else [row[name]]
        if is_nested and not (_is_nested(values) and len(values) == len(row["input_ids"])):
            raise ValueError(f"a row gives several documents (nested input_ids): {name} must be nested alike")
        parts = [_integers(name, part) for part in values]
        lengths = lengths or [part.numel() for part in parts]
        for part, length in zip(parts, lengths, strict=True):
            if part.numel() != length:
                raise ValueError(f"a row has {length} input_ids but {part.numel()} in {name}; they must match")
        given[name] = torch.cat(parts)
    ids_n, mask_n, attended_n = given["input_ids"], given[mask_name], given.get("attention_mask")
    if mask_name == "labels":
        learned_n = mask_n != -100
        if (learned_n & (mask_n != ids_n)).any():
            raise ValueError("labels differ from input_ids: give the same ids, unshifted, or -100")
        mask_n = learned_n.long()
    documents_n = given.get("document_ids")
    if documents_n is None:
        documents_n = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for name, values_n in ((mask_name, mask_n), ("attention_mask", attended_n)):
        if values_n is not None and ((values_n != 0) & (values_n != 1)).any():
            raise ValueError(f"{name} holds values other than 0 and 1")
    if attended_n is not None:
        documents_n = documents_n.masked_fill(attended_n == 0, -1)
    return ids_n, mask_n, _number_runs(documents_n)


def _is_nested(values: Any) -> bool:
    if not isinstance(values, (list, tuple)) or len(values) == 0:
        return False
    is_scalar_tensor = isinstance(values[0], Tensor) and values[0].dim() == 0
    return not is_scalar_tensor and not isinstance(values[0], Number)  # numpy's ints are Numbers, too


def _integers(name: str, values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} must be a flat list of ints, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.to("cpu", torch.int64)


def _padded_floats(name: str, values: Tensor, length: int, max_length: int) -> Tensor:
    if values.shape[0] != length:
        raise ValueError(f"a row has {length} input_ids but {values.shape[0]} in {name}; they must match")
    out = values.new_zeros(max_length, *values.shape[1:])
    out[:length] = values
    return out


def _number_runs(documents_n: Tensor) -> Tensor:
    """Documents numbered 0, 1, ... by runs of equal ids, so that an id used twice names two documents; negative: -1."""
    if documents_n.numel() == 0:
        return documents_n
    is_token_n = documents_n >= 0
    starts_n = is_token_n.clone()
    starts_n[1:] &= documents_n[1:] != documents_n[:-1]
    return torch.where(is_token_n, starts_n.cumsum(0) - 1, -1)


def _positions(documents_L: Tensor) -> Tensor:
    column_L = torch.arange(documents_L.numel())
    starts_L = torch.ones_like(documents_L, dtype=torch.bool)
    starts_L[1:] = documents_L[1:] != documents_L[:-1]
    start_L = torch.where(starts_L, column_L, 0).cummax(0).values
    return torch.where(documents_L >= 0, column_L - start_L, 0)


def _row_key(given: Any, ids_n: Tensor) -> int:
    if given is None:
        return hash63(ids_n.numpy().tobytes())
    if isinstance(given, str):
        return hash63(given.encode())
    key = int(given)
    if not -(2**63) <= key < 2**63:
        raise ValueError(f"row_key is {key}; it must fit into 64 bits")
    return key
