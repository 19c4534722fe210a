"""CPU attention as a custom operator, so that torch.compile takes it into a graph without looking inside.

Inside, blocks of queries depend on the data; outside, shapes are static: one graph, whatever the data.
"""

import torch
from torch import Tensor

from peagle_train.core.attention import _backward, _forward
from peagle_train.core.visibility import Visibility


def attention_op(
    query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, visibility: Visibility
) -> Tensor:
    """As attention.py's, [B, Q, H, D]; every int of the visibility must be the same for all batches."""
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
