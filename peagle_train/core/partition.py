"""Segments: cutting a row's elements into S parts that are trained one after another (P-EAGLE, Algorithm 1).

Boundaries B_0 = 0 < ... < B_S = L are columns. A depth-0 element belongs to the segment that its anchor lies in; every
deeper element follows its depth-1 ancestor, whose position is anchor + 1. So whole rollouts stay together, and column p
brings at most one depth-0 element and the K - 1 elements of the rollout that starts at anchor p - 1.

Knows nothing of models. L: columns of a row, S: segments, C: capacity of a segment in elements, K: depths.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Boundaries = Literal["balanced", "uniform"]
BOUNDARIES = get_args(Boundaries)


def assign_cod_segments(anchor_pos: Tensor, depth: Tensor, seq_length: int, num_segments: int) -> Tensor:
    """Algorithm 1 with uniform boundaries: `clamp((anchor + (depth > 0)) * S // L, 0, S - 1)`.

    Args:
        anchor_pos, depth: int64, same shape, as `generate_cod_sample_indices` returns them.
        seq_length: L >= 1.
        num_segments: S >= 1; where S > L some segments stay empty.

    Returns:
        int64, shape of `anchor_pos`, in 0..S-1.
    """
    if num_segments < 1:
        raise ValueError(f"num_segments is {num_segments}; it must be at least 1")
    return ((anchor_pos + (depth > 0)) * num_segments // seq_length).clamp(0, num_segments - 1)


def max_elements(
    seq_length: int,
    num_depths: int,
    down_sample_ratio: float,
    down_sample_ratio_min: float,
    max_anchors: int | None = None,
) -> int:
    """T_max: no row of `seq_length` columns ever has more elements.

    `L + sum_d int((n - d) * max(r**d, r_min))`, n being L, or `max_anchors` where that is less.
    """
    return sum(_max_per_depth(seq_length, num_depths, down_sample_ratio, down_sample_ratio_min, max_anchors))


def segment_capacity(
    seq_length: int,
    num_depths: int,
    down_sample_ratio: float,
    down_sample_ratio_min: float,
    num_segments: int,
    boundaries: Boundaries = "balanced",
    max_anchors: int | None = None,
) -> int:
    """C, elements per segment, known before any data is read: no segment of any row ever holds more.

    balanced: the least C with S * (C - (K - 1)) >= T_max; a segment closed by `balanced_boundaries` holds more than
    C - K elements, since no column brings more than K. uniform: w columns bring at most w elements of each depth.
    """
    check_num_segments(num_segments, seq_length)
    check_boundaries(boundaries)
    per_depth = _max_per_depth(seq_length, num_depths, down_sample_ratio, down_sample_ratio_min, max_anchors)
    if num_segments == 1:
        return sum(per_depth)
    if boundaries == "uniform":
        width = -(-seq_length // num_segments)
        return sum(min(width, count) for count in per_depth)
    return -(-sum(per_depth) // num_segments) + num_depths - 1


def _max_per_depth(length: int, num_depths: int, ratio: float, ratio_min: float, max_anchors: int | None) -> list[int]:
    most = length if max_anchors is None else min(length, max_anchors)
    return [length] + [int(max(0, most - d) * max(ratio**d, ratio_min)) for d in range(1, num_depths)]


def balanced_boundaries(anchor: Tensor, depth: Tensor, seq_length: int, num_segments: int, capacity: int) -> Tensor:
    """Cut a row's columns greedily so that every segment holds as many elements as fit into `capacity`.

    Segments fill from the left; what remains at the end is empty (its boundary is L) and costs nothing to train.

    Args:
        anchor, depth: int64 [T], the row's elements in any order.
        seq_length: L. num_segments: S. capacity: C, of `segment_capacity`.

    Returns:
        int64 [S + 1], ascending, first 0, last L.
    """
    count_L = torch.bincount(anchor + (depth > 0), minlength=seq_length)
    assert count_L.numel() == seq_length, "an element's first column lies outside the row"
    before_L = torch.cat([torch.zeros(1, dtype=torch.int64), count_L.cumsum(0)])  # elements left of column p
    bounds = [0]
    for _ in range(num_segments):
        # The largest column p with before[p] - before[start] <= C: S binary searches, no loop over elements.
        limit = before_L[bounds[-1]] + capacity
        bounds.append(int(torch.searchsorted(before_L, limit, right=True)) - 1)
    assert bounds[-1] == seq_length, f"{num_segments} segments of {capacity} do not hold {int(before_L[-1])} elements"
    return torch.tensor(bounds)


def segments_of(anchor: Tensor, depth: Tensor, boundaries: Tensor) -> Tensor:
    """int64 [T]: A[anchor] at depth 0, A[anchor + 1] deeper, A[p] = max{s : B_s <= p < B_{s+1}}."""
    return torch.searchsorted(boundaries, anchor + (depth > 0), right=True) - 1


def check_num_segments(num_segments: int, seq_length: int) -> None:
    if not 1 <= num_segments <= seq_length:
        raise ValueError(f"num_segments is {num_segments}; it must lie in 1..{seq_length}, the columns of a row")


def check_boundaries(boundaries: str) -> None:
    if boundaries not in BOUNDARIES:
        raise ValueError(f"boundaries is {boundaries!r}; it must be one of {', '.join(BOUNDARIES)}")
