"""Checkpoints on disk: which there are, whether they are whole, which to keep.

    checkpoint-<step>/
        config.json, model.safetensors   the drafter as vLLM loads it, in the dtype that it is trained in
        optimizer.state                  AdamW's exp_avg, exp_avg_sq and step, by parameter name
        rng.state                        torch's generators, by rank
        state.json                       step, position in the data, scheduler, best, fingerprints, versions, recipe
        recipe.yaml                      the resolved recipe, for people
        manifest.json                    size and sha256 of all of the above

A folder gets its name when everything in it is on disk, so that what is found is whole unless somebody damaged it; no other
file says which one is the newest. Nothing here is ever unpickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peagle_train.durable import remove_tree, try_removing, write_folder
from peagle_train.errors import DamagedCheckpoint

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SET_ASIDE = re.compile(r"set-aside-([0-9]+)")
_LEFT_OVER = re.compile(r"\.(checkpoint-[0-9]+|best|final)\.(partial|deleted)")


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints (those with a manifest), the newest step first; their content is not looked at.

    Raises:
        ValueError: the output folder cannot be read.
    """
    try:
        found = {step: path for path in output.iterdir() if (step := step_of(path)) is not None}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"output.dir {output} cannot be read: {error.strerror}") from None
    return [found[step] for step in sorted(found, reverse=True) if _has_manifest(found[step])]


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:  # it may not be looked into: not passed over in silence, `verify_checkpoint` says why
        return True


def write_checkpoint(output: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """`fill` a folder and make it checkpoint-<step> once it is on disk.

    Raises:
        OSError: it could not be written; nothing of it is left, and other checkpoints are as they were.
    """

    def fill_and_list(folder: Path) -> None:
        fill(folder)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_bytes(_dump(_signed({"format": FORMAT, "step": step, "files": files})))

    path = checkpoint_path(output, step)
    write_folder(path, fill_and_list)
    try_removing(output / f"set-aside-{step}", _remove)
    return path


def verify_checkpoint(folder: Path) -> None:
    """DamagedCheckpoint unless every file of the manifest has its size and its sha256."""
    manifest = _read_manifest(folder)
    for name, described in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise DamagedCheckpoint(f"{path} is missing")
            size = path.stat().st_size
            if size != described["size"]:  # told without reading it
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {described['size']}")
            if _describe(path) != described:
                raise DamagedCheckpoint(f"{path} is not what was written (its sha256 differs)")
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    damaged = DamagedCheckpoint(f"{path} is not what was written")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(manifest, dict) or not {"format", "step", "files"} <= manifest.keys():
        raise damaged
    # Compared byte for byte with what we would have written, so that every edit of it is seen, and not taken for one of
    # the files that it lists.
    if _dump(_signed(manifest)) != content:
        raise damaged
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
    if manifest["step"] != step_of(folder):
        raise DamagedCheckpoint(f"{path} is of step {manifest['step']}, not of the folder's name")
    plain = all(name == Path(name).name and set(d) == {"size", "sha256"} for name, d in manifest["files"].items())
    if not plain or not {"model.safetensors", "optimizer.state", "state.json"} <= set(manifest["files"]):
        raise damaged
    return manifest


def prune(output: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Remove all but the newest `keep_last` checkpoints and those of every `keep_every`-th step; returns whose."""
    removed = []
    for path in [] if keep_last is None else list_checkpoints(output)[: keep_last - 1 : -1]:
        step = step_of(path)
        assert step is not None
        if (keep_every is None or step % keep_every) and try_removing(path, _remove):
            removed.append(step)
    return removed


def set_aside_later(output: Path, step: int) -> list[int]:
    """Rename checkpoints behind `step`, which a run that goes on from there will make again: they must not be found.

    Each is removed when the run has saved that step again, and all of them at its end.
    """
    moved = []
    for path in sorted(output.iterdir()):
        later = step_of(path)
        if later is not None and later > step:
            _remove(output / f"set-aside-{later}")
            os.rename(path, output / f"set-aside-{later}")
            moved.append(later)
    return sorted(moved)


def remove_set_aside(output: Path) -> None:
    for path in output.iterdir():
        if _SET_ASIDE.fullmatch(path.name):
            try_removing(path, _remove)


def clean_up(output: Path) -> None:
    """Remove what a killed run has left half-written or half-removed, and put a replaced folder's old content back."""
    for path in output.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            try_removing(path)
    for name in ("best", "final"):
        old = output / f".{name}.old"
        if os.path.lexists(old) and not os.path.lexists(output / name):
            os.rename(old, output / name)
        else:
            try_removing(old)


def _remove(path: Path) -> None:
    """Remove a folder (or a link to one); killed half-way, what is left has a name that nobody looks for."""
    if path.is_symlink():
        remove_tree(path)
    elif path.is_dir():
        gone = path.with_name(f".{path.name.replace('set-aside', 'checkpoint')}.deleted")
        remove_tree(gone)
        os.rename(path, gone)
        remove_tree(gone)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    unsigned = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**unsigned, "sha256": hashlib.sha256(_dump(unsigned)).hexdigest()}


def _dump(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
