"""Evaluation never needs more memory than training, and covers every held-out row once."""

import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peagle_train.config import load_recipe
from peagle_train.files import RunStopped
from peagle_train.training.trainer import Trainer
from tests.ranks_run import make_trainer
from tests.tiny import write_recipe, write_rows

LENGTHS = [64, 60, 3, 33, 64]


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def trainer_of(folder: Path, target: Path, **sections: Any) -> Trainer:
    rows = write_rows(folder / "rows.jsonl", LENGTHS)
    recipe = load_recipe(write_recipe(folder, target, rows, folder / "run", **sections))
    return make_trainer(recipe, Accelerator(cpu=True))


def test_steps_that_are_asked_for_anew_begin_where_the_run_is(tmp_path, tiny_target):
    trainer = trainer_of(tmp_path, tiny_target)
    first, again = (next(trainer.steps())[0]["row_key"].tolist() for _ in range(2))
    assert first == again and trainer.following, "what was ahead of the first step is forgotten"


def test_a_reader_that_has_seen_enough_ends_a_run_as_it_ends_any_command_and_a_full_disk_by_a_line(
    tmp_path, tiny_target
):
    trainer = trainer_of(tmp_path, tiny_target)
    for error, ends, said in (
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), BrokenPipeError, "Broken pipe"),
        (OSError(errno.ENOSPC, "No space left"), RunStopped, "it could not be written.*No space left"),
    ):
        with pytest.raises(ends, match=said):
            trainer.on_main("it", Mock(side_effect=error))


@pytest.mark.parametrize("mode", ["relay", "recompute"])
def test_evaluation_has_no_larger_pass_and_no_larger_tensor_than_training(mode, tmp_path, tiny_target):
    held_out = write_rows(tmp_path / "held_out.jsonl", LENGTHS, seed=1)
    data = {"eval_sources": [str(held_out)], "max_length": 64}
    trainer = trainer_of(tmp_path, tiny_target, cod={"num_segments": 6}, data=data, train={"segment_mode": mode})
    passes: list[tuple[int, int]] = []  # elements and context columns of each forward of the drafter
    forward = trainer.draft.forward

    def counted(token: torch.Tensor, *arguments: Any, context: Any = None, **keywords: Any) -> Any:
        passes.append((token.shape[1], context[0][0].shape[2] if context else 0))
        return forward(token, *arguments, context=context, **keywords)

    trainer.draft.forward = counted  # type: ignore[method-assign, assignment]
    with LargestTensor() as training:
        for batches in trainer.steps():
            trainer.accumulate(batches)
    trained, passes[:] = list(passes), []
    with LargestTensor() as evaluating:
        values = trainer.evaluator()
    assert values is not None and sum(values["supervised"]) > 0
    # The draws differ, so that a segment may hold some more elements of one than of the other, up to the capacity.
    most = max(trainer.collator.capacity, max(n for n, _ in trained))
    assert max(n for n, _ in passes) <= most and len(passes) <= len(trained)
    assert max(columns for _, columns in passes) <= max(columns for _, columns in trained)
    assert evaluating.numel <= training.numel
    if mode == "relay":
        assert most < 64
