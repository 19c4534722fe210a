"""Runs that were stopped go on as if they had not been, bit for bit, or not at all, with a clear line."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import peagle_train.training.checkpoint as run_checkpoint
import peagle_train.training.trainer as trainer_module
from peagle_train.__main__ import main, parse
from peagle_train.config import load_recipe
from peagle_train.data.packing import PackedRows
from peagle_train.distributed import load_full_moments
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.checkpoint import claim_output, lock_output, write_checkpoint
from peagle_train.training.evaluate import Evaluator
from peagle_train.training.signals import outside_the_loop
from peagle_train.training.step import BatchRunner, make_optimizer
from peagle_train.training.trainer import Trainer
from tests.test_checkpoint_files import in_child
from tests.tiny import VOCAB, make_target, write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13]
TIMES = {
    "tokens_per_second",
    "supervised_tokens_per_second",
    "peak_memory_bytes",
    "loader_wait_share",
    "seconds",
    "seconds_left",
}


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
    """Have the next run get a SIGTERM behind a step."""
    from peagle_train.training.trainer import Trainer

    real = Trainer._optimizer_step

    def step_and_stop(self: Trainer, batches: Any) -> None:
        real(self, batches)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

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
        for file in ("model.safetensors", "optimizer.state", "rng.state"):
            assert (again / file).read_bytes() == (path / file).read_bytes(), (path.name, file)


EVALUATED = {"eval_fraction": 0.3}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "relay": {"train": {"batch_size": 2}},
    "accumulating with workers": {"train": {"gradient_accumulation_steps": 2}, "data": {"num_workers": 2}},
    "float32, flat, cosine": {"train": {"dtype": "float32", "schedule": "cosine"}, "cod": {"num_segments": 1}},
    "compiled": {"train": {"compile": True, "compile_backend": "aot_eager"}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_that_was_stopped_is_the_run_that_was_not(
    case: str, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"max_steps": 12, "eval_steps": 2, "save_steps": 4, **SETTINGS[case].get("train", {})}
    sections = {**SETTINGS[case], "train": shared, "data": {**EVALUATED, **SETTINGS[case].get("data", {})}}
    whole = recipe_for(tmp_path / "whole", target, rows, **sections)
    run(whole)
    parts = recipe_for(tmp_path / "parts", target, rows, **sections)
    # Within an epoch, where a save was due anyway, and behind the last step, before it is evaluated.
    stops: list[tuple[int, list[str]]] = [(5, []), (8, ["--resume"]), (12, ["--resume"])]
    for step, arguments in stops[: 1 if case == "compiled" else 3]:
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            run(parts, *arguments)
        assert not (tmp_path / "parts" / "run" / "final").exists()
    run(parts, "--resume")
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    recompiles = [line["recompiles"] for line in metrics(tmp_path / "parts" / "run") if line["kind"] == "train"]
    assert set(recompiles) == ({0} if case == "compiled" else {None})


def test_a_run_with_the_full_vocabulary_writes_no_mapping_and_resumes_with_or_without_one(
    tmp_path: Path, target: Path, rows: Path
) -> None:
    train = {"max_steps": 6, "save_steps": 2, "eval_steps": 2}
    sections: dict[str, Any] = {"draft": {"draft_vocab_size": None}, "train": train, "data": EVALUATED}
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    run(recipe_for(tmp_path / "whole", target, rows, **sections))
    written = [file.parent.name for file in whole.glob("*/model.safetensors")]
    assert {"final", "best", "checkpoint-4"} <= set(written)
    for name in written:
        assert not {"d2t", "t2d"} & drafter(whole / name).keys(), name
    shutil.copytree(whole, parts)
    recipe = recipe_for(tmp_path / "parts", target, rows, **sections)
    run(recipe, "--resume", str(parts / "checkpoint-2"))
    assert_same_run(parts, whole)
    mapping = {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.ones(VOCAB, dtype=torch.bool)}

    def as_older_versions(folder: Path) -> None:
        for file in (whole / "checkpoint-4").iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, folder)
        save_file({**drafter(folder), **mapping}, folder / "model.safetensors")

    write_checkpoint(parts, 4, as_older_versions)
    run(recipe, "--resume", str(parts / "checkpoint-4"))
    assert all(torch.equal(drafter(parts / "final")[name], t) for name, t in drafter(whole / "final").items())
    other = recipe_for(tmp_path / "other", target, rows, **{**sections, "train": {"max_steps": 2, "save_steps": 1}})
    for start in (f"draft.init_from={whole / 'final'}", f"draft.vocab_from={whole / 'best'}"):
        run(other, start)
        run(other, start, "--resume", str(tmp_path / "other" / "run" / "checkpoint-1"))
        shutil.rmtree(tmp_path / "other" / "run")


def test_whatever_step_a_run_was_stopped_at_it_goes_on_from_there(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 7, "save_steps": 1, "eval_steps": 3}
    recipe = recipe_for(tmp_path, target, rows, data=EVALUATED, train=train)
    run(recipe)
    output, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(output, whole)
    for step in range(6, 0, -1):
        run(recipe, "--resume", str(output / f"checkpoint-{step}"))
        assert f"going on behind step {step}" in capsys.readouterr().out
        assert_same_run(output, whole)
        assert not list(output.glob("set-aside*"))


def test_a_signal_within_a_step_drops_it_and_a_run_that_goes_on_does_it_from_its_start(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_steps": 5, "gradient_accumulation_steps": 4}
    run(recipe_for(tmp_path / "whole", target, rows, train=train))
    recipe = recipe_for(tmp_path / "parts", target, rows, train=train)
    real, calls = BatchRunner.run, []

    def run_and_signal(self: BatchRunner, *args: Any, **kwargs: Any) -> Any:
        stats = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) in (2, 4 + 8 + 3):  # of the first step, of the third one of a run that began again
            os.kill(os.getpid(), signal.SIGTERM)
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(BatchRunner, "run", run_and_signal)
        run(recipe)
        assert len(calls) == 2 and (tmp_path / "parts" / "run" / "checkpoint-0").exists()
        calls += [1, 1]
        run(recipe, "--resume")
        assert len(calls) == 4 + 8 + 3
    assert sorted(p.name for p in (tmp_path / "parts" / "run").glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]
    run(recipe, "--resume")
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


def started(folder: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> Path:
    """The recipe of a run of 9 steps that was stopped behind step 5; it has checkpoints 2, 4 and 5."""
    settings = {"max_steps": 9, "save_steps": 2, "eval_steps": 3, **train}
    recipe = recipe_for(folder, target, rows, data=EVALUATED, train=settings)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        run(recipe)
    return recipe


def test_going_on_reads_no_row_of_the_steps_that_are_done(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peagle_train.training.trainer import Trainer

    recipe = started(tmp_path, target, rows, monkeypatch, batch_size=2)
    read: list[object] = []
    make, get = Trainer._steps, PackedRows.__getitem__

    def counted(self: PackedRows, index: Any) -> Any:
        read.append(index)
        return get(self, index)

    def steps(self: Trainer) -> Any:
        monkeypatch.setattr(PackedRows, "__getitem__", counted)
        return make(self)

    monkeypatch.setattr(Trainer, "_steps", steps)
    monkeypatch.setattr(Evaluator, "__call__", lambda self: None)
    run(recipe, "--resume")
    assert len(read) == (9 - 5) * 2


def test_a_file_that_cannot_be_written_ends_the_run_with_one_line_and_the_last_checkpoint_goes_on(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    output = tmp_path / "run"
    metrics_file = output / "metrics.jsonl"
    content = metrics_file.read_bytes()
    metrics_file.unlink()
    metrics_file.mkdir()
    run(recipe, "--resume", code=2)  # found out before anything is trained
    assert str(metrics_file) in last_error(capsys)
    metrics_file.rmdir()
    metrics_file.write_bytes(content)
    for module, function, what, goes_on in (
        (run_checkpoint, "write_checkpoint", "checkpoint-6 could not be saved", "checkpoint-5"),
        (trainer_module, "save_drafter", "final could not be written", "checkpoint-8"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            run(recipe, "--resume", code=1)
        message = last_error(capsys)
        assert what in message and "No space left" in message
        assert f"the last checkpoint is {output / goes_on}: the same command with --resume" in message
    run(recipe, "--resume")
    whole = recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3})
    run(whole)
    assert_same_run(output, tmp_path / "whole" / "run")


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("peagle_train: error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def test_a_finished_run_says_so_and_writes_nothing(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 4, "save_steps": 2, "schedule": "linear", "warmup_ratio": 0.0}
    recipe = recipe_for(tmp_path, target, rows, train=train)
    run(recipe)
    output = tmp_path / "run"
    before = contents(output)
    for arguments, more in (([], False), (["train.max_steps=6"], True), (["train.max_steps=null"], True)):
        capsys.readouterr()
        run(recipe, "--resume", *arguments)
        said = capsys.readouterr().out
        assert "finished run: nothing to do" in said and contents(output) == before
        assert (
            f"to train for more steps, as the recipe has it now: --resume {output / 'checkpoint-2'}" in said
        ) == more
    # Asked for by name, it goes on to more steps, and says what becomes of the learning rate.
    run(recipe, "--resume", str(output / "checkpoint-2"), "train.max_steps=6")
    said = capsys.readouterr().out
    assert "steps 4 -> 6: at step 2 the learning rate jumps from 5.000e-03 to 6.667e-03" in said
    assert json.loads((output / "run.json").read_text())["steps"] == 6
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_ended_at_max_steps_goes_on_to_the_end_of_its_epochs(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 3, "save_steps": 2})
    run(recipe)
    run(recipe, "--resume", str(tmp_path / "run" / "checkpoint-2"), "train.max_steps=null")
    whole = recipe_for(tmp_path / "whole", target, rows)
    run(whole)
    steps = json.loads((tmp_path / "whole" / "run" / "run.json").read_text())["steps"]
    assert steps > 3 and json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == steps


@pytest.mark.parametrize("named", [False, True])
def test_a_finished_run_whose_drafter_was_removed_or_whose_checkpoint_is_named_does_its_last_steps_again(
    named: bool, tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 4, "save_steps": 2, "log_steps": 1})
    run(recipe)
    output, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(output, whole)
    if not named:
        shutil.rmtree(output / "final")
    run(recipe, f"--resume={output / 'checkpoint-2'}" if named else "--resume")
    said = capsys.readouterr().out
    assert "going on behind step 2" in said and (f"{output / 'final'} is gone" in said) == (not named)
    assert_same_run(output, whole)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoint-2")
    run(recipe, "--resume", code=2)
    assert "without a complete checkpoint" in last_error(capsys)


def test_where_there_is_nothing_to_resume_the_line_says_what_there_is(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 2})
    run(recipe, "--resume", code=2)
    assert "holds no run: start one without --resume" in last_error(capsys) and not (tmp_path / "run").exists()
    run(recipe)
    (tmp_path / "run" / "run.json").write_text('{"state": "started"}')
    (tmp_path / "run" / "checkpoint-1").mkdir()
    run(recipe, "--resume", code=2)
    message = last_error(capsys)
    assert "without a complete checkpoint" in message and "checkpoint-1 has no manifest.json" in message
    run(recipe, "--resume", str(tmp_path / "elsewhere"), code=2)
    assert "give a folder named checkpoint-<step>" in last_error(capsys)
    (tmp_path / "checkpoint-1").mkdir()
    run(recipe, "--resume", str(tmp_path / "checkpoint-1"), code=2)
    assert f"set output.dir={tmp_path}" in last_error(capsys)


@pytest.mark.parametrize("content", [None, "", "[]", '{"state": '])
def test_a_complete_checkpoint_is_enough_to_go_on_whatever_became_of_the_runs_marker(
    content: str | None,
    tmp_path: Path,
    target: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    marker = tmp_path / "run" / "run.json"
    marker.unlink()
    if content is not None:
        marker.write_text(content)
    run(recipe, code=2)  # a plain start says that there is a run
    assert "already holds a run; go on with it (--resume)" in last_error(capsys)
    run(recipe, "--resume")
    assert f"{marker} is missing or broken, and is written anew" in capsys.readouterr().out
    whole = recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3})
    run(whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize("by_name", [False, True])
def test_checkpoints_that_were_moved_to_another_disk_and_linked_are_gone_on_from_and_pruned(
    by_name: bool, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    output, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    for step in (2, 4, 5):
        (output / f"checkpoint-{step}").rename(disk / f"checkpoint-{step}")
        (output / f"checkpoint-{step}").symlink_to(disk / f"checkpoint-{step}")
    before = contents(disk)
    run(recipe, f"--resume={output / 'checkpoint-4'}" if by_name else "--resume", "train.keep_last=1")
    run(recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3}))
    assert_same_run(output, tmp_path / "whole" / "run")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-8"] and contents(disk) == before


def test_another_target_is_refused_though_its_head_is_the_same_and_a_copy_is_taken(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(target, folder)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    before = contents(tmp_path / "run")
    run(recipe, "--resume", f"target.path={other}", code=2)
    assert "--resume: target's config and weights: " in last_error(capsys) and contents(tmp_path / "run") == before
    run(recipe, "--resume", f"target.path={copy}")
    assert "accepted, as the target's config and weights came out the same" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--resume"]])
def test_a_folder_in_which_another_process_trains_is_said_to_be_in_use_not_to_be_removed(
    arguments: list[str], tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(tmp_path, target, rows)
    output = tmp_path / "run"
    claim_output(output)  # it has no checkpoint yet
    locked, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = lock_output(output)
        os.write(locked[1], b".")
        os.read(go[0], 1)
        os._exit(0 if lock else 1)
    os.read(locked[0], 1)
    try:
        run(recipe, *arguments, code=2)
    finally:  # or it would wait for ever
        os.write(go[1], b".")
        os.waitpid(pid, 0)
    assert last_error(capsys).endswith(f"output.dir {output} is in use: another process is training there")


STARTED: dict[str, list[list[str]]] = {
    "init_from": [[], ["draft.init_from=null"], ["draft.init_from=/nowhere"]],
    "vocab_from": [[]],
}


@pytest.mark.parametrize("key", STARTED)
def test_the_drafter_that_a_run_started_from_is_not_needed_to_go_on(
    key: str,
    tmp_path: Path,
    target: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of another shape than the recipe and the target would give, and another vocabulary.
    shape = {"intermediate_size": 20, "num_key_value_heads": 4, "rope_theta": 77.0, "draft_vocab_size": 31}
    shape["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    run(recipe_for(tmp_path / "first", target, rows, draft=shape, train={"max_steps": 1}))
    source = tmp_path / "first" / "run" / "final"
    settings = {key: str(source), "draft_vocab_size": None}
    sections = {"data": EVALUATED, "draft": settings, "train": {"max_steps": 6, "eval_steps": 3}}
    whole = recipe_for(tmp_path / "whole", target, rows, **sections)
    run(whole)
    parts = recipe_for(tmp_path / "parts", target, rows, **sections)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        run(parts)
    shutil.rmtree(source)
    for arguments in STARTED[key]:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / "parts" / "run", tmp_path / "again")
        run(parts, "--resume", f"output.dir={tmp_path / 'again'}", *arguments)
        assert_same_run(tmp_path / "again", tmp_path / "whole" / "run")
    # A vocabulary of another file must be read: it counts by what it leads to.
    capsys.readouterr()
    changed = ["draft.init_from=null"] if key == "init_from" else []
    run(parts, "--resume", *changed, "draft.vocab_from=/nowhere", code=2)
    assert "draft.vocab_from /nowhere" in last_error(capsys)
    run(recipe_for(tmp_path / "other", target, rows, train={"max_steps": 1}))
    run(parts, "--resume", *changed, f"draft.vocab_from={tmp_path / 'other' / 'run' / 'final'}", code=2)
    assert "draft vocabulary" in last_error(capsys)
    run(parts, "--resume", *changed, f"draft.vocab_from={tmp_path / 'whole' / 'run' / 'final'}")
    assert "accepted, as the draft vocabulary came out the same" in capsys.readouterr().out


def test_a_checkpoint_that_was_copied_elsewhere_goes_on_there_as_the_line_says(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run" / "checkpoint-4", other / "checkpoint-4")
    shutil.rmtree(tmp_path / "run")
    run(recipe, f"--resume={other / 'checkpoint-4'}", code=2)
    assert f"set output.dir={other}" in last_error(capsys) and not (tmp_path / "run").exists()
    run(recipe, f"--resume={other / 'checkpoint-4'}", f"output.dir={other}")
    assert "going on behind step 4" in capsys.readouterr().out
    run(recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3}))
    ours, theirs = drafter(other / "final"), drafter(tmp_path / "whole" / "run" / "final")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


FINISHED: dict[str, Any] = {
    **{"state": "finished", "drafter": "final", "steps": 3, "epochs": 1, "train_seconds": 0.5},
    **{
        "before": {"expected_accepted_length": 1.0, "loss": 2.0},
        "after": {"expected_accepted_length": 1.5, "loss": 1.0},
    },
    "best": {"step": 2, "expected_accepted_length": 1.6, "folder": "best"},
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "3",
        '"x"',
        pytest.param("[" * 100_000, id="deep"),
        "{}",
        '{"state": []}',
        '{"state": "stopped"}',
        '{"state": "finished"}',
    ]
    + [json.dumps({**FINISHED, key: value}) for key in FINISHED for value in ([1], "x" if key != "drafter" else 1)]
    + [json.dumps({**FINISHED, "before": None})],
)
def test_a_marker_of_anything_else_is_no_run_and_one_line(
    content: str, tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = recipe_for(tmp_path, target, rows), tmp_path / "run"
    (output / "final").mkdir(parents=True)
    (output / "final" / "model.safetensors").touch()
    (output / "run.json").write_text(json.dumps(FINISHED))
    assert main(["--summary", str(output)]) == 0 and main([str(recipe), "--resume"]) == 0
    assert capsys.readouterr().out.count("1.000 before, 1.500 after training") == 2
    (output / "run.json").write_text(content)
    for arguments in (["--summary", str(output)], [str(recipe), "--resume"]):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert f"{output} holds no run" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("role", ["optimizer.state", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_offered_by_name(
    role: str,
    tmp_path: Path,
    target: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    output = tmp_path / "run"
    damaged = output / "checkpoint-5" / role
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = contents(output)
    run(recipe, "--resume", code=2)
    message = last_error(capsys)
    assert str(damaged) in message and f"--resume {output / 'checkpoint-4'}" in message and contents(output) == before
    run(recipe, "--resume", str(output / "checkpoint-4"))
    assert "later steps (5) are set aside" in capsys.readouterr().out
    assert not (output / "set-aside-5").exists()
    whole = recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3})
    run(whole)
    assert_same_run(output, tmp_path / "whole" / "run")
    for step in (2, 4, 6, 8):  # all of them damaged: nothing is offered
        (output / f"checkpoint-{step}" / role).write_bytes(b"")
    (output / "run.json").write_text('{"state": "started"}')
    run(recipe, "--resume", code=2)
    assert "no sound one is left" in last_error(capsys)


def test_changes_of_the_recipe_are_shown_and_those_that_would_make_it_another_run_are_refused_by_name(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch)
    before = contents(tmp_path / "run")
    run(recipe, "--resume", "train.learning_rate=1.0", "cod.down_sample_ratio=0.5", "data.max_length=33", code=2)
    message = last_error(capsys)
    for change in ("train.learning_rate 0.01 -> 1.0", "cod.down_sample_ratio 0.7 -> 0.5", "data.max_length 32 -> 33"):
        assert change in message
    other = write_rows(tmp_path / "other.jsonl", LENGTHS, prompt=0.3, seed=1)
    for changed, named in (
        (f"data.sources=[{other}]", "rows to train on"),
        ("data.max_documents=8", "rows to train on"),
        ("data.max_eval_rows=1", "held-out rows"),
        ("train.batch_size=2", "rows of a step"),
        ("train.max_steps=4", "behind the 4 steps"),
    ):
        run(recipe, "--resume", changed, code=2)
        assert named in last_error(capsys)
    assert contents(tmp_path / "run") == before
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows, moved)
    run(recipe, "--resume", f"data.sources=[{moved}]", "data.num_workers=1", "train.keep_last=1", "train.log_steps=1")
    said = capsys.readouterr().out
    assert "train.keep_last null -> 1: changes no number" in said and "data.num_workers 0 -> 1" in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    whole = recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train={"max_steps": 9, "eval_steps": 3})
    run(whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")


def test_a_run_that_ran_out_of_memory_goes_on_in_more_segments(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = started(tmp_path, target, rows, monkeypatch, gradient_accumulation_steps=2)
    run(recipe, "--resume", "cod.num_segments=5", "train.batch_size=2", "train.gradient_accumulation_steps=1")
    assert "cod.num_segments 3 -> 5: same rows and draws" in capsys.readouterr().out
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2}
    run(recipe_for(tmp_path / "whole", target, rows, data=EVALUATED, train=settings))
    ours, theirs = drafter(tmp_path / "run" / "final"), drafter(tmp_path / "whole" / "run" / "final")
    assert all(torch.allclose(ours[n], t, rtol=0, atol=1e-9) for n, t in theirs.items())


def test_a_best_drafter_of_a_step_that_was_undone_is_not_taken_for_the_best(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, lengths = Evaluator.__call__, iter([1.0, 1.1, 1.2, 1.3, 1.2, 1.1])

    def evaluate(self: Evaluator) -> Any:
        return {**(real(self) or {}), "expected_accepted_length": next(lengths)}

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    recipe = recipe_for(
        tmp_path, target, rows, data=EVALUATED, train={"max_steps": 5, "save_steps": 1, "eval_steps": 1}
    )
    run(recipe)
    output = tmp_path / "run"
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 3
    lengths = iter([1.0])
    (output / "run.json").write_text('{"state": "started"}')
    run(recipe, "--resume", str(output / "checkpoint-2"), "train.eval_steps=null")
    assert "best/ holds a later step" in capsys.readouterr().out
    assert json.loads((output / "run.json").read_text())["best"] == {
        "step": 2,
        "expected_accepted_length": 1.2,
        "folder": None,
    }


@pytest.mark.parametrize(
    ("arguments", "resume", "recipe", "overrides"),
    [
        (["r.yaml", "--resume"], "", "r.yaml", []),
        (["--resume", "r.yaml", "a.b=1"], "", "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume", "a.b=1"], "", "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume", "--print-config"], "", "r.yaml", []),
        (["r.yaml", "--resume", "run/checkpoint-3", "a.b=1"], "run/checkpoint-3", "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume=run/checkpoint-3"], "run/checkpoint-3", "r.yaml", []),
        (["r.yaml"], None, "r.yaml", []),
    ],
)
def test_resume_takes_a_folder_and_nothing_else_for_its_own(
    arguments: list[str], resume: str | None, recipe: str, overrides: list[str]
) -> None:
    options = parse(arguments)
    assert (options.resume, options.recipe, options.overrides) == (resume, recipe, overrides)


def test_before_the_first_step_sigusr1_is_answered_and_sigterm_is_one_line(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, kind = recipe_for(tmp_path, target, rows, train={"max_steps": 2}), signal.SIGUSR1
    load = FrozenTarget.load

    def load_and_signal(*args: Any, **kwargs: Any) -> FrozenTarget:
        os.kill(os.getpid(), kind)
        return load(*args, **kwargs)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr(FrozenTarget, "load", load_and_signal)
    assert in_child(lambda: run(recipe)) == 0
    assert capfd.readouterr().err.splitlines()[0].startswith("peagle_train: SIGUSR1: there is nothing to save")
    shutil.rmtree(tmp_path / "run")
    kind = signal.SIGTERM
    run(recipe, code=143)
    said = capfd.readouterr().err
    assert said == "peagle_train: error: SIGTERM outside of the training loop: nothing more was saved\n"
    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_comes_where_python_swallows_exceptions_ends_the_run_all_the_same(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.perf_counter()  # the handler runs before the next line

    load = FrozenTarget.load

    def load_and_die(*args: Any, **kwargs: Any) -> FrozenTarget:
        Dying()
        return load(*args, **kwargs)

    monkeypatch.setattr(FrozenTarget, "load", load_and_die)
    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 2})
    assert in_child(lambda: run(recipe)) == 143
    said = capfd.readouterr().err
    assert said == "peagle_train: error: SIGTERM outside of the training loop: nothing more was saved\n"


def test_other_swallowed_errors_are_told_as_ever_and_the_hook_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise OSError("in vain")

    told: list[str] = []
    hook = lambda what: told.append(str(what.exc_value))  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with outside_the_loop(lambda error: told.append("ended")):
        assert sys.unraisablehook is not hook
        Failing()
    assert told == ["in vain"] and sys.unraisablehook is hook


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_damaged_or_missing_log_is_no_reason_not_to_go_on_and_no_step_is_in_it_twice(
    is_gone: bool, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 7, "save_steps": 2})
    path = tmp_path / "run" / "metrics.jsonl"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        run(recipe)
    if is_gone:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(b"\xff" + content[1:] + b"half")
    with monkeypatch.context() as patch:  # it is killed behind the checkpoint of step 4
        patch.setattr(Trainer, "_finish", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run(recipe, "--resume")
    run(recipe, "--resume")
    lines = path.read_bytes().splitlines()
    if not is_gone:
        assert lines[0][:1] == b"\xff"
        lines = lines[1:]
    assert [json.loads(line)["step"] for line in lines] == ([4, 5, 6, 7] if is_gone else [2, 3, 4, 5, 6, 7])


def test_sigusr1_saves_and_goes_on_and_clocks_that_jump_change_nothing(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peagle_train.training.trainer import Trainer

    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 5})
    run(recipe)
    real = Trainer._optimizer_step

    def step_and_signal(self: Trainer, batches: Any) -> None:
        real(self, batches)
        monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * self.step)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "_optimizer_step", step_and_signal)
    again = recipe_for(tmp_path / "again", target, rows, train={"max_steps": 5})
    run(again)
    assert [path.name for path in (tmp_path / "again" / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert_same_run(tmp_path / "again" / "run", tmp_path / "run")
    (tmp_path / "again" / "run" / "run.json").write_text('{"state": "started"}')
    monkeypatch.undo()
    run(again, "--resume")
    assert_same_run(tmp_path / "again" / "run", tmp_path / "run")


def test_the_optimizer_makes_nothing_beside_its_state_as_the_plan_of_memory_takes_it(
    tmp_path: Path, target: Path, rows: Path
) -> None:
    train = load_recipe(str(recipe_for(tmp_path, target, rows))).train
    assert make_optimizer(torch.nn.Linear(3, 2), train).defaults["fused"] is True


def test_moments_and_steps_lie_where_their_parameter_does() -> None:
    # fused AdamW reads all of them on the parameter's device; meta stands for one that is not the host
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    moments = {
        f"{kind}.{n}": torch.ones(p.shape) for kind in ("exp_avg", "exp_avg_sq") for n, p in model.named_parameters()
    }
    moments |= {f"step.{name}": torch.tensor(7.0) for name, _ in model.named_parameters()}
    load_full_moments(model, optimizer, moments)
    assert len(optimizer.state) == 2
    assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {"meta"}
