"""The tools' arguments: what cannot be is one line and exit code 2, before anything is measured."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from peagle_train.files import told, write_text
from tests.helpers import ROOT


@pytest.mark.parametrize(
    "line",
    [
        "bench_collator.py --lengths x",
        "bench_collator.py --segments 0",
        "bench_loss.py --chunks 0",
        "bench_mask.py --n x",
        "bench_segments.py --n 8x",
        "bench_target.py --chunks=-1",
    ],
)
def test_a_benchs_bad_number_is_named_with_its_option(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    assert arguments[0].partition("=")[0] in error and arguments[-1].rpartition("=")[2] in error


def test_an_error_that_names_no_file_is_no_users_mistake() -> None:
    assert told(ValueError("a\n  b")) == "a b"
    assert told(FileNotFoundError(2, "No such file or directory", "x\n")) == "No such file or directory: 'x\\n'"
    with pytest.raises(OSError):
        told(OSError(5, "Input/output error"))


@pytest.mark.parametrize("name", ["page", "."])
def test_a_folder_in_the_place_of_a_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("page")
    with pytest.raises(OSError) as error:
        write_text(Path(name), "x")
    assert told(error.value) == f"Is a directory: '{name}'" and os.listdir() == ["page"]
