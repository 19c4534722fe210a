"""The host's view of a batch: which slices a step's passes run over, known before anything moves to the device.

Computed from the collator's CPU tensors, so that nothing on the step's path waits for the device. B: rows, S: segments,
C: capacity, n: own elements of a segment without its padding, K: depths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peagle_train.core.visibility import GRID

SIZES = 8
"""A static plan's passes have at most this many sizes: a graph is compiled for each one that occurs."""
SIZE_STEP = 128
"""They are multiples of this, flex attention's block, but for the capacity itself."""


@dataclass
class Segment:
    """One segment of a batch; everything but tensors is a Python int."""

    columns: slice
    """Own elements in the flat batch; padding after the fullest row's is left out, in a static plan what is beyond the
    next of its sizes."""
    num_depth0: int
    """M: own slots from here on hold no depth-0 element in any row."""
    first_rollout: int
    """Own slots before this hold no deeper element in any row."""
    num_context: int
    """P: columns before the segment, of the row that has most."""
    context_end: Tensor
    """int64 [B]: columns before the segment, row by row."""
    supervised: Tensor
    """int64 [m]: own supervised elements, as b * n + i."""
    anchors: slice
    """Columns that hold every own anchor."""
    labels: slice
    """Columns that hold every own label."""
    earliest: Tensor
    """int64 [B]: first column that any own element reads the keys of."""
    latest: Tensor
    """int64 [B]: last own depth-0 anchor, -1 if there is none."""

    @property
    def num_elements(self) -> int:
        return self.columns.stop - self.columns.start


@dataclass
class Plan:
    segments: list[Segment]
    """Those that hold an element, in order."""
    num_supervised: int
    supervised_per_depth: Tensor
    """int64 [K]"""
    num_elements: int
    """Of all rows."""
    row_length: int
    """L"""
    capacity: int
    """C"""
    columns_read: int
    """Columns that elements read: features and last hidden states must reach at least so far."""
    token_ids: Tensor
    """int64, the tokens of all documents."""
    static: bool = False
    """Whether sizes are the same few for every batch (see `plan_segments`)."""
    pad_context: bool = False

    @property
    def num_depths(self) -> int:
        """K"""
        return self.supervised_per_depth.numel()

    @property
    def num_slots(self) -> int:
        """Of all segments and rows: elements and padding."""
        return sum(s.num_elements * s.latest.numel() for s in self.segments)


def padding_share(plans: Sequence[Plan]) -> float:
    """Share of the slots of these plans' passes that hold no element."""
    slots = sum(plan.num_slots for plan in plans)
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
    batch: dict[str, Tensor], num_depths: int | None = None, static: bool = False, pad_context: bool | None = None
) -> Plan:
    """Read a collator's batch (on CPU; a batch on a device is copied back first, which waits for it).

    Args:
        num_depths: K, for batches made by hand; a collator's batch knows its own. ValueError if the two differ.
        static: sizes are few whatever the data, own elements being padded to the next `pass_size`, the context to a
            multiple of `GRID` columns; else only what exists is run.
        pad_context: pad the context to L instead, which compiled drafters need; None: if static.
    """
    pad_context = static if pad_context is None else pad_context
    names = ("anchor", "depth", "supervised", "segment_ids", "position_ids", "input_ids", "document_ids")
    anchor, depth, supervised, segment_ids, position, ids, documents = (batch[name].cpu() for name in names)
    num_depths = _num_depths(batch, int(depth.max()) + 1, num_depths)
    B, L = position.shape
    num_segments = int(segment_ids[0, -1]) + 1
    capacity = anchor.shape[1] // num_segments
    shape = (B, num_segments, capacity)
    anchor_BSC, depth_BSC, supervised_BSC = anchor.view(shape), depth.view(shape), supervised.view(shape)
    start_BSC = anchor_BSC - position.gather(1, anchor).view(shape)

    is_depth0 = depth_BSC == 0
    n_S = (depth_BSC >= 0).sum(-1).amax(0).tolist()
    num_depth0_BS = is_depth0.sum(-1)
    # A row without rollouts in a segment still must not let others' rollouts count as its depth-0 slots.
    latest_BS = torch.where(is_depth0, anchor_BSC, -1).amax(-1)
    context_end_BS = torch.cat([torch.zeros(B, 1, dtype=torch.int64), latest_BS.cummax(1).values[:, :-1] + 1], dim=1)
    earliest_BS = torch.where(depth_BSC >= 0, start_BSC, L).amin(-1)

    def padded(context: int) -> int:
        if pad_context:
            return L if num_segments > 1 else 0
        return min(-(-context // GRID) * GRID, L) if static else context

    segments = []
    for s in range(num_segments):
        n = n_S[s]
        if n == 0:
            continue
        own_anchor, own_depth = anchor_BSC[:, s, :n], depth_BSC[:, s, :n]
        real_anchor = own_anchor[own_depth >= 0]
        last_position = int((own_anchor + own_depth)[own_depth >= 0].max())
        size = pass_size(n, capacity, num_segments) if static else n
        segments.append(
            Segment(
                columns=slice(s * capacity, s * capacity + size),
                num_depth0=min(size, L) if static else int(num_depth0_BS[:, s].max()),
                first_rollout=0 if static else min(int(num_depth0_BS[:, s].min()), n),
                num_context=padded(int(context_end_BS[:, s].max())),
                context_end=context_end_BS[:, s],
                supervised=supervised_BSC[:, s, :size].flatten().nonzero().flatten(),
                anchors=slice(int(real_anchor.min()), int(real_anchor.max()) + 1),
                labels=slice(int(real_anchor.min()) + 1, min(last_position + 2, L)),
                earliest=earliest_BS[:, s],
                latest=latest_BS[:, s],
            )
        )
    per_depth = torch.bincount(depth[supervised], minlength=num_depths)
    columns_read = max((s.labels.stop for s in segments), default=0)
    token_ids = ids[documents >= 0]
    return Plan(
        segments=segments,
        num_supervised=int(supervised.sum()),
        supervised_per_depth=per_depth,
        num_elements=int((depth >= 0).sum()),
        row_length=L,
        capacity=capacity,
        columns_read=columns_read,
        token_ids=token_ids,
        static=static,
        pad_context=pad_context,
    )


def _num_depths(batch: dict[str, Tensor], deepest: int, given: int | None) -> int:
    known = batch["supervised_per_depth"].shape[1] if "supervised_per_depth" in batch else given or deepest
    if given not in (None, known) or known < deepest:
        raise ValueError(
            f"num_depths is {given}, but the batch is of {max(known, deepest)} depths: leave num_depths out"
        )
    return known
