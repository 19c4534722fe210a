"""What a run is made of beside its files: weights, optimizer, schedule and generators as plain tensors and JSON, and back.

`collect_*` may be collective: every rank calls them, the main process writes what they return. Tensors sharded by FSDP2
are saved whole and shared out again (`whole`, `like`).
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
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full (a collective call), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A copy of a whole tensor with the dtype, the device and the sharding of `reference`."""
    if hasattr(reference, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        moved = tensor.to(reference.device, reference.dtype)
        return distribute_tensor(moved, reference.device_mesh, reference.placements)  # type: ignore[attr-defined]
    return torch.empty_like(reference).copy_(tensor)  # a copy: the file may be removed while the run goes on


def load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


# ---- weights and optimizer


def load_weights(draft: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Parameters and buffers in place; ValueError if names or shapes differ."""
    own = draft.state_dict()
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"the checkpoint's drafter has other tensors than this one: {', '.join(differing[:4])}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{list(tensors[name].shape)}, not {list(tensor.shape)}"
                raise ValueError(f"the checkpoint's {name} has the shape {shapes}")
            tensor.copy_(like(tensors[name], tensor))


def collect_optimizer(draft: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `<exp_avg | exp_avg_sq | step>.<parameter name>`; parameters without one are left out."""
    tensors = {}
    for name, parameter in draft.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert key in MOMENTS, key
            tensors[f"{key}.{name}"] = whole(value)
    return tensors


def load_optimizer(draft: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """What `collect_optimizer` gave, by name; ValueError for a name that the drafter does not train."""
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in trained or key not in MOMENTS:
            raise ValueError(f"the checkpoint's optimizer has a state of {full_name}, which is not trained here")
        parameter = trained[name]
        optimizer.state[parameter][key] = tensor.clone() if key == "step" else like(tensor, parameter)


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
