"""The tools' arguments: what cannot be is one line and exit code 2, before anything is measured."""

import runpy
import sys
from pathlib import Path

import pytest

from peagle_train.files import told
from tests.helpers import ROOT, command
from tests.tiny import make_target, write_recipe, write_rows

LONG = "x" * 300
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """The tool as it is called, in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    "line",
    [
        "bench_collator.py --lengths x",
        "bench_collator.py --segments 0",
        "bench_loss.py --chunks 0",
        "bench_mask.py --n x",
        "bench_target.py --chunks=-1",
        "chaos.py --life 3",
    ],
)
def test_a_benchs_bad_number_is_named_with_its_option(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = line.split()
    assert run(monkeypatch, name, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert arguments[0].partition("=")[0] in error and arguments[-1].rpartition("=")[2] in error


@pytest.mark.parametrize(
    "line",
    [
        f"check {LONG}",
        f"export {LONG} --out OUT",
        f"import {LONG} --out OUT",
        f"import . --out OUT --target {LONG}",
        f"evaluate . --prompts humaneval --target {LONG}",
        f"evaluate . --prompts humaneval --json {LONG}",
        f"prepare {RECIPE} --out {LONG} target.path=.",
        f"show-row {RECIPE} --row 0 data.prepared={LONG}",
        f"report {LONG}",
        f"show-row {LONG} --row 0",
    ],
)
def test_a_name_that_is_too_long_for_a_file_is_one_line(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(*line.replace("OUT", str(tmp_path / "out")).split()) == 2
    printed = capsys.readouterr()
    assert len((printed.err or printed.out).strip().splitlines()) == 1 or line.startswith("check"), printed
    assert not (tmp_path / "out").exists()


def test_an_error_that_names_no_file_is_no_users_mistake() -> None:
    assert told(ValueError("a\n  b")) == "a b"
    assert told(FileNotFoundError(2, "No such file or directory", "x\n")) == "No such file or directory: 'x\\n'"
    with pytest.raises(OSError):
        told(OSError(5, "Input/output error"))


@pytest.mark.parametrize("option", ["--summary", "--resume"])
def test_the_trainers_own_paths_are_checked_too(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    from peagle_train.__main__ import main

    assert main([RECIPE, f"{option}={LONG}"]) == 2
    assert f"{option}: give a path" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prepare", "cache"])
def test_a_folder_to_make_with_a_name_that_is_too_long_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [9, 5])
    recipe = write_recipe(tmp_path, make_target(tmp_path / "target"), rows, tmp_path / "run")
    capsys.readouterr()
    assert command(name, recipe, "--out", tmp_path / LONG) == 2
    error = capsys.readouterr().err
    assert "error: " in error.splitlines()[-1] and "File name too long" in error and "Traceback" not in error
