"""The trainer's step on a CUDA device that is not there: bytes, kernels and waits, counted on tensors without data.

The same numbers on builds for CPUs and for CUDA. A sequence of 8,192 tokens, a drafter for an 8B target.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ENVIRONMENT, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++"),
]
STEPS: dict[str, dict[str, Any]] = {
    "S=1": {"S": 1},
    "S=2": {"S": 2},
    "S=4": {"S": 4},
    "S=16": {"S": 16},
    "S=1, checkpointing, 2 micro-batches": {"S": 1, "activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "S=4, large chunks of the loss": {"S": 4, "loss_chunk_rows": 8192},
    "S=4, recompute, checkpointing": {"S": 4, "segment_mode": "recompute", "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each of `STEPS` takes."""
    shim, package = tmp_path_factory.mktemp("shim") / "fake_cuda.so", Path(torch.__file__).parent
    build = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{package}/include", "tests/fake_cuda.cpp", "-o", str(shim)]
    subprocess.run([*build, f"-L{package}/lib", f"-Wl,-rpath,{package}/lib", "-lc10"], cwd=ROOT, check=True)
    run = [sys.executable, "tests/fake_cuda_run.py", *map(json.dumps, STEPS.values())]
    environment = {**ENVIRONMENT, "LD_PRELOAD": str(shim), "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return dict(zip(STEPS, map(json.loads, found.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("step", STEPS)
def test_tensors_hold_what_is_planned(step: str, measured: dict[str, Any]) -> None:
    assert measured[step]["peak"] == pytest.approx(measured[step]["planned"], rel=0.05)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_never_waits_for_the_device(step: str, measured: dict[str, Any]) -> None:
    assert measured[step]["waits"] == {}


def test_an_eager_step_launches_at_most_3800_kernels_in_four_segments(measured: dict[str, Any]) -> None:
    assert 3000 < measured["S=4"]["kernels"] <= 3800
