"""Attention of a chunk to all that came before, without a mask of chunk * past: transformers' sdpa, a block of queries at a
time.

transformers makes the mask of a chunk whole: at 2,048 queries and 131,072 keys 0.25 GiB, and 1 GiB more once it is floats.
Q: queries of the chunk, K: keys, its own the last; h: heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "peagle_train_chunks"
BLOCK, CPU_BLOCK = 256, 64
"""Queries at a time: their mask is as wide as the past, and on CPU most of a narrow target's memory."""


def chunk_mask(*, mask_function: Any, attention_mask: Tensor | None = None, **given: Any) -> Tensor | None:
    """None for a plain causal mask, which `chunk_attention` knows; else sdpa's (a sliding window's is narrow)."""
    if mask_function is causal_mask_function and attention_mask is None and not given.get("local_size"):
        return None
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **given)


def chunk_attention(
    module: nn.Module,
    query_1hQD: Tensor,
    key_1hKD: Tensor,
    value_1hKD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, Q, h, D]. Without a mask, query i sees the first K - Q + i + 1 keys."""
    Q, K = query_1hQD.shape[2], key_1hKD.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = [name for name in ("position_bias", "softcap", "s_aux") if given.get(name) is not None]
    if attention_mask is not None or special or not causal or Q in (1, K):
        return sdpa_attention_forward(
            module, query_1hQD, key_1hKD, value_1hKD, attention_mask, dropout, scaling, is_causal, **given
        )
    on_cpu = query_1hQD.device.type == "cpu"
    if not on_cpu:  # with a mask, CUDA's fast kernels want as many key heads as query heads
        groups = query_1hQD.shape[1] // key_1hKD.shape[1]
        key_1hKD, value_1hKD = repeat_kv(key_1hKD, groups), repeat_kv(value_1hKD, groups)
    out_1hQD = query_1hQD.new_empty(*query_1hQD.shape[:3], value_1hKD.shape[3])
    block = CPU_BLOCK if on_cpu else BLOCK
    for start in range(0, Q, block):
        stop = min(start + block, Q)
        seen = K - Q + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query_1hQD.device).tril(K - Q + start)
        out_1hQD[:, :, start:stop] = F.scaled_dot_product_attention(
            query_1hQD[:, :, start:stop],
            key_1hKD[:, :, :seen],
            value_1hKD[:, :, :seen],
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=on_cpu,
        )
    return out_1hQD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, chunk_attention)
AttentionMaskInterface.register(NAME, chunk_mask)


@contextmanager
def narrow_masks(config: Any) -> Iterator[None]:
    """In the block, a target that attends by sdpa goes by `chunk_attention`; any other as before (flash attention has no
    masks, eager needs its scores anyway).
    """
    given = config._attn_implementation
    if given == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = given
