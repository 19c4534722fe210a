"""Folders that a run reads, damaged in any way: refused in one line, or read as they were."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peagle_train.__main__ import main
from peagle_train.config import Recipe, load_recipe
from peagle_train.data.training_data import load_training_data, prepare_recipe
from peagle_train.serving.drafter_io import load_drafter
from peagle_train.training.checkpoint import verify_checkpoint
from tests.tiny import MASK, VOCAB, make_target, write_recipe, write_rows

QUIET = settings(max_examples=70, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    target = make_target(folder / "target")
    rows = write_rows(folder / "rows.jsonl", [20, 33, 7, 31, 12, 29])
    path = write_recipe(folder, target, rows, folder / "run", train={"max_steps": 2, "save_steps": 1})
    recipe = load_recipe(path)
    prepare_recipe(recipe, folder / "prepared", say=lambda _: None)
    assert main([str(path)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = {
        "prepared": folder / "prepared",
        "checkpoint-1": folder / "run" / "checkpoint-1",
        "final": folder / "run" / "final",
    }
    yield {"recipe": path, "target": target, "folders": folders}


def rows_of(recipe: Recipe) -> list[Any]:
    data = load_training_data(recipe, None, VOCAB, MASK, lambda _: None)
    return [
        {name: row[name] for name in sorted(row)} for row in (data.train_rows[i] for i in range(len(data.train_rows)))
    ]


def read_prepared(folder: Path, world: dict[str, Any]) -> list[Any]:
    return rows_of(load_recipe(world["recipe"], [f"data.prepared={folder}"]))


def read_checkpoint(folder: Path, world: dict[str, Any]) -> list[Any]:
    verify_checkpoint(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"]


def read_drafter(folder: Path, world: dict[str, Any]) -> list[Any]:
    draft = load_drafter(folder)
    # Whoever edits a weight gets that weight: a drafter's folder has no checksums. What it is of must stay.
    return sorted((name, tuple(tensor.shape)) for name, tensor in draft.state_dict().items())


READERS: dict[str, Callable[[Path, dict[str, Any]], list[Any]]] = {
    "prepared": read_prepared,
    "checkpoint-1": read_checkpoint,
    "final": read_drafter,
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def damage(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["gone", "empty", "cut", "bit", "more", "other", "folder", "zeros"]), label="kind")
    if kind == "cut":
        content = content[: data.draw(st.integers(0, max(0, len(content) - 1)), label="length")]
    elif kind == "bit" and content:
        content[data.draw(st.integers(0, len(content) - 1), label="at")] ^= 1 << data.draw(
            st.integers(0, 7), label="bit"
        )
    elif kind in ("empty", "more", "zeros"):
        content = {"empty": bytearray(), "more": content + b"\n{}", "zeros": bytearray(len(content))}[kind]
    elif kind == "other":
        content = bytearray(
            data.draw(st.sampled_from([b"{}", b"[]", b"null", b"3", b'"x"', b"\xff", b"[" * 9999]), label="text")
        )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@QUIET
def test_a_damaged_folder_is_refused_in_one_line_or_read_as_it_was(
    name: str, tmp_path_factory: pytest.TempPathFactory, world: dict[str, Any], data: st.DataObject
) -> None:
    whole = world["folders"][name]
    folder = tmp_path_factory.mktemp("damaged") / name
    shutil.copytree(whole, folder)
    file = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())), label="file")
    damage(folder / file, data)
    try:
        read = READERS[name](folder, world)
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1500, repr(text)
    else:
        assert same(read, READERS[name](whole, world)), file
    finally:
        shutil.rmtree(folder.parent)
