"""A step that is not finite is not applied: its rows are written down and the run goes on, unless there are too many."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from peagle_train.core.relay import RelayBuffers
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.checkpoint import write_checkpoint
from peagle_train.training.trainer import Trainer
from tests.test_resume import LENGTHS, assert_same_run, drafter, last_error, metrics, recipe_for, run, stop_after
from tests.tiny import make_target, write_rows


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


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Any, value: float = float("inf"), what: str = "features") -> None:
    """Have the target give something that is not finite for rows whose key is bad."""
    outputs = FrozenTarget.outputs

    def poisoned(self: FrozenTarget, batch: Any, head_rows: Any) -> Any:
        result = outputs(self, batch, head_rows)
        for row, key in enumerate(batch["row_key"].tolist()):
            if is_bad(key):
                getattr(result, what)[row] = value
        return result

    monkeypatch.setattr(FrozenTarget, "outputs", poisoned)


def rows_by_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[int]]]:
    """Fills with each step's row keys by micro-batch."""
    seen: dict[int, list[list[int]]] = {}
    real = Trainer._optimizer_step

    def step(self: Trainer, batches: Any) -> None:
        seen[self.step + 1] = [batch["row_key"].tolist() for batch in batches]
        real(self, batches)

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    return seen


def leave_out(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The oracle: those steps are not trained at all, but the schedule and the data go on."""
    real = Trainer._optimizer_step

    def step(self: Trainer, batches: Any) -> None:
        if self.step + 1 in steps:
            self.scheduler.step()
            self.step += 1
            self._stats = None
        else:
            real(self, batches)

    monkeypatch.setattr(Trainer, "_optimizer_step", step)


SETTINGS: dict[str, Any] = {
    "train": {"max_steps": 7, "batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3},
    "data": {"pack": False},
}


@pytest.mark.parametrize("what", ["features", "last_hidden"])
@pytest.mark.parametrize("segments", [1, 4])
def test_a_poisoned_row_costs_its_step_and_nothing_else(
    what: str, segments: int, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "cod": {"num_segments": segments}}
    with monkeypatch.context() as patch:
        seen = rows_by_step(patch)
        run(recipe_for(tmp_path / "plain", target, rows, **settings))
    bad = max(seen[2][1])  # a row of the second micro-batch, comes again in each epoch
    steps = {step for step, batches in seen.items() if any(bad in keys for keys in batches)}
    assert len(steps) > 1
    with monkeypatch.context() as patch:
        poison(patch, lambda key: key == bad, what=what)
        run(recipe_for(tmp_path / "poisoned", target, rows, **settings))
    with monkeypatch.context() as patch:
        leave_out(patch, steps)
        run(recipe_for(tmp_path / "without", target, rows, **settings))
    ours, theirs = (drafter(tmp_path / name / "run" / "final") for name in ("poisoned", "without"))
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert not all(torch.equal(ours[n], t) for n, t in drafter(tmp_path / "plain" / "run" / "final").items())
    entries = [json.loads(x) for x in (tmp_path / "poisoned" / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert {e["step"] for e in entries} == steps and all(e["rank"] == 0 and e["what"] == "loss" for e in entries)
    assert len(entries) == len(steps) and all(e["row_key"] == bad for e in entries)
    lines = metrics(tmp_path / "poisoned" / "run")
    assert {x["step"] for x in lines if x["kind"] == "skipped"} == steps
    assert {x["step"] for x in lines if x["kind"] == "train"} == set(range(1, 8)) - steps


def test_a_gradient_alone_that_is_not_finite_is_not_applied_either(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Trainer.accumulate, []

    def accumulate(self: Trainer, batches: Any) -> Any:
        stats = real(self, batches)
        if self.step == 2:
            self.draft.fc.weight.grad[0, 0] = float("inf")
            seen.extend(key for batch in batches for key in batch["row_key"].tolist())
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "accumulate", accumulate)
        run(recipe_for(tmp_path, target, rows, train={"max_steps": 5, "gradient_accumulation_steps": 2}))
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [e["row_key"] for e in entries] == seen and {e["what"] for e in entries} == {"gradient"}
    assert all(t.isfinite().all() for t in drafter(tmp_path / "run" / "final").values())
    with monkeypatch.context() as patch:
        leave_out(patch, {3})
        settings = {"max_steps": 5, "gradient_accumulation_steps": 2}
        run(recipe_for(tmp_path / "without", target, rows, train=settings))
    theirs = drafter(tmp_path / "without" / "run" / "final")
    assert all(torch.equal(drafter(tmp_path / "run" / "final")[n], t) for n, t in theirs.items())


def test_too_many_bad_steps_in_a_row_stop_the_run_with_one_line_and_good_weights(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def is_bad(key: int) -> bool:
        calls.append(key)
        return len(calls) in (2, 4, 5, 6)  # two in a row would do, but the first bad one stands alone

    recipe = recipe_for(tmp_path, target, rows, train={"max_steps": 8, "max_bad_steps": 3, "save_steps": 3})
    with monkeypatch.context() as patch:
        poison(patch, is_bad, float("nan"), "last_hidden")
        run(recipe, code=1)
    message = last_error(capsys)
    output = tmp_path / "run"
    assert "step 6" in message and str(calls[5]) in message and "number 3 in a row" in message
    assert f"in {output / 'checkpoint-6'}" in message and f"--resume {output / 'checkpoint-3'}" in message
    assert all(t.isfinite().all() for t in drafter(output / "checkpoint-6").values())
    run(recipe, "--resume")  # behind the bad rows
    assert [x["step"] for x in metrics(output) if x["kind"] == "train"] == [1, 3, 7, 8]
    with monkeypatch.context() as patch:
        leave_out(patch, {2, 4, 5, 6})
        run(recipe_for(tmp_path / "without", target, rows, train={"max_steps": 8}))
    ours, theirs = drafter(output / "final"), drafter(tmp_path / "without" / "run" / "final")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_the_checkpoint_that_is_offered_is_from_before_the_bad_steps_and_the_last_one_counts_anew(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"max_steps": 9, "max_bad_steps": 3, "save_steps": 1}
    recipe, output, calls = recipe_for(tmp_path, target, rows, train=train), tmp_path / "run", []
    with monkeypatch.context() as patch:
        poison(patch, lambda key: calls.append(key) or len(calls) > 2)
        run(recipe, code=1)
        message = last_error(capsys)
        assert f"in {output / 'checkpoint-5'}" in message and f"--resume {output / 'checkpoint-2'} before" in message
        run(recipe, "--resume", code=1)  # three more are allowed
        assert "in step 8" in last_error(capsys)
    run(recipe, "--resume", str(output / "checkpoint-2"))
    assert [x["step"] for x in metrics(output) if x["kind"] == "train"] == list(range(1, 10))


def test_a_run_with_bad_rows_that_was_stopped_is_the_run_that_was_not(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen = rows_by_step(patch)
        run(recipe_for(tmp_path / "plain", target, rows, **SETTINGS))
    poison(monkeypatch, lambda key: key in (max(seen[2][1]), max(seen[5][0])))
    run(recipe_for(tmp_path / "whole", target, rows, **SETTINGS))
    parts = recipe_for(tmp_path / "parts", target, rows, **SETTINGS)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        run(parts)
    run(parts, "--resume", str(tmp_path / "parts" / "run" / "checkpoint-3"))
    assert_same_run(tmp_path / "parts" / "run", tmp_path / "whole" / "run")
    ours, theirs = ((tmp_path / name / "run" / "bad_rows.jsonl").read_text() for name in ("parts", "whole"))
    assert ours == theirs and len(theirs.splitlines()) > 1


@pytest.mark.parametrize(
    ("at", "more"),
    [(3, {}), (3, {"save_steps": 2, "max_bad_steps": 1}), (4, {"save_steps": 2}), (7, {}), (6, {"eval_steps": 6})],
    ids=["next step", "max_bad_steps", "checkpoint", "final", "best"],
)
def test_a_run_whose_weights_are_no_longer_finite_says_that_it_diverged_and_leaves_none_of_them(
    at: int, more: dict[str, Any], tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, calls = torch.optim.AdamW.step, []

    def overflow(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        result = real(self, *arguments, **options)
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                max((p for group in self.param_groups for p in group["params"]), key=torch.numel)[:] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    train = {"max_steps": 7, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.5, **more}
    run(recipe_for(tmp_path, target, rows, train=train, data={"eval_fraction": 0.3}), code=1)
    message, output = last_error(capsys), tmp_path / "run"
    assert "not finite" in message and "diverged" in message, message
    assert "learning rate of 0.01" in message and "weight_decay 0.5" in message
    assert "rows" not in message and "--resume" not in message and not (output / "bad_rows.jsonl").exists()
    saved = sorted(path.parent.name for path in output.glob("*/model.safetensors"))
    assert saved == (["checkpoint-2"] if more.get("save_steps") else []) and not (output / "final").exists()
    assert all(t.isfinite().all() for name in saved for t in drafter(output / name).values())


def test_no_run_starts_or_resumes_with_weights_that_are_not_finite(
    tmp_path: Path, rows: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(folder: Path, name: str) -> None:
        tensors = drafter(folder)
        tensors[name][-1] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def ruined(folder: Path) -> None:
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        damage(folder, "fc.weight")

    recipe, output = recipe_for(tmp_path, target, rows, train={"max_steps": 3, "save_steps": 1}), tmp_path / "run"
    run(recipe)
    shutil.copytree(output / "checkpoint-2", tmp_path / "whole", ignore=shutil.ignore_patterns("manifest.json"))
    write_checkpoint(output, 2, ruined)
    run(recipe, "--resume", str(output / "checkpoint-2"), code=2)
    message = last_error(capsys)
    assert "checkpoint-2's fc.weight has" in message and "not finite" in message
    damage(output / "final", "norm.weight")
    shutil.copytree(target, tmp_path / "broken")
    damage(tmp_path / "broken", "model.embed_tokens.weight")
    other = f"output.dir={tmp_path / 'other'}"
    run(recipe, other, f"draft.init_from={output / 'final'}", code=2)
    assert "its norm.weight has 1 values that are not finite" in last_error(capsys)
    run(recipe, other, f"target.path={tmp_path / 'broken'}", code=2)
    assert "embed_tokens.weight has 16 values that are not finite" in last_error(capsys)
    assert not (tmp_path / "other").exists()


def test_what_a_bad_step_leaves_in_the_relays_buffers_is_gone_before_the_next_reads_them(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    real = RelayBuffers.forget

    def look_and_forget(self: RelayBuffers) -> None:
        tensors = [tensor for pair in self.keys_values for tensor in pair]
        before = all(tensor.isfinite().all() for tensor in tensors)
        real(self)
        found.append((before, all((tensor == 0).all() for tensor in tensors) and len(tensors) == 4))

    monkeypatch.setattr(RelayBuffers, "forget", look_and_forget)
    poison(monkeypatch, lambda key: True, float("nan"))
    run(recipe_for(tmp_path, target, rows, train={"max_steps": 5, "max_bad_steps": 2}), code=1)
    assert len(found) >= 2 and all(is_zero for _, is_zero in found)
    assert found[0][0] and not any(was_finite for was_finite, _ in found[1:])
