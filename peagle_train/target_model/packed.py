"""Packed documents that get what each gets alone: what the target is given at a time, attention that is told where
documents lie, and the check that they are kept apart.

Short documents run side by side without a cache, as many as a chunk holds. A document longer than a chunk runs alone, chunk
by chunk, over a cache of its own: it needs no more memory than weights, keys and values, and one chunk.

transformers' sdpa masks packed sequences, so nothing is skipped: at 8,192 tokens the mask is 64 MiB, and 128 MiB more once
a kernel has made bfloat16 of it. Told where documents begin, `varlen_attn` computes what is seen and nothing else; where it
does not run (CPU, float32, ...) every document is attended to by itself. A chunk of a document is the same case: one
document whose last Q positions are the queries.

N: tokens of all sequences; Q: queries, K: keys, of which the queries' own are the last; h: query heads, g: key heads,
D: head size.
"""

import inspect
import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

from peagle_train.files import one_line

logger = logging.getLogger(__name__)
NAME = "peagle_train"
BLOCK, CPU_BLOCK = 256, 64
"""Queries at a time where a mask is needed: it is as wide as the keys, and on CPU most of a narrow target's memory."""
TOLERANCE = 0.05  # of the Euclidean norm: bfloat16 stays below, a mistake does not


class Way(NamedTuple):
    """How packed documents are kept apart, and how many tokens the target is given at a time."""

    apart: bool  # one document at a time, for a target whose attention does not heed documents' bounds
    chunk_tokens: int | None = None  # at most this many tokens a forward; None: the whole batch


def document_bounds(position_ids: Tensor) -> list[int]:
    """Where each document begins among the N tokens of all sequences, ascending, and N: where a sequence does and, as in
    transformers, wherever a position is not the one before plus 1. `position_ids`: int64 [B, L], on the host.
    """
    begins_BL = position_ids.new_ones(position_ids.shape).bool()
    begins_BL[:, 1:] = position_ids.diff(dim=1) != 1
    return [*begins_BL.flatten().nonzero().flatten().tolist(), position_ids.numel()]


def plan_runs(bounds: list[int], way: Way) -> list[list[slice]]:
    """Cut packed sequences, by their `document_bounds`, into runs of at most a chunk, and single documents that are longer.

    Returns spans of the N tokens: those of a run are given one after the other, over a cache if they are several. Where
    documents run one at a time, those of one token (padding is such) are skipped, as they have no position that drafts,
    unless that token is all there is.
    """
    limit = way.chunk_tokens or bounds[-1]
    runs: list[list[slice]] = []
    for start, stop in pairwise(bounds):
        if way.apart and stop - start == 1 and bounds[-1] > 1:
            continue
        if runs and not way.apart and len(runs[-1]) == 1 and stop - runs[-1][0].start <= limit:
            runs[-1] = [slice(runs[-1][0].start, stop)]
        else:
            runs.append([slice(first, min(first + limit, stop)) for first in range(start, stop, limit)])
    return runs


def cache_argument(base: nn.Module) -> str:
    """What the base model calls the cache that it is given: transformers renamed it."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


# Attention


def takes_bounds(model: nn.Module, config: Any) -> bool:
    """Whether all sequences can be given as one, with documents' bounds: layers of known types that attend by sdpa through
    transformers' interface, and that flash attention supports (it has no masks either).
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    is_open = model._supports_attention_backend and model._supports_flash_attn
    return config._attn_implementation == "sdpa" and kinds <= {"full_attention", "sliding_attention"} and bool(is_open)


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
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_masked = any(x is not None for x in (attention_mask, *map(given.get, ("position_bias", "softcap", "s_aux"))))
    kinds: Any = getattr(module.config, "layer_types", None)
    # The window may be in the mask alone, as Qwen2-MoE's is.
    lost = bool(kinds) and kinds[module.layer_idx] == "sliding_attention" and not sliding_window
    if bounds is None or documents is None or not causal or lost or is_masked:
        why = "was not told the bounds of documents or its window, or has a mask, bias, cap or sinks"
        raise ValueError(f"{type(module).__name__} {why}: with target.check true, it gets one document at a time")
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
    """Whether `varlen_attn` has a kernel."""
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


# The check


def choose_way(name: str, features: Callable[..., tuple[Tensor, Tensor]], way: Way, vocab_size: int) -> Way:
    """`way`, or one document at a time where packed ones do not get what they get alone, of a few tokens that are run.

    name: the target's. features: `FrozenTarget.features`. ValueError: they are not finite, or chunks give others.
    """
    lengths = [6, 5, 2, 3, 7, 3]  # of documents: the first three in one sequence, the others in another
    ids_n = torch.arange(1, 1 + sum(lengths)) % vocab_size
    document_n = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position_BL = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)

    def run(way: Way, ids_n: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features and last hidden states of each document, packed in two sequences."""
        packed = features(ids_n.view_as(position_BL), position_BL, way)
        return list(zip(*(values.flatten(0, 1).split(lengths) for values in packed), strict=True))

    expected = run(Way(apart=True), ids_n)
    if not all(bool(values.isfinite().all()) for both in expected for values in both):
        why = "its weights are damaged, or target.dtype is too narrow"
        raise ValueError(f"target {name} gives features that are not finite: {why}")

    def error(way: Way) -> float:
        """How far packed documents are off what they give alone, or off themselves beside other documents.

        Both in the worst case, but the first, in 16 bits, in the median: there a few tokens of a model with massive
        activations are off by half when any shape changes, packed or not. A neighbour changes no shape.
        """
        packed = run(way, ids_n)
        alone = sorted(max(map(relative, a, b)) for a, b in zip(packed, expected, strict=True))
        moved = []
        for one in range(3):  # of each sequence's three documents
            others_n = torch.where(document_n % 3 == one, ids_n, (ids_n + vocab_size // 2) % vocab_size)
            moved += [max(map(relative, a, b)) for a, b in zip(run(way, others_n)[one::3], packed[one::3], strict=True)]
        is_rough = expected[0][0].dtype.itemsize < 4
        return max(alone[len(alone) // 2] if is_rough else alone[-1], *moved)

    for one in dict.fromkeys((way, way._replace(apart=True))):
        try:
            off = max(error(one._replace(chunk_tokens=n)) for n in ((None, 4) if way.chunk_tokens else (None,)))
            why = f"features are {off:.0%} off" if off > TOLERANCE else ""
        except Exception as raised:  # whatever a model raises that knows no such arguments
            why = one_line(raised, 200) or type(raised).__name__
        if not why:
            return one
        if not one.apart:
            logger.warning("target %s does not keep packed documents apart (%s): one at a time, slower", name, why)
    raise ValueError(f"target {name} gives other features in chunks ({why}): set target.chunk_tokens to null")


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite if that is not a number."""
    found, expected = found.double(), expected.double()
    off = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(off) else off
