"""What several processes must agree on: how they were launched, the sum of gradients, the number of passes."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

LAUNCH_CPU = "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {n} -m peagle_train RECIPE"


def check_launch(num_processes: int) -> None:
    """ValueError where a launch meant several processes but each one would train alone, silently."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked > 1 and num_processes == 1:
        raise ValueError(
            f"launched as {asked} processes, but each believes that it is alone and would train the same model: on CPU"
            f" start it as `{LAUNCH_CPU.format(n=asked)}`"
        )
    # `accelerate launch --cpu --num_processes 2` names a master, starts a single process and says nothing.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and num_processes == 1:
        raise ValueError(
            "launched with several processes asked for, but `accelerate launch --cpu` starts only one: start it as"
            f" `{LAUNCH_CPU.format(n=2)}`"
        )


def check_device(device: torch.device) -> None:
    """ValueError for a kind of device whose attention nobody has tried."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"the device is {device.type}; only cpu and cuda are supported: set ACCELERATE_USE_CPU=true to run on the CPU"
        )


def check_device_map(device_map: str | None, num_processes: int) -> None:
    """ValueError where several processes would each spread a target over the same devices."""
    if device_map and num_processes > 1:
        raise ValueError(
            f"target.device_map is {device_map} and there are {num_processes} processes: it spreads the target over the"
            " devices that one process sees; start a single one, or use target.shard"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module's parameters."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


@torch.no_grad()
def same_on_all_ranks(model: nn.Module, device: torch.device) -> None:
    """Give every rank the parameters and buffers of rank 0; a tensor at a time is on the device, where collectives work."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            moved = tensor.detach().to(device)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)


@torch.no_grad()
def sum_over_ranks(parameters: Iterable[nn.Parameter], also: list[Tensor]) -> None:
    """Add up gradients (zeros where there is none) and a few statistics over all ranks, in place, a dtype at a time.

    A plain sum: the loss is already divided by the count over all ranks. Parameters must come in the same order on every
    rank; which of them have a gradient may differ (a rank with nothing supervised has none).
    """
    tensors = list(also)
    for parameter in parameters:
        if parameter.grad is None:  # alone, too: without a gradient the optimizer would leave out this step's decay
            parameter.grad = torch.zeros_like(parameter)
        tensors.append(parameter.grad)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_counts(counts: list[int], device: torch.device) -> Tensor:
    """int64 tensor of the counts, summed over ranks; stays on the device."""
    total = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def max_counts(counts: list[int], device: torch.device) -> list[int]:
    """The largest of each count over ranks, on the host. Only sharded drafters need it: it waits for the device."""
    largest = torch.tensor(counts, dtype=torch.int64, device=device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()
