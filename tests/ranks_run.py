"""Started by torchrun: whole runs, one after the other, on the processes of one launch.

python -m torch.distributed.run ... tests/ranks_run.py RUNS.json, which lists [recipe, override, override, ...].
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train import peers
from peagle_train.build import make_draft
from peagle_train.data import PackedRows, pack_documents
from peagle_train.recipe import Recipe, load_recipe
from peagle_train.sources import load_documents
from peagle_train.train import load_target
from peagle_train.trainer import Trainer


def make_trainer(recipe: Recipe, accelerator: Accelerator) -> Trainer:
    target = load_target(recipe, accelerator)

    def rows(sources: list[str]) -> PackedRows:
        documents, _ = load_documents(sources, tokenizer=None, vocab_size=target.vocab_size)
        return pack_documents(documents, recipe.data.max_length, recipe.data.pack)[0]

    mask_token_id, draft_vocab_size = recipe.draft.mask_token_id, recipe.draft.draft_vocab_size
    assert mask_token_id is not None and draft_vocab_size is not None
    draft = make_draft(recipe, target, mask_token_id, torch.arange(draft_vocab_size))
    held_out = rows(recipe.data.eval_sources) if recipe.data.eval_sources else PackedRows([], [])
    return Trainer(recipe, accelerator, target, draft, rows(recipe.data.sources), held_out)


if __name__ == "__main__":
    accelerator = Accelerator()
    peers.connect()
    for recipe_path, *overrides in json.loads(Path(sys.argv[1]).read_text()):
        make_trainer(load_recipe(recipe_path, overrides), accelerator).run()
    accelerator.end_training()
