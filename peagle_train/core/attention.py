"""Attention of drafter elements under the visibility rule.

On a CPU by `attention_cpu.py`, elsewhere by flex_attention with a BlockMask (`flex.py`).

B: rows, H: query heads, G: key/value heads, N: own elements (queries and keys), Q: queries of this call (the last Q of the
N), P: context columns, D: head dim.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peagle_train.core.attention_cpu import CPUAttention, attention_op
from peagle_train.core.visibility import Causal, Visibility


def uses_flex(device: torch.device) -> bool:
    """Whether elements attend through flex_attention there, and not through torch's flash kernel for CPUs."""
    return device.type != "cpu"


def attend(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor] | None,
    visibility: Visibility | Causal,
) -> Tensor:
    """softmax(q k / sqrt(D)) v over the visible keys; a query that sees nothing gives 0.

    Args:
        query: [B, H, Q, D], the last Q of the pass's N elements.
        own: keys and values of the pass's elements, [B, G, N, D] each.
        context: keys and values of the context columns, [B, G, P, D] each, or None for P = 0.
        visibility: the pass's tables, or `Causal`, for which torch's own attention does.

    Returns:
        [B, Q, H * D]
    """
    key, value = own
    if context is None:
        context = (key[:, :, :0], value[:, :, :0])
    if isinstance(visibility, Causal):
        out_BQHD = _causal(query, key, value, context, visibility.window)
    elif uses_flex(query.device):
        out_BQHD = _flex(query, key, value, context, visibility)
    elif torch.compiler.is_compiling():
        out_BQHD = attention_op(query, key, value, *context, visibility)
    else:
        out_BQHD = CPUAttention.apply(query, key, value, *context, visibility)
    return out_BQHD.flatten(2)


def _causal(query: Tensor, key: Tensor, value: Tensor, context: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    key, value = torch.cat([context[0], key], dim=2), torch.cat([context[1], value], dim=2)
    Q, n = query.shape[2], key.shape[2]
    seen_Qn = torch.ones(Q, n, dtype=torch.bool, device=query.device).tril(n - Q)
    if window is not None:
        seen_Qn = seen_Qn.triu(n - Q - window + 1)
    out_BHQD = scaled_dot_product_attention(query, key, value, attn_mask=seen_Qn, enable_gqa=True)
    return out_BHQD.transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, context: tuple[Tensor, Tensor], visibility: Visibility) -> Tensor:
    from peagle_train.core.flex import block_mask_of, flex

    key = torch.cat([context[0], key], dim=2)
    value = torch.cat([context[1], value], dim=2)
    skip = visibility.anchor.shape[1] - query.shape[2]
    return flex(query, key, value, block_mask_of(visibility, skip)).transpose(1, 2)
