"""Linear + KL without logits: from hidden states and head weights to the loss, its gradients and the hits.

Both models' logits exist for one chunk of rows at a time, in float32 or wider; gradients are computed in the same visit,
so the backward only scales them. M: rows (supervised elements), V: draft vocabulary, H: drafter's hidden size, T: the
target's, c: rows of a chunk.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Loss = Literal["kl", "soft_ce", "hard_ce", "tv", "lk"]
LOSSES = get_args(Loss)


def chunked_linear_loss(
    hidden: Tensor,
    head: Tensor,
    target_hidden: Tensor,
    target_head: Tensor,
    loss: Loss = "kl",
    chunk_rows: int = 384,
    counted: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of the drafter's loss against the target's distribution, both softmaxed over the draft vocabulary.

    Args:
        hidden: [M, H], the drafter's hidden states (after its final norm).
        head: [V, H], its `lm_head`; a frozen one (requires_grad False) costs no gradient work.
        target_hidden: [M, T], the target's last hidden states (after its final norm) of the rows' labels. No gradient.
        target_head: [V, T], the target's head rows of the draft vocabulary. No gradient.
        loss: "kl" KL(target || draft); "soft_ce" the same less the target's entropy; "hard_ce" against its argmax; "tv" the
            chance that a sampled draft is refused, 1 - sum min(p, q); "lk" share * kl + (1 - share) * tv, where share =
            exp(-3 sum min(p, q)) has no gradient.
        chunk_rows: rows whose logits exist at a time.
        counted: bool [M], rows that are not counted have no loss, no gradient and no hit; None counts all. For compiled
            callers, whose M must not depend on the data; others leave such rows out.
        weight: [M], what each row's loss is multiplied by; None: one.

    Returns:
        (loss: scalar, float32 or wider; hits: bool [M], whether the two argmaxes agree).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    compute = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        compute = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        inputs = [t.to(compute) for t in (hidden, head, target_hidden, target_head)]
        return _ChunkedLinearLoss.apply(*inputs, loss, chunk_rows, counted, weight, torch.is_grad_enabled())


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden_MH, head_VH, target_MT, target_head_VT, loss, chunk_rows, counted_M, weight_M, with_grad
    ):
        want_hidden = with_grad and ctx.needs_input_grad[0]
        want_head = with_grad and ctx.needs_input_grad[1]
        M = hidden_MH.shape[0]
        wide = torch.promote_types(hidden_MH.dtype, torch.float32)
        loss_M = hidden_MH.new_empty(M, dtype=wide)
        hits_M = torch.zeros(M, dtype=torch.bool, device=hidden_MH.device)
        d_hidden_MH = torch.empty_like(hidden_MH) if want_hidden else None
        d_head_VH = torch.zeros_like(head_VH, dtype=wide) if want_head else None
        left_out_M = None if counted_M is None else ~counted_M
        room: list[Tensor] = []
        for start in range(0, M, chunk_rows):
            rows = slice(start, start + chunk_rows)
            h_cH = hidden_MH[rows]
            if not room or room[0].shape[0] != h_cH.shape[0]:
                # All the wide tensors that there are. New ones for each chunk would leave holes in a CPU's heap; a shorter
                # last chunk has its own, as Inductor writes well only into whole tensors, not into slices.
                room.clear()
                room += [
                    hidden_MH.new_empty(h_cH.shape[0], head_VH.shape[0], dtype=wide)
                    for _ in range(2 if loss == "hard_ce" else 3)
                ]
            loss_M[rows], hits_M[rows], d_cV = _visit(h_cH, head_VH, target_MT[rows], target_head_VT, loss, room)
            if weight_M is not None:
                loss_M[rows] *= weight_M[rows]
                d_cV *= weight_M[rows, None]
            if left_out_M is not None:
                d_cV.masked_fill_(left_out_M[rows, None], 0)
            d_cV = d_cV.to(hidden_MH.dtype)
            if d_hidden_MH is not None:
                d_hidden_MH[rows] = d_cV @ head_VH
            if d_head_VH is not None:
                d_head_VH += d_cV.T @ h_cH
            del d_cV  # before the next chunk's logits are made
        if left_out_M is not None:
            loss_M, hits_M = loss_M.masked_fill(left_out_M, 0), hits_M & counted_M
        ctx.save_for_backward(d_hidden_MH, d_head_VH)
        ctx.mark_non_differentiable(hits_M)
        ctx.head_dtype = head_VH.dtype
        # A sum, not filled in place: compiled by torch 2.11, what is returned would lose every gradient.
        return loss_M.sum(), hits_M

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):  # type: ignore[no-untyped-def]
        d_hidden_MH, d_head_VH = ctx.saved_tensors
        # In d_total's own precision: bfloat16 would round the scale, and with it every gradient, by up to 0.4 %.
        d_hidden = None if d_hidden_MH is None else (d_hidden_MH.to(d_total.dtype) * d_total).to(d_hidden_MH.dtype)
        d_head = None if d_head_VH is None else (d_head_VH * d_total).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None, None, None, None


def _visit(
    h_cH: Tensor, head_VH: Tensor, target_cT: Tensor, target_head_VT: Tensor, loss: str, room: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss [c], whether its argmaxes agree [c], and the loss's gradient by the drafter's logits [c, V].

    Everything of the size [c, V] is written into the tensors of `room`, two for hard_ce and else three.
    """
    a_cV, log_q_cV, *more = room
    best_c = _logits(target_cT, target_head_VT, out=a_cV).argmax(-1)
    if more:
        (b_cV,) = more
        torch.log_softmax(a_cV, -1, out=b_cV)
    hits_c = _logits(h_cH, head_VH, out=a_cV).argmax(-1) == best_c
    torch.log_softmax(a_cV, -1, out=log_q_cV)
    if not more:
        best_c1 = best_c[:, None]
        loss_c = -log_q_cV.gather(1, best_c1)[:, 0]
        return loss_c, hits_c, log_q_cV.exp_().scatter_add_(1, best_c1, log_q_cV.new_full(best_c1.shape, -1.0))
    p_cV = torch.exp(b_cV, out=a_cV)
    score_cV = torch.neg(log_q_cV, out=b_cV) if loss == "soft_ce" else b_cV.sub_(log_q_cV)
    loss_c = _dot(p_cV, score_cV)
    if loss not in ("tv", "lk"):
        return loss_c, hits_c, log_q_cV.exp_().sub_(p_cV)
    # tv is the sum of p - q where q <= p; its gradient there is q * (that q's sum - 1), elsewhere q * that sum.
    q_cV, below_cV = log_q_cV.exp_(), score_cV.ge_(0)
    q_below_c = _dot(q_cV, below_cV)
    tv_c = _dot(p_cV, below_cV) - q_below_c
    kl_share_c = torch.exp(3 * (tv_c - 1)) if loss == "lk" else torch.zeros_like(tv_c)
    tv_share_c = 1 - kl_share_c
    loss_c = kl_share_c * loss_c + tv_share_c * tv_c
    d_cV = below_cV.mul_(-tv_share_c[:, None]).add_((kl_share_c + tv_share_c * q_below_c)[:, None]).mul_(q_cV)
    return loss_c, hits_c, d_cV.sub_(p_cV.mul_(kl_share_c[:, None]))


def _dot(x_cV: Tensor, y_cV: Tensor) -> Tensor:
    """[c]"""
    return (x_cV[:, None] @ y_cV[:, :, None])[:, 0, 0]


def _logits(x_cI: Tensor, weight_VI: Tensor, out: Tensor) -> Tensor:
    """[c, V] in float32 or wider; on CUDA as they were summed, not rounded in between."""
    if x_cI.dtype == out.dtype:
        return torch.mm(x_cI, weight_VI.T, out=out)
    if x_cI.is_cuda:
        return torch.mm(x_cI, weight_VI.T, out_dtype=out.dtype, out=out)
    return out.copy_(x_cI @ weight_VI.T)
