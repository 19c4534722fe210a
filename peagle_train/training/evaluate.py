"""Held-out evaluation: the training loss and per-depth accuracy on data that is never trained on, under a fixed draw.

Runs in the same segments as training, so it never needs more memory. B: sequences, L: positions, m: positions of several
sequences, T: the target's hidden size, V: the target's vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from peagle_train.data.packing import PackedRows
from peagle_train.data.sampler import EMPTY_ROW
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import sum_over_ranks
from peagle_train.target_model.frozen import TargetBase
from peagle_train.training.metrics import summary_of
from peagle_train.training.step import Batch, BatchRunner, add_up

EVAL_SEED = 0  # of the evaluation's COD draw: the same in every run, so that runs can be compared


@torch.no_grad()
def mass_outside(target: TargetBase, last_hidden_mT: Tensor, draft_ids: Tensor, chunk: int = 8192) -> Tensor:
    """[m]: the probability that the target gives tokens that the drafter cannot draft; from chunks of the vocabulary."""
    head_VT, device = target.head_weight(), last_hidden_mT.device
    is_draft_V = torch.zeros(head_VT.shape[0], dtype=torch.bool, device=device)
    is_draft_V[draft_ids.to(device)] = True
    inside, total = [], []
    for head, drafted in zip(head_VT.split(chunk), is_draft_V.split(chunk), strict=True):
        logits = (last_hidden_mT @ head.to(device).T).float()
        total.append(logits.logsumexp(-1))
        inside.append(logits.masked_fill(~drafted, float("-inf")).logsumexp(-1))
    return -torch.expm1(torch.stack(inside).logsumexp(0) - torch.stack(total).logsumexp(0)).clamp(max=0)


class Evaluator:
    """Evaluates a drafter on held-out sequences; each rank takes its share of them."""

    def __init__(self, runner: BatchRunner, rows: PackedRows) -> None:
        self.runner, self.rows = runner, rows
        self.collator = make_collator(runner.recipe, EVAL_SEED, runner.device)
        self._outside: float | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, Any] | None:
        """Loss, per-depth accuracy, expected accepted length over all ranks; None without held-out data."""
        if len(self.rows) == 0:
            return None
        accelerator, size = self.runner.accelerator, self.runner.recipe.train.batch_size
        order = range(accelerator.process_index, len(self.rows), accelerator.num_processes)
        batches = -(-len(self.rows) // (size * accelerator.num_processes))  # the same on every rank
        indices = [*order] + [EMPTY_ROW] * (batches * size - len(order))
        sums = []
        weighted = torch.zeros((), dtype=torch.float64, device=self.runner.device)
        for first in range(0, len(indices), size):
            batch = self.collator([self.rows[0, i] for i in indices[first : first + size]])
            target = self.runner.run_target(batch)
            sums.append(self.runner.run(batch, self.runner.plan(batch), scale=None, target=target))
            if self._outside is None:
                weighted += self._mass_outside(batch, target.last_hidden)
        stats = add_up(sums, self.runner.device)
        sum_over_ranks([], also=[stats.loss, stats.hits, stats.totals, weighted])
        values = summary_of(stats)
        if self._outside is None:  # a property of the data, not of the drafter
            self._outside = float(weighted) / max(1, sum(values["supervised"]))
        return {**values, "hits": stats.hits.tolist(), "mass_outside": self._outside}

    def _mass_outside(self, batch: Batch, last_hidden_BLT: Tensor) -> Tensor:
        """Sum over the batch's supervised elements of the target's mass outside the draft vocabulary."""
        target, device = self.runner.target, self.runner.device
        B, L = batch["input_ids"].shape
        label = (batch["anchor"] + batch["depth"] + 1).clamp(0, L - 1)
        # How many supervised elements have their label at each position.
        count_BL = torch.zeros(B, L, dtype=torch.int64).scatter_add_(1, label, batch["supervised"].long())
        used_BL = count_BL > 0
        if self.runner.draft.config.draft_vocab_size == target.vocab_size or not bool(used_BL.any()):
            return torch.zeros((), dtype=torch.float64, device=device)
        chosen_mT = last_hidden_BLT[used_BL.to(last_hidden_BLT.device)].to(device)
        mass = [mass_outside(target, part, self.runner.draft.draft_token_ids) for part in chosen_mT.split(256)]
        return (torch.cat(mass).double() * count_BL[used_BL].to(device)).sum()
