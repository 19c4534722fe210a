"""flex_attention's BlockMask, counted from the layout: no query is ever compared with a key.

A BlockMask needs one number for each pair of a query block and a key block: how many of its pairs are visible (none: left
out, all: full, else partial). Two facts give it in whole-tensor integer operations:

    Depth-0 keys, context first and then own, ascend by anchor. So a query sees an interval of them, and an interval is
        two endpoints: what it covers of each key block follows from the blocks that the endpoints fall into and the rest
        inside those (a difference array), whatever lies in between.
    A rollout is contiguous and ascends by depth. So a query of depth d sees itself and the d - 1 slots before it.

Shapes depend on shapes alone and nothing waits for the device, so torch.compile traces it into a step. Work is linear in
the elements plus linear in the pairs of blocks.

B: rows, Q: queries, P: context columns, M: leading own slots that hold all depth-0 elements, T = P + M, N: own elements,
X: query blocks, Y: key blocks, Z: key blocks that hold a key below T.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from peagle_train.visibility import Visibility

BLOCK_SIZE = 128
"""flex_attention's default, on both sides."""


def direct_block_mask(
    visibility: Visibility,
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    skip: int = 0,
    block_size: int = BLOCK_SIZE,
) -> BlockMask:
    """`create_block_mask(mask_mod, B, None, N - skip, P + N)`, table for table, the transposed ones too.

    Args:
        visibility: a row's own slots hold its depth-0 elements with ascending anchors, all of them at or after
            `context_end`, then each rollout with depths 1, 2, ... side by side; padding may lie anywhere between them.
        mask_mod: the same rule, for partial blocks; kept, not called.
        skip: own elements before this one are keys only.
        block_size: of queries and of keys.
    """
    Q, K = visibility.anchor.shape[1] - skip, visibility.num_context + visibility.anchor.shape[1]
    pairs_B1XY = visible_pairs(visibility, skip, block_size)[:, None]
    full_B1XY = pairs_B1XY == block_size**2
    partial_B1XY = (pairs_B1XY > 0) & ~full_B1XY
    del pairs_B1XY
    kv, full_kv = _ordered(partial_B1XY), _ordered(full_B1XY)
    # Not from_kv_blocks: it would find the transposed tables by writing the dense ones out and sorting them.
    q, full_q = _ordered(partial_B1XY.mT.contiguous()), _ordered(full_B1XY.mT.contiguous())
    return BlockMask((Q, K), *kv, *full_kv, *q, *full_q, BLOCK_SIZE=(block_size, block_size), mask_mod=mask_mod)


def visible_pairs(visibility: Visibility, skip: int = 0, block_size: int = BLOCK_SIZE) -> Tensor:
    """int32 [B, X, Y]: visible (query, key) pairs of each pair of blocks, for queries from own element `skip` on."""
    B, N = visibility.anchor.shape
    P = visibility.num_context
    X, Y = -(-(N - skip) // block_size), -(-(P + N) // block_size)
    pairs_BXY = torch.zeros(B, X, Y, dtype=torch.int32, device=visibility.anchor.device)
    if P + visibility.num_depth0:
        _add_depth0_keys(pairs_BXY, visibility, skip, block_size)
    _add_rollout_keys(pairs_BXY, visibility, skip, block_size)
    return pairs_BXY


def _add_depth0_keys(pairs_BXY: Tensor, visibility: Visibility, skip: int, block_size: int) -> None:
    P, M = visibility.num_context, visibility.num_depth0
    anchor_BK, depth_BK = visibility.key_tables()
    exists_BT = depth_BK[:, : P + M] == 0
    # Slots that hold no key take the anchor of the key before, so that the whole ascends and can be searched.
    sorted_BT = torch.where(exists_BT, anchor_BK[:, : P + M], -1).cummax(1).values
    before_BT1 = torch.nn.functional.pad(exists_BT.cumsum(1), (1, 0))  # keys in slots before this one

    is_real_BQ = visibility.depth[:, skip:] >= 0
    start_BQ, anchor_BQ = visibility.start[:, skip:].contiguous(), visibility.anchor[:, skip:].contiguous()
    first_BQ = torch.searchsorted(sorted_BT, start_BQ)
    end_BQ = torch.searchsorted(sorted_BT, anchor_BQ, right=True)
    # Both ends of a query that sees nothing are the same, and cancel.
    end_BQ = torch.where(is_real_BQ, end_BQ, first_BQ).maximum(first_BQ)

    B, X = pairs_BXY.shape[:2]
    Z = -(-(P + M) // block_size)
    edge = (torch.arange(Z + 1, device=exists_BT.device) * block_size).clamp(max=P + M)
    keys_BZ = before_BT1[:, edge].diff(dim=1).to(torch.int32)
    enters_BXZ = pairs_BXY.new_zeros(B, X, Z)
    for slot_BQ, sign in ((end_BQ, 1), (first_BQ, -1)):
        # All keys before the slot: whole blocks up to the slot's, and a part of that one.
        z_BQ = (slot_BQ // block_size).clamp(max=Z - 1)
        part_BQ = before_BT1.gather(1, slot_BQ) - before_BT1.gather(1, z_BQ * block_size)
        _add_at(pairs_BXY, z_BQ, part_BQ * sign, 0, block_size)
        _add_at(enters_BXZ, z_BQ, torch.full_like(z_BQ, -sign), 0, block_size)
    covering_BXZ = enters_BXZ.cumsum(2, dtype=torch.int32)
    pairs_BXY[:, :, :Z] += covering_BXZ.mul_(keys_BZ[:, None])


def _add_rollout_keys(pairs_BXY: Tensor, visibility: Visibility, skip: int, block_size: int) -> None:
    N, P = visibility.anchor.shape[1], visibility.num_context
    first = max(skip, visibility.first_rollout)
    longest = visibility.num_depths - 1
    if first >= N or longest < 1:
        return
    length_BR = visibility.depth[:, first:].clamp(0, longest)  # keys that the query sees; its own slot is the last
    end_R = torch.arange(P + first + 1, P + N + 1, device=length_BR.device)
    for back in range((longest + block_size - 2) // block_size + 1):  # blocks that a rollout can reach into
        y_R = (end_R - 1) // block_size - back
        left_R = (y_R * block_size).clamp(min=0)
        right_R = torch.minimum(end_R, (y_R + 1) * block_size)
        part_BR = (right_R - torch.maximum(end_R - length_BR, left_R)).clamp(min=0)
        _add_at(pairs_BXY, y_R.clamp(min=0).expand_as(part_BR), part_BR, first - skip, block_size)


def _add_at(table_BXY: Tensor, y_BQ: Tensor, value_BQ: Tensor, first: int, block_size: int) -> None:
    """Add each query's value at its own block x and key block y; the queries are `first`, `first` + 1, ..."""
    B, X, Y = table_BXY.shape
    x_Q = torch.arange(first, first + y_BQ.shape[1], device=y_BQ.device) // block_size
    row_B1 = torch.arange(B, device=y_BQ.device)[:, None] * X
    index_BQ = (row_B1 + x_Q) * Y + y_BQ
    table_BXY.view(-1).index_add_(0, index_BQ.flatten(), value_BQ.flatten().to(table_BXY.dtype))


def _ordered(is_in: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, indices), int32: the True columns of each row in order, then the others, as create_block_mask has them.

    By counting instead of sorting, since sorting two values costs as much as sorting any.
    """
    Y = is_in.shape[-1]
    column_Y = torch.arange(Y, dtype=torch.int32, device=is_in.device)
    place = is_in.cumsum(-1, dtype=torch.int32)  # in place from here on: these are the largest tables of all
    count = place[..., -1:].clone()
    place_if_out = (count + column_Y).sub_(place)
    place = torch.where(is_in, place.sub_(1), place_if_out).long()
    del place_if_out
    indices = torch.empty(is_in.shape, dtype=torch.int32, device=is_in.device)
    indices.scatter_(-1, place, column_Y.expand_as(place))
    return count.squeeze(-1), indices
