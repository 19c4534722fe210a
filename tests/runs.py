"""Whole runs in this process, and what is compared between them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from peagle_train.__main__ import main
from peagle_train.training.trainer import Trainer
from tests.tiny import write_recipe
from tools.chaos import metrics

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13]
EVALUATED = {"eval_fraction": 0.3}


def recipe_for(folder: Path, target: Path, rows: Path, /, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, target, rows, folder / "run", **sections)


def run(recipe: Path, *arguments: str, code: int = 0) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), *arguments]) == code


def stopped(recipe: Path, step: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A run that gets a SIGTERM after a step."""
    take_step = Trainer.take_step

    def step_and_stop(self: Trainer, batches: Any) -> Any:
        result = take_step(self, batches)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", step_and_stop)
        run(recipe, *arguments)


def drafter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    """Whether names, shapes and, to `atol`, numbers are the same."""
    if ours.keys() != theirs.keys() or any(ours[name].shape != t.shape for name, t in theirs.items()):
        return False
    return all(torch.allclose(ours[name], t, rtol=0, atol=atol) for name, t in theirs.items())


def lines(output: Path, kind: str) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl."""
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files in a folder and below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(ours: Path, whole: Path) -> None:
    """Drafters, numbers, summaries and the checkpoints that both have are equal bit for bit."""
    for name in ("final", "best"):
        assert (ours / name).exists() == (whole / name).exists(), name
        assert not (whole / name).exists() or same_tensors(drafter(ours / name), drafter(whole / name)), name
    assert metrics(ours) == metrics(whole)
    summaries = [json.loads((output / "run.json").read_text()) for output in (ours, whole)]
    for summary in summaries:
        del summary["train_seconds"]
    assert summaries[0] == summaries[1]
    for path in {path.name for path in whole.glob("checkpoint-*")} & {path.name for path in ours.glob("checkpoint-*")}:
        for file in ("model.safetensors", "optimizer.state"):
            assert (ours / path / file).read_bytes() == (whole / path / file).read_bytes(), (path, file)


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("peagle-train train: error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def in_child(function: Callable[[], object]) -> int:
    """Run something that touches files only in a forked process: its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
