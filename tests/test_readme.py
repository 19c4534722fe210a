"""The README's Python examples run as they stand, and its commands exist."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from peagle_train.config import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(index: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[index])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()


def test_the_collator_and_the_relay_are_shown_in_few_lines() -> None:
    lengths = {
        name: len(e.strip().splitlines()) for e in EXAMPLES for name in ("DataLoader(", "relay_step(") if name in e
    }
    assert lengths["DataLoader("] <= 10 and lengths["relay_step("] < 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"(?:tools|recipes|tests|peagle_train|docs)/[\w/.]+\.(?:py|sh|yaml|json|png|md|safetensors)", text
    )
    for name in set(named):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_one(page: Path) -> None:
    known = {
        f"{section.name}.{key.name}"
        for section in fields(Recipe)
        for key in fields(get_type_hints(Recipe)[section.name])
    }
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./])((?:target|data|draft|cod|train|output)\.(?!py\b)[a-z_]+)\b(?!\()", text))
    assert named - {"draft.parameters"} <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_tool_that_a_page_shows_is_one(page: Path) -> None:
    shown = re.findall(r"^(?:python )?(tools/\w+\.py) (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for tool in {tool for tool, _ in shown}:
        given = {option for name, line in shown if name == tool for option in re.findall(r"(?<=\s)--[a-z-]+", line)}
        result = subprocess.run([sys.executable, str(ROOT / tool), "--help"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert given <= set(re.findall(r"--[a-z-]+", result.stdout)), tool


def test_the_page_of_keys_is_what_the_recipe_says() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/document_keys.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    for section in fields(Recipe):
        for key in fields(get_type_hints(Recipe)[section.name]):
            assert f"| `{section.name}.{key.name}` |" in page
