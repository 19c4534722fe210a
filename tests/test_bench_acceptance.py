"""tools/bench_acceptance.py on a tiny target: what it trains, what it measures, and that it resumes."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from peagle_train import cli
from tests.byte_tokenizer import make_byte_target, write_stdlib_recipe
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import bench_acceptance


def rows_of(results: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "date"} for row in json.loads(results.read_text())]


@pytest.mark.slow
def test_cases_are_trained_once_and_measured_on_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(self: bench_acceptance.Bench, log: Path, *command: str, alone: bool = True) -> None:
        """In this process, not in one of its own."""
        assert command[:2] == ("-m", "peagle_train")
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(list(command[2:])) == 0, capsys.readouterr().err
        ran.append(log.stem)

    monkeypatch.setattr(bench_acceptance.Bench, "run", run)
    monkeypatch.setattr(bench_acceptance, "TIMED_STEPS", 6)
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", make_byte_target(tmp_path / "target"), "unused")
    out, results = tmp_path / "out", tmp_path / "results.json"
    command = ["x", "--recipe", str(recipe), "--out", str(out), "--json", str(results), "--only", "base", "untrained"]
    command += ["--minutes", "0.001", "--limit", "2", "--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_acceptance.main() == 0
    assert sorted(ran) == ["base", "evaluate", "features", "timed_base", "untrained"]
    base, untrained = first = rows_of(results)
    assert base["texts"] == {"same": 2, "tie": 0, "bug": 0, "none": 0} and base["replays_that_differ"] == 0
    assert "texts" not in untrained and base["steps"] >= 1 == untrained["steps"] and len(base["by_k"]) == 5
    assert base["prompts"] == untrained["prompts"] == 2 and "difference" not in base
    assert untrained["difference"] == pytest.approx(untrained["accepted_length"] - base["accepted_length"])
    assert untrained["difference_interval"][0] <= untrained["difference"] <= untrained["difference_interval"][1]

    ran.clear()
    (out / "untrained" / "final").rename(out / "untrained" / "gone")  # as if it had been stopped
    (out / "untrained" / "run.json").unlink()
    assert bench_acceptance.main() == 0 and ran == ["untrained", "evaluate"]
    assert rows_of(results)[0] == first[0] and len(rows_of(results)) == 2
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "2"])
    assert bench_acceptance.main() == 2 and "begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    [("--recipe", "/nowhere.yaml"), ("--minutes", "nan"), ("--limit", "1"), ("--json", "/nowhere/x.json")],
)
def test_a_mistake_is_told_before_anything_is_trained(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", tmp_path, "unused")
    monkeypatch.setattr(sys, "argv", ["x", "--recipe", str(recipe), "--out", str(tmp_path / "out"), name, value])
    try:
        code = bench_acceptance.main()
    except SystemExit as end:  # argparse's
        code = end.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "error: " in error and value in error
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_one_line_with_the_last_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading\necho no target here\nexit 3\n")
    python.chmod(0o700)
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", tmp_path / "no target", "unused")
    command = ["x", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--only", "untrained"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "executable", str(python))
    assert bench_acceptance.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bench_acceptance.py: error: ") and "no target" in line and "features.log" in line
