"""Experiment trackers by way of Accelerate. `metrics.jsonl` has everything with or without one.

A tracker is somebody else's service: one that fails, at the start or later, costs a warning, never the run.
"""

import json
import logging
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from peagle_train.durable import write_text
from peagle_train.errors import one_line
from peagle_train.recipe import Recipe

logger = logging.getLogger(__name__)

PROJECT = "peagle_train"
"""What runs are filed under, where the tracker has projects or experiments."""
REMEMBERED = "tracker.json"
"""In the output folder: the tracker's name of the run, so that a resumed run goes on in it."""


def check_tracker(name: str | None) -> None:
    """ValueError, with what to install, unless the recipe's train.log_with can be used."""
    if name is None:
        return
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"train.log_with is {name}, which is not installed: pip install {name}, or set train.log_with to null"
            " (metrics.jsonl is written either way)"
        ) from None


class Tracker:
    """The main process's line to the accelerator's trackers; without any, it does nothing.

    Args:
        accelerator: made with `log_with` and `project_dir`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._is_on = False

    def start(self, recipe: Recipe, step: int, config: dict[str, Any]) -> None:
        """Open the run, or go on with it behind `step`; its output folder is there.

        Args:
            config: the recipe's sections as plain values.
        """
        if not (self.accelerator.is_main_process and self.accelerator.log_with):
            return
        folder = Path(recipe.output.dir)
        known = _read_id(folder) if step else None
        run_id = known or uuid.uuid4().hex
        name = folder.resolve().name
        project = "tensorboard" if recipe.train.log_with == "tensorboard" else PROJECT  # there, a folder in output.dir
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder)},
            "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},
            "mlflow": {"run_name": name, "run_id": known},
        }
        try:
            self.accelerator.init_trackers(project, flatten(config), options)
            if recipe.train.log_with == "mlflow":
                run_id = self.accelerator.get_tracker("mlflow", unwrap=True).info.run_id
            write_text(folder / REMEMBERED, json.dumps({"tracker": recipe.train.log_with, "id": run_id}) + "\n")
            self._is_on = True
        except Exception as error:
            self._give_up("did not start", error)

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, as `kind/name`; one of a list for each depth."""
        if not self._is_on:
            return
        numbers = flatten_numbers(kind, values)
        try:
            self.accelerator.log(numbers, step=values["step"])
        except Exception as error:
            self._give_up("failed", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._is_on = False
        names = ", ".join(str(tracker) for tracker in self.accelerator.log_with)
        self.accelerator.trackers = []  # so that ending the run does not wait for it either
        reason = one_line(error, 200)
        logger.warning(
            "train.log_with: %s %s (%s: %s): the run goes on without; metrics.jsonl has everything",
            names,
            what,
            type(error).__name__,
            reason,
        )


def flatten(sections: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """`section.key` of a recipe's plain values; what is no number or word becomes a word."""
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {key: value if isinstance(value, (str, int, float)) else json.dumps(value) for key, value in flat.items()}


def flatten_numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Numbers alone, `kind/name` and `kind/name/depth_d`; the step is left out."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            numbers |= {f"{kind}/{name}/depth_{depth}": item for depth, item in enumerate(value)}
        elif isinstance(value, (int, float)) and name not in ("step", "num_steps"):
            numbers[f"{kind}/{name}"] = value
    return numbers


def _read_id(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / REMEMBERED).read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
