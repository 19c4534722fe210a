"""Folders on disk that are either whole or not there: written beside their place, synced, renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peagle_train.draft_config import PEagleDraftConfig

MARKER = "run.json"
"""In the output folder: whose folder it is, and how far the run came."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder, sync it and put it in the place of `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_drafter(path: Path, config: PEagleDraftConfig, state: dict[str, Tensor], extra: dict[str, str]) -> None:
    """`model.safetensors` and `config.json` as vLLM loads them, and further text files by name."""

    def fill(folder: Path) -> None:
        config.dtype = state["fc.weight"].dtype
        config.to_json_file(folder / "config.json")
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, text in extra.items():
            (folder / name).write_text(text, encoding="utf-8")

    write_folder(path, fill)


def check_output(folder: Path) -> None:
    """ValueError if the output folder holds another run or anything else. Changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output.dir {folder} is a file; give a folder")
    if (folder / MARKER).exists():
        raise ValueError(f"output.dir {folder} already holds a run; give another folder, or remove it first")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output.dir {folder} is not empty and holds no run; give another folder")


def claim_output(folder: Path) -> None:
    """Make the output folder this run's; ValueError if it holds anything."""
    check_output(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, {"state": "started"})
    except OSError as error:
        raise ValueError(f"output.dir {folder} cannot be written: {error.strerror}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
