"""The scripts of tools/: what they refuse, and what they make of a folder that an earlier run has left."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

STARTED, FINISHED = '{"state": "started"}', '{\n "state": "finished"}'


def bash(body: str, *arguments: str | Path) -> tuple[int, str]:
    script = f"set -euo pipefail; NAME=x; source {ROOT}/tools/common.sh; {body}"
    done = subprocess.run(["bash", "-c", script, "x", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "smollm2_chat.sh"])
@pytest.mark.parametrize("argument", ["--print-config", "--x=y", "quick", "output.dir=x", "output.dir =x", ""])
def test_what_is_no_override_is_refused_before_anything_is_done(script, argument, tmp_path):
    # VIRTUAL_ENV: a script that went on would find no Python.
    env = {"PATH": "/usr/bin:/bin", "PEAGLE_OUTPUT": str(tmp_path / "out"), "VIRTUAL_ENV": "/none"}
    words = ["bash", ROOT / "tools" / script, "train.epochs=2", argument]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    said = "PEAGLE_OUTPUT" if argument.startswith("output") else f"{argument} is not an override"
    assert done.returncode == 2 and said in done.stderr and not done.stdout
    assert not [*tmp_path.iterdir()]
    assert bash('check_overrides "$@"', "train.epochs=2", "draft.window=9") == (0, "")


@pytest.mark.parametrize("script", ["quickstart.sh", "smollm2_chat.sh"])
def test_help_says_what_the_script_does_and_heeds_and_does_nothing(script, tmp_path):
    env = {"PATH": "/usr/bin:/bin", "PEAGLE_OUTPUT": str(tmp_path / "out")}
    for option in ("-h", "--help"):
        done = subprocess.run(["bash", ROOT / "tools" / script, option], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr and not [*tmp_path.iterdir()]
        assert "PEAGLE_OUTPUT: where results go" in done.stdout and "pipefail" not in done.stdout
        assert "#" not in done.stdout


def test_a_file_in_the_place_of_the_output_is_refused_before_anything_is_installed(tmp_path):
    (tmp_path / "out").write_text("")
    code, output = bash(f"PEAGLE_OUTPUT={tmp_path}/out VIRTUAL_ENV=/none; begin")
    assert code == 2 and "out is a file" in output and "environment" not in output


def test_one_script_at_a_time_works_on_a_folder_and_does_not_make_it(tmp_path):
    def second(folder: str) -> tuple[int, str]:
        inner = f"NAME=y; source {ROOT}/tools/common.sh; OUTPUT={tmp_path}/new/{folder}; lock_output; echo works"
        return bash('OUTPUT=$1; lock_output; bash -c "$2"', tmp_path / "new" / "run", inner)

    for _ in range(2):  # a lock ends with its process
        code, output = second("run")
        assert code == 2 and f"another y is at work on {tmp_path}/new/run" in output and "works" not in output
        assert second("other") == (0, "works\n")
    assert not (tmp_path / "new" / "run").exists(), "an empty folder would be what a run has left"


SAVED = {"run.json": STARTED, "checkpoint-7/x": ""}
LEFT: dict[str, tuple[dict[str, str], str, bool]] = {
    "nothing": ({}, "resume=.", True),
    "a run before its first checkpoint": ({"run.json": STARTED, "metrics.jsonl": ""}, "removing it", False),
    "a run with checkpoints": (SAVED, "resume=--resume.", True),
    "a finished run": ({"run.json": FINISHED, "final/x": ""}, "resume=--resume.", True),
    "a finished run's checkpoints": ({"run.json": FINISHED, "checkpoint-7/x": ""}, "a finished run", True),
    "a drafter with checkpoints": ({**SAVED, "final/x": ""}, "resume=--resume.", True),
    "a drafter of a run that did not end": ({"run.json": STARTED, "final/x": ""}, "did not end well", True),
    "somebody else's": ({"thesis.tex": ""}, "not from a training run", True),
    "somebody else's, hidden": ({".thesis.tex": ""}, "not from a training run", True),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_run_that_was_stopped_resumes_or_begins_again_and_nothing_else_is_removed(case, tmp_path):
    (files, said, stays), folder = LEFT[case], tmp_path / "run[1]"  # a name that looks like a pattern
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    code, output = bash('resume_or_clear "$@"; echo "resume=${resume[*]-}."', folder, "train.epochs=2")
    assert said in output and folder.exists() == (stays and bool(files))
    assert code == {"did not end well": 1, "not from a training run": 2}.get(said, 0)
    assert (": train.epochs=2\n" in output) == case.startswith("a finished run")


def test_an_empty_folder_is_begun_in(tmp_path):
    assert bash('resume=(x); resume_or_clear "$1"; echo "resume=${resume[*]-}."', tmp_path) == (0, "resume=.\n")
