"""One process at a time in a folder."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


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
