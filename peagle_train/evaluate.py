"""Held-out evaluation: the training loss and per-depth accuracy on rows that are never trained on, under a fixed draw.

Runs in the same segments as training, so that it never needs more memory. T: the target's hidden size, V: the target's
vocabulary, m: columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peagle_train.metrics import accuracies, expected_accepted_length
from peagle_train.segments import StepStats
from peagle_train.target import FrozenTarget

EVAL_SEED = 0
"""Of the evaluation's COD draw: the same in every run, so that runs can be compared."""


@torch.no_grad()
def mass_outside(target: FrozenTarget, last_hidden_mT: Tensor, draft_ids: Tensor, chunk: int = 8192) -> Tensor:
    """[m]: the probability that the target gives to tokens that the drafter cannot draft.

    Visits the vocabulary in chunks, so that no row of full logits exists.
    """
    head_VT = target.head.weight
    assert isinstance(head_VT, Tensor)
    is_draft_V = torch.zeros(head_VT.shape[0], dtype=torch.bool, device=head_VT.device)
    is_draft_V[draft_ids.to(head_VT.device)] = True
    inside, total = [], []
    for start in range(0, head_VT.shape[0], chunk):
        logits = (last_hidden_mT @ head_VT[start : start + chunk].T).float()
        total.append(logits.logsumexp(-1))
        drafted = is_draft_V[start : start + chunk]
        inside.append(logits.masked_fill(~drafted, float("-inf")).logsumexp(-1))
    log_inside = torch.stack(inside).logsumexp(0)
    log_total = torch.stack(total).logsumexp(0)
    return -torch.expm1(log_inside - log_total).clamp(max=0)


def label_columns(batch: dict[str, Tensor]) -> Tensor:
    """int64 [B, L]: how many supervised elements have their label in each column."""
    B, L = batch["input_ids"].shape
    label = (batch["anchor"] + batch["depth"] + 1).clamp(0, L - 1)
    return torch.zeros(B, L, dtype=torch.int64).scatter_add_(1, label, batch["supervised"].long())


def summarize(sums: StepStats, outside: float | None) -> dict[str, Any]:
    """Numbers of an evaluation from its sums over all ranks; reads the device."""
    hits, totals = sums.hits.tolist(), sums.totals.tolist()
    accuracy = accuracies(hits, totals)
    return {
        "loss": float(sums.loss) / max(1, sum(totals)),
        "accuracy": accuracy,
        "expected_accepted_length": expected_accepted_length(accuracy),
        "hits": hits,
        "supervised": totals,
        "mass_outside": outside,
    }


def gather_sums(sums: list[StepStats], device: torch.device) -> StepStats:
    """One sum over micro-batches and ranks."""
    loss = torch.stack([s.loss for s in sums]).sum()
    hits = torch.stack([s.hits for s in sums]).sum(0)
    totals = torch.stack([s.totals for s in sums]).sum(0).to(device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in (loss, hits, totals):
            dist.all_reduce(tensor)
    return StepStats(loss, hits, totals)
