"""What the tools share: how they stop, and that what they tell people to type next can be typed."""

import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from peagle_train.config import as_override, dump_line, load_recipe, parse_yaml
from tests.helpers import ROOT
from tests.tiny import write_recipe

STOPPED = [
    ("cache_features", "peagle_train.config.load_recipe", ["x.yaml"]),
    ("prepare_data", "peagle_train.config.load_recipe", ["x.yaml"]),
    ("show_row", "peagle_train.config.load_recipe", ["x.yaml", "--row", "0"]),
    ("evaluate", "peagle_train.decoding.evaluate.run", ["x", "--prompts", "stdlib"]),
    ("export", "peagle_train.serving.export.find_drafter", ["x", "--check"]),
    ("report", "peagle_train.report.write_report", ["x"]),
    ("show_batch", "peagle_train.show.write_picture", ["--example"]),
    ("import", "peagle_train.serving.start.import_drafter", ["x", "--out", "y"]),
]


@pytest.mark.parametrize("tool, where, arguments", STOPPED, ids=[tool for tool, _, _ in STOPPED])
def test_a_tool_that_is_interrupted_says_one_line_and_exits_with_130(
    tool: str,
    where: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    assert end.value.code == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(tool) and ": stopped" in line


PATHS = [
    "plain",
    "/with space/x",
    "it's",
    "a,b [c] {d}",
    "#x: y",
    "12",
    "a~b",
    'q"$HOME`',
    "\u00e9 \u4e2d \U0001f600",
    "w " * 99,
]


@pytest.mark.parametrize("path", PATHS)
def test_an_override_that_is_printed_gives_the_same_value_when_it_is_pasted(path: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, Path("t"), Path("s"), Path("o"))
    for key, value in (("data.sources", [path]), ("target.path", path)):
        [pasted] = shlex.split(as_override(key, value))
        section, leaf = key.split(".")
        assert getattr(getattr(load_recipe(recipe, [pasted]), section), leaf) == value
    assert "\n" not in as_override("data.sources", [path])


@pytest.mark.parametrize("value", [None, True, "null", "true", 1, "1", "", [], ["a", 2.5], {"a": [1]}, "...", "- x"])
def test_a_value_on_one_line_of_yaml_is_read_back(value: Any) -> None:
    line = dump_line(value)
    assert parse_yaml(line, "here") == value and "\n" not in line
