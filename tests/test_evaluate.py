"""A trainer without its run: evaluation never needs more memory than training; a reader that left."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import Accelerator

from peagle_train.config import load_recipe
from peagle_train.training.trainer import Trainer
from tests.helpers import LiveBytes, calls_of
from tests.ranks_run import make_trainer
from tests.tiny import write_recipe, write_rows

LENGTHS = [64, 60, 3, 33, 64]


def trainer_of(folder: Path, target: Path, **sections: Any) -> Trainer:
    rows = write_rows(folder / "rows.jsonl", LENGTHS)
    recipe = load_recipe(write_recipe(folder, target, rows, folder / "run", **sections))
    return make_trainer(recipe, Accelerator(cpu=True))


def test_a_reader_that_has_seen_enough_ends_a_run_as_it_ends_any_command(tmp_path, tiny_target):
    with pytest.raises(BrokenPipeError):
        trainer_of(tmp_path, tiny_target).on_main("it", Mock(side_effect=BrokenPipeError))


@pytest.mark.parametrize("mode", ["relay", "recompute"])
def test_evaluation_has_no_larger_pass_or_tensor_than_training_and_holds_no_more(mode, tmp_path, tiny_target):
    held_out = write_rows(tmp_path / "held_out.jsonl", LENGTHS, seed=1)
    data = {"eval_sources": [str(held_out)], "max_length": 64}
    trainer = trainer_of(tmp_path, tiny_target, cod={"num_segments": 6}, data=data, train={"segment_mode": mode})
    with calls_of(trainer.draft) as trained, LiveBytes() as training:
        for batches in trainer.steps():
            trainer.accumulate(batches)
    with calls_of(trainer.draft) as passes, LiveBytes() as evaluating:
        values = trainer.evaluator()
    assert values is not None and sum(values["supervised"]) > 0
    # The draws differ, so that a segment may hold some more elements of one than of the other, up to the capacity.
    assert max(passes) <= max(trainer.collator.capacity, *trained) and len(passes) <= len(trained)
    assert evaluating.peak <= training.peak and evaluating.largest <= training.largest
    if mode == "relay":
        assert max(passes) < 64
