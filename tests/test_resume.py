"""Runs that were stopped go on as if they had not been, bit for bit, or not at all, with a clear line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from peagle_train.__main__ import main
from tests.tiny import make_target, write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13]
TIMES = {"tokens_per_second", "peak_memory_bytes", "loader_wait_share", "seconds"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS, prompt=0.3)


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe_for(folder: Path, target: Path, rows: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, target, rows, folder / "run", **sections)


def run(recipe: Path, *arguments: str, code: int = 0) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), *arguments]) == code


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next run end, as by SIGTERM, behind a step."""
    from peagle_train.trainer import Trainer

    real = Trainer._optimizer_step

    def step_and_stop(self: Trainer, batches: Any) -> None:
        real(self, batches)
        if self.step == step:
            self.signals.stop = "SIGTERM"

    monkeypatch.setattr(Trainer, "_optimizer_step", step_and_stop)


def drafter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_run(ours: Path, whole: Path) -> None:
    for name in ("final", "best"):
        assert (ours / name).exists() == (whole / name).exists(), name
        if (whole / name).exists():
            mine, theirs = drafter(ours / name), drafter(whole / name)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], t) for n, t in theirs.items()), name
    assert metrics(ours) == metrics(whole)
    summaries = [json.loads((output / "run.json").read_text()) for output in (ours, whole)]
    for summary in summaries:
        del summary["train_seconds"]
    assert summaries[0] == summaries[1]
    for path in whole.glob("checkpoint-*"):
        again = ours / path.name
        for file in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
            assert (again / file).read_bytes() == (path / file).read_bytes(), (path.name, file)


EVALUATED = {"eval_fraction": 0.3}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "relay": {"train": {"batch_size": 2}},
    "accumulating with workers": {"train": {"gradient_accumulation_steps": 2}, "data": {"num_workers": 2}},
    "float32, flat, cosine": {"train": {"dtype": "float32", "schedule": "cosine"}, "cod": {"num_segments": 1}},
    "compiled": {"train": {"compile": True, "compile_backend": "aot_eager"}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_that_was_stopped_twice_is_the_run_that_was_not(
    case: str, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"max_steps": 12, "eval_steps": 2, "save_steps": 4, **SETTINGS[case].get("train", {})}
    sections = {**SETTINGS[case], "train": shared, "data": {**EVALUATED, **SETTINGS[case].get("data", {})}}
    whole = recipe_for(tmp_path / "whole", target, rows, **sections)
    run(whole)
    parts = recipe_for(tmp_path / "parts", target, rows, **sections)
    for step, arguments in ((5, []), (8, ["--resume"])):  # within an epoch, and where a save was due anyway
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            run(parts, *arguments)
        assert not (tmp_path / "parts" / "run" / "final").exists()
    run(parts, "--resume")
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    recompiles = [line["recompiles"] for line in metrics(tmp_path / "parts" / "run") if line["kind"] == "train"]
    assert set(recompiles) == ({0} if case == "compiled" else {None})


def test_whatever_step_a_run_was_stopped_at_it_goes_on_from_there(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 7, "save_steps": 1, "eval_steps": 3}
    recipe = recipe_for(tmp_path, target, rows, data=EVALUATED, train=train)
    run(recipe)
    output, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(output, whole)
    for step in range(6, 0, -1):
        # more steps would be asked for if it were not the same run: a finished one is left alone
        (output / "run.json").write_text('{"state": "started"}')
        run(recipe, "--resume", str(output / f"checkpoint-{step}"))
        assert f"going on behind step {step}" in capsys.readouterr().out
        assert_same_run(output, whole)
        assert not list(output.glob("set-aside*"))
