"""Signals that a run answers between two steps: SIGTERM and SIGINT save and end it, SIGUSR1 saves and goes on; and what
they do before the first step and behind the last."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 5.0
"""Under torchrun, a second signal within so long of the first is taken for its own: it passes a SIGTERM on, which its
processes have got already where it was sent to their whole group, or their job."""


@contextmanager
def outside_the_loop(swallowed: Callable[[KeyboardInterrupt], None]) -> Iterator[None]:
    """Around all of a process, `Signals` included: SIGTERM ends it by a KeyboardInterrupt, as SIGINT does by itself, and
    SIGUSR1, which would kill it, is only answered.

    swallowed: called, to end the process, where the interrupt came in a place whose exceptions Python only prints (the
        callback of a weak reference, a `__del__`), and nobody would stop.
    """
    main_process, hook = os.getpid(), sys.unraisablehook

    def on_unraisable(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            swallowed(what.exc_value)
        else:
            hook(what)

    def on_term(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if os.getpid() != main_process:  # forked off; its parent ends it by this very signal
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt(signal.Signals(number).name)

    def on_save(number: int, _: FrameType | None) -> None:
        os.write(2, b"peagle_train: SIGUSR1: there is nothing to save outside of the training loop\n")

    before: dict[int, Any] = {}
    try:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, on_term)
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, on_save)
    except ValueError:  # not in the main thread
        pass
    sys.unraisablehook = on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for kind, handler in before.items():
            signal.signal(kind, handler)


class Signals:
    """While entered, signals are remembered instead of acted on; a second SIGTERM or SIGINT ends the process at once
    (under torchrun, one that comes `ECHO_SECONDS` later).

    A handler does nothing but set a flag: it may run in the middle of any Python line, a save included.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asked for the end."""
        self.save = False
        """Somebody asked for a checkpoint; whoever makes one sets it back."""
        self._stopped_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._on_stop)
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        except ValueError:  # not in the main thread, where Python has no handlers: signals do what they did
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._stopped_at < ECHO_SECONDS
        if self.stop is not None and is_echo:
            os.write(2, b"peagle_train: a second signal so soon is taken for torchrun's, which passes on the first\n")
            return
        if self.stop is not None:
            os.write(2, b"peagle_train: a second signal: ending at once, nothing more is saved\n")
            os._exit(128 + number)
        self.stop, self._stopped_at = signal.Signals(number).name, time.monotonic()
        # os.write, not print: a print that this very handler interrupted would raise
        os.write(2, f"peagle_train: {self.stop}: saving and ending; a second one ends at once\n".encode())

    def _on_save(self, number: int, _: FrameType | None) -> None:
        self.save = True


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error says that a loader process is gone; not one that the data raised inside of one.

    torch says so from a signal handler, anywhere in the run, unless reading what the process was about to hand over fails
    first, with the error of a connection that was cut.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    is_cut = isinstance(error, (OSError, EOFError))
    is_cut &= module.startswith("multiprocessing.") or "in pin memory thread" in str(error)
    return "DataLoader worker (pid" in str(error) or is_cut


def leave_to_parent(worker_id: int) -> None:
    """A loader process's `worker_init_fn`: signals to the whole group (a terminal's ^C, a scheduler's SIGTERM) must not
    kill it under a parent that is still finishing its step. It ends when the parent says so, or is gone.
    """
    for number in (*STOPPING, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
