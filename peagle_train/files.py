"""One process at a time in a folder."""

import fcntl
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# ---- errors
# Why a run stops that nobody made a mistake in, and streams that can tell it; light: the command line imports it first.


def print_anything() -> None:
    """Let stdout and stderr take any text: what they cannot show (half a surrogate pair, a letter that the terminal lacks)
    they write as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class RunStopped(RuntimeError):
    """The run had to stop: one line for a person, exit code 1. What was saved before is whole."""


class NonFinite(RunStopped):
    """The weights are not finite, or the loss or gradient of too many steps in a row; none of these steps was applied."""


class NonFiniteWeights(ValueError):
    """A drafter's weights are not finite: refused where they are read, the end of a run that would save them."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are not what its manifest says: a user's decision, exit code 2."""


def one_line(what: object, most: int | None = None) -> str:
    """A text or an error's own words, on one line, of `most` letters at most."""
    return " ".join(str(what).split())[:most]


def told(error: ValueError | OSError) -> str:
    """A tool's last words about a user's mistake, in one line. An OSError that names no file is none, and raised again."""
    if isinstance(error, ValueError):
        return one_line(error)
    if error.filename is None:
        raise error
    name = ascii(error.filename)
    return f"{error.strerror}: {name if len(name) <= 200 else name[:197] + '...'}"


def run_tool(name: str, work: Callable[[], int | None], when_stopped: str = "") -> int:
    """A tool's exit code: what `work` gives (None: 0), 2 behind one line on stderr about a user's mistake, 130 behind one
    line if it was interrupted.
    """
    print_anything()
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped{when_stopped}", file=sys.stderr)
        return 130


# ---- durable
# Files and folders that are whole or not there: written beside their place, synced, and renamed to it.

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""What the name of an unfinished file ends with."""


def partial_path(path: Path) -> Path:
    """Where to write what will be `path`: one name, so that what a killed run left is written over."""
    return path.with_name(f".{path.name}{PARTIAL}")


def put(partial: Path, path: Path) -> None:
    """Give a finished file its name, on disk for good when this returns. OSError where that fails."""
    make_readable(partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it. OSError where it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of bytes as they are."""
    partial = partial_path(path)
    partial.write_bytes(content)
    put(partial, path)


def make_readable(path: Path) -> None:
    """The mode that any new file or folder gets: safetensors and mkdtemp make theirs for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, sync it and put it in the place of `path`."""
    temporary = partial_path(path)
    remove_tree(temporary)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for file in temporary.iterdir():
            make_readable(file)
            sync(file)
        sync(temporary)
        if os.path.lexists(path):
            old = path.with_name(f".{path.name}.old")
            remove_tree(old)
            os.replace(path, old)
            os.replace(temporary, path)
            try_removing(old)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_tree(path: Path) -> None:
    """Remove a folder, if it is there; of a link to one only the link. OSError where that does not work."""
    if path.is_symlink():
        logger.warning("%s is a link: only the link is removed, %s stays", path, os.readlink(path))
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def try_removing(path: Path, remove: Callable[[Path], None] = remove_tree) -> bool:
    """Whether `path` is gone. What cannot be removed takes room, but what a run has saved is saved: a warning."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): remove it by hand", path, error)
        return False
    return True


# ---- locks
# One process at a time in a folder.


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Make the folder of `--out`, and keep out any other process that asks here meanwhile. A kill lets go of it.

    A folder that is made here and stays empty is removed again.

    Raises:
        ValueError: it cannot be made, or another process is `doing` there.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileExistsError:
        raise ValueError(f"--out {folder} is a file; give a folder") from None
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from None
    try:
        _lock(handle, folder, doing)
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty, as a rule
                    folder.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, doing: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {folder}: another process is {doing} there; wait, or give another folder") from None
    except OSError as error:  # some network file systems lock no folders
        logger.warning(
            "--out %s cannot be locked (%s): see to it that no other process is %s there", folder, error.strerror, doing
        )
