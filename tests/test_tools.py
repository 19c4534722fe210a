"""What people are told to type next can be typed."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from peagle_train.config import as_override, load_recipe, parse_yaml
from tests.tiny import write_recipe

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
    [word] = shlex.split(line := as_override("a.b", value))
    assert parse_yaml(word.removeprefix("a.b="), "here") == value and "\n" not in line
