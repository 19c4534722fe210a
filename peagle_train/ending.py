"""How a training run ends beside what `run_tool` says: by a signal, N, with the exit code 128 + N.

Needs the standard library alone: the command line imports it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from peagle_train.files import run_tool

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 5.0
"""Under torchrun, a second signal this soon after the first is taken for its copy: torchrun passes on a SIGTERM that its
processes have already got if it was sent to their whole group, or job."""


def run_training(work: Callable[[], int | None]) -> int:
    """`run_tool` for a training run. Outside of the training loop SIGUSR1 does nothing."""
    before = _set_handlers({signal.SIGUSR1: signal.SIG_IGN})
    try:
        return run_tool("peagle-train train", work, mistakes=(ValueError,))
    finally:
        _set_handlers(before)


def _set_handlers(handlers: dict[int, Any]) -> dict[int, Any]:
    """Returns the handlers of before. In a notebook's or a server's thread, which can have none, nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


class Signals:
    """While entered, SIGTERM and SIGINT ask for a checkpoint and the end, SIGUSR1 for a checkpoint, answered between two
    steps. A second SIGTERM or SIGINT ends the process at once (under torchrun, one that comes `ECHO_SECONDS` later).

    A handler does nothing but set a flag: it may run in the middle of any Python line, a save included.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self._stopped_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = _set_handlers(dict.fromkeys((*STOPPING, signal.SIGUSR1), self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        _set_handlers(self._before)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # os.write, not print: a print that this very handler interrupted would raise
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self._stopped_at = True, time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"peagle-train: {name}: saving after this step; a second one ends at once\n".encode())
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._stopped_at >= ECHO_SECONDS:
            os.write(2, b"peagle-train: a second signal: ending at once, nothing more is saved\n")
            os._exit(128 + number)


def leave_to_parent(worker_id: int) -> None:
    """A loader process's `worker_init_fn`: signals to the whole group (a terminal's ^C, a scheduler's SIGTERM) must not
    kill it under a parent that is still finishing its step. It ends with its parent.
    """
    _set_handlers(dict.fromkeys((*STOPPING, signal.SIGUSR1), signal.SIG_IGN))
