"""How commands and runs end, files and folders that are written whole or not at all, and one process at a time in a folder.

Imports the standard library alone until tensors are saved: the command line imports it first.
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# How a command ends.


class RunStopped(RuntimeError):
    """Ends a run with one line and exit code 1 instead of a traceback. What was saved before is whole."""


class NonFiniteWeights(ValueError):
    """A drafter's weights are not finite: refused when read; a run that would save them ends."""


def one_line(what: object, most: int | None = None) -> str:
    """A text or an error's message on one line, cut after `most` characters."""
    return " ".join(str(what).split())[:most]


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Columns side by side; `right`: all but the first with their cells to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[c.rjust(w) if right and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def told(error: Exception) -> str:
    """The line about a user's mistake or a full disk. Anything else is raised again, such as an OSError without a file."""
    if isinstance(error, ValueError):
        return one_line(error)
    if not isinstance(error, OSError):
        raise error
    if error.filename is None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise error
        return f"a file could not be written: {error.strerror}"
    # Of a rename, where to: its source is a partial file of ours.
    return f"{error.strerror}: {error.filename2 or error.filename!a}"


def run_tool(name: str, work: Callable[[], int | None], when_stopped: str = "") -> int:
    """Run a command; its exit code is what `work` returns (None: 0). Otherwise one line on stderr, and 2 after a user's
    mistake (see `told`), 1 after `RunStopped`, 130 after an interrupt; the last two with `when_stopped`. Anything else
    keeps its traceback. One of several processes exits here, without the interpreter's teardown; if it failed,
    torchrun then ends the others.
    """
    several, rank = int(os.environ.get("WORLD_SIZE", "1")) > 1, os.environ.get("RANK", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # half a surrogate pair, a letter that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    text = ""
    try:
        code = work() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output has seen enough, as head has; Python's flush at exit would fail
        os._exit(141)
    except RunStopped as error:
        text, code = f"{name}: error: {one_line(error)}{when_stopped}", 1
    except KeyboardInterrupt:
        text, code = f"{name}: stopped (interrupted){when_stopped}", 130
    except Exception as error:
        try:
            text, code = f"{name}: error: {told(error)}", 2
        except Exception:
            if not several:
                raise
            text, code = traceback.format_exc().rstrip(), 1
            if re.search(r"[Cc]onnection (closed|reset)|remote process exited", str(error)):
                text = f"{name}: error: {one_line(error, 300)}: if another rank has failed, its message is above"
    if several and text and rank != "0":
        time.sleep(3)  # all ranks fail alike, as a rule: rank 0 reports it, and torchrun ends the others
    with suppress(OSError):  # a full disk
        sys.stdout.flush()
    if text:
        print(f"{text} (rank {rank})" if several else text, file=sys.stderr)
    if several:
        # Process groups that are still referenced keep gloo's threads; the interpreter's teardown may abort in them, and
        # after an error nothing at exit may wait for the other ranks.
        sys.stderr.flush()
        os._exit(code)
    return code


# How a signal, N, ends a training run: after its step and a checkpoint, or at once with the exit code 128 + N.

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 5.0
"""Under torchrun, a second signal this soon after the first is taken for its copy: torchrun passes on a SIGTERM that its
processes have already got if it was sent to their whole group, or job."""


class Signals:
    """While entered, SIGTERM and SIGINT ask for a checkpoint and the end, answered between two steps: the handler may run
    in the middle of any line, a save included. A second one ends the process at once (see `ECHO_SECONDS`).
    """

    stop = False
    _stopped_at = 0.0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


# Whole or not at all: written beside its place, synced, renamed to it.

UMASK = os.umask(0)  # it can only be read by setting it, for all threads: done once, before there are any
os.umask(UMASK)


def partial_path(path: Path) -> Path:
    """Where to write what will be `path`: always the same name, so that a killed run's leftover is overwritten."""
    return path.with_name(f".{path.name}.partial")


def put(partial: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`, in place of what is there; it is on disk when this returns."""
    is_folder = partial.is_dir()
    for part in [*(partial.iterdir() if is_folder else []), partial]:
        part.chmod((0o777 if part.is_dir() else 0o666) & ~UMASK)  # safetensors makes files for their owner alone
        _sync(part)
    old = path.with_name(f".{path.name}.old")
    if is_folder and os.path.lexists(path):
        remove_tree(old)
        os.replace(path, old)
    os.replace(partial, path)
    _sync(path.parent)
    if is_folder:
        try_removing(old)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it. OSError if it cannot be written."""
    partial = partial_path(path)
    partial.write_bytes(content)
    put(partial, path)


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` for a JSON value."""
    write_bytes(path, f"{json.dumps(content, indent=2)}\n".encode())


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a temporary folder, then sync it and rename it to `path`, replacing what is there."""
    temporary = partial_path(path)
    remove_tree(temporary)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        put(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(path: Path) -> None:
    """Remove a folder if it exists; of a link to one, only the link. OSError if that fails."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def try_removing(path: Path, remove: Callable[[Path], None] = remove_tree) -> None:
    """Remove `path`; a warning if that fails: it takes up disk space, but nothing that was saved is lost."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): remove it by hand", path, error)


def sha256_of(path: Path) -> str:
    """A file's."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(content: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What was written with its `checksum` as sha256, without that; None if there is no file; ValueError otherwise."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("sha256") == checksum(content):
            return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is not what was written: remove its folder, and make it again")


def save_tensors(path: Path, tensors: Mapping[str, Any], name: str = "format", value: str = "pt") -> None:
    """Write a safetensors file; OSError where that fails. Its metadata are one pair: of several the order varies."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # torch, which a command's --help does without

    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={name: value})
    except SafetensorError as error:
        raise OSError(errno.EIO, one_line(error), str(path)) from None


def put_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """`save_tensors`, whole or not at all; without `put`'s wait for the folder, as there are many files."""
    partial = partial_path(path)
    save_tensors(partial, tensors)
    partial.chmod(0o666 & ~UMASK)
    _sync(partial)
    os.replace(partial, path)


# One process at a time.


def lock(descriptor: int, where: str, doing: str, posix: int | None = None) -> None:
    """Lock an open file or folder until it is closed; ValueError if another process is `doing` something there. By flock,
    or, with `posix`, a command of `os.lockf`.
    """
    try:
        if posix is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lockf(descriptor, posix, 0)
    except (BlockingIOError, PermissionError):  # POSIX has either
        raise ValueError(f"{where} is in use: another process is {doing} there; wait, or give another path") from None
    except OSError as error:  # some network file systems lock nothing
        logger.warning("%s cannot be locked (%s): make sure that no other process is %s there", where, error, doing)


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Create the folder given as `--out` and hold its lock (see `lock`); an empty one is removed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made or opened: {error.strerror}") from None
    try:
        lock(handle, f"--out {folder}", doing)
        try:
            yield
        finally:
            with suppress(OSError):  # not empty, usually
                folder.rmdir()
    finally:
        os.close(handle)
