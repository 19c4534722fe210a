"""tools/bench_acceptance.py on a tiny target: what it trains, what it measures, and that it resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.byte_tokenizer import make_byte_target, write_stdlib_recipe
from tests.helpers import ENVIRONMENT, ROOT

sys.path.insert(0, str(ROOT / "tools"))


def rows_of(results: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "date"} for row in json.loads(results.read_text())]


@pytest.mark.slow
def test_cases_are_trained_once_and_measured_on_the_same_texts(tmp_path: Path) -> None:
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", make_byte_target(tmp_path / "target"), "unused")
    out, results = tmp_path / "out", tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "tools" / "bench_acceptance.py"), "--recipe", str(recipe), "--out", str(out)]
    command += ["--minutes", "0.01", "--limit", "2", "--max-tokens", "8", "--json", str(results)]
    command += ["--jobs", "2", "--only", "base", "untrained"]
    first = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert first.returncode == 0, first.stderr
    base, untrained = first_rows = rows_of(results)
    assert base["texts"] == {"same": 2, "tie": 0, "bug": 0, "none": 0} and base["replays_that_differ"] == 0
    assert len(base["teacher_forced_accuracy"]) >= 5 and "texts" not in untrained
    evaluated = (out / "evaluate.json").stat().st_mtime_ns
    same = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert same.returncode == 0 and same.stdout == first.stdout and same.stderr == ""
    assert rows_of(results) == first_rows and (out / "evaluate.json").stat().st_mtime_ns == evaluated
    assert base["steps"] == json.loads((out / "steps.json").read_text())["base"] and untrained["steps"] == 1
    assert base["prompts"] == untrained["prompts"] == 2 and "difference" not in base
    assert untrained["difference"] == pytest.approx(untrained["accepted_length"] - base["accepted_length"])
    assert untrained["difference_interval"][0] <= untrained["difference"] <= untrained["difference_interval"][1]
    (out / "untrained" / "final").rename(out / "untrained" / "gone")  # as if it had been stopped
    (out / "untrained" / "run.json").unlink()
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 0 and "untrained: training" in again.stderr and "base: training" not in again.stderr
    assert (out / "evaluate.json").stat().st_mtime_ns > evaluated, "measured anew with the drafter"
    assert len(again.stdout.splitlines()) == len(first.stdout.splitlines()) == 3
    other = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True, env=ENVIRONMENT)
    assert other.returncode == 2 and "begun with other settings" in other.stderr


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--recipe", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--recipe", "."], "Is a directory"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--limit", "1"], "--limit is 1"),
        (["--json", "/nowhere/x.json"], "does not exist"),
        (["--out", "/dev/null"], "/dev/null"),
        (["bad.key=1"], "bad"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    changes: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bench_acceptance

    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", tmp_path, "unused")
    command = ["x", *changes, "--recipe", str(recipe)] if "--recipe" not in changes else ["x", *changes]
    monkeypatch.setattr(sys, "argv", command if "--out" in changes else [*command, "--out", str(tmp_path / "out")])
    try:
        code = bench_acceptance.main()
    except SystemExit as end:  # argparse's
        code = end.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "error: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_one_line_with_the_last_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_acceptance

    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", tmp_path / "no target", "unused")
    command = ["x", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--only", "untrained"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_acceptance.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bench_acceptance.py: error: ") and "no target" in line and "features.log" in line
