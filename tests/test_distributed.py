"""The command line on two processes on CPU, and launches that lie. Whole runs on several processes: test_ranks.py."""

import subprocess
import sys

import pytest

from peagle_train.__main__ import main
from tests.helpers import ENVIRONMENT, ROOT
from tests.runs import EVALUATED, drafter, in_child, run, same_tensors


def launch(processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run([*command, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_the_command_line_on_two_processes_prints_once_and_ends_with_one_processs_weights(tmp_path, tiny, capsys):
    recipe = tiny(tmp_path, data=EVALUATED, train={"max_steps": 2})
    sharded = ["train.sharding=fsdp2", "target.shard=true"]
    two = launch(2, "-m", "peagle_train", str(recipe), f"output.dir={tmp_path / 'two'}", *sharded)
    assert two.returncode == 0, two.stdout + two.stderr
    run(recipe, "train.gradient_accumulation_steps=2")
    assert same_tensors(drafter(tmp_path / "two" / "final"), drafter(tmp_path / "run" / "final"), 1e-8)
    ours, theirs = (
        [line for line in text.splitlines() if line.startswith("held-out")]
        for text in (two.stdout, capsys.readouterr().out)
    )
    assert ours == theirs and len(ours) >= 2


LAUNCHES = {
    "launched as 2 processes": {"WORLD_SIZE": "2", "RANK": "0"},
    "launched as several processes": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.mark.parametrize("message", LAUNCHES)
def test_processes_that_would_train_alone_are_refused_with_the_line_that_works(
    message, tmp_path, tiny, monkeypatch, capfd
):
    recipe = tiny(tmp_path)
    for name, value in LAUNCHES[message].items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert in_child(lambda: sys.exit(main([str(recipe)]))) != 0
    error = capfd.readouterr().err
    assert message in error and "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_one_of_several_processes_ends_at_once_with_its_code_and_with_all_that_it_said(code):
    script = "import atexit; from peagle_train.files import run_tool; atexit.register(print, 'waited')"
    script += f"; run_tool('x', lambda: print('done') or {code})"
    done = launch(1, "-c", script, WORLD_SIZE="2", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout, done.stderr) == (code, "done\n", "")
