"""Who sees whom: the one place that states the visibility rule, and the tables that attention reads it from.

An element sees the depth-0 elements of its own document with anchor <= its own, and the elements of its own rollout
with depth <= its own; padding sees and is seen by nothing. With a window of N positions, it sees of the former only those
less than N positions before its own, anchor + depth. So a row is described by four integers: `start`, the first column
that it sees (`first_seen`), `anchor`, `depth`, and for a key whether it exists at all (depth >= 0).

B: rows of the batch, N: elements of a pass (the queries), M: of these the leading slots that hold depth-0 elements,
P: context columns (depth-0 keys computed elsewhere), K = P + N: keys, context first.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

MASK_CACHE_BYTES = 8 * 2**20
"""Masks of a pass are kept for its other layers and its backward while they are smaller than this together."""
MASK_BLOCK_BYTES = 64 * 2**20
"""No block of a dense mask is larger than this (additive, in the compute dtype)."""
QUERY_BLOCK = 512
"""Queries of a block on CPU; fewer where a block over all its keys would exceed MASK_BLOCK_BYTES."""
GRID = 64
"""In two-byte dtypes, ranges of keys and the border to the rollouts lie on multiples of this (in static plans all of them,
see `plan_segments`): the CPU's bfloat16 kernels are compiled for every shape that comes and kept, so that a run's memory
would grow with every new one."""


def first_seen(document_start: Tensor, anchor: Tensor, depth: Tensor, window: int | None) -> Tensor:
    """First column that an element sees: of its document, and with a window of N of the anchors in (a + d - N, a].

    Broadcasts, int64. N is at least the number of depths, so that a window hides nothing of the own rollout.
    """
    return document_start if window is None else torch.maximum(document_start, anchor + depth - window + 1)


def sees_context(query_start: Tensor, query_anchor: Tensor, key_anchor: Tensor, key_depth: Tensor) -> Tensor:
    """Depth-0 elements from the first that is seen to the own anchor. Broadcasts; all int64 but the bool result."""
    return (key_depth == 0) & (key_anchor >= query_start) & (key_anchor <= query_anchor)


def sees_rollout(query_anchor: Tensor, query_depth: Tensor, key_anchor: Tensor, key_depth: Tensor) -> Tensor:
    """Deeper elements of the own rollout, up to the own depth. Broadcasts. An anchor names a rollout within a row."""
    return (key_depth > 0) & (key_anchor == query_anchor) & (key_depth <= query_depth)


@dataclass
class Causal:
    """Serving's rule, for one text: an element sees all of the context, the elements in front of it, and itself.

    depth: int64 [1, N], 0 for real tokens, which come first, then a mask slot's. Knows nothing of anchors and documents.
    window: only the last so many of them, the own one included; None: all.
    """

    depth: Tensor
    window: int | None = None


@dataclass
class QueryBlock:
    """Queries [q0, q1) and the only keys that they can see: context columns, own depth-0 slots, own rollout slots."""

    q0: int
    q1: int
    context: slice
    depth0: slice
    rollout: slice
    seen: slice
    """Columns of `context` that every query sees, as those before the first query's anchor: no mask is made of them."""


@dataclass
class Visibility:
    """The visibility of one pass: N queries over P context columns and the pass's own N elements.

    start, anchor, depth: int64 [B, N]; depth -1 is padding. Columns are counted from each row's first context column.
    context_end: int64 [B]: row b's context is columns [0, context_end[b]) (a column that is no drafter row is inside
        nobody's interval, and so seen by nobody). num_context: P >= max(context_end), a Python int.
    num_depth0: M, a Python int: own slots from M on hold no depth-0 element.
    first_rollout: own slots before it hold no deeper element.
    cut: queries before it take no part in the last layer (Algorithm 1's context rows).
    flex: flex attention's tables of the pass (`FlexTables`), by the number of queries left out, where it is used.
    """

    start: Tensor
    anchor: Tensor
    depth: Tensor
    context_end: Tensor
    num_context: int
    num_depth0: int
    first_rollout: int
    num_depths: int
    cut: int = 0
    flex: dict[int, Any] = field(default_factory=dict)
    _blocks: list[QueryBlock] = field(default_factory=list)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def key_tables(self) -> tuple[Tensor, Tensor]:
        """(anchor, depth) of all K = P + N keys, int64 [B, K]; depth -1 where there is no key."""
        B = self.anchor.shape[0]
        column_P = torch.arange(self.num_context, device=self.anchor.device)
        exists_BP = column_P < self.context_end[:, None]
        anchor_BK = torch.cat([column_P.expand(B, -1), self.anchor], dim=1)
        depth_BK = torch.cat([torch.where(exists_BP, 0, -1), self.depth], dim=1)
        return anchor_BK, depth_BK

    def dense(self) -> Tensor:
        """bool [B, N, K], the whole mask at once: for small inputs, and what the other forms are compared with."""
        anchor_BK, depth_BK = self.key_tables()
        q_anchor, q_depth = self.anchor[:, :, None], self.depth[:, :, None]
        k_anchor, k_depth = anchor_BK[:, None], depth_BK[:, None]
        context = sees_context(self.start[:, :, None], q_anchor, k_anchor, k_depth)
        return (context | sees_rollout(q_anchor, q_depth, k_anchor, k_depth)) & (q_depth >= 0)

    def blocks(self, itemsize: int) -> list[QueryBlock]:
        """Cut the queries into blocks, each with the key ranges that it can see. CPU only: it reads the tables."""
        if self._blocks:
            return self._blocks
        B, N = self.anchor.shape
        keys = self.num_context + self.num_depth0 + QUERY_BLOCK + self.num_depths
        size = max(1, min(QUERY_BLOCK, MASK_BLOCK_BYTES // (B * keys * itemsize)))
        grid = GRID if itemsize == 2 else 1
        if grid > 1:
            size = size // GRID * GRID or 1 << size.bit_length() - 1
        # Depth-0 elements and rollouts see different ranges, so a block holds one kind as far as B > 1 allows it.
        border = self.first_rollout // grid * grid
        edges = sorted({0, self.cut, border, self.num_depth0, N} & set(range(N + 1)))
        starts = [q for lo, hi in pairwise(edges) for q in range(lo, hi, size)]
        is_depth0_BM = self.depth[:, : self.num_depth0] == 0
        anchor_BM = self.anchor[:, : self.num_depth0]
        nowhere = torch.iinfo(torch.int64).max
        for q0, q1 in pairwise([*starts, N]):
            real = self.depth[:, q0:q1] >= 0
            lo = int(torch.where(real, self.start[:, q0:q1], nowhere).min())
            hi = int(torch.where(real, self.anchor[:, q0:q1], -1).max()) + 1
            seen_M = (is_depth0_BM & (anchor_BM >= lo) & (anchor_BM < hi)).any(0).nonzero().flatten()
            depth0 = slice(0, 0)
            if seen_M.numel():
                depth0 = _on_grid(int(seen_M[0]), int(seen_M[-1]) + 1, self.num_depth0, grid)
            context = _on_grid(min(lo, self.num_context), min(hi, self.num_context), self.num_context, grid)
            # A rollout is contiguous, so its elements lie at most K - 2 slots before the query.
            rollout = _on_grid(max(self.first_rollout, q0 - self.num_depths + 2), q1, N, grid)
            first = max(context.start, int(self.start[:, q0:q1].max()))
            end = min(context.stop, int(self.anchor[:, q0:q1].min()) + 1, int(self.context_end.min()))
            seen = slice(first, end) if first < end and bool(real.all()) else slice(context.stop, context.stop)
            self._blocks.append(QueryBlock(q0, q1, context, depth0, rollout, seen))
        return self._blocks

    def block_mask(self, index: int, dtype: torch.dtype) -> Tensor:
        """The additive mask of block `index`: 0 where the query sees the key, -inf elsewhere, [B, 1, q, k] in `dtype`.

        Keys are the block's three slices, in order.
        """
        block = self.blocks(dtype.itemsize)[index]
        hidden = self._masks.get(index)
        if hidden is None:
            hidden = self._hidden(block)
            if sum(m.numel() for m in self._masks.values()) + hidden.numel() <= MASK_CACHE_BYTES:
                self._masks[index] = hidden
        left, seen = block.seen.start - block.context.start, block.seen.stop - block.seen.start
        mask = torch.zeros(*hidden.shape[:-1], seen + hidden.shape[-1], dtype=dtype)
        mask[..., :left].masked_fill_(hidden[..., :left], float("-inf"))
        mask[..., left + seen :].masked_fill_(hidden[..., left:], float("-inf"))
        return mask

    def _hidden(self, block: QueryBlock) -> Tensor:
        """bool [B, 1, q, k]: the keys that a query does not see; those that all of them see are left out."""
        q = slice(block.q0, block.q1)
        start, anchor, depth = self.start[:, q, None], self.anchor[:, q, None], self.depth[:, q, None]
        column = torch.cat(
            [torch.arange(block.context.start, block.seen.start), torch.arange(block.seen.stop, block.context.stop)]
        )
        exists = torch.where(column < self.context_end[:, None], 0, -1)
        parts = [
            sees_context(start, anchor, column, exists[:, None]),
            sees_context(start, anchor, self.anchor[:, None, block.depth0], self.depth[:, None, block.depth0]),
            sees_rollout(anchor, depth, self.anchor[:, None, block.rollout], self.depth[:, None, block.rollout]),
        ]
        visible = torch.cat(parts, dim=-1) & (depth >= 0)
        return visible.logical_not_()[:, None]


def _on_grid(start: int, stop: int, limit: int, grid: int) -> slice:
    """[start, stop), widened to multiples of `grid` within [0, limit): what is not seen is masked."""
    if start >= stop:
        return slice(0, 0)
    return slice(start // grid * grid, min(-(-stop // grid) * grid, limit))
