"""A step that is not finite is not applied: its sequences are logged and the run continues, unless there are too many."""

import shutil
from itertools import count
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peagle_train import distributed
from peagle_train.distributed import clip_gradients
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.trainer import Trainer
from tests.runs import assert_same_run, drafter, last_error, lines, run, same_tensors, stopped


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Any, value: float = float("inf"), what: str = "features") -> None:
    """Have the target give something that is not finite for sequences whose key is bad."""
    outputs = FrozenTarget.outputs

    def poisoned(self: FrozenTarget, batch: Any, head_rows: Any) -> Any:
        result = outputs(self, batch, head_rows)
        for i, key in enumerate(batch["row_key"].tolist()):
            if is_bad(key):
                getattr(result, what)[i] = value
        return result

    monkeypatch.setattr(FrozenTarget, "outputs", poisoned)


def without(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The oracle: the optimizer has no such steps, but the schedule and the data move on."""
    step, real = count(1), torch.optim.AdamW.step

    def step_or_not(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        return None if next(step) in steps else real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_or_not)


SETTINGS: dict[str, Any] = {
    "train": {"max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3},
    "data": {"pack": False},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny):
    """An undisturbed run's final drafter, and each step's keys by micro-batch."""
    folder, seen, real = tmp_path_factory.mktemp("plain"), {}, Trainer.take_step

    def step(self: Trainer, batches: Any) -> Any:
        seen[self.step + 1] = [batch["row_key"].tolist() for batch in batches]
        return real(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", step)
        run(tiny(folder, **SETTINGS))
    return drafter(folder / "run" / "final"), seen


def test_a_poisoned_sequence_costs_its_step_and_nothing_else_and_a_resumed_run_the_same(
    tmp_path, tiny, plain, monkeypatch
):
    settings = {**SETTINGS, "cod": {"num_segments": 4}}
    bad = max(plain[1][2][1])  # of the second micro-batch, comes again in each epoch
    steps = {step for step, batches in plain[1].items() if any(bad in keys for keys in batches)}
    assert len(steps) > 1
    with monkeypatch.context() as patch:
        poison(patch, lambda key: key == bad)
        run(tiny(tmp_path / "poisoned", **settings))
        parts = tiny(tmp_path / "parts", **settings)
        stopped(parts, 4, patch)
        run(parts, "--resume", str(tmp_path / "parts" / "run" / "checkpoint-3"))
        assert_same_run(tmp_path / "parts" / "run", tmp_path / "poisoned" / "run")
    with monkeypatch.context() as patch:
        without(patch, steps)
        run(tiny(tmp_path / "without", **settings))
    ours, theirs = (drafter(tmp_path / name / "run" / "final") for name in ("poisoned", "without"))
    assert same_tensors(ours, theirs) and not same_tensors(ours, plain[0])
    found = {line["step"]: line["sequences"] for line in lines(tmp_path / "poisoned" / "run", "skipped")}
    assert found == {s: [k for keys in plain[1][s] for k in keys if k] for s in steps}
    assert {line["step"] for line in lines(tmp_path / "poisoned" / "run", "train")} == set(range(1, 7)) - steps


def test_a_gradient_alone_that_is_not_finite_is_not_applied_either(tmp_path, tiny, plain, monkeypatch):
    step = count(1)

    def spoil_and_clip(parameters: Any, limit: float) -> torch.Tensor:
        if next(step) == 3:
            parameters[0].grad.view(-1)[0] = float("inf")
        return clip_gradients(parameters, limit)

    monkeypatch.setattr(distributed, "clip_gradients", spoil_and_clip)
    run(tiny(tmp_path, **SETTINGS))
    [found] = lines(tmp_path / "run", "skipped")
    assert found["sequences"] == [key for keys in plain[1][3] for key in keys if key]
    assert all(t.isfinite().all() for t in drafter(tmp_path / "run" / "final").values())


def test_too_many_bad_steps_in_a_row_stop_the_run_with_one_line_and_good_weights(tmp_path, tiny, monkeypatch, capsys):
    calls = []

    def is_bad(key: int) -> bool:
        calls.append(key)
        return len(calls) in (2, 4, 5)  # two in a row would do, but the first bad one stands alone

    train = {"max_steps": 7, "max_bad_steps": 2, "save_steps": 1}
    recipe, output = tiny(tmp_path, train=train), tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, is_bad, float("nan"), "last_hidden")
        run(recipe, code=1)
    message = last_error(capsys)
    assert "step 5" in message and str(calls[4]) in message and "number 2 in a row" in message
    # offered: one from before the bad steps, not that of the first of them
    assert f"in {output / 'checkpoint-5'}" in message and "a checkpoint of step 3 or earlier" in message
    assert all(t.isfinite().all() for t in drafter(output / "checkpoint-5").values())
    with monkeypatch.context() as patch:
        poison(patch, lambda key: True)
        run(recipe, "--resume", code=1)  # counts from 0: two more are allowed
        assert "step 7/7" in last_error(capsys)
    run(recipe, "--resume", str(output / "checkpoint-5"))
    assert [line["step"] for line in lines(output, "train")] == [1, 3, 6, 7]
    run(recipe, "--resume", str(output / "checkpoint-3"))
    assert [line["step"] for line in lines(output, "train")] == [1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("at", "more"), [(4, {"save_steps": 2}), (6, {}), (5, {"eval_steps": 5})], ids=["checkpoint", "final", "best"]
)
def test_a_run_whose_weights_are_no_longer_finite_says_that_it_diverged_and_leaves_none_of_them(
    at, more, tmp_path, tiny, monkeypatch, capsys
):
    real, step = torch.optim.AdamW.step, count(1)

    def overflow(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        result = real(self, *arguments, **options)
        if next(step) == at:
            with torch.no_grad():
                max((p for group in self.param_groups for p in group["params"]), key=torch.numel)[:] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    train = {"max_steps": 6, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.5, **more}
    run(tiny(tmp_path, train=train, data={"eval_fraction": 0.3}), code=1)
    message, output = last_error(capsys), tmp_path / "run"
    assert "not finite" in message and "diverged at train.learning_rate 0.01" in message and "--resume" not in message
    saved = sorted(path.parent.name for path in output.glob("*/model.safetensors"))
    assert saved == (["checkpoint-2"] if more.get("save_steps") else []) and not (output / "final").exists()
    assert all(t.isfinite().all() for name in saved for t in drafter(output / name).values())


def test_no_run_starts_with_weights_that_are_not_finite(tmp_path, tiny, tiny_target, capsys):
    shutil.copytree(tiny_target, tmp_path / "broken")
    tensors = drafter(tiny_target)
    tensors["model.embed_tokens.weight"][-1] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    run(tiny(tmp_path), f"target.path={tmp_path / 'broken'}", code=2)
    assert "embed_tokens.weight has 16 values that are not finite" in last_error(capsys)
    assert not (tmp_path / "run").exists()
