"""Folders on disk that are either whole or not there: written beside their place, synced, renamed."""

import fcntl
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.durable import write_folder, write_json
from peagle_train.serving.drafter_tensors import check_finite

logger = logging.getLogger(__name__)

MARKER = "run.json"
"""In the output folder: whose folder it is, and how far the run came."""


def save_drafter(path: Path, config: PEagleDraftConfig, state: dict[str, Tensor], extra: dict[str, str]) -> None:
    """`model.safetensors` and `config.json` as vLLM loads them, and further text files by name."""
    write_folder(path, lambda folder: fill_drafter(folder, config, state, extra))


def fill_drafter(folder: Path, config: PEagleDraftConfig, state: dict[str, Tensor], extra: dict[str, str]) -> None:
    """What `save_drafter` writes, into a folder that is there.

    Raises:
        NonFiniteWeights: a weight is not finite. OSError: it cannot be written.
    """
    check_finite(state, "the drafter's")
    config.dtype = state["fc.weight"].dtype
    config.to_json_file(folder / "config.json")
    save_tensors(folder / "model.safetensors", state)
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; OSError where it cannot be written."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def check_output(folder: Path) -> None:
    """ValueError if the output folder holds another run or anything else, or cannot be read. Changes nothing."""
    try:
        _check_output(folder)
    except OSError as error:
        raise ValueError(f"output.dir {folder} cannot be read: {error.strerror}; give another folder") from None


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output.dir {folder} is a file; give a folder")
    # A checkpoint is a run too, whatever became of its marker.
    if (folder / MARKER).exists() or any(folder.glob("checkpoint-*/manifest.json")):
        raise ValueError(
            f"output.dir {folder} already holds a run; go on with it (--resume), give another folder, or remove it first"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output.dir {folder} is not empty and holds no run; give another folder")


def read_marker(folder: Path) -> dict[str, Any]:
    """An output folder's `run.json`; {} where it is missing or not what a run writes. ValueError if it cannot be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker if _is_marker(marker) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{folder / MARKER} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_marker(marker: Any) -> bool:
    """Whether it has all that is read from it; else False, or an error of its types."""
    if marker["state"] == "stopped":
        return all(isinstance(marker[key], str) for key in ("signal", "checkpoint")) and isinstance(
            marker["steps"], int
        )
    if marker["state"] != "finished":
        return marker["state"] == "started"
    best, numbers = marker.get("best"), [marker["train_seconds"], marker.get("epochs", 1)]
    if marker["after"]:
        numbers += [marker[when][key] for when in ("before", "after") for key in ("expected_accepted_length", "loss")]
    if best:
        numbers += [best["step"], best["expected_accepted_length"]]
        best.get("folder")
    is_sized = isinstance(marker["drafter"], str) and isinstance(marker["steps"], int)
    return is_sized and all(isinstance(number, int | float) for number in numbers)


def claim_output(folder: Path) -> None:
    """Make the output folder this run's; ValueError if it holds anything."""
    check_output(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, {"state": "started"})
    except OSError as error:
        raise ValueError(f"output.dir {folder} cannot be written: {error.strerror}") from error


def lock_output(folder: Path) -> Any:
    """An open file that keeps other processes out of the folder until it is closed, or this process dies.

    Raises:
        ValueError: another process trains into the folder.
    """
    file = (folder / ".lock").open("w")
    try:
        # POSIX's, not flock: loader processes inherit that one, and would hold it for seconds behind a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output.dir {folder} is in use: another process is training there") from None
    except OSError as error:  # a file system without locks
        logger.warning("output.dir %s cannot be locked (%s): take care that one run writes there", folder, error)
    return file


def check_not_in_use(folder: Path) -> None:
    """ValueError if another process trains into the folder: it must be told so, not to remove it. Changes nothing."""
    try:
        with (folder / ".lock").open() as file:
            # Shared, so that the ranks of one launch do not take each other for another run.
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"output.dir {folder} is in use: another process is training there") from None
    except OSError:  # no folder, no lock, or a file system without locks: `lock_output` says so
        pass
