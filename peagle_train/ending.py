"""How a training run ends: by itself, by a signal, by a mistake, or because a rank has failed.

Exit code 0; 2 for a user's mistake and 1 for a run that had to stop, each with one line on stderr; 128 + N after signal N.
Anything unexpected keeps its traceback. Needs the standard library alone: the command line imports it.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from peagle_train.files import RunStopped, one_line, print_anything

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 5.0
"""Under torchrun, a second signal this soon after the first is taken for its copy: torchrun passes on a SIGTERM that its
processes have already got if it was sent to their whole group, or job."""


def run_training(work: Callable[[], int | None]) -> int:
    """Run `work`; returns the exit code, after one line on stderr where something went wrong. Of several processes, one
    that fails ends at once: torchrun then ends the others.
    """
    print_anything()
    with _interruptible():
        try:
            return work() or 0
        except ValueError as error:
            return _fail(str(error), 2)
        except RunStopped as error:
            return _fail(str(error), 1)
        except KeyboardInterrupt as error:
            return _interrupted(error)
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                raise
            if re.search(r"[Cc]onnection (closed|reset)|remote process exited", str(error)):
                return _fail(f"{one_line(error, 300)}: if another rank has failed, its message is above", 1)
            return _end(traceback.format_exc().rstrip(), 1)


def _fail(message: str, code: int) -> int:
    return _end(f"peagle_train: error: {one_line(message)}", code)


def _interrupted(error: KeyboardInterrupt) -> int:
    name, code = ("SIGTERM", 143) if str(error) == "SIGTERM" else ("interrupted", 130)
    return _fail(f"{name} outside of the training loop: nothing more was saved", code)


def _end(text: str, code: int) -> int:
    """Print why this process ends. One of several ends here: nothing at exit may wait for the other ranks."""
    several, rank = int(os.environ.get("WORLD_SIZE", "1")) > 1, os.environ.get("RANK", "0")
    if several and code != 1 and rank != "0":
        # All ranks make a user's mistake or get a signal, as a rule: rank 0 reports it, and torchrun ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    sys.stdout.flush()
    sys.stderr.write(f"{text} (rank {rank})\n" if several else f"{text}\n")
    sys.stderr.flush()
    if several:
        os._exit(code)
    return code


@contextmanager
def _interruptible() -> Iterator[None]:
    """Outside of the training loop SIGTERM ends the process by a KeyboardInterrupt, as SIGINT does by itself, and SIGUSR1,
    which would kill it, does nothing.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # in a notebook or a server, which has its own handlers
        yield
        return
    main_process, hook = os.getpid(), sys.unraisablehook

    def on_term(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if os.getpid() == main_process:
            raise KeyboardInterrupt("SIGTERM")
        os.kill(os.getpid(), number)  # forked off; its parent ends it by this very signal

    def on_unraisable(what: "sys.UnraisableHookArgs") -> None:
        hook(what)
        if isinstance(what.exc_value, KeyboardInterrupt):  # lost in a `__del__` or a weak reference's callback
            os._exit(_interrupted(what.exc_value))

    sys.unraisablehook = on_unraisable
    before = _set_handlers({signal.SIGTERM: on_term, signal.SIGUSR1: signal.SIG_IGN})
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _set_handlers(before)


def _set_handlers(handlers: dict[int, Any]) -> dict[int, Any]:
    """Returns the handlers of before."""
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


class Signals:
    """While entered, SIGTERM and SIGINT ask for a checkpoint and the end, SIGUSR1 for a checkpoint, answered between two
    steps. A second SIGTERM or SIGINT ends the process at once (under torchrun, one that comes `ECHO_SECONDS` later).

    A handler does nothing but set a flag: it may run in the middle of any Python line, a save included.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asked for the end."""
        self.save = False
        self._stopped_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody have a handler
            self._before = _set_handlers(dict.fromkeys((*STOPPING, signal.SIGUSR1), self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        _set_handlers(self._before)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # os.write, not print: a print that this very handler interrupted would raise
        if number == signal.SIGUSR1:
            self.save = True
        elif self.stop is None:
            self.stop, self._stopped_at = signal.Signals(number).name, time.monotonic()
            os.write(
                2, f"peagle_train: {self.stop}: saving after this step and ending; a second one ends at once\n".encode()
            )
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._stopped_at >= ECHO_SECONDS:
            os.write(2, b"peagle_train: a second signal: ending at once, nothing more is saved\n")
            os._exit(128 + number)


def leave_to_parent(worker_id: int) -> None:
    """A loader process's `worker_init_fn`: signals to the whole group (a terminal's ^C, a scheduler's SIGTERM) must not
    kill it under a parent that is still finishing its step. It ends with its parent.
    """
    _set_handlers(dict.fromkeys((*STOPPING, signal.SIGUSR1), signal.SIG_IGN))


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error means that a loader process was killed, rather than that the data raised inside of one.

    torch raises it from a signal handler, anywhere in the run, unless reading what the process was about to hand over fails
    first, with the error of a connection that was cut.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_cut = isinstance(error, (OSError, EOFError))
    is_cut &= frame.f_globals.get("__name__", "").startswith("multiprocessing.") or "in pin memory thread" in str(error)
    return "DataLoader worker (pid" in str(error) or is_cut
