"""flex_attention over drafter elements, for CUDA: the visibility rule as a mask_mod and its BlockMask.

What both read is made before a pass, outside of every graph, and given to it as plain tensors: tables that are made inside
a graph are formulas there, which Inductor writes into the mask_mod and cannot compile.

B: rows, Q: queries, K: keys.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from peagle_train.core.block_mask import BLOCK_SIZE, block_tables
from peagle_train.core.visibility import Visibility, sees_context, sees_rollout

SHAPES = 256
"""Shapes that flex attention is compiled for in a process: segment counts, row lengths, evaluation, idle passes."""


class FlexTables(NamedTuple):
    """All that flex reads of a pass's visibility, for the queries from some element on."""

    rule: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """int32: the queries' start, anchor, depth [B, Q]; the keys' anchor, depth [B, K]."""
    blocks: tuple[Tensor, ...]
    """`block_tables`'s eight."""


def flex_tables(visibility: Visibility, skip: int = 0) -> FlexTables:
    """For the queries from `skip` on, and all context and own keys."""
    queries = (t[:, skip:] for t in (visibility.start, visibility.anchor, visibility.depth))
    start, anchor, depth, key_anchor, key_depth = (
        t.to(torch.int32).contiguous() for t in (*queries, *visibility.key_tables())
    )
    return FlexTables((start, anchor, depth, key_anchor, key_depth), block_tables(visibility, skip))


def flex_tables_of_pass(
    visibility: Visibility, layers: int, keys_values_only: bool, skip: int
) -> dict[int, FlexTables]:
    """Those of all `layers` of a pass, by the number of queries left out; the last layer's queries begin at `skip`."""
    skips = {0} if layers > 1 else set()
    if not keys_values_only:
        skips.add(skip)
    return {s: flex_tables(visibility, s) for s in sorted(skips)}


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
        options["BACKEND"] = (
            "TRITON"  # its decoding kernel, the default, has no form for this many queries of grouped heads
        )
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
