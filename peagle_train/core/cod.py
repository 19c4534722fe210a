"""COD: which (anchor, depth) elements of a sequence are trained on (P-EAGLE, arXiv:2602.01469, section 3).

An element (anchor a, depth d) is the drafter's slot d of the draft that starts after token a + 1. Depth 0 is every
position; each deeper level keeps a random share of the chains that the level above kept, so that a sequence of n tokens
costs n * sum(r**d) elements instead of n * K.

Knows nothing of models, batches or segments.
"""

import hashlib

import torch
from torch import Tensor


def keep_counts(n_valid: int, num_depths: int, down_sample_ratio: float, down_sample_ratio_min: float) -> list[int]:
    """How many elements each depth >= 1 keeps at most: `int(max(0, n_valid - d) * max(r**d, r_min))`.

    The list ends before the first depth that keeps none: sampling stops there.
    """
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
        seq_length: number of rows, >= 1.
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
    check_cod_arguments(num_depths, down_sample_ratio, down_sample_ratio_min, max_anchors)
    if seq_length < 1:
        raise ValueError(f"seq_length is {seq_length}; a sequence has at least 1 row")
    if loss_mask.dim() == 2 and loss_mask.shape[0] == 1:
        loss_mask = loss_mask[0]
    if loss_mask.shape != (seq_length,):
        raise ValueError(
            f"loss_mask has shape {tuple(loss_mask.shape)}; expected ({seq_length},) or (1, {seq_length}) for"
            f" seq_length {seq_length}"
        )
    is_supervised_P = loss_mask != 0
    is_first_P = torch.zeros_like(is_supervised_P)
    is_first_P[0] = filter_position_zero
    depth0 = torch.arange(seq_length, device=loss_mask.device)
    ratios = (num_depths, down_sample_ratio, down_sample_ratio_min)
    return _draw(depth0, is_supervised_P, is_first_P, ratios, max_anchors, generator)


def _draw(
    depth0: Tensor,
    is_supervised_P: Tensor,
    is_first_P: Tensor,
    ratios: tuple[int, float, float],
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The depth-0 anchors, then for each depth a random subset of the chains that can still grow.

    A position in `is_first_P` is in no pool: its anchor would lie before its document. It still counts as valid, and is
    drawn among the starts, as in the reference, which lets it in at depth 1.
    """
    starts = torch.nonzero(is_supervised_P).flatten()
    if max_anchors is not None and starts.numel() > max_anchors:
        order = torch.randperm(starts.numel(), generator=generator, device=starts.device)
        starts = starts[order[:max_anchors]].sort().values
    in_pool_P = is_supervised_P & ~is_first_P
    pool = starts[in_pool_P[starts]]
    anchors, depths = [depth0], [torch.zeros_like(depth0)]
    for d, count in enumerate(keep_counts(starts.numel(), *ratios), start=1):
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
    `generate_cod_sample_indices` of its own rows. The first row of a document is in no pool of depth >= 1: its anchor
    would lie in the document before.

    Args:
        loss_mask_L: [L] 0/1, unshifted: 1 on the assistant's tokens.
        document_ids_L: [L] int64, the same number for neighbours of one document, -1 on padding.

    Returns:
        `(anchor, depth)`, int64 [T], depth-major.
    """
    length = loss_mask_L.shape[0]
    if length < 2:
        empty = torch.zeros(0, dtype=torch.int64, device=loss_mask_L.device)
        return empty, empty.clone()
    is_row_L = drafter_rows(document_ids_L)
    is_supervised_L = supervised_rows(loss_mask_L, document_ids_L)
    is_first_L = is_row_L.clone()
    is_first_L[1:] &= document_ids_L[1:] != document_ids_L[:-1]

    # Every document's first row takes the place of position 0.
    ratios = (num_depths, down_sample_ratio, down_sample_ratio_min)
    return _draw(torch.nonzero(is_row_L).flatten(), is_supervised_L, is_first_L, ratios, max_anchors, generator)


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


def check_cod_arguments(
    num_depths: int, down_sample_ratio: float, down_sample_ratio_min: float, max_anchors: int | None
) -> None:
    """ValueError unless num_depths >= 1, 0 < down_sample_ratio <= 1, 0 <= down_sample_ratio_min <= 1, max_anchors >= 1."""
    if num_depths < 1:
        raise ValueError(f"num_depths is {num_depths}; it must be at least 1")
    if not 0 < down_sample_ratio <= 1:
        raise ValueError(f"down_sample_ratio is {down_sample_ratio}; it must lie in (0, 1]")
    if not 0 <= down_sample_ratio_min <= 1:
        raise ValueError(f"down_sample_ratio_min is {down_sample_ratio_min}; it must lie in [0, 1]")
    if max_anchors is not None and max_anchors < 1:
        raise ValueError(f"max_anchors is {max_anchors}; it must be at least 1, or None for all anchors")


def seeded(*words: object) -> torch.Generator:
    """A generator of the words' own: one seed of them all would be added up, and torch keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(hash63(",".join(map(str, words)).encode()))


def hash63(data: bytes) -> int:
    """63 bits of the sha256: the same on every machine."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1
