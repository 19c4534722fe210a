"""Attention that is told where documents lie, so that no mask over tokens by tokens is needed.

transformers' sdpa masks packed sequences, so nothing is skipped: at 8,192 tokens the mask is 64 MiB, and 128 MiB more once
a kernel has made bfloat16 of it. Told where documents begin, `varlen_attn` computes what is seen and nothing else; where it
does not run (CPU, float32, ...) every document is attended to by itself. A chunk of a document is the same case: one
document whose last Q positions are the queries.

Q: queries, K: keys, of which the queries' own are the last; h: query heads, g: key heads, D: head size.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

NAME = "peagle_train"
BLOCK, CPU_BLOCK = 256, 64
"""Queries at a time where a mask is needed: it is as wide as the keys, and on CPU most of a narrow target's memory."""
KINDS = ("full_attention", "sliding_attention")  # layer types whose attention is known here


def takes_bounds(model: nn.Module, config: Any) -> bool:
    """Whether all sequences can be given as one, with documents' bounds: layers of known types that attend by sdpa through
    transformers' interface, and that flash attention supports (it has no masks either).
    """
    known = set(getattr(config, "layer_types", None) or KINDS) <= {*KINDS}
    is_open = model._supports_attention_backend and model._supports_flash_attn
    return config._attn_implementation == "sdpa" and known and bool(is_open)


@contextmanager
def bounds_heeded(config: Any) -> Iterator[None]:
    """In the block, a target that attends by sdpa goes by `packed_attention`; transformers then makes no masks."""
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def bounds_arguments(bounds: list[int], span: slice, device: torch.device) -> dict[str, Any]:
    """What tells `packed_attention` where the documents of a span of tokens lie. `bounds`: see `document_bounds`."""
    own = [span.start, *bounds[bisect_right(bounds, span.start) : bisect_left(bounds, span.stop)], span.stop]
    documents = tuple(bound - span.start for bound in own)
    return {"documents": documents, "bounds": torch.tensor(documents, dtype=torch.int32).to(device, non_blocking=True)}


def packed_attention(
    module: nn.Module,
    query_1hQD: Tensor,
    key_1gKD: Tensor,
    value_1gKD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    documents: Sequence[int] | None = None,
    bounds: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; returns [1, Q, h, D]. ValueError for attention of another kind.

    documents: where each begins among the queries, and Q; `bounds` is the same, int32 on the device. With more keys than
        queries there is one document, whose last Q positions are the queries.
    sliding_window: how many positions are seen, the query's own included.
    """
    kinds = getattr(module.config, "layer_types", None)
    if (
        any(given.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        or attention_mask is not None
        or documents is None
        or not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        or (kinds and kinds[module.layer_idx] == KINDS[1] and not sliding_window)  # type: ignore[index]
    ):
        why = "was not told the bounds of documents, or has a mask, bias, cap, sinks or no window, which is not known"
        raise ValueError(f"{type(module).__name__} {why}: with target.check true, it gets one document at a time")
    assert bounds is not None
    if not varlen_serves(query_1hQD.device.type, query_1hQD.dtype, query_1hQD.shape[3], value_1gKD.shape[3]):
        out_1hQD = _one_by_one(query_1hQD, key_1gKD, value_1gKD, documents, scaling, sliding_window)
        return out_1hQD.transpose(1, 2).contiguous(), None
    Q, K, longest = query_1hQD.shape[2], key_1gKD.shape[2], max(stop - start for start, stop in pairwise(documents))
    # Made on the device, as a copy from the host would wait: a cache's length differs from layer to layer.
    bounds_k, longest_k = (
        (bounds, longest) if Q == K else (torch.arange(2, dtype=torch.int32, device=bounds.device) * K, K)
    )
    groups = query_1hQD.shape[1] // key_1gKD.shape[1]  # torch 2.11's kernel wants as many key heads as query heads
    states = query_1hQD, repeat_kv(key_1gKD, groups), repeat_kv(value_1gKD, groups)
    q_QhD, k_KhD, v_KhD = (each[0].transpose(0, 1) for each in states)
    sides = (sliding_window - 1 if sliding_window else -1, 0)  # positions seen before and after a query's own; -1: all
    lengths = bounds, bounds_k, longest, longest_k
    out_QhD: Any = varlen_attn(q_QhD, k_KhD, v_KhD, *lengths, scale=scaling, window_size=sides)
    return out_QhD[None], None


AttentionInterface.register(NAME, packed_attention)


def varlen_serves(device_type: str, dtype: torch.dtype, D: int, value_D: int) -> bool:
    """Whether `varlen_attn` has a kernel. Where it should and has none, `FrozenTarget.check` sees that."""
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and D == value_D <= 256 and D % 8 == 0


def _one_by_one(
    q_1hQD: Tensor, k_1gKD: Tensor, v_1gKD: Tensor, documents: Sequence[int], scale: float | None, window: int | None
) -> Tensor:
    """[1, h, Q, D], by sdpa."""
    Q, K = q_1hQD.shape[2], k_1gKD.shape[2]
    groups, block = q_1hQD.shape[1] // k_1gKD.shape[1], CPU_BLOCK
    if q_1hQD.device.type != "cpu":  # CUDA's kernels for float32 and for masks want as many key heads as query heads
        k_1gKD, v_1gKD, groups, block = repeat_kv(k_1gKD, groups), repeat_kv(v_1gKD, groups), 1, BLOCK
    if Q < K:
        return _attend(q_1hQD, k_1gKD, v_1gKD, scale, window or K, block)
    out_1hQD = repeat_kv(v_1gKD, groups).clone()  # what a document of one token gets, as padding is
    for start, stop in pairwise(documents):
        n = stop - start
        if n > 1:
            # Few lengths, as CPU kernels keep something for each new one in bfloat16. What comes after is not seen.
            padded = slice(start, start - (-n // CPU_BLOCK) * CPU_BLOCK)
            q, k, v = (states[:, :, padded] for states in (q_1hQD, k_1gKD, v_1gKD))
            out_1hQD[:, :, start:stop] = _attend(q, k, v, scale, window or K, block)[:, :, :n]
    return out_1hQD


def _attend(q_1hQD: Tensor, k_1gKD: Tensor, v_1gKD: Tensor, scale: float | None, window: int, block: int) -> Tensor:
    """One document: query i sees the last `window` of its first K - Q + i + 1 keys."""
    Q, K = q_1hQD.shape[2], k_1gKD.shape[2]
    given: dict[str, Any] = {"scale": scale, "enable_gqa": q_1hQD.shape[1] != k_1gKD.shape[1]}
    if Q == K <= window:
        return F.scaled_dot_product_attention(q_1hQD, k_1gKD, v_1gKD, is_causal=True, **given)
    out_1hQD = q_1hQD.new_empty(*q_1hQD.shape[:3], v_1gKD.shape[3])
    for start in range(0, Q, block):
        stop = min(start + block, Q)
        position = K - Q + start  # of the first query
        first = max(0, position + 1 - window)  # key that it sees first
        keys = slice(first, K - Q + stop)
        mask = torch.ones(stop - start, keys.stop - first, dtype=torch.bool, device=q_1hQD.device)
        mask = mask.tril(position - first).triu(position - first + 1 - window)
        out_1hQD[:, :, start:stop] = F.scaled_dot_product_attention(
            q_1hQD[:, :, start:stop], k_1gKD[:, :, keys], v_1gKD[:, :, keys], attn_mask=mask, **given
        )
    return out_1hQD
