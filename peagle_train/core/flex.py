"""flex_attention over drafter elements, for CUDA: the visibility rule as a mask_mod and its BlockMask.

What both read is made before a pass, outside of every graph, and given to it as plain tensors: tables that are made inside
a graph are formulas there, which Inductor writes into the mask_mod and cannot compile.

B: rows, Q: queries, K: keys, P: context columns, M: leading own slots that hold all depth-0 elements, T = P + M, N: own
elements, X: query blocks of q queries, Y: key blocks, Z: key blocks below T.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from peagle_train.core.visibility import Visibility, sees_context, sees_rollout

BLOCK_SIZE = 128
"""flex_attention's default, on both sides."""
SHAPES = 256
"""Shapes that flex attention is compiled for in a process: segment counts, row lengths, evaluation, idle passes."""


class FlexTables(NamedTuple):
    """All that flex reads of a pass's visibility, for the queries from some element on."""

    rule: tuple[Tensor, ...]
    """int32: the queries' start, anchor, depth [B, Q]; the keys' anchor, depth [B, K]."""
    blocks: tuple[Tensor, ...]
    """`block_tables`'s eight."""


def flex_tables(visibility: Visibility, skip: int = 0) -> FlexTables:
    """For the queries from `skip` on, and all context and own keys."""
    queries = (t[:, skip:] for t in (visibility.start, visibility.anchor, visibility.depth))
    rule = tuple(t.to(torch.int32).contiguous() for t in (*queries, *visibility.key_tables()))
    return FlexTables(rule, block_tables(visibility, skip))


def block_mask_of(visibility: Visibility, skip: int = 0) -> BlockMask:
    """The BlockMask over Q = N - skip queries and K = P + N keys, around the pass's tables where they are made already."""
    tables = visibility.flex.get(skip) or flex_tables(visibility, skip)
    start_BQ, anchor_BQ, depth_BQ, key_anchor_BK, key_depth_BK = tables.rule

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        anchor, depth = anchor_BQ[b, q], depth_BQ[b, q]
        key_anchor, key_depth = key_anchor_BK[b, k], key_depth_BK[b, k]
        visible = sees_context(start_BQ[b, q], anchor, key_anchor, key_depth)
        return (visible | sees_rollout(anchor, depth, key_anchor, key_depth)) & (depth >= 0)

    lengths = start_BQ.shape[1], key_anchor_BK.shape[1]
    size = (BLOCK_SIZE, BLOCK_SIZE)
    return BlockMask(lengths, *tables.blocks, BLOCK_SIZE=size, mask_mod=mask_mod)  # type: ignore[misc]


def kernel_options(queries: int, head_dim: int, itemsize: int, capability: tuple[int, int] | None) -> dict[str, Any]:
    """flex_attention's, on top of its own defaults. `capability`: of the CUDA device, None where there is none."""
    options: dict[str, Any] = {}
    if queries < BLOCK_SIZE:
        # Its decoding kernel, the default, has no form for this many queries of grouped heads.
        options["BACKEND"] = "TRITON"
    if capability == (9, 0) and itemsize == 2 and 64 < head_dim <= 128:
        # The default's backward spills registers wherever a length is no multiple of its blocks.
        blocks = {"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 32, "num_warps": 8, "num_stages": 2}
        options |= {f"bwd_{name}": value for name, value in blocks.items()}
    return options


@torch.compiler.assume_constant_result
def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.version.cuda and torch.cuda.is_available() else None


@cache
def _compiled(function):  # type: ignore[no-untyped-def]
    return torch.compile(function, dynamic=False, fullgraph=True)


def flex(query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, block_mask: BlockMask) -> Tensor:
    """[B, H, Q, D]; always compiled, since eager flex attends densely and ignores the block tables."""
    Q, D = query_BHQD.shape[2:]
    options: dict[str, Any] = {
        "block_mask": block_mask,
        "enable_gqa": True,
        "kernel_options": kernel_options(Q, D, query_BHQD.dtype.itemsize, _capability()),
    }
    if torch.compiler.is_compiling():
        return flex_attention(query_BHQD, key_BGKD, value_BGKD, **options)  # type: ignore[return-value]
    # Beyond the limit fullgraph makes an error of what would be a dense attention.
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        return _compiled(flex_attention)(query_BHQD, key_BGKD, value_BGKD, **options)


# The BlockMask, counted from the layout: no query is ever compared with a key.
#
# It needs one number for each pair of a query block and a key block: how many of its pairs are visible (none: left out,
# all: full, else partial). Two facts give it in whole-tensor integer operations:
#
#   Depth-0 keys, context first and then own, ascend by anchor. So a query sees an interval of them, and an interval is two
#       endpoints: what it covers of each key block follows from the blocks that the endpoints fall into and the rest inside
#       those (a difference array), whatever lies in between.
#   A rollout is contiguous and ascends by depth. So a query of depth d sees itself and the d - 1 slots before it.
#
# Shapes depend on shapes alone and nothing waits for the device. Work is linear in the elements plus linear in the pairs of
# blocks.


def block_tables(visibility: Visibility, skip: int = 0, block_size: int = BLOCK_SIZE) -> tuple[Tensor, ...]:
    """The eight tables of `create_block_mask(mask_mod, B, None, N - skip, P + N)`, in the order of BlockMask's constructor.

    Args:
        visibility: a row's own slots hold its depth-0 elements with ascending anchors, all of them at or after
            `context_end`, then each rollout with depths 1, 2, ... side by side; padding may lie anywhere between them.
        skip: own elements before this one are keys only.
        block_size: of queries and of keys.
    """
    pairs_B1XY = visible_pairs(visibility, skip, block_size)[:, None]
    full_B1XY = pairs_B1XY == block_size**2
    partial_B1XY = (pairs_B1XY > 0) & ~full_B1XY
    del pairs_B1XY
    kv, full_kv = _ordered(partial_B1XY), _ordered(full_B1XY)
    # Not from_kv_blocks: it would find the transposed tables by writing the dense ones out and sorting them.
    return (*kv, *full_kv, *_ordered(partial_B1XY.mT.contiguous()), *_ordered(full_B1XY.mT.contiguous()))


def visible_pairs(visibility: Visibility, skip: int = 0, block_size: int = BLOCK_SIZE) -> Tensor:
    """int32 [B, X, Y]: visible (query, key) pairs of each pair of blocks, for queries from own element `skip` on."""
    B, N = visibility.anchor.shape
    P, T = visibility.num_context, visibility.num_context + visibility.num_depth0
    Q = N - skip
    X, Y = -(-Q // block_size), -(-(P + N) // block_size)

    def in_blocks(own_BN: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(own_BN[:, skip:], (0, X * block_size - Q), value=fill).view(B, X, block_size)

    depth_BXq = in_blocks(visibility.depth, -1)
    pairs_BXY = torch.zeros(B, X, Y, dtype=torch.int32, device=depth_BXq.device)
    if visibility.first_rollout < N:
        _add_rollout_keys(pairs_BXY, depth_BXq, P + skip, visibility.num_depths)
    if T:
        anchor_BK, key_depth_BK = visibility.key_tables()
        key_anchor_BT, exists_BT = anchor_BK[:, :T], key_depth_BK[:, :T] == 0
        start_BXq, anchor_BXq = in_blocks(visibility.start, 0), in_blocks(visibility.anchor, 0)
        _add_depth0_keys(pairs_BXY, start_BXq, anchor_BXq, depth_BXq >= 0, key_anchor_BT, exists_BT)
    return pairs_BXY


def _add_rollout_keys(pairs_BXY: Tensor, depth_BXq: Tensor, base: int, num_depths: int) -> None:
    """`base`: the slot of the first query's own key."""
    X, block_size = depth_BXq.shape[1:]
    x_X1 = torch.arange(X, device=depth_BXq.device)[:, None]
    q_q = torch.arange(block_size, device=depth_BXq.device)
    end_Xq = base + x_X1 * block_size + q_q + 1  # just past the own key, the last that is seen of the rollout
    first_BXq = end_Xq - depth_BXq  # depth 0 and padding see none of a rollout
    own_Xq = (end_Xq - 1) // block_size  # the own key's block
    for back in range((num_depths + block_size - 3) // block_size + 1):  # blocks that num_depths - 1 keys can reach
        y_Xq = own_Xq - back
        left_Xq, right_Xq = y_Xq * block_size, torch.minimum(end_Xq, (y_Xq + 1) * block_size)
        part_BXq = (right_Xq - torch.maximum(first_BXq, left_Xq)).clamp(min=0)
        # Out of range only where there is nothing to add: left of the first key, or right of the last query.
        y_Xq = y_Xq.clamp(0, pairs_BXY.shape[2] - 1)
        pairs_BXY.scatter_add_(2, y_Xq.expand_as(part_BXq), part_BXq.to(torch.int32))


def _add_depth0_keys(
    pairs_BXY: Tensor,
    start_BXq: Tensor,
    anchor_BXq: Tensor,
    is_real_BXq: Tensor,
    key_anchor_BT: Tensor,
    exists_BT: Tensor,
) -> None:
    B, X, block_size = start_BXq.shape
    T = exists_BT.shape[1]
    Z = -(-T // block_size)
    # Slots that hold no key take the anchor of the key before, so that the whole ascends and can be searched.
    sorted_BT = torch.where(exists_BT, key_anchor_BT, -1).cummax(1).values
    before_BT1 = torch.nn.functional.pad(exists_BT.cumsum(1), (1, 0))  # keys in the slots before this one
    first_BXq = torch.searchsorted(sorted_BT, start_BXq.flatten(1)).view(start_BXq.shape)
    end_BXq = torch.searchsorted(sorted_BT, anchor_BXq.flatten(1), right=True).view(start_BXq.shape)
    # Both ends of a query that sees nothing are the same, and cancel.
    end_BXq = torch.where(is_real_BXq, end_BXq, first_BXq)

    enters_BXZ = pairs_BXY.new_zeros(B, X, Z)
    for slot_BXq, sign in ((end_BXq, 1), (first_BXq, -1)):
        # All keys before the slot: those of whole blocks, counted below, and a part of the slot's own block.
        z_BXq = (slot_BXq // block_size).clamp(max=Z - 1)
        part_BXq = _take(before_BT1, slot_BXq) - _take(before_BT1, z_BXq * block_size)
        pairs_BXY.scatter_add_(2, z_BXq, (part_BXq * sign).to(torch.int32))
        enters_BXZ.scatter_add_(2, z_BXq, torch.full_like(z_BXq, -sign, dtype=torch.int32))
    edge = (torch.arange(Z + 1, device=exists_BT.device) * block_size).clamp(max=T)
    keys_BZ = before_BT1[:, edge].diff(dim=1).to(torch.int32)
    # Intervals that begin in this block or before, and end after it.
    between_BXZ = enters_BXZ.cumsum(2, dtype=torch.int32)
    pairs_BXY[:, :, :Z].add_(between_BXZ.mul_(keys_BZ[:, None]))


def _take(values_BT: Tensor, index_BXq: Tensor) -> Tensor:
    return values_BT.gather(1, index_BXq.flatten(1)).view(index_BXq.shape)


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
