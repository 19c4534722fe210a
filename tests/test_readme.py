"""The README's Python examples run as they stand, and its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_every_script_that_the_readme_names_is_there() -> None:
    for name in set(re.findall(r"(?:tools|recipes|tests|peagle_train)/[\w/.]+\.(?:py|sh|yaml|safetensors)", README)):
        assert (ROOT / name).exists(), name
