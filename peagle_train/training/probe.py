"""Whether a step fits into memory, tried before the run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import Recipe
from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.distributed import clip_gradients
from peagle_train.machine import GIB, available_ram, peak_ram, resident_ram
from peagle_train.target_model.frozen import TargetBase


def probe_step(
    recipe: Recipe,
    target: TargetBase,
    draft: PEagleDraft,
    collator: CODCollator,
    optimizers: list[torch.optim.Optimizer],
    accumulate: Callable[[list[dict[str, Tensor]]], object],
) -> str:
    """Run one step on every rank and undo it; returns the line that says what it took on this rank.

    Sequences that are full, supervised throughout and as long as they get need all that any step can need. No weight, no
    optimizer state, no generator and no file changes. `accumulate`: leaves an optimizer step's gradients, given its
    micro-batches. torch.OutOfMemoryError: it does not fit, and nor would the run.
    """
    device, B, L = draft.device, recipe.train.batch_size, recipe.data.max_length
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(target.vocab_size - 1, (L,), generator=torch.Generator().manual_seed(0))
    ids += ids >= draft.mask_token_id  # which no sequence may hold
    row: dict[str, Any] = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "row_key": 0, "epoch": 0}
    if not recipe.target.cache and not recipe.target.server:
        # Sequences of several documents may take a mask of L x L, which a document alone does without.
        position = torch.cat([torch.arange(L - L // 2), torch.arange(L // 2)])
        packed = {"input_ids": ids.expand(B, -1), "position_ids": position.expand(B, -1).contiguous()}
        target.outputs(packed, draft.lm_head.weight)
    # States, AdamW's two and Muon's one, are there in all later steps; in a resumed run, already.
    parameters = [(o, p) for o in optimizers for group in o.param_groups for p in group["params"] if not o.state.get(p)]
    states: list[Tensor] = []
    for optimizer, parameter in parameters:
        states += [torch.zeros_like(parameter) for _ in range(1 + isinstance(optimizer, torch.optim.AdamW))]
    batch = collator([row] * B)
    try:
        accumulate([batch] * min(2, recipe.train.gradient_accumulation_steps))
        clip_gradients([p for p in draft.parameters() if p.requires_grad], math.inf)
    finally:
        del states, batch
        draft.zero_grad()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What lies outside of the allocator (CUDA's context, other processes), and the most that it ever held.
        peak = total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak, total = peak_ram(), available_ram() + resident_ram()
    return f"fits: peak {peak / GIB:.2f} of {total / GIB:.2f} GiB in a full-length step (train.probe)"
