"""Files and folders that are whole or not there: written beside their place, synced, and renamed to it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
