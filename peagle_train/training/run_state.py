"""What a run is made of beside its files, its weights and its optimizer (`sharded.py`): schedule and generators as plain
tensors and JSON, and back.

`collect_rng` is collective: every rank calls it, the main process writes what it returns.
"""

import hashlib
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


# ---- schedule


def schedule_at(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> list[float]:
    """Each parameter group's learning rate in the step behind `step`."""
    factors = scheduler.lr_lambdas  # type: ignore[attr-defined]
    return [base * factor(step) for base, factor in zip(scheduler.base_lrs, factors, strict=True)]


def set_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> None:
    """Put the schedule behind `step` steps, as if it had gone there."""
    rates = schedule_at(scheduler, step)
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, list(rates)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---- generators

# Nothing of a run draws from the global generators; they are kept for what a target's own code may do with them.


def collect_rng(rank: int, world_size: int) -> dict[str, Tensor]:
    """Every rank's global generators, uint8 (Python's int64), as `<cpu | cuda | python>.<rank>`."""
    own = {"cpu": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    all_ranks: list[Any] = [own]
    if world_size > 1:
        all_ranks = [None] * world_size
        dist.all_gather_object(all_ranks, own)
    return {f"{kind}.{r}": state for r, states in enumerate(all_ranks) for kind, state in states.items()}


def set_rng(tensors: Mapping[str, Tensor], rank: int) -> None:
    """This rank's generators, where the checkpoint has them."""
    if f"cpu.{rank}" in tensors:
        torch.set_rng_state(tensors[f"cpu.{rank}"].clone())
    if f"python.{rank}" in tensors:
        version, _, gauss = random.getstate()
        random.setstate((version, tuple(tensors[f"python.{rank}"].tolist()), gauss))
    if f"cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"cuda.{rank}"].clone())


# ---- what must be the same when a run goes on


def versions() -> dict[str, str]:
    import accelerate
    import transformers

    import peagle_train

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "peagle_train": peagle_train.__version__,
    }


def fingerprint(tensor: Tensor) -> str:
    """sha256 of dtype, shape and up to 64 first rows."""
    sample = tensor[:64].detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{tensor.dtype},{tuple(tensor.shape)}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
