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
from collections.abc import Callable
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

    Outside of the training loop SIGTERM and SIGINT do what they do to any Python process, and SIGUSR1 does nothing.
    """
    print_anything()
    before = _set_handlers({signal.SIGUSR1: signal.SIG_IGN})
    try:
        return work() or 0
    except ValueError as error:
        return _fail(str(error), 2)
    except RunStopped as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted outside of the training loop: nothing more was saved", 130)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        if re.search(r"[Cc]onnection (closed|reset)|remote process exited", str(error)):
            return _fail(f"{one_line(error, 300)}: if another rank has failed, its message is above", 1)
        return _end(traceback.format_exc().rstrip(), 1)
    finally:
        _set_handlers(before)


def _fail(message: str, code: int) -> int:
    return _end(f"peagle_train: error: {one_line(message)}", code)


def _end(text: str, code: int) -> int:
    """Print why this process ends. One of several ends here: nothing at exit may wait for the other ranks."""
    several, rank = int(os.environ.get("WORLD_SIZE", "1")) > 1, os.environ.get("RANK", "0")
    if several and code != 1 and rank != "0":
        time.sleep(3)  # all ranks make a user's mistake, as a rule: rank 0 reports it, and torchrun ends the others
    sys.stdout.flush()
    sys.stderr.write(f"{text} (rank {rank})\n" if several else f"{text}\n")
    sys.stderr.flush()
    if several:
        os._exit(code)
    return code


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
            os.write(
                2, f"peagle_train: {name}: saving after this step and ending; a second one ends at once\n".encode()
            )
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._stopped_at >= ECHO_SECONDS:
            os.write(2, b"peagle_train: a second signal: ending at once, nothing more is saved\n")
            os._exit(128 + number)


def leave_to_parent(worker_id: int) -> None:
    """A loader process's `worker_init_fn`: signals to the whole group (a terminal's ^C, a scheduler's SIGTERM) must not
    kill it under a parent that is still finishing its step. It ends with its parent.
    """
    _set_handlers(dict.fromkeys((*STOPPING, signal.SIGUSR1), signal.SIG_IGN))
