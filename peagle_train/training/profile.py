"""Where the time of a step goes: named spans, a torch profiler trace of chosen steps, and a table of the spans."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

SPANS = ("loader wait", "target", "pass A", "pass B forward", "loss", "backward", "reduce", "optimizer")
"""In the order of a step. The loss is part of "pass B forward", and inside the graph of a compiled drafter."""


@contextmanager
def span(name: str) -> Iterator[None]:
    """Name what happens inside for a profiler; costs about a microsecond without one."""
    assert name in SPANS, name
    if torch.compiler.is_compiling():  # inside a graph there is nothing to name
        yield
        return
    with record_function(f"peagle::{name}"):
        yield


class StepProfiler:
    """Traces the optimizer steps first..last (1-based, inclusive) of a run into `trace.json`.

    Args:
        steps: [first, last], or None for no profile.
    """

    def __init__(self, steps: list[int] | None, folder: Path, device: torch.device) -> None:
        self.steps, self.path, self.device = steps, folder / "trace.json", device
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Called before step `step` waits for its data."""
        if self.steps and step == self.steps[0]:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int, is_last: bool = False) -> str | None:
        """Called after it; at the last profiled step, or the run's last, the table of where the time went."""
        if self._profile is None or self.steps is None or (step < self.steps[1] and not is_last):
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profile.stop()
        self._profile.export_chrome_trace(str(self.path))
        table = self._table(step - self.steps[0] + 1)
        self._profile = None
        return table

    def _table(self, steps: int) -> str:
        assert self._profile is not None
        found = {event.key: event for event in self._profile.key_averages()}
        lines = [f"profile of {steps} steps, a step's milliseconds on the host (and the device); trace: {self.path}"]
        for name in SPANS:
            event = found.get(f"peagle::{name}")
            if event is None:
                continue
            device = getattr(event, "device_time_total", 0) / 1e3 / steps
            suffix = f"  ({device:9.1f})" if self.device.type == "cuda" else ""
            lines.append(f"  {name:<15}{event.cpu_time_total / 1e3 / steps:10.1f}{suffix}")
        return "\n".join(lines)
