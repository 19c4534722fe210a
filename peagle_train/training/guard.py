"""Steps whose loss or gradient is not finite: not applied, their rows written down, too many in a row stop the run.

Such a step counts as a step: the learning rate and the position in the data move on, so that step n always trains the same
rows at the same rate; the weights and the optimizer's moments stay as they were, as if the step had not been there.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from peagle_train.distributed import sum_counts
from peagle_train.files import NonFinite
from peagle_train.serving.drafter_io import count_non_finite
from peagle_train.training.checkpoint import list_checkpoints, save_checkpoint, step_of

if TYPE_CHECKING:
    from peagle_train.training.trainer import Trainer

BAD_ROWS = "bad_rows.jsonl"


class Guard:
    """Counts bad steps and writes `bad_rows.jsonl` (main process)."""

    def __init__(self, folder: Path, max_bad_steps: int) -> None:
        self.path = folder / BAD_ROWS
        self.max_bad_steps = max_bad_steps
        self.in_a_row = 0
        self.lines = 0

    @property
    def must_stop(self) -> bool:
        return self.in_a_row >= self.max_bad_steps

    def write(self, entries: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.lines += len(entries)


def skip_step(trainer: "Trainer", batches: list[dict[str, Tensor]], losses: list[Tensor]) -> None:
    """What is left to do in a step that was not applied, on every rank: find its rows, stop if it was one too many, or if
    the weights are not finite, for then no row is at fault.

    Args:
        trainer: behind the step. batches: the step's micro-batches on this rank. losses: scalar, of each of them.
    """
    if not _has_finite_weights(trainer):
        raise NonFinite(
            f"step {trainer.step} was not applied: the drafter's weights are not finite: {diverged(trainer)}"
        )
    bad = [_bad_rows(trainer, b) for b, loss in zip(batches, losses, strict=True) if not bool(torch.isfinite(loss))]
    found = _entries(trainer, bad, "loss") or _entries(trainer, batches, "gradient")
    trainer.on_main(f"{BAD_ROWS} could not be written", lambda: trainer.guard.write(found))
    what, keys = found[0]["what"], [entry["row_key"] for entry in found]
    line = f"{what} is not finite in step {trainer.step}, rows {keys}: the step was not applied"
    trainer.record("skipped", f"step {trainer.step}/{trainer.num_steps}  {line}", step=trainer.step)
    if trainer.guard.must_stop:
        in_a_row, trainer.guard.in_a_row = trainer.guard.in_a_row, 0  # who goes on from here begins to count anew
        path = save_checkpoint(trainer)
        # Not one that was saved among the bad steps: it has their number, and would stop at once.
        sound = (p for p in list_checkpoints(trainer.folder) if (step_of(p) or 0) <= trainer.step - in_a_row)
        earlier = next(sound, None)
        raise NonFinite(
            f"{line}, number {in_a_row} in a row (train.max_bad_steps is {trainer.guard.max_bad_steps}), at a learning"
            f" rate of {trainer.learning_rate:.3g}. The weights of the last good step, all finite, are in {path}: the same"
            " command with --resume goes on behind these rows"
            + (f", with --resume {earlier} before them" if earlier else "")
            + "; if the loss had risen before, start a new run with a lower train.learning_rate"
        )


def diverged(trainer: "Trainer") -> str:
    """Words for a run whose weights are no longer finite: no checkpoint of them is made or offered."""
    train = trainer.recipe.train
    return (
        f"the run has diverged at a learning rate of {trainer.learning_rate:.3g} (train.learning_rate"
        f" {train.learning_rate:g}, train.weight_decay {train.weight_decay:g}): start a new run with a lower one"
    )


@torch.no_grad()
def _has_finite_weights(trainer: "Trainer") -> bool:
    """Whether the drafter's are, over all ranks."""
    own = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.draft.parameters())
    return int(sum_counts([sum(map(count_non_finite, own))], trainer.device)) == 0


@torch.no_grad()
def _bad_rows(trainer: "Trainer", batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a micro-batch, the rows whose own loss is not finite; all of them where that cannot be told."""
    size = batch["row_key"].numel()
    several = trainer.accelerator.num_processes > 1
    if size == 1 or (several and (trainer.runner.sharded or trainer.recipe.target.shard)):
        return batch  # where something is sharded, all ranks would have to run the same number of passes
    bad = []
    for row in range(size):
        # The row in every place of the batch: the same shapes, so that nothing is compiled again.
        alone = {name: tensor[row : row + 1].expand_as(tensor).contiguous() for name, tensor in batch.items()}
        loss = trainer.runner.run(alone, trainer.runner.plan(alone), scale=None).loss
        bad.append(not bool(torch.isfinite(loss)))
    is_bad = torch.tensor(bad) if any(bad) else torch.ones(size, dtype=torch.bool)
    return {"row_key": batch["row_key"][is_bad]}


def _entries(trainer: "Trainer", batches: list[dict[str, Tensor]], what: str) -> list[dict[str, Any]]:
    """A line for each row of these micro-batches, over all ranks.

    Where only the gradient is not finite, it cannot be told whose it is.
    """
    epoch = (trainer.step - 1) // trainer.sampler.steps_per_epoch
    where = {"step": trainer.step, "epoch": epoch, "rank": trainer.accelerator.process_index}
    keys = [key for batch in batches for key in batch["row_key"].tolist() if key]  # 0 is a row of nothing
    everybody = [[{**where, "row_key": key, "what": what} for key in keys]]
    if trainer.accelerator.num_processes > 1:
        own, everybody = everybody[0], [[] for _ in range(trainer.accelerator.num_processes)]
        dist.all_gather_object(everybody, own)
    return [entry for entries in everybody for entry in entries]
