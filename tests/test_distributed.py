"""The command line on two processes on CPU, and launches that lie. Whole runs on several processes: test_ranks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_target, write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 5]
ROOT = Path(__file__).parent.parent


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    env = {name: value for name, value in env.items() if value}
    return subprocess.run(command + list(arguments), env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def test_twenty_steps_sharded_over_two_processes_end_with_one_processs_weights(tmp_path: Path, target: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", LENGTHS, prompt=0.3)
    shared = {"max_steps": 20, "log_steps": 5}
    held_out = write_rows(tmp_path / "held_out.jsonl", [30, 7, 12], seed=9)
    recipe = write_recipe(
        tmp_path, target, rows, tmp_path / "run", data={"eval_sources": [str(held_out)]}, train=shared
    )
    sharded = ["train.sharding=fsdp2", "target.shard=true"]
    two = launch(2, "-m", "peagle_train", str(recipe), f"output.dir={tmp_path / 'two'}", *sharded)
    assert two.returncode == 0, two.stderr[-2000:]
    one = launch(
        1, "-m", "peagle_train", str(recipe), f"output.dir={tmp_path / 'one'}", "train.gradient_accumulation_steps=2"
    )
    assert one.returncode == 0, one.stderr[-2000:]
    ours, theirs = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("two", "one"))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-8), name
    # Evaluation gathers counts over ranks: the same numbers, printed once.
    lines = [[x for x in r.stdout.splitlines() if x.startswith("held-out")] for r in (two, one)]
    assert lines[0] == lines[1] and len(lines[0]) >= 2


def test_processes_that_would_train_alone_are_refused_with_the_line_that_works(tmp_path: Path, target: Path) -> None:
    recipe = write_recipe(tmp_path, target, write_rows(tmp_path / "rows.jsonl", LENGTHS), tmp_path / "run")
    strangers = launch(2, "-m", "peagle_train", str(recipe), ACCELERATE_USE_CPU="")
    assert strangers.returncode != 0
    assert "each believes that it is alone" in strangers.stderr
    assert "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2" in strangers.stderr
    assert not (tmp_path / "run").exists()
    single = launch(1, "-m", "peagle_train", str(recipe), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert single.returncode == 2 and "starts only one" in single.stderr
