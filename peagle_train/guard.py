"""Steps whose loss or gradient is not finite: not applied, their rows written down, too many in a row stop the run.

Such a step counts as a step: the learning rate and the position in the data move on, so that step n always trains the same
rows at the same rate; the weights and the optimizer's moments stay as they were, as if the step had not been there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def suspects(
    batches: list[dict[str, Tensor]], losses: list[Tensor], step: int, epoch: int, rank: int
) -> list[dict[str, Any]]:
    """This rank's rows of the micro-batches whose own loss is not finite."""
    entries = []
    for batch, loss in zip(batches, losses, strict=True):
        if not bool(torch.isfinite(loss)):
            keys = [key for key in batch["row_key"].tolist() if key]
            entries += [{"step": step, "epoch": epoch, "rank": rank, "row_key": key, "what": "loss"} for key in keys]
    return entries


def all_rows(batches: list[dict[str, Tensor]], step: int, epoch: int, rank: int) -> list[dict[str, Any]]:
    """Every row of the step on this rank, where only the gradient is not finite: it cannot be told whose it is."""
    keys = [key for batch in batches for key in batch["row_key"].tolist() if key]
    return [{"step": step, "epoch": epoch, "rank": rank, "row_key": key, "what": "gradient"} for key in keys]
