"""How fast a run is, what it waits for and when it ends: counted on the host, so that nothing waits for the device.

A *window* is what lies between two log lines. The first one holds what happens once (compiling, first allocations): it is
shown like all others, but neither the time left nor the advice is made of it.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from peagle_train.training.about import cores

WAITS = 0.1
"""From this share of the time spent waiting for data on, a run is told."""
SETTLED_STEPS = 20
"""Behind so many steps, the first window's left out, the share is believed; and so many make a stretch of a run."""
SLOWER = 1.5
"""A stretch whose steps take so many times as long as the fastest one's is told."""
STARVED = 0.8
"""Less than this share of the processor time that a second had in the fastest stretch means that others use the cores."""


class Pace:
    """What a run did in the present window and in all settled ones.

    Args:
        num_processes: ranks that are taken to do what this one does.
        num_workers: data.num_workers.
    """

    def __init__(self, num_processes: int = 1, num_workers: int = 0) -> None:
        self.num_processes, self.num_workers = num_processes, num_workers
        self._is_first, self._has_advised = True, False
        self._settled_steps, self._settled_seconds, self._settled_wait = 0, 0.0, 0.0
        self._first_pace: float | None = None
        self._stretch = _Stretch()
        self._fastest: _Stretch | None = None
        self._slow: _Stretch | None = None
        self._has_told_slow = False
        self.restart()

    def restart(self) -> None:
        """Begin a window now; what the present one holds is forgotten."""
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._steps, self._tokens, self._supervised, self._wait = 0, 0, 0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no part of the window: an evaluation, a checkpoint."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._started += time.perf_counter() - wall
        self._cpu_started += time.process_time() - cpu

    def waited(self, seconds: float) -> None:
        """The loop stood still for its loader."""
        self._wait += seconds

    def step(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """An optimizer step is done. `batches`: its micro-batches, on the host."""
        self._steps += 1
        self._tokens += sum(int((b["document_ids"] >= 0).sum()) for b in batches)
        self._supervised += sum(int((b["supervised"] & (b["depth"] == 0)).sum()) for b in batches)

    def close_window(self, steps_left: int) -> dict[str, Any]:
        """End the window and begin the next; its numbers:

        tokens_per_second: real tokens, of all ranks. supervised_tokens_per_second: those of them that are learned from.
        loader_wait_share: of the time. seconds_left: None where nothing is known.
        """
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        if self._is_first:
            self._is_first = False
            self._first_pace = seconds / self._steps if self._steps else None
        else:
            self._settled_steps += self._steps
            self._settled_seconds += seconds
            self._settled_wait += self._wait
            self._stretch.add(self._steps, seconds, self._wait, time.process_time() - self._cpu_started)
            self._close_stretch()
        pace = self._settled_seconds / self._settled_steps if self._settled_steps else self._first_pace
        values = {
            "tokens_per_second": self._tokens * self.num_processes / seconds,
            "supervised_tokens_per_second": self._supervised * self.num_processes / seconds,
            "loader_wait_share": min(1.0, self._wait / seconds),
            "seconds_left": None if pace is None else pace * steps_left,
        }
        self.restart()
        return values

    def _close_stretch(self) -> None:
        if self._stretch.steps < SETTLED_STEPS:
            return
        stretch, self._stretch = self._stretch, _Stretch()
        if self._fastest is None or stretch.pace < self._fastest.pace:
            self._fastest = stretch
        self._slow = stretch if stretch.pace >= SLOWER * self._fastest.pace else None

    def advice(self) -> list[str]:
        """Each once a run: what to change where it waits for its loader; where the time goes where it got slower."""
        said = []
        share = self._settled_wait / max(self._settled_seconds, 1e-9)
        if not self._has_advised and self._settled_steps >= SETTLED_STEPS and share >= WAITS:
            self._has_advised = True
            said.append(f"the run waits for data {share:.0%} of the time: {self._more_loaders()}")
        if self._slow is not None and not self._has_told_slow:
            self._has_told_slow = True
            said.append(self._slowdown(self._slow))
        return said

    def _more_loaders(self) -> str:
        own = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if self.num_workers < own:
            return f"raise data.num_workers (now {self.num_workers}; {own} cores a process)"
        return f"{self.num_workers} loader processes on {own} cores: more cores would make it faster"

    def _slowdown(self, now: "_Stretch") -> str:
        before = self._fastest
        assert before is not None
        line = (
            f"a step takes {now.pace:.2g} s, {now.pace / before.pace:.1f} times as long as before ({before.pace:.2g} s):"
            f" {now.wait_share:.0%} of it waiting for data ({before.wait_share:.0%} before),"
            f" {now.cpu_share:.0%} of a core's time computing ({before.cpu_share:.0%} before): "
        )
        if now.wait / now.steps - before.wait / before.steps > (now.pace - before.pace) / 2:
            return line + self._more_loaders()
        if now.cpu_share < STARVED * before.cpu_share:
            return line + "other work takes this machine's cores, or the device waits"
        return line + "train.profile_steps shows which part of a step it is"


class _Stretch:
    """Consecutive windows, added up."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.wait, self.cpu = 0, 0.0, 0.0, 0.0

    def add(self, steps: int, seconds: float, wait: float, cpu: float) -> None:
        self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        self.wait, self.cpu = self.wait + wait, self.cpu + cpu

    @property
    def pace(self) -> float:
        """Seconds a step."""
        return self.seconds / self.steps

    @property
    def wait_share(self) -> float:
        return min(1.0, self.wait / self.seconds)

    @property
    def cpu_share(self) -> float:
        """Processor time of this process, its threads together, over the time that went by."""
        return self.cpu / self.seconds


def padding_share(batches: Sequence[dict[str, Tensor]]) -> float:
    """Share of the batches' element slots that hold no element."""
    slots = sum(b["depth"].numel() for b in batches)
    return sum(int((b["depth"] < 0).sum()) for b in batches) / max(1, slots)


def duration(seconds: float) -> str:
    """For a person: 42 s, 3:07 min, 5:40 h, 2 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
