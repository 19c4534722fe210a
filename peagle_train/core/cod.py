"""COD: which (anchor, depth) elements of a sequence are trained on, and the segments that they are cut into (P-EAGLE,
arXiv:2602.01469, section 3 and Algorithm 1).

An element (anchor a, depth d) is the drafter's slot d of the draft that starts after token a + 1. Depth 0 is every
position; each deeper level keeps a random share of the chains that the level above kept, so that a sequence of n tokens
costs n * sum(r**d) elements instead of n * K.

Boundaries B_0 = 0 < ... < B_S = L are columns. A depth-0 element belongs to the segment that its anchor lies in; every
deeper element follows its depth-1 ancestor, whose position is anchor + 1. So whole rollouts stay together, and column p
brings at most one depth-0 element and the K - 1 elements of the rollout that starts at anchor p - 1.

Knows nothing of models or batches. L: columns of a row, S: segments, C: capacity of a segment in elements, K: depths.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

Boundaries = Literal["balanced", "uniform"]


def keep_counts(
    n_valid: int, num_depths: int, down_sample_ratio: float, down_sample_ratio_min: float, max_anchors: int | None
) -> list[int]:
    """How many elements each depth >= 1 keeps at most: `int(max(0, n - d) * max(r**d, r_min))`, n being `n_valid`, or
    `max_anchors` where that is less.

    The list ends before the first depth that keeps none: sampling stops there. ValueError: an argument out of range.
    """
    if num_depths < 1:
        raise ValueError(f"num_depths is {num_depths}; it must be at least 1")
    if not 0 < down_sample_ratio <= 1:
        raise ValueError(f"down_sample_ratio is {down_sample_ratio}; it must lie in (0, 1]")
    if not 0 <= down_sample_ratio_min <= 1:
        raise ValueError(f"down_sample_ratio_min is {down_sample_ratio_min}; it must lie in [0, 1]")
    if max_anchors is not None:
        if max_anchors < 1:
            raise ValueError(f"max_anchors is {max_anchors}; it must be at least 1, or None for all anchors")
        n_valid = min(n_valid, max_anchors)
    counts: list[int] = []
    for d in range(1, num_depths):
        count = int(max(0, n_valid - d) * max(down_sample_ratio**d, down_sample_ratio_min))
        if count == 0:
            break
        counts.append(count)
    return counts


def generate_cod_sample_indices(
    seq_length: int,
    loss_mask: Tensor,
    num_depths: int = 8,
    down_sample_ratio: float = 0.7,
    down_sample_ratio_min: float = 0.2,
    filter_position_zero: bool = True,
    generator: torch.Generator | None = None,
    max_anchors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the elements of one sequence.

    Works on *shifted* rows: row p reads token x_{p+1} and is supervised where `loss_mask[p]` is 1.

    Args:
        seq_length: number of rows.
        loss_mask: [seq_length] or [1, seq_length], 0/1 of any dtype.
        num_depths: K, >= 1; depths 0..K-1.
        down_sample_ratio: r in (0, 1]; depth d keeps a share r**d.
        down_sample_ratio_min: floor of that share, in [0, 1] (0: the paper's; 0.2: speculators').
        filter_position_zero: position 0 never enters the pool of a depth >= 1 (its anchor would be -1).
        generator: source of randomness; None is torch's global one (to reproduce the reference draws).
        max_anchors: rollouts start at no more than this many anchors, drawn first; None: at all. Depth 0 stays whole.

    Returns:
        `(anchor_pos, depth)`, two int64 tensors [T] on the mask's device, depth-major, positions ascending within a
        depth. Chains are complete: an element at depth d has its ancestors at depths 0..d-1 of the same anchor.

    Raises:
        ValueError: on an argument out of range or a mask of another length.
    """
    if loss_mask.shape not in ((seq_length,), (1, seq_length)):
        raise ValueError(f"loss_mask has shape {tuple(loss_mask.shape)}, but seq_length is {seq_length}")
    is_supervised_P = loss_mask.flatten() != 0
    in_pool_P = is_supervised_P.clone()
    in_pool_P[:1] &= not filter_position_zero
    depth0 = torch.arange(seq_length, device=loss_mask.device)
    ratios = (num_depths, down_sample_ratio, down_sample_ratio_min)
    return _draw(depth0, is_supervised_P, in_pool_P, ratios, max_anchors, generator)


def _draw(
    depth0: Tensor,
    is_supervised_P: Tensor,
    in_pool_P: Tensor,
    ratios: tuple[int, float, float],
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The depth-0 anchors, then for each depth a random subset of the chains that can still grow.

    A supervised position outside `in_pool_P` is in no pool: its anchor would lie before its document. It still counts as
    valid, and is drawn among the starts, as in the reference, which lets it in at depth 1.
    """
    starts = torch.nonzero(is_supervised_P).flatten()
    counts = keep_counts(starts.numel(), *ratios, max_anchors)
    if max_anchors is not None and starts.numel() > max_anchors:
        order = torch.randperm(starts.numel(), generator=generator, device=starts.device)
        starts = starts[order[:max_anchors]].sort().values
    pool = starts[in_pool_P[starts]]
    anchors, depths = [depth0], [torch.zeros_like(depth0)]
    for d, count in enumerate(counts, start=1):
        kept = pool
        if pool.numel() >= count:  # else all of it, and the generator does not move: so the reference draws
            order = torch.randperm(pool.numel(), generator=generator, device=pool.device)
            kept = pool[order[:count]].sort().values
        anchors.append(kept - d)
        depths.append(torch.full_like(kept, d))
        # Modulo: the reference wraps at the end, which in_pool_P undoes as long as position 0 is not in it.
        pool = (kept + 1) % in_pool_P.numel()
        pool = pool[in_pool_P[pool]]
    return torch.cat(anchors), torch.cat(depths)


def sample_packed_row(
    loss_mask_L: Tensor,
    document_ids_L: Tensor,
    num_depths: int,
    down_sample_ratio: float,
    down_sample_ratio_min: float,
    generator: torch.Generator | None = None,
    max_anchors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the elements of a packed, *unshifted* row: several documents, and padding (document id -1).

    Column p is a row of the drafter when p and p + 1 belong to the same document, supervised when
    `loss_mask_L[p + 1]` is 1. Anchors and positions are columns. A lone document, padded or not, gets exactly
    `generate_cod_sample_indices` of its own rows: every document's first row takes the place of position 0.

    Args:
        loss_mask_L: [L] 0/1, unshifted: 1 on the assistant's tokens.
        document_ids_L: [L] int64, the same number for neighbours of one document, -1 on padding.

    Returns:
        `(anchor, depth)`, int64 [T], depth-major.
    """
    is_supervised_L = supervised_rows(loss_mask_L, document_ids_L)
    in_pool_L = is_supervised_L.clone()
    in_pool_L[:1] = False
    in_pool_L[1:] &= document_ids_L[1:] == document_ids_L[:-1]
    depth0 = torch.nonzero(drafter_rows(document_ids_L)).flatten()
    ratios = (num_depths, down_sample_ratio, down_sample_ratio_min)
    return _draw(depth0, is_supervised_L, in_pool_L, ratios, max_anchors, generator)


def drafter_rows(document_ids: Tensor) -> Tensor:
    """bool [..., L]: columns that are rows of the drafter, those whose right neighbour is of the same document."""
    is_row = torch.zeros_like(document_ids, dtype=torch.bool)
    is_row[..., :-1] = (document_ids[..., :-1] == document_ids[..., 1:]) & (document_ids[..., :-1] >= 0)
    return is_row


def supervised_rows(loss_mask: Tensor, document_ids: Tensor) -> Tensor:
    """bool [..., L]: rows of the drafter that read a token to learn from."""
    is_supervised = drafter_rows(document_ids)
    is_supervised[..., :-1] &= loss_mask[..., 1:] != 0
    return is_supervised


def assign_cod_segments(anchor_pos: Tensor, depth: Tensor, seq_length: int, num_segments: int) -> Tensor:
    """Algorithm 1 with uniform boundaries: `clamp((anchor + (depth > 0)) * S // L, 0, S - 1)`.

    Args:
        anchor_pos, depth: int64, same shape, as `generate_cod_sample_indices` returns them.
        seq_length: L >= 1.
        num_segments: S >= 1; where S > L some segments stay empty.

    Returns:
        int64, shape of `anchor_pos`, in 0..S-1.
    """
    return ((anchor_pos + (depth > 0)) * num_segments // seq_length).clamp(0, num_segments - 1)


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

    One segment: T_max = L + sum_d int((n - d) * max(r**d, r_min)), n being L, or `max_anchors` where that is less.
    balanced: the least C with S * (C - (K - 1)) >= T_max; a segment closed by `balanced_boundaries` holds more than
    C - K elements, since no column brings more than K. uniform: w columns bring at most w elements of each depth.
    ValueError: an argument out of range.
    """
    if not 1 <= num_segments <= seq_length:
        raise ValueError(f"num_segments is {num_segments}; it must lie in 1..{seq_length}, the columns of a row")
    if boundaries not in ("balanced", "uniform"):
        raise ValueError(f"boundaries is {boundaries!r}; it must be balanced or uniform")
    ratios = (num_depths, down_sample_ratio, down_sample_ratio_min)
    per_depth = [seq_length, *keep_counts(seq_length, *ratios, max_anchors)]
    if num_segments == 1:
        return sum(per_depth)
    if boundaries == "uniform":
        width = -(-seq_length // num_segments)
        return sum(min(width, count) for count in per_depth)
    return -(-sum(per_depth) // num_segments) + num_depths - 1


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


def seeded(*words: object) -> torch.Generator:
    """A generator of the words' own: one seed of them all would be added up, and torch keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(hash63(",".join(map(str, words)).encode()))


def hash63(data: bytes) -> int:
    """63 bits of the sha256: the same on every machine."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1
