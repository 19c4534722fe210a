"""How a signal, N, ends a training run: after its step and a checkpoint, or at once with the exit code 128 + N."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 5.0
"""Under torchrun, a second signal this soon after the first is taken for its copy: torchrun passes on a SIGTERM that its
processes have already got if it was sent to their whole group, or job."""


def _set_handlers(handlers: dict[int, Any]) -> dict[int, Any]:
    """Returns the handlers of before. In a notebook's or a server's thread, which can have none, nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


class Signals:
    """While entered, SIGTERM and SIGINT ask for a checkpoint and the end, answered between two steps: the handler may run
    in the middle of any line, a save included. A second one ends the process at once (see `ECHO_SECONDS`).
    """

    def __init__(self) -> None:
        self.stop = False
        self._stopped_at = 0.0

    def __enter__(self) -> "Signals":
        self._before = _set_handlers(dict.fromkeys(STOPPING, self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        _set_handlers(self._before)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # os.write, not print: a print that this very handler interrupted would raise
        if not self.stop:
            self.stop, self._stopped_at = True, time.monotonic()
            after = "stopping as soon as the work is safe; a second one ends at once"
            os.write(2, f"peagle-train: {signal.Signals(number).name}: {after}\n".encode())
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._stopped_at >= ECHO_SECONDS:
            os.write(2, b"peagle-train: a second signal: ending at once, nothing more is saved\n")
            os._exit(128 + number)


def leave_to_parent(worker_id: int) -> None:
    """A loader process's `worker_init_fn`: signals to the whole group (a terminal's ^C, a scheduler's SIGTERM) must not
    kill it under a parent that is still finishing its step. It ends with its parent.
    """
    _set_handlers(dict.fromkeys(STOPPING, signal.SIG_IGN))
