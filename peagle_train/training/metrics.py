"""A run's numbers: accuracy by depth, pace, log lines, metrics.jsonl, trackers, a profile."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from peagle_train.core.passes import StepStats
from peagle_train.files import one_line

logger = logging.getLogger(__name__)

ABOUT = "about.json"  # in the output folder: what packing made of a run's data
SMOOTHED = 100  # steps that the accepted length of a log line is of


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


class Pace:
    """How fast a run is and what it waits for since the last log line, counted on the host; ranks are taken to be alike."""

    def __init__(self, num_processes: int = 1) -> None:
        self.num_processes = num_processes
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()
        self.steps, self.tokens, self.wait = 0, 0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count: an evaluation, a checkpoint."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def step(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Count an optimizer step. `batches`: its micro-batches, on the host."""
        self.steps += 1
        self.tokens += sum(int((b["document_ids"] >= 0).sum()) for b in batches)

    def numbers(self, steps_left: int) -> dict[str, Any]:
        """Tokens/s over all ranks, share of the time waiting for the loader, time left; counts from 0 afterwards."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        values = {
            "tokens_per_second": self.tokens * self.num_processes / seconds,
            "loader_wait_share": min(1.0, self.wait / seconds),
            "seconds_left": seconds / self.steps * steps_left,
        }
        self.restart()
        return values


def summary_of(stats: StepStats) -> dict[str, Any]:
    """A step's or an evaluation's loss, accuracy by depth and expected accepted length, of sums over all ranks."""
    hits, totals = stats.hits.tolist(), stats.totals.tolist()
    accuracy = accuracies(hits, totals)
    values = {"loss": float(stats.loss) / max(1, sum(totals)), "accuracy": accuracy}
    return {**values, "expected_accepted_length": expected_accepted_length(accuracy), "supervised": totals}


def profile_table(profile: torch.profiler.profile, steps: int) -> str:
    """Where the time of a profile's steps went, by the `record_function("peagle::NAME")` outside of compiled graphs."""
    lines = [f"profile of {steps} steps, milliseconds a step on the host (and on the device); trace: trace.json"]
    for event in sorted(profile.key_averages(), key=lambda e: -e.cpu_time_total):
        if event.key.startswith("peagle::") and event.cpu_time_total:
            host, device = (time / 1e3 / steps for time in (event.cpu_time_total, event.device_time_total))
            lines.append(f"  {event.key.removeprefix('peagle::'):<16}{host:10.1f}  ({device:.1f})")
    return "\n".join(lines)


def check_tracker(name: str) -> None:
    """ValueError, with what to install, unless this tracker (train.log_with) is there: Accelerate would skip it."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ValueError(f"train.log_with is {name}, which is missing: pip install {name}, or set it to null") from None


class Reporter:
    """The main process's output: `metrics.jsonl`, log lines, and Accelerate's tracker."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.path, self.lines, self.start_time = folder / "metrics.jsonl", 0, 0.0

    def start(self, config: dict[str, dict[str, Any]]) -> None:
        """Start, or continue. `config`: the recipe's sections as plain values."""
        self.start_time = time.perf_counter()
        if self.accelerator.log_with:
            flat = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
            flat = {key: v if isinstance(v, (str, int, float)) else json.dumps(v) for key, v in flat.items()}
            title = self.folder.resolve().name
            names = {"wandb": {"name": title}, "mlflow": {"run_name": title}, "trackio": {"name": title}}
            try:
                self.accelerator.init_trackers("peagle_train", flat, names)
            except Exception as error:  # another's service, which has its own ways to fail
                raise ValueError(f"train.log_with: it did not start: {one_line(error, 200)}") from error

    def record(self, kind: str, line: str, **values: Any) -> None:
        """Write a line of metrics.jsonl, print one for a person, and log the numbers to the tracker: as `kind/name`, those
        of a list as `kind/name/depth_d`.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint's lines are on disk before it is
        self.lines += 1
        self.say(line)
        numbers: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, list) and kind != "skipped":
                numbers |= {f"{kind}/{name}/depth_{depth}": item for depth, item in enumerate(value)}
            elif isinstance(value, (int, float)) and name not in ("step", "num_steps"):
                numbers[f"{kind}/{name}"] = value
        try:
            self.accelerator.log(numbers, step=values["step"])
        except Exception as error:  # another's service, which must not cost the run
            self.accelerator.trackers = []  # so that the end of the run does not wait for it either
            logger.warning("train.log_with: it failed (%s): the run continues without it", one_line(error, 200))

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)


def train_line(values: dict[str, Any], accuracy: Sequence[float], steps: int) -> str:
    """A step's numbers for a person; `accuracy`: of the last `steps` steps together."""
    return (
        f"step {values['step']}/{values['num_steps']}  loss {values['loss']:.3f}"
        f"  accepted {expected_accepted_length(accuracy):.3f} (last {steps} steps)"
        f"  {values['tokens_per_second']:.0f} tok/s  {values['peak_memory_bytes'] / 2**30:.1f} GiB"
        f"  left {duration(values['seconds_left'])}  waits {values['loader_wait_share']:.0%}"
    )


def eval_line(title: str, values: dict[str, Any]) -> str:
    length, accuracy = values["expected_accepted_length"], " ".join(f"{share:.2f}" for share in values["accuracy"])
    return f"{title}: expected accepted length {length:.3f}  loss {values['loss']:.4f}  acc {accuracy}"


def duration(seconds: float) -> str:
    """For a person: 0:03:07; 2 days, 3:00:00."""
    return str(timedelta(seconds=round(seconds)))
