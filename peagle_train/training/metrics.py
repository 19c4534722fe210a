"""A run's numbers: accuracy by depth, pace, log lines, metrics.jsonl, trackers, a profile."""

import json
import logging
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs
from torch import Tensor
from tqdm import tqdm

from peagle_train.files import one_line, write_json
from peagle_train.machine import cores, peak_ram
from peagle_train.training.checkpoint import versions

logger = logging.getLogger(__name__)

ABOUT = "about.json"
"""In the output folder: data, versions and machine of a run; rewritten when it is resumed."""
TRACKED = "tracker.json"
"""In the output folder: the tracker's id of the run, so that a resumed run continues in it."""
WAITS, SETTLED_STEPS = 0.1, 20
"""Share of the time spent waiting for data, over at least this many steps, that is worth a line."""


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
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_ram()


def about_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions and machine, for about.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {
        "device": f"{device.type} ({name})",
        "processes": num_processes,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }
    return {"versions": versions(), "machine": machine}


class Pace:
    """How fast a run is and what it waits for, counted on the host: nothing waits for the device.

    A *window* lies between two log lines. The first one includes compiling and first allocations: it is logged like the
    others, but the time left and the advice ignore it as soon as there is another.

    Args:
        num_processes: ranks, assumed to do what this one does. num_workers: data.num_workers.
    """

    def __init__(self, num_processes: int = 1, num_workers: int = 0) -> None:
        self.num_processes, self.num_workers = num_processes, num_workers
        self.is_first, self.has_advised = True, False
        self.settled_steps, self.settled_seconds, self.settled_wait = 0, 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Start a window now; the current one is discarded."""
        self.started = time.perf_counter()
        self.steps, self.tokens, self.supervised, self.wait = 0, 0, 0, 0.0

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
        self.supervised += sum(int((b["supervised"] & (b["depth"] == 0)).sum()) for b in batches)

    def close_window(self, steps_left: int) -> dict[str, Any]:
        """The window's numbers: tokens/s and supervised tokens/s over all ranks, share of the time waiting, time left."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        if not self.is_first:
            self.settled_steps += self.steps
            self.settled_seconds += seconds
            self.settled_wait += self.wait
        self.is_first = False
        pace = self.settled_seconds / self.settled_steps if self.settled_steps else seconds / self.steps
        values = {
            "tokens_per_second": self.tokens * self.num_processes / seconds,
            "supervised_tokens_per_second": self.supervised * self.num_processes / seconds,
            "loader_wait_share": min(1.0, self.wait / seconds),
            "seconds_left": pace * steps_left,
        }
        self.restart()
        return values

    def advice(self) -> str | None:
        """Once a run: what to change if it waits for its loader."""
        share = self.settled_wait / max(self.settled_seconds, 1e-9)
        if self.has_advised or self.settled_steps < SETTLED_STEPS or share < WAITS:
            return None
        self.has_advised = True
        own = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        change = "raise data.num_workers" if self.num_workers < own else "only more cores would help"
        waits = f"the run waits for data {share:.0%} of the time"
        return f"{waits}: {change} (data.num_workers is {self.num_workers}, {own} cores a process)"


class StepProfiler:
    """Profiles the optimizer steps first..last (counted from 1) into `trace.json` in the output folder.

    The spans in its table are the `record_function("peagle::NAME")` of the step's code; inside a compiled graph there are
    none.
    """

    def __init__(self, steps: list[int] | None, folder: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = folder / "trace.json"
        self.profile: Any = None
        """While it runs: never, if the run is resumed after `first`."""

    def before(self, step: int) -> None:
        """Call before the step waits for its data."""
        if step == self.first:
            self.profile = ProfileKwargs().build()
            self.profile.start()

    def after(self, step: int, is_last: bool) -> str | None:
        """Call after the step; after the last profiled step, or the run's last, returns a table of where the time went."""
        if self.profile is None or (step < self.last and not is_last):
            return None
        profile, self.profile = self.profile, None
        profile.stop()
        profile.export_chrome_trace(str(self.path))
        steps = step - self.first + 1
        lines = [f"profile of {steps} steps, milliseconds a step on the host (and the device); trace: {self.path}"]
        spans = [e for e in profile.key_averages() if e.key.startswith("peagle::") and e.cpu_time_total]
        for event in sorted(spans, key=lambda e: -e.cpu_time_total):
            device = f"  ({event.device_time_total / 1e3 / steps:.1f})" if event.device_time_total else ""
            lines.append(
                f"  {event.key.removeprefix('peagle::'):<16}{event.cpu_time_total / 1e3 / steps:10.1f}{device}"
            )
        return "\n".join(lines)


def check_tracker(name: str) -> None:
    """ValueError, with what to install, unless this tracker (train.log_with) can be used."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"train.log_with is {name}, which is not installed: pip install {name}, or set train.log_with to null"
            " (metrics.jsonl is written either way)"
        ) from None


class Reporter:
    """The main process's output: `metrics.jsonl`, log lines, a progress bar on a terminal, and Accelerate's tracker.

    A tracker is another's service: one that fails costs a warning, never the run.
    """

    def __init__(self, folder: Path, num_steps: int, accelerator: Accelerator) -> None:
        self.folder, self.accelerator, self.active = folder, accelerator, accelerator.is_main_process
        self.path, self.lines, self.num_steps, self.start_time = folder / "metrics.jsonl", 0, num_steps, 0.0

    def start(self, step: int, config: dict[str, dict[str, Any]]) -> None:
        """Start, or continue after `step`. `config`: the recipe's sections as plain values."""
        self.start_time = time.perf_counter()
        hidden = not (self.active and sys.stderr.isatty())
        self.bar = tqdm(total=self.num_steps, initial=step, unit="step", disable=hidden, leave=False)
        if self.active and self.accelerator.log_with:
            try:
                self._start_tracker(step, config)
            except Exception as error:
                self._drop_tracker("did not start", error)

    def _start_tracker(self, step: int, config: dict[str, dict[str, Any]]) -> None:
        tracker, title, memo = config["train"]["log_with"], self.folder.resolve().name, self.folder / TRACKED
        flat = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
        flat = {key: v if isinstance(v, (str, int, float)) else json.dumps(v) for key, v in flat.items()}
        known = json.loads(memo.read_text(encoding="utf-8"))["id"] if step and memo.exists() else None
        run_id = known or uuid.uuid4().hex
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "wandb": {"name": title, "id": run_id, "resume": "allow", "dir": str(self.folder)},
            "trackio": {"name": f"{title}-{run_id[:8]}", "resume": "allow"},
            "mlflow": {"run_name": title, "run_id": known},
        }
        # To tensorboard, a project is a folder in the output folder.
        self.accelerator.init_trackers("tensorboard" if tracker == "tensorboard" else "peagle_train", flat, options)
        if tracker == "mlflow":  # it chooses the id
            run_id = self.accelerator.get_tracker("mlflow", unwrap=True).info.run_id
        write_json(memo, {"tracker": tracker, "id": run_id})

    def record(self, kind: str, line: str, **values: Any) -> None:
        """Write a line of metrics.jsonl, print one for a person, and log the numbers to the tracker: as `kind/name`, those
        of a list as `kind/name/depth_d`.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
        self.lines += 1
        self.say(line)
        if "loss" in values:
            self.bar.set_postfix_str(
                f"{kind} loss {values['loss']:.3f}, accepted {values['expected_accepted_length']:.2f}"
            )
        numbers: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, list):
                numbers |= {f"{kind}/{name}/depth_{depth}": item for depth, item in enumerate(value)}
            elif value is not None and name not in ("step", "num_steps"):
                numbers[f"{kind}/{name}"] = value
        try:
            self.accelerator.log(numbers, step=values["step"])
        except Exception as error:
            self._drop_tracker("failed", error)

    def _drop_tracker(self, what: str, error: Exception) -> None:
        self.accelerator.trackers = []  # so that the end of the run does not wait for it either
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        logger.warning(
            "train.log_with: tracker %s (%s): the run continues without; metrics.jsonl has all", what, reason
        )

    def sync(self) -> None:
        """Flush the lines written so far to the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def say(self, line: str) -> None:
        if self.active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def train_line(values: dict[str, Any]) -> str:
    """A step's numbers for a person."""
    shares = " ".join(f"{a:.2f}" for a in values["accuracy"])
    return (
        f"step {values['step']}/{values['num_steps']}  loss {values['loss']:.4f}  acc {shares}"
        f"  accepted {values['expected_accepted_length']:.3f}  lr {values['learning_rate']:.2e}"
        f"  grad {values['grad_norm']:.2f}  {values['tokens_per_second']:.0f} tok/s"
        f" ({values['supervised_tokens_per_second']:.0f} supervised)  padding {values['padding_share']:.1%}"
        f"  waits {values['loader_wait_share']:.1%}  peak {values['peak_memory_bytes'] / 2**30:.2f} GiB"
        + ("" if values["recompiles"] is None else f"  {values['recompiles']} recompiles")
        + f"  left {duration(values['seconds_left'])}"
    )


def eval_line(title: str, values: dict[str, Any]) -> str:
    shares = " ".join(f"{a:.2f}" for a in values["accuracy"])
    return (
        f"{title}: expected accepted length {values['expected_accepted_length']:.3f}  loss {values['loss']:.4f}"
        f"  acc {shares}  target mass outside the draft vocabulary {values['mass_outside']:.2%}"
    )


def duration(seconds: float) -> str:
    """For a person: 0:03:07; 2 days, 3:00:00."""
    return str(timedelta(seconds=round(seconds)))
