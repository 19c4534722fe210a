"""Attention of drafter elements on a CPU: torch's flash kernel, block of queries by block of queries, each over the keys
that it can see. Only queries, keys, values, output and log-sum-exp are kept for the backward, no mask and no score.

Eagerly it is an autograd function, whose visibility keeps its blocks from layer to layer; in a compiled graph, a custom
operator that torch.compile does not look into: its blocks depend on the data, the shapes around it do not.

B: rows, H: query heads, G: key/value heads, R = H / G, N: own elements (queries and keys), Q: queries of this call (the
last Q of the N), P: context columns, D: head dim.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peagle_train.core.visibility import QueryBlock, Visibility

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, context_key, context_value, visibility):  # type: ignore[no-untyped-def]
        out_BQGRD, lse_BQGR = _forward(query, key, value, context_key, context_value, visibility)
        ctx.save_for_backward(query, key, value, context_key, context_value, out_BQGRD, lse_BQGR)
        ctx.visibility = visibility
        return out_BQGRD.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BQHD):  # type: ignore[no-untyped-def]
        query, key, value, context_key, context_value, out, lse = ctx.saved_tensors
        d = _backward(grad_BQHD, query, key, value, context_key, context_value, out, lse, ctx.visibility)
        return *d, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Output [B, Q, G, R, D] and log-sum-exp [B, Q, G, R] (float32 or wider)."""
    B, H, Q, D = query.shape
    G, N = key.shape[1:3]
    query_BGRQD = query.reshape(B, G, H // G, Q, D)
    out_BQGRD = query.new_zeros(B, Q, G, H // G, D)
    lse_BQGR = query.new_zeros(B, Q, G, H // G, dtype=torch.promote_types(query.dtype, torch.float32))
    for index, block, q in _blocks_of_last(visibility, query, N - Q):
        k = _visible_keys(block, context_key, key)
        if k.shape[2] == 0:
            continue
        v = _visible_keys(block, context_value, value)
        mask = visibility.block_mask(index, query.dtype)
        for r in range(H // G):  # a group's heads share keys and values without repeating them
            out, lse = _flash(query_BGRQD[:, :, r, q], k, v, attn_mask=mask, scale=D**-0.5)
            out_BQGRD[:, q, :, r] = out.transpose(1, 2)
            lse_BQGR[:, q, :, r] = lse.transpose(1, 2)
        del k, v, mask  # before the next block's are made
    return out_BQGRD, lse_BQGR


def _backward(
    grad_BQHD: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    out_BQGRD: Tensor,
    lse_BQGR: Tensor,
    visibility: Visibility,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, context_key, context_value, in their dtypes."""
    B, H, Q, D = query.shape
    G, N = key.shape[1:3]
    query_BGRQD = query.reshape(B, G, H // G, Q, D)
    grad_BGRQD = grad_BQHD.reshape(B, Q, G, H // G, D).permute(0, 2, 3, 1, 4)
    out_BGRQD = out_BQGRD.permute(0, 2, 3, 1, 4)
    lse_BGRQ = lse_BQGR.permute(0, 2, 3, 1)
    # Many blocks add to a key: sums in float32 or wider.
    wide = lse_BQGR.dtype
    d_query_BGRQD = query.new_zeros(B, G, H // G, Q, D)
    d_own = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    d_context = torch.zeros_like(context_key, dtype=wide), torch.zeros_like(context_value, dtype=wide)
    for index, block, q in _blocks_of_last(visibility, query, N - Q):
        k = _visible_keys(block, context_key, key)
        if k.shape[2] == 0:
            continue
        v = _visible_keys(block, context_value, value)
        mask = visibility.block_mask(index, query.dtype)
        for r in range(H // G):
            d_query, d_key, d_value = _flash_backward(
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
            d_query_BGRQD[:, :, r, q] = d_query
            _add_to_visible(block, d_context[0], d_own[0], d_key)
            _add_to_visible(block, d_context[1], d_own[1], d_value)
            del d_query, d_key, d_value
        del k, v, mask  # before the next block's are made
    d_keys_values = [d.to(key.dtype) for d in (*d_own, *d_context)]
    return d_query_BGRQD.reshape(B, H, Q, D), d_keys_values[0], d_keys_values[1], d_keys_values[2], d_keys_values[3]


def _blocks_of_last(visibility: Visibility, query: Tensor, skip: int) -> list[tuple[int, QueryBlock, slice]]:
    """(index, block, its queries as a slice of this call's) for the blocks from query `skip` on."""
    blocks = enumerate(visibility.blocks(query.dtype.itemsize))
    chosen = [(i, b, slice(b.q0 - skip, b.q1 - skip)) for i, b in blocks if b.q0 >= skip]
    assert sum(b.q1 - b.q0 for _, b, _ in chosen) == query.shape[2], "a block straddles the first query"
    return chosen


def _visible_keys(block: QueryBlock, context: Tensor, own: Tensor) -> Tensor:
    parts = [context[:, :, block.context], own[:, :, block.depth0], own[:, :, block.rollout]]
    parts = [p for p in parts if p.shape[2]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) if parts else own[:, :, :0]


def _add_to_visible(block: QueryBlock, d_context: Tensor, d_own: Tensor, d_visible: Tensor) -> None:
    slices = [(d_context, block.context), (d_own, block.depth0), (d_own, block.rollout)]
    lengths = [s.stop - s.start for _, s in slices]
    for (target, where), part in zip(slices, d_visible.split(lengths, dim=2), strict=True):
        target[:, :, where] += part


def attention_op(
    query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, visibility: Visibility
) -> Tensor:
    """As `CPUAttention`, [B, Q, H, D]; every int of the visibility must be the same for all batches."""
    v = visibility
    tables = (v.start, v.anchor, v.depth, v.context_end)
    sizes = [v.num_context, v.num_depth0, v.first_rollout, v.num_depths, v.cut]
    out_BQGRD, _ = _attention(query, key, value, context_key, context_value, *tables, sizes)
    return out_BQGRD.flatten(2, 3)


def _visibility(start: Tensor, anchor: Tensor, depth: Tensor, context_end: Tensor, sizes: list[int]) -> Visibility:
    num_context, num_depth0, first_rollout, num_depths, cut = sizes
    return Visibility(
        start, anchor, depth, context_end, num_context, num_depth0, first_rollout, num_depths=num_depths, cut=cut
    )


@torch.library.custom_op("peagle_train::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    start: Tensor,
    anchor: Tensor,
    depth: Tensor,
    context_end: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor]:
    visibility = _visibility(start, anchor, depth, context_end, sizes)
    return _forward(query, key, value, context_key, context_value, visibility)


@torch.library.custom_op("peagle_train::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor,
    anchor: Tensor,
    depth: Tensor,
    context_end: Tensor,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    visibility = _visibility(start, anchor, depth, context_end, sizes)
    # Contiguous: what comes out must have the strides that the fake below promises.
    d_query, *others = _backward(grad, query, key, value, context_key, context_value, out, lse, visibility)
    d_key, d_value, d_context_key, d_context_value = (d.contiguous() for d in others)
    return d_query.contiguous(), d_key, d_value, d_context_key, d_context_value


@_attention.register_fake
def _(query, key, value, context_key, context_value, start, anchor, depth, context_end, sizes):  # type: ignore[no-untyped-def]
    B, H, Q, D = query.shape
    G = key.shape[1]
    out = query.new_empty(B, Q, G, H // G, D)
    return out, out.new_empty(B, Q, G, H // G, dtype=torch.promote_types(query.dtype, torch.float32))


@_attention_backward.register_fake
def _(grad, query, key, value, context_key, context_value, out, lse, *tables):  # type: ignore[no-untyped-def]
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        context_key.new_empty(context_key.shape),
        context_value.new_empty(context_value.shape),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, *output)


def _derive(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    *tensors, out, lse = ctx.saved_tensors
    grads = _attention_backward(d_out.flatten(2, 3).contiguous(), *tensors[:5], out, lse, *tensors[5:], ctx.sizes)
    return *grads, None, None, None, None, None


_attention.register_autograd(_derive, setup_context=_setup)
