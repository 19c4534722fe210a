"""Numbers of a run: per-depth accuracy, expected accepted length, progress bar and JSON lines."""

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def accuracies(hits: Sequence[int], totals: Sequence[int]) -> list[float]:
    """Per depth, 0 where nothing was supervised."""
    return [h / t if t else 0.0 for h, t in zip(hits, totals, strict=True)]


def expected_accepted_length(accuracy: Sequence[float]) -> float:
    """1 + sum_k prod_{i <= k} acc_i: tokens a target pass yields if depths' hits were independent (greedy)."""
    total, product = 1.0, 1.0
    for share in accuracy:
        product *= share
        total += product
    return total


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since the start: of the CUDA allocator, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Reporter:
    """Rank 0's voice: a progress bar on a terminal, plain lines elsewhere, and `metrics.jsonl` in the output folder."""

    def __init__(self, folder: Path, num_steps: int, active: bool, start_step: int = 0) -> None:
        self.active = active
        self.path = folder / "metrics.jsonl"
        self.lines = 0
        self.start_time = time.perf_counter()
        self.bar = tqdm(
            total=num_steps,
            initial=start_step,
            unit="step",
            disable=not (active and sys.stderr.isatty()),
            leave=False,
        )

    def step(self) -> None:
        self.bar.update(1)

    def record(self, kind: str, line: str, **values: Any) -> None:
        """One JSON line and one line for a person."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        self.lines += 1
        self.say(line)

    def sync(self) -> None:
        """Have the lines so far on disk, whatever happens to the machine."""
        if self.active and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def say(self, line: str) -> None:
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def train_line(values: dict[str, Any]) -> str:
    """A step's numbers for a person."""
    shares = " ".join(f"{a:.2f}" for a in values["accuracy"])
    return (
        f"step {values['step']}/{values['num_steps']}  loss {values['loss']:.4f}  acc {shares}"
        f"  accepted {values['expected_accepted_length']:.3f}  lr {values['learning_rate']:.2e}"
        f"  grad {values['grad_norm']:.2f}  {values['tokens_per_second']:.0f} tok/s"
        f"  peak {values['peak_memory_bytes'] / 2**30:.2f} GiB"
        + ("" if values["recompiles"] is None else f"  {values['recompiles']} recompiles")
    )


def eval_line(title: str, values: dict[str, Any]) -> str:
    shares = " ".join(f"{a:.2f}" for a in values["accuracy"])
    return (
        f"{title}: expected accepted length {values['expected_accepted_length']:.3f}  loss {values['loss']:.4f}"
        f"  acc {shares}  target mass outside the draft vocabulary {values['mass_outside']:.2%}"
    )
