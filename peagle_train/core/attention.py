"""Attention of drafter elements under the visibility rule: on CUDA by flex_attention with a BlockMask (`flex.py`), on a CPU
by torch's flash kernel, block of queries by block of queries, each over the keys that it can see. The CPU keeps queries,
keys, values, output and log-sum-exp for the backward, no mask and no score.

B: rows, H: query heads, G: key/value heads, R = H / G, N: own elements (queries and keys), Q: queries of this call (the
last Q of the N), P: context columns, D: head dim.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from peagle_train.core import flex
from peagle_train.core.visibility import Causal, QueryBlock, Visibility

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    if context is None:
        context = (own[0][:, :, :0], own[1][:, :, :0])
    if isinstance(visibility, Visibility) and not uses_flex(query.device):
        attention = attention_op if torch.compiler.is_compiling() else CPUAttention.apply
        return attention(visibility, query, *own, *context).flatten(2)
    key, value = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
    if isinstance(visibility, Visibility):
        block_mask = flex.block_mask_of(visibility, own[0].shape[2] - query.shape[2])
        out_BHQD = flex.flex(query, key, value, block_mask)
    else:
        Q, n = query.shape[2], key.shape[2]
        seen_Qn = torch.ones(Q, n, dtype=torch.bool, device=query.device).tril(n - Q)
        if visibility.window is not None:
            seen_Qn = seen_Qn.triu(n - Q - visibility.window + 1)
        out_BHQD = scaled_dot_product_attention(query, key, value, attn_mask=seen_Qn, enable_gqa=True)
    return out_BHQD.transpose(1, 2).flatten(2)


# On a CPU


class CPUAttention(torch.autograd.Function):
    """[B, Q, H, D] of query, key, value, the context's key and value; a visibility keeps its blocks from layer to layer."""

    @staticmethod
    def forward(ctx, visibility, *inputs):  # type: ignore[no-untyped-def]
        out_BQGRD, lse_BQGR = _forward(inputs, visibility)
        ctx.save_for_backward(*inputs, out_BQGRD, lse_BQGR)
        ctx.visibility = visibility
        return out_BQGRD.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BQHD):  # type: ignore[no-untyped-def]
        *inputs, out, lse = ctx.saved_tensors
        return None, *_backward(grad_BQHD, inputs, out, lse, ctx.visibility)


def _forward(inputs: Sequence[Tensor], visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Output [B, Q, G, R, D] and log-sum-exp [B, Q, G, R] (float32 or wider)."""
    query, key = inputs[:2]
    B, H, Q, D = query.shape
    G = key.shape[1]
    query_BGRQD = query.reshape(B, G, H // G, Q, D)
    out_BQGRD = query.new_zeros(B, Q, G, H // G, D)
    lse_BQGR = query.new_zeros(B, Q, G, H // G, dtype=torch.promote_types(query.dtype, torch.float32))
    for _, q, k, v, mask in _blocks(inputs, visibility):
        for r in range(H // G):  # a group's heads share keys and values without repeating them
            out, lse = _flash(query_BGRQD[:, :, r, q], k, v, attn_mask=mask, scale=D**-0.5)
            out_BQGRD[:, q, :, r] = out.transpose(1, 2)
            lse_BQGR[:, q, :, r] = lse.transpose(1, 2)
        del k, v, mask  # before the next block's are made
    return out_BQGRD, lse_BQGR


def _backward(
    grad_BQHD: Tensor, inputs: Sequence[Tensor], out_BQGRD: Tensor, lse_BQGR: Tensor, visibility: Visibility
) -> list[Tensor]:
    """Gradients of the inputs, contiguous and in their dtypes."""
    query, *keys_values = inputs
    B, H, Q, D = query.shape
    G = keys_values[0].shape[1]
    query_BGRQD = query.reshape(B, G, H // G, Q, D)
    grad_BGRQD = grad_BQHD.reshape(B, Q, G, H // G, D).permute(0, 2, 3, 1, 4)
    out_BGRQD = out_BQGRD.permute(0, 2, 3, 1, 4)
    lse_BGRQ = lse_BQGR.permute(0, 2, 3, 1)
    d_query_BGRQD = query.new_zeros(B, G, H // G, Q, D)
    # Many blocks add to a key: sums in float32 or wider.
    d_key, d_value, d_context_key, d_context_value = (t.new_zeros(t.shape, dtype=lse_BQGR.dtype) for t in keys_values)
    for block, q, k, v, mask in _blocks(inputs, visibility):
        for r in range(H // G):
            d_query_BGRQD[:, :, r, q], d_k, d_v = _flash_backward(
                grad_BGRQD[:, :, r, q].contiguous(),
                query_BGRQD[:, :, r, q],
                k,
                v,
                out_BGRQD[:, :, r, q],
                lse_BGRQ[:, :, r, q],
                0.0,
                False,
                attn_mask=mask,
                scale=D**-0.5,
            )
            _add_to_visible(block, d_context_key, d_key, d_k)
            _add_to_visible(block, d_context_value, d_value, d_v)
            del d_k, d_v
        del k, v, mask  # before the next block's are made
    d_keys_values = [d.to(query.dtype) for d in (d_key, d_value, d_context_key, d_context_value)]
    return [d_query_BGRQD.reshape(B, H, Q, D), *d_keys_values]


def _blocks(
    inputs: Sequence[Tensor], visibility: Visibility
) -> Iterator[tuple[QueryBlock, slice, Tensor, Tensor, Tensor]]:
    """Each block of the queries that sees anything: its queries as a slice of this call's, its keys, values and mask."""
    query, key, value, context_key, context_value = inputs
    skip = key.shape[2] - query.shape[2]
    blocks = visibility.blocks(query.dtype.itemsize)
    assert skip in (0, *(b.q0 for b in blocks)), "a block straddles the first query"
    for index, block in enumerate(blocks):
        keys = [s for s in (block.context, block.depth0, block.rollout) if s.stop > s.start]
        if block.q0 >= skip and keys:
            yield (
                block,
                slice(block.q0 - skip, block.q1 - skip),
                _visible(block, context_key, key),
                _visible(block, context_value, value),
                visibility.block_mask(index, query.dtype),
            )


def _visible(block: QueryBlock, context: Tensor, own: Tensor) -> Tensor:
    parts = [context[:, :, block.context], own[:, :, block.depth0], own[:, :, block.rollout]]
    parts = [p for p in parts if p.shape[2]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_to_visible(block: QueryBlock, d_context: Tensor, d_own: Tensor, d_visible: Tensor) -> None:
    slices = [(d_context, block.context), (d_own, block.depth0), (d_own, block.rollout)]
    lengths = [s.stop - s.start for _, s in slices]
    for (target, where), part in zip(slices, d_visible.split(lengths, dim=2), strict=True):
        target[:, :, where] += part


# In a compiled graph: operators that torch.compile does not look into. Their blocks depend on the data, the shapes around
# them do not.


def attention_op(visibility: Visibility, *inputs: Tensor) -> Tensor:
    """As `CPUAttention`; every int of the visibility must be the same for all batches."""
    v = visibility
    sizes = [v.num_context, v.num_depth0, v.first_rollout, v.num_depths, v.cut]
    return _attention(list(inputs), [v.start, v.anchor, v.depth, v.context_end], sizes)[0].flatten(2, 3)


@torch.library.custom_op("peagle_train::attention", mutates_args=())
def _attention(inputs: list[Tensor], tables: list[Tensor], sizes: list[int]) -> tuple[Tensor, Tensor]:
    return _forward(inputs, Visibility(*tables, *sizes))  # type: ignore[arg-type]


@torch.library.custom_op("peagle_train::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, inputs: list[Tensor], out: Tensor, lse: Tensor, tables: list[Tensor], sizes: list[int]
) -> list[Tensor]:
    return _backward(grad, inputs, out, lse, Visibility(*tables, *sizes))  # type: ignore[arg-type]


@_attention.register_fake
def _(inputs, tables, sizes):  # type: ignore[no-untyped-def]
    query, key = inputs[:2]
    B, H, Q, D = query.shape
    G = key.shape[1]
    out = query.new_empty(B, Q, G, H // G, D)
    return out, out.new_empty(B, Q, G, H // G, dtype=torch.promote_types(query.dtype, torch.float32))


@_attention_backward.register_fake
def _(grad, inputs, out, lse, tables, sizes):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in inputs]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, tables, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, *tables, *output)


def _derive(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    *tensors, out, lse = ctx.saved_tensors
    inputs, tables = tensors[:5], tensors[5:]
    grads = _attention_backward(d_out.flatten(2, 3).contiguous(), inputs, out, lse, tables, ctx.sizes)
    return grads, [None] * len(tables), None


_attention.register_autograd(_derive, setup_context=_setup)
