"""The commands: help at once, one line where they are stopped, and recipes that need no checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peagle_train.cli import COMMANDS, main
from peagle_train.config import load_recipe
from tests.helpers import ENVIRONMENT

HEAVY = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy", "pydantic"}


def test_the_help_of_every_command_answers_at_once_and_says_its_first_line_in_the_list(tmp_path):
    code = f"""
import sys
from peagle_train.cli import COMMANDS, main
assert main(['--help']) == 0
for name in ["train", *COMMANDS]:
    print("====", name, flush=True)
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:
        assert not end.code
heavy = {HEAVY} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-1500:]
    overview, *pages = result.stdout.split("==== ")
    for page in pages:
        name = page.split()[0]
        assert f"  {name} " in overview and "--help" in page and (name == "train" or f"peagle-train {name}" in page)


def test_a_command_whose_reader_has_seen_enough_ends_without_a_traceback():
    read, write = os.pipe()
    os.close(read)  # as `| head` does
    run = [sys.executable, "-m", "peagle_train", "recipes", "quickstart"]
    result = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(write)
    assert result.returncode == 141 and not result.stderr


def test_the_version_is_printed_and_recipes_of_the_package_are_listed_printed_and_used_by_name(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"peagle-train \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"quickstart", "qwen3_8b_8k"} <= set(listed)
    for name in listed:
        assert main(["recipes", name]) == 0
        Path("mine.yaml").write_text(capsys.readouterr().out)
        load_recipe("mine.yaml")
    assert main(["recipes", "none"]) == 2
    assert "quickstart" in capsys.readouterr().err
    assert main(["quickstart", "--print-config"]) == 0
    assert "output" in capsys.readouterr().out
    Path("quickstart").write_text("train: {max_steps: 1}")  # a file of that name is meant before it
    assert main(["quickstart", "--print-config"]) == 2


def test_a_command_that_is_interrupted_says_one_line_and_exits_with_130(monkeypatch, capsys):
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("peagle_train.config.load_recipe", interrupted)
    for name, *more in (["plan"], ["cache"], ["show-row", "--row", "0"]):
        assert main([name, "x.yaml", *more]) == 130
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"peagle-train {name}: stopped") and ("resumes" in line) == (name == "cache")


WRONG = {
    "plann x.yaml": "no command or recipe is called 'plann'; there are train, plan, ",
    "quikstart": ", recipes, gpt_oss_20b_8k, llama31_8b_8k, quickstart, ",
    "prepare quickstart --workers 0": "--workers: got 0",
    "evaluate x --prompts stdlib --temperature nan": "--temperature: got nan",
    "train": "required: recipe",
    "regenerate p.jsonl --out o.jsonl --target t --model m": "--target alone",
    "train quickstart --lr 1": "--lr 1 (settings are section.key=value, without dashes",
    "report .": "metrics.jsonl; give a recipe's output.dir",
    **{f"{name} --nonsense": f"peagle-train {name}: error: " for name in COMMANDS},
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_on_the_command_line_is_one_line(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert WRONG[line] in error and ": error: " in error
