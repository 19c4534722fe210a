"""Started by torchrun: one optimizer step's gradients, summed over ranks, written by rank 0.

python -m torch.distributed.run ... tests/distributed_run.py RECIPE OUT
"""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from peagle_train.build import make_draft
from peagle_train.data import PackedRows, pack_documents
from peagle_train.recipe import load_recipe
from peagle_train.sources import load_documents
from peagle_train.target import FrozenTarget
from peagle_train.trainer import Trainer


def gradients(recipe_path: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    recipe = load_recipe(recipe_path, overrides)
    accelerator = Accelerator()
    target = FrozenTarget.load(recipe.target.path, dtype=recipe.target.dtype, device=accelerator.device)
    documents, _ = load_documents(recipe.data.sources, tokenizer=None, vocab_size=target.vocab_size)
    rows, _ = pack_documents(documents, recipe.data.max_length, recipe.data.pack)
    mask_token_id, draft_vocab_size = recipe.draft.mask_token_id, recipe.draft.draft_vocab_size
    assert mask_token_id is not None and draft_vocab_size is not None
    draft = make_draft(recipe, target, mask_token_id, torch.arange(draft_vocab_size))
    trainer = Trainer(recipe, accelerator, target, draft, rows, PackedRows([], []))
    trainer.accumulate(next(trainer._steps()))
    out = {n: p.grad for n, p in trainer.draft.named_parameters() if p.requires_grad and p.grad is not None}
    accelerator.end_training()
    return {name: grad.contiguous() for name, grad in out.items()}


if __name__ == "__main__":
    found = gradients(sys.argv[1], sys.argv[3:])
    import os

    if os.environ.get("RANK", "0") == "0":
        save_file(found, sys.argv[2])
