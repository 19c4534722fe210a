"""How fast a run is, what it waits for and when it ends: counted on the host, so that nothing waits for the device.

A *window* is what lies between two log lines. The first one holds what happens once (compiling, first allocations): it is
shown like all others, but neither the time left nor the advice is made of it.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

WAITS = 0.1
"""From this share of the time spent waiting for data on, a run is told."""
SETTLED_STEPS = 20
"""Behind so many steps, the first window's left out, the share is believed."""


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
        self.restart()

    def restart(self) -> None:
        """Begin a window now; what the present one holds is forgotten (an evaluation came in between)."""
        self._started = time.perf_counter()
        self._steps, self._tokens, self._supervised, self._wait = 0, 0, 0, 0.0

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
        pace = self._settled_seconds / self._settled_steps if self._settled_steps else self._first_pace
        values = {
            "tokens_per_second": self._tokens * self.num_processes / seconds,
            "supervised_tokens_per_second": self._supervised * self.num_processes / seconds,
            "loader_wait_share": min(1.0, self._wait / seconds),
            "seconds_left": None if pace is None else pace * steps_left,
        }
        self.restart()
        return values

    def advice(self) -> str | None:
        """Once a run: what to change where the loader is what it waits for."""
        if self._has_advised or self._settled_steps < SETTLED_STEPS:
            return None
        share = self._settled_wait / max(self._settled_seconds, 1e-9)
        if share < WAITS:
            return None
        self._has_advised = True
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        begin = f"the run waits for data {share:.0%} of the time"
        if self.num_workers < cores:
            return f"{begin}: raise data.num_workers (now {self.num_workers}; {cores} cores a process)"
        return f"{begin}, with {self.num_workers} loader processes on {cores} cores: more cores would make it faster"


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
