"""The host's view of a batch: which slices a step's passes run over, known before anything moves to the device.

Computed from the collator's CPU tensors, so that nothing on the step's path waits for the device. Segments and ends of
segments that no supervised element reaches are left out; through D layers with a window of N positions it reaches
D * (N - 1) columns back. B: rows, L: columns, S: segments, C: capacity, n: own elements of a segment, K: depths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peagle_train.core.visibility import GRID, first_seen

SIZES = 8
"""A static plan's passes have at most this many sizes: a graph is compiled for each one that occurs."""
SIZE_STEP = 128
"""They are multiples of this, flex attention's block, but for the capacity itself."""


class Context(NamedTuple):
    """Columns whose depth-0 elements a pass reads: in each row `columns` from `first` on, those before `end`."""

    first: Tensor
    """int64 [B]"""
    end: Tensor
    """int64 [B]"""
    columns: int
    """P"""


@dataclass
class Segment:
    """One segment of a batch; everything but tensors is a Python int."""

    columns: slice
    """Own elements in the flat batch; what no row needs is left out at both ends, in a static plan what is beyond the next
    of its sizes."""
    num_depth0: int
    """M: own slots from here on hold no depth-0 element in any row."""
    first_rollout: int
    """Own slots before this hold no deeper element in any row."""
    context_end: Tensor
    """int64 [B]: columns before the segment, row by row."""
    reads_from: Tensor
    """int64 [B]: its needed elements read no reached column before this one; L if none is needed."""
    supervised: Tensor
    """int64 [m]: own supervised elements, as b * n + i."""
    anchors: slice
    """Columns that hold every own anchor."""

    @property
    def num_elements(self) -> int:
        return self.columns.stop - self.columns.start


@dataclass
class Plan:
    segments: list[Segment]
    """Those that hold a supervised element, or one that such an element reaches, in order."""
    num_supervised: int
    supervised_per_depth: Tensor
    """int64 [K]"""
    num_elements: int
    """Of all rows, in all segments' slices."""
    row_length: int
    """L"""
    capacity: int
    """C"""
    columns_read: int
    """Features and last hidden states must reach at least so far: to the last supervised element's label."""
    read: Tensor
    """bool [L]: columns that segments to their right read in some row, through all layers."""
    token_ids: Tensor
    """int64, the tokens of all documents."""
    window: int | None
    static: bool
    """Whether sizes are the same few for every batch (see `plan_segments`)."""
    pad_context: bool

    @property
    def num_depths(self) -> int:
        """K"""
        return self.supervised_per_depth.numel()

    @property
    def learning(self) -> list[Segment]:
        """The segments that own a supervised element."""
        return [s for s in self.segments if s.supervised.numel()]

    def most_context(self, layers: int = 1) -> int:
        """Columns that a pass's context has at most, in any batch: what `layers` layers can reach."""
        if self.window is None:
            return self.row_length
        most = layers * (self.window - 1)
        return min(-(-most // GRID) * GRID if self.static else most, self.row_length)

    def context(self, end: Tensor, reads_from: Tensor, layers: int = 1) -> Context:
        """The context of a pass.

        Args:
            end: int64 [B], the context ends before it. reads_from: int64 [B], nothing before it is read.
            layers: that read through the context: 1 where it is keys and values, all where it is run again.
        """
        P = max(0, int((end - reads_from).max()))
        if self.static:
            P = -(-P // GRID) * GRID
        P = self.most_context(layers) if self.pad_context else min(P, self.most_context(layers))
        return Context((end - P).clamp(min=0), end, P)


def padding_share(plans: Sequence[Plan]) -> float:
    """Share of the slots of these plans' passes that hold no element."""
    slots = sum(s.num_elements * s.context_end.numel() for plan in plans for s in plan.segments)
    return 1 - sum(plan.num_elements for plan in plans) / slots if slots else 0.0


def pass_size(num_elements: int, capacity: int, num_segments: int) -> int:
    """Slots of a static pass: the next of a few sizes, the fewer the more segments there are, so that the last segment of a
    row, the only one that balanced boundaries do not fill, is padded by no more than a sixteenth of the most elements that
    a row can have (an eighth where there is one segment).
    """
    sizes = min(SIZES, max(1, 2 * SIZES // num_segments))
    step = -(-capacity // (sizes * SIZE_STEP)) * SIZE_STEP
    return min(-(-num_elements // step) * step, capacity)


def plan_segments(
    batch: dict[str, Tensor],
    static: bool = False,
    pad_context: bool | None = None,
    window: int | None = None,
    layers: int = 1,
) -> Plan:
    """Read a collator's batch (on CPU; a batch on a device is copied back first, which waits for it).

    Args:
        static: sizes are few whatever the data, own elements being padded to the next `pass_size`, the context to a
            multiple of `GRID` columns; else only what exists is run.
        pad_context: pad the context to the most that it can be, which compiled drafters need; None: if static.
        window, layers: the drafter's `sliding_window` and `num_hidden_layers`.
    """
    pad_context = static if pad_context is None else pad_context
    names = ("anchor", "depth", "supervised", "segment_ids", "position_ids", "input_ids", "document_ids")
    anchor, depth, supervised, segment_ids, position, ids, documents = (batch[name].cpu() for name in names)
    num_depths = batch["supervised_per_depth"].shape[1]
    B, L = position.shape
    num_segments = int(segment_ids[0, -1]) + 1
    capacity = anchor.shape[1] // num_segments
    shape = (B, num_segments, capacity)
    anchor_BSC, depth_BSC, supervised_BSC = anchor.view(shape), depth.view(shape), supervised.view(shape)

    # Through D layers a window of N reaches as far back as one of D * (N - 1) + 1 does through one.
    through = None if window is None else layers * (window - 1) + 1
    reached_from = first_seen(anchor - position.gather(1, anchor), anchor, depth, through)
    none, one = torch.zeros(B, L + 1, dtype=torch.int64), supervised.long()
    begin_BL, end_BL = (none.scatter_add(1, at, one)[:, :L] for at in (reached_from, anchor + 1))
    reaching_BL = (begin_BL - end_BL).cumsum(1)  # supervised elements that reach a column
    is_reached_BL = reaching_BL > 0
    is_needed_BSC = (supervised | (depth == 0) & is_reached_BL.gather(1, anchor)).view(shape)

    # The first column of a run: nobody reaches both it and the one before.
    is_first_BL = is_reached_BL & (reaching_BL == begin_BL)
    run_BL = torch.where(is_first_BL, torch.arange(L), 0).cummax(1).values
    reads_from_BS = torch.where(is_needed_BSC, run_BL.gather(1, anchor).view(shape), L).amin(-1)

    latest_BS = torch.where(depth_BSC == 0, anchor_BSC, -1).amax(-1)
    context_end_BS = torch.cat([torch.zeros(B, 1, dtype=torch.int64), latest_BS.cummax(1).values[:, :-1] + 1], dim=1)
    column_L, from_BS1, end_BS1 = torch.arange(L), reads_from_BS[:, :, None], context_end_BS[:, :, None]
    read_BL = is_reached_BL & ((column_L >= from_BS1) & (column_L < end_BS1)).any(1)

    first_S = torch.where(is_needed_BSC, torch.arange(capacity), capacity).amin((0, 2)).tolist()
    stop_S = (depth_BSC >= 0).sum(-1).amax(0).tolist()
    segments = []
    for s, (first, stop) in enumerate(zip(first_S, stop_S, strict=True)):
        if first == capacity:
            continue
        if static:
            size = pass_size(stop - first, capacity, num_segments)
            first = min(first, capacity - size)
            stop = first + size
        own_anchor, own_depth = anchor_BSC[:, s, first:stop], depth_BSC[:, s, first:stop]
        real_anchor = own_anchor[own_depth >= 0]
        num_depth0_B = (own_depth == 0).sum(-1)
        segments.append(
            Segment(
                columns=slice(s * capacity + first, s * capacity + stop),
                num_depth0=min(stop - first, L) if static else int(num_depth0_B.max()),
                first_rollout=0 if static else int(num_depth0_B.min()),
                context_end=context_end_BS[:, s],
                reads_from=reads_from_BS[:, s],
                supervised=supervised_BSC[:, s, first:stop].flatten().nonzero().flatten(),
                anchors=slice(int(real_anchor.min()), int(real_anchor.max()) + 1),
            )
        )
    labels = (anchor + depth + 1)[supervised]
    return Plan(
        segments=segments,
        num_supervised=labels.numel(),
        supervised_per_depth=torch.bincount(depth[supervised], minlength=num_depths),
        num_elements=sum(int((depth[:, s.columns] >= 0).sum()) for s in segments),
        row_length=L,
        capacity=capacity,
        columns_read=int(labels.max()) + 1 if labels.numel() else 0,
        read=read_BL.any(0),
        token_ids=ids[documents >= 0],
        window=window,
        static=static,
        pad_context=pad_context and num_segments > 1,
    )
