"""Files that are there whole or not at all: written beside their place, synced, and renamed to it."""

import os
from pathlib import Path

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
