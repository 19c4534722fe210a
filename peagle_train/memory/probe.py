"""One full-length step before the first one, and away with it: what fits here fits for the whole run.

Shapes are the same for every batch (on CUDA they are static), so a row that is full, supervised throughout and as long as
rows get needs all that any step can need. Nothing of the run changes: no weight, no optimizer state, no generator, no file.
"""

import math
import resource
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peagle_train.memory.memory_plan import GIB
from peagle_train.memory.memory_sizes import available_ram, resident_ram
from peagle_train.target.cached_target import CachedTarget
from peagle_train.target.frozen import FrozenTarget
from peagle_train.training.sharded import clip_gradients

if TYPE_CHECKING:
    from peagle_train.training.trainer import Trainer


def probe_step(trainer: "Trainer") -> str:
    """Run it, on every rank at once; returns the line that says what it took here.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device, optimizer = trainer.device, trainer.optimizer
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _run_target_packed(trainer)
    # AdamW's state is there in every step but the first; in a run that goes on, it is there already.
    states = [torch.zeros_like(p) for p in trainer.trained if not optimizer.state.get(p) for _ in range(2)]
    batch = full_batch(trainer)
    try:
        trainer.accumulate([batch] * min(2, trainer.recipe.train.gradient_accumulation_steps))
        clip_gradients(trainer.trained, math.inf)
    finally:
        del states, batch
        optimizer.zero_grad(set_to_none=True)
    return _line(device)


def full_batch(trainer: "Trainer") -> dict[str, Tensor]:
    """A batch, on the host, of rows as long and with as many elements as any can have."""
    recipe, target = trainer.recipe, trainer.target
    L, generator = recipe.data.max_length, torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size - 1, (L,), generator=generator)
    ids += ids >= trainer.draft.mask_token_id  # which no sequence may hold
    row: dict[str, Any] = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "row_key": 0, "epoch": 0}
    if isinstance(target, CachedTarget):
        dtype = target.cache.dtype
        row["features"] = torch.zeros(L, 3 * target.hidden_size, dtype=dtype)
        row["last_hidden"] = torch.zeros(L, target.hidden_size, dtype=dtype)
    return trainer.collator([row] * recipe.train.batch_size)


def _run_target_packed(trainer: "Trainer") -> None:
    """Rows of several documents may take a mask of L x L, which a document alone does without."""
    if not isinstance(trainer.target, FrozenTarget):
        return
    B, L = trainer.recipe.train.batch_size, trainer.recipe.data.max_length
    position = torch.cat([torch.arange(L - L // 2), torch.arange(L // 2)])[None].expand(B, -1)
    trainer.target.features(torch.zeros(B, L, dtype=torch.int64), position.contiguous())


def _line(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What lies outside of the allocator (CUDA's context, other processes), and the most that it ever held.
        peak = total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = available_ram() + resident_ram()
    return f"fits: peak {peak / GIB:.2f} of {total / GIB:.2f} GiB in a full-length step (train.probe)"
