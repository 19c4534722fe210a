"""Started by torchrun: whole runs, one after the other, on the processes of one launch.

python -m torch.distributed.run ... tests/ranks_run.py RUNS.json, which lists [recipe, override or option, ...].
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train.config import Recipe, load_recipe
from peagle_train.core.segments import StepStats
from peagle_train.data.documents import load_documents
from peagle_train.data.packing import PackedRows, pack_documents
from peagle_train.serving.start import make_draft
from peagle_train.training.build import load_target
from peagle_train.training.checkpoint import Checkpoint, open_resume, restore
from peagle_train.training.step import Batch
from peagle_train.training.trainer import Trainer


def make_trainer(recipe: Recipe, accelerator: Accelerator) -> Trainer:
    target = load_target(recipe, accelerator)

    def rows(sources: list[str]) -> PackedRows:
        documents, _ = load_documents(sources, tokenizer=None, vocab_size=target.vocab_size)
        return pack_documents(documents, recipe.data.max_length, recipe.data.pack)[0]

    mask_token_id, draft_vocab_size = recipe.draft.mask_token_id, recipe.draft.draft_vocab_size
    assert mask_token_id is not None and draft_vocab_size is not None
    draft = make_draft(recipe, target, mask_token_id, torch.arange(draft_vocab_size))
    held_out = rows(recipe.data.eval_sources) if recipe.data.eval_sources else pack_documents([], recipe.data.max_length)[0]
    return Trainer(recipe, accelerator, target, draft, rows(recipe.data.sources), held_out)


def run(accelerator: Accelerator, recipe_path: str, *arguments: str) -> None:
    """A whole run; `--stop-behind=STEP` as a signal to the last rank stops it, and `--resume`."""
    options = [argument for argument in arguments if argument.startswith("--")]
    recipe = load_recipe(recipe_path, [argument for argument in arguments if argument not in options])
    checkpoint = open_resume(recipe, "") if "--resume" in options else None
    trainer = make_trainer(recipe, accelerator)
    if checkpoint is not None:
        assert isinstance(checkpoint, Checkpoint), checkpoint
        restore(trainer, checkpoint)
    for option in options:
        if option.startswith("--stop-behind=") and accelerator.process_index == accelerator.num_processes - 1:
            stop_behind(trainer, int(option.partition("=")[2]))
    summary = trainer.run()
    assert summary.get("signal") == ("SIGTERM" if summary["state"] == "stopped" else None)  # on every rank


def stop_behind(trainer: Trainer, step: int) -> None:
    accumulate = trainer.accumulate

    def signalled(batches: list[Batch]) -> StepStats:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(batches)

    trainer.accumulate = signalled  # type: ignore[method-assign]


if __name__ == "__main__":
    accelerator = Accelerator()
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        run(accelerator, *arguments)
    accelerator.end_training()
