"""Linear + KL without logits: from hidden states and head weights to the loss, its gradients and the hits.

Both models' logits exist for one chunk of rows at a time, in float32 or wider; gradients are computed in the same visit,
so the backward only scales them. M: rows (supervised elements), V: draft vocabulary, H: drafter's hidden size, T: the
target's, c: rows of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOSSES = ("kl", "soft_ce", "hard_ce")


def chunked_linear_loss(
    hidden: Tensor,
    head: Tensor,
    target_hidden: Tensor,
    target_head: Tensor,
    loss: str = "kl",
    chunk_rows: int = 384,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of the drafter's loss against the target's distribution, both softmaxed over the draft vocabulary.

    Args:
        hidden: [M, H], the drafter's hidden states (after its final norm).
        head: [V, H], its `lm_head`; a frozen one (requires_grad False) costs no gradient work.
        target_hidden: [M, T], the target's last hidden states (after its final norm) of the rows' labels. No gradient.
        target_head: [V, T], the target's head rows of the draft vocabulary. No gradient.
        loss: "kl" KL(target || draft); "soft_ce" the same less the target's entropy; "hard_ce" against its argmax.
        chunk_rows: rows whose logits exist at a time.
        counted: bool [M], rows that are not counted have no loss, no gradient and no hit; None counts all. For compiled
            callers, whose M must not depend on the data; others leave such rows out.

    Returns:
        (loss: scalar, float32 or wider; hits: bool [M], whether the two argmaxes agree).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    with torch.no_grad():
        compute = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            compute = torch.get_autocast_dtype(hidden.device.type)
        target_hidden, target_head = target_hidden.to(compute), target_head.to(compute)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLinearLoss.apply(
            hidden.to(compute),
            head.to(compute),
            target_hidden,
            target_head,
            loss,
            chunk_rows,
            counted,
            torch.is_grad_enabled(),
        )


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MH, head_VH, target_MT, target_head_VT, loss, chunk_rows, counted_M, with_grad):  # type: ignore[no-untyped-def]
        want_hidden = with_grad and ctx.needs_input_grad[0]
        want_head = with_grad and ctx.needs_input_grad[1]
        M = hidden_MH.shape[0]
        wide = torch.promote_types(hidden_MH.dtype, torch.float32)
        total = hidden_MH.new_zeros((), dtype=wide)
        hits_M = torch.zeros(M, dtype=torch.bool, device=hidden_MH.device)
        d_hidden_MH = torch.empty_like(hidden_MH) if want_hidden else None
        d_head_VH = torch.zeros_like(head_VH, dtype=wide) if want_head else None
        for start in range(0, M, chunk_rows):
            rows = slice(start, start + chunk_rows)
            h_cH = hidden_MH[rows]
            loss_c, hits_c, d_cV = _visit(h_cH, head_VH, target_MT[rows], target_head_VT, loss)
            if counted_M is not None:
                counted_c = counted_M[rows]
                hits_c = hits_c & counted_c
                loss_c = torch.where(counted_c, loss_c, 0)
                d_cV = torch.where(counted_c[:, None], d_cV, 0)
            hits_M[rows] = hits_c
            total = total + loss_c.sum()  # not in place: compiled by torch 2.11, that loses every gradient
            d_cV = d_cV.to(hidden_MH.dtype)
            if d_hidden_MH is not None:
                d_hidden_MH[rows] = d_cV @ head_VH
            if d_head_VH is not None:
                d_head_VH += d_cV.T @ h_cH
            del d_cV  # before the next chunk's logits are made
        ctx.save_for_backward(d_hidden_MH, d_head_VH)
        ctx.mark_non_differentiable(hits_M)
        ctx.head_dtype = head_VH.dtype
        return total, hits_M

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):  # type: ignore[no-untyped-def]
        d_hidden_MH, d_head_VH = ctx.saved_tensors
        # In d_total's own precision: bfloat16 would round the scale, and with it every gradient, by up to 0.4 %.
        d_hidden = None if d_hidden_MH is None else (d_hidden_MH.to(d_total.dtype) * d_total).to(d_hidden_MH.dtype)
        d_head = None if d_head_VH is None else (d_head_VH * d_total).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None, None, None


def _visit(
    h_cH: Tensor, head_VH: Tensor, target_cT: Tensor, target_head_VT: Tensor, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss [c], whether its argmaxes agree [c], and the loss's gradient by the drafter's logits [c, V].

    In place wherever a tensor of logits is not needed again: three of them exist at a time.
    """
    wide = torch.promote_types(h_cH.dtype, torch.float32)
    t_cV = (target_cT @ target_head_VT.T).to(wide)
    best_c = t_cV.argmax(-1)
    t_cV.sub_(t_cV.gather(1, best_c[:, None]))  # less the largest, so that exp stays finite
    u_cV = (h_cH @ head_VH.T).to(wide)
    hits_c = u_cV.argmax(-1) == best_c
    u_cV.sub_(u_cV.amax(-1, keepdim=True))
    if loss == "hard_ce":
        own_c = u_cV.gather(1, best_c[:, None])[:, 0]
        d_cV = u_cV.exp_()
        z_c = d_cV.sum(-1)
        d_cV.div_(z_c[:, None]).scatter_add_(1, best_c[:, None], d_cV.new_full((h_cH.shape[0], 1), -1.0))
        return z_c.log() - own_c, hits_c, d_cV
    p_cV = t_cV.exp()
    s_c = p_cV.sum(-1)
    p_cV.div_(s_c[:, None])
    # log p - log q = (t - u) + (log z - log s), and the p of a row sum to 1.
    score_cV = t_cV.sub_(u_cV) if loss == "kl" else t_cV.copy_(u_cV).neg_()
    mean_c = (p_cV[:, None] @ score_cV[:, :, None])[:, 0, 0]
    d_cV = u_cV.exp_()
    z_c = d_cV.sum(-1)
    d_cV.div_(z_c[:, None]).sub_(p_cV)
    return mean_c + z_c.log() - (s_c.log() if loss == "kl" else 0), hits_c, d_cV
