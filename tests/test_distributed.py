"""The command line on two processes on CPU, and launches that lie. Whole runs on several processes: test_ranks.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peagle_train.__main__ import main
from tests.runs import in_child
from tests.tiny import write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 5]
ROOT = Path(__file__).parent.parent


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    env = {name: value for name, value in env.items() if value}
    return subprocess.run(command + list(arguments), env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_the_command_line_on_two_processes_prints_once_and_ends_with_one_processs_weights(
    tmp_path, tiny_target, capsys
):
    rows = write_rows(tmp_path / "rows.jsonl", LENGTHS, prompt=0.3)
    held_out = write_rows(tmp_path / "held_out.jsonl", [30, 7, 12], seed=9)
    sections: dict[str, Any] = {"data": {"eval_sources": [str(held_out)]}, "train": {"max_steps": 2}}
    recipe = write_recipe(tmp_path, tiny_target, rows, tmp_path / "run", **sections)
    sharded = ["train.sharding=fsdp2", "target.shard=true"]
    two = launch(2, "-m", "peagle_train", str(recipe), f"output.dir={tmp_path / 'two'}", *sharded)
    assert two.returncode == 0, two.stdout + two.stderr
    assert main([str(recipe), f"output.dir={tmp_path / 'one'}", "train.gradient_accumulation_steps=2"]) == 0
    ours, theirs = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("two", "one"))
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-8), name
    lines = [
        [x for x in text.splitlines() if x.startswith("held-out")] for text in (two.stdout, capsys.readouterr().out)
    ]
    assert lines[0] == lines[1] and len(lines[0]) >= 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "launched as 2 processes"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "launched as several processes"),
    ],
    ids=["strangers", "single"],
)
def test_processes_that_would_train_alone_are_refused_with_the_line_that_works(
    environment, message, tmp_path, tiny_target, tiny_rows, monkeypatch, capfd
):
    recipe = write_recipe(tmp_path, tiny_target, tiny_rows, tmp_path / "run")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert in_child(lambda: sys.exit(main([str(recipe)]))) != 0
    error = capfd.readouterr().err
    assert message in error and "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_one_of_several_processes_ends_at_once_with_its_code_and_with_all_that_it_said(code):
    script = "import atexit; from peagle_train.files import run_tool; atexit.register(print, 'waited')"
    done = launch(
        1, "-c", f"{script}; run_tool('x', lambda: print('done') or {code})", WORLD_SIZE="2", PYTHONUNBUFFERED=""
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "done\n", "")
