"""A run's output folder as plain values, finished or not: what the report is made of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peagle_train.strict_yaml import YamlError, read_yaml
from peagle_train.training.about import ABOUT
from peagle_train.training.checkpoint import MARKER

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one output folder says."""

    name: str
    folder: Path
    train: list[Line]
    """Lines of the training loss, by step, each with `hours`: since the run began, over all of its parts."""
    eval: list[Line]
    """Held-out lines, by step, with `hours` where a training line near them tells."""
    skipped: list[int]
    """Steps that were not applied."""
    summary: Line
    """run.json."""
    about: Line
    """about.json; empty for a run of an older version."""
    recipe: dict[str, Any]


def read_run(folder: Path) -> Run:
    """ValueError unless the folder holds a run with at least one number. A half-written last line is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: it has no metrics.jsonl")
    lines = _read_lines(path)
    train = _with_hours([line for line in lines if line.get("kind") == "train"])
    evaluated = [line for line in lines if line.get("kind") == "eval"]
    if not train and not evaluated:
        raise ValueError(f"{path} holds no numbers yet")
    for line in evaluated:
        line["hours"] = _hours_at(train, line["step"])
    try:
        recipe = read_yaml(folder / "recipe.yaml")
    except YamlError as error:
        raise ValueError(f"the recipe {error}") from None
    return Run(
        name=folder.resolve().name,
        folder=folder,
        train=train,
        eval=evaluated,
        skipped=[line["step"] for line in lines if line.get("kind") == "skipped"],
        summary=_read_json(folder / MARKER),
        about=_read_json(folder / ABOUT),
        recipe=recipe,
    )


def read_runs(folders: list[Path]) -> list[Run]:
    """Runs with names that tell them apart: the last parts of their paths."""
    runs = [read_run(folder) for folder in folders]
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is given twice")
    parts = 1
    while len({path[-parts:] for path in paths}) < len(paths):
        parts += 1
    return [Run(**{**run.__dict__, "name": "/".join(path[-parts:])}) for run, path in zip(runs, paths)]


def differing_keys(runs: list[Run]) -> dict[str, list[Any]]:
    """`section.key` of the recipes' settings that are not the same in all runs, with each run's value."""
    flat = [{f"{s}.{k}": v for s, values in run.recipe.items() for k, v in values.items()} for run in runs]
    keys = sorted({key for one in flat for key in one})
    table = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def _read_lines(path: Path) -> list[Line]:
    raw = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(raw, start=1):
        if not text:
            continue
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number == len(raw):  # being written right now, or cut by a crash
                continue
            raise ValueError(f"{path}, line {number} is damaged") from None
    return lines


def _read_json(path: Path) -> Line:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _with_hours(lines: list[Line]) -> list[Line]:
    """`seconds` begin at 0 again in every part of a run that was stopped and went on."""
    before = last = 0.0
    for line in lines:
        if line["seconds"] < last:
            before += last
        last = line["seconds"]
        line["hours"] = (before + last) / 3600
    return lines


def _hours_at(train: list[Line], step: int) -> float | None:
    if step == 0 or not train:
        return 0.0 if step == 0 else None
    known = [line["hours"] for line in train if line["step"] <= step]
    return known[-1] if known else None
