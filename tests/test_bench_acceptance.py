"""tools/bench_acceptance.py on a tiny target: what it trains, what it measures, and that it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.byte_tokenizer import make_byte_target, write_stdlib_recipe
from tests.helpers import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_cases_are_trained_once_and_measured_on_the_same_texts(tmp_path: Path) -> None:
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", make_byte_target(tmp_path / "target"), "unused")
    out, results = tmp_path / "out", tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "tools" / "bench_acceptance.py"), "--recipe", str(recipe), "--out", str(out)]
    command += ["--minutes", "0.01", "--limit", "2", "--max-tokens", "8", "--json", str(results)]
    command += ["--only", "base", "untrained"]
    first = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert first.returncode == 0, first.stderr
    base, untrained = json.loads(results.read_text())
    assert base["steps"] == json.loads((out / "steps.json").read_text())["base"] and untrained["steps"] == 1
    assert base["prompts"] == untrained["prompts"] == 2 and "difference" not in base
    assert untrained["difference"] == pytest.approx(untrained["accepted_length"] - base["accepted_length"])
    assert untrained["difference_interval"][0] <= untrained["difference"] <= untrained["difference_interval"][1]
    (out / "untrained" / "final").rename(out / "untrained" / "gone")  # as if it had been stopped
    (out / "untrained" / "run.json").unlink()
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 0 and "untrained: training" in again.stderr and "base: training" not in again.stderr
    assert len(again.stdout.splitlines()) == len(first.stdout.splitlines()) == 3
    other = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True, env=ENVIRONMENT)
    assert other.returncode == 2 and "begun with other settings" in other.stderr
