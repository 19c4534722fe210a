"""flex_attention over drafter elements, for CUDA: the visibility rule as a mask_mod and its BlockMask."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from peagle_train.core.block_mask import direct_block_mask
from peagle_train.core.visibility import Visibility, sees_context, sees_rollout


@cache
def _compiled(function):  # type: ignore[no-untyped-def]
    return torch.compile(function, dynamic=False)


def mask_mod_of(visibility: Visibility, skip: int = 0):  # type: ignore[no-untyped-def]
    """The rule as flex's `mask_mod(b, h, q, k)`, for queries from `skip` on and all context and own keys."""
    k_anchor_BK, k_depth_BK = visibility.key_tables()
    start_BQ, anchor_BQ = visibility.start[:, skip:].contiguous(), visibility.anchor[:, skip:].contiguous()
    depth_BQ = visibility.depth[:, skip:].contiguous()

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        anchor, depth = anchor_BQ[b, q], depth_BQ[b, q]
        key_anchor, key_depth = k_anchor_BK[b, k], k_depth_BK[b, k]
        visible = sees_context(start_BQ[b, q], anchor, key_anchor, key_depth)
        return (visible | sees_rollout(anchor, depth, key_anchor, key_depth)) & (depth >= 0)

    return mask_mod


def block_mask_of(visibility: Visibility, skip: int = 0) -> BlockMask:
    """The pass's BlockMask over Q = N - skip queries and K = P + N keys, made once and kept for its other layers."""
    kept = visibility.block_masks.get(skip)
    if kept is None:
        kept = direct_block_mask(visibility, mask_mod_of(visibility, skip), skip)
        visibility.block_masks[skip] = kept
    return kept


def flex(query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, block_mask: BlockMask) -> Tensor:
    """[B, H, Q, D]; always compiled, since eager flex attends densely and ignores the block tables."""
    return _compiled(flex_attention)(query_BHQD, key_BGKD, value_BGKD, block_mask=block_mask, enable_gqa=True)
