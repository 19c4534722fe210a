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
@pytest.mark.parametrize("argument", ["--print-config", "quick", "output.dir=x"])
def test_what_is_no_override_is_refused_before_anything_is_done(script, argument, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "tools" / script, argument], env={"PATH": "/usr/bin:/bin", "PEAGLE_OUTPUT": str(tmp_path / "out")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and argument in done.stderr and not done.stdout
    assert not [*tmp_path.iterdir()]


LEFT: dict[str, tuple[dict[str, str], str, bool]] = {
    "nothing": ({}, "resume=.", True),
    "a run before its first checkpoint": ({"run.json": STARTED, "metrics.jsonl": ""}, "removing it", False),
    "a run with checkpoints": ({"run.json": STARTED, "checkpoint-7/x": ""}, "resume=--resume.", True),
    "a finished run": ({"run.json": FINISHED, "final/x": ""}, "resume=--resume.", True),
    "a drafter of a run that did not end": ({"run.json": STARTED, "final/x": ""}, "did not end well", True),
    "somebody else's": ({"thesis.tex": ""}, "not from a training run", True),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_run_that_was_stopped_resumes_or_begins_again_and_nothing_else_is_removed(case, tmp_path):
    files, said, stays = LEFT[case]
    for name, content in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(content)
    code, output = bash('resume_or_clear "$@"; echo "resume=${resume[*]-}."', tmp_path / "run", "train.epochs=2")
    assert said in output and (tmp_path / "run").exists() == (stays and bool(files))
    assert code == {"did not end well": 1, "not from a training run": 2}.get(said, 0)
    assert ("train.epochs=2" in output) == (case == "a finished run")
