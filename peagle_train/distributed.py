"""Several processes as one run: how they were launched, what they wait for, what they sum, and FSDP2.

A step's collectives run in the default group, whose time-out is minutes. Waiting that may take longer (loading,
tokenizing, saving) goes over a gloo group on the host that never times out.

FSDP2 is the same raw `fully_shard` on GPUs and on CPUs, where Accelerate's own silently becomes data parallelism. Saving
and loading take whole tensors by name, so that a run may resume on any number of processes, sharded or not.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")

# The launch


def check_launch(num_processes: int) -> None:
    """ValueError where a launch meant several processes but each one would train alone, silently. Every rank calls it."""
    asked = int(os.environ.get("WORLD_SIZE", "0"))
    # `accelerate launch --cpu --num_processes 2` names a master and starts a single process.
    if num_processes == 1 and (asked > 1 or ("MASTER_ADDR" in os.environ and not asked)):
        start = f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {max(2, asked)} -m peagle_train RECIPE"
        what = f"launched as {asked if asked > 1 else 'several'} processes, but this one is alone"
        raise ValueError(f"{what}: on CPU start them as `{start}`")
    if several():
        _host_group()  # now, while the processes have just met: its own start has a time-out


def check_device(device: torch.device) -> None:
    """ValueError for a kind of device that attention was never run on."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device is {device.type}, neither cpu nor cuda: set ACCELERATE_USE_CPU=true")


REFUSED = {
    "fsdp_version": "1",
    "fsdp_offload_params": "true",
    "fsdp_reshard_after_forward": "false",
    "fsdp_activation_checkpointing": "true",  # train.activation_checkpointing does it
    # transformers acts on it without a word: the target's weights stay empty on all processes of a machine but one
    "fsdp_cpu_ram_efficient_loading": "true",
}
"""What a launch's FSDP config may ask for and would not get, or must not: key and value."""


def check_sharding(asked: str) -> bool:
    """Whether train.sharding (`asked`) or the launch ask for FSDP2; ValueError where they contradict, or for `REFUSED`."""
    by_launch = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if by_launch and asked == "none":
        remedy = "set it to auto or fsdp2, or launch with recipes/accelerate/ddp.yaml"
        raise ValueError(f"train.sharding is none, but the run was launched with an FSDP config: {remedy}")
    for key, value in REFUSED.items() if by_launch else ():
        if os.environ.get(key.upper(), "").lower() == value:
            raise ValueError(f"the launch has {key}: {value}, unsupported: take recipes/accelerate/fsdp2.yaml")
    return by_launch or asked == "fsdp2"


# Waiting


def several() -> bool:
    """Whether there are several processes that have met."""
    return dist.is_initialized() and dist.get_world_size() > 1


@lru_cache
def _host_group() -> dist.ProcessGroup:
    """All ranks, on the host and without a time-out; the first call is a collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def from_all(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank, once all are here, however long that takes."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def wait_for_all() -> None:
    from_all(None)


def agree(values: dict[str, Any]) -> None:
    """Wait for all ranks; ValueError where a value, by the words for it, is not that of rank 0."""
    for what, value in from_all(values)[0].items():
        if value != values[what]:
            raise ValueError(f"{what}: not the same as on rank 0: give all machines the same recipe, files and target")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """The processes of a machine run what is inside one after the other; all ranks enter and leave together."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    for turn in range(1 + max(from_all(own))):  # LOCAL_WORLD_SIZE is torchrun's alone
        if turn == own:
            yield
        wait_for_all()


# Sums


@torch.no_grad()
def same_on_all_ranks(model: nn.Module, device: torch.device) -> None:
    """Give every rank the parameters and buffers of rank 0, a tensor at a time on the device, where collectives work."""
    if several():
        for tensor in [*model.parameters(), *model.buffers()]:
            moved = tensor.detach().to(device)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)


@torch.no_grad()
def sum_over_ranks(parameters: Iterable[nn.Parameter], also: list[Tensor]) -> None:
    """Add up gradients (zeros where a rank has none) and a few statistics over all ranks, in place, a dtype at a time: a
    plain sum, as the loss is already divided by the count over all ranks.
    """
    tensors = list(also)
    for parameter in parameters:
        if parameter.grad is None:  # on one process, too: without a gradient the optimizer would skip this step's decay
            parameter.grad = torch.zeros_like(parameter)
        tensors.append(parameter.grad)
    for dtype in sorted({t.dtype for t in tensors}, key=str) if several() else ():
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def counts_over_ranks(counts: list[int], device: torch.device, largest: bool = False) -> Tensor:
    """int64 tensor of each count's sum (or its `largest`) over ranks; it stays on the device, and reading it waits."""
    found = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    if several():
        dist.all_reduce(found, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return found


# FSDP2


@lru_cache
def world_mesh(device_type: str) -> DeviceMesh:
    """All ranks in a row; the first call is a collective."""
    return init_device_mesh(device_type, (dist.get_world_size(),))


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, bf16: bool = False) -> None:
    """Shard a module over all ranks, in place, and move it to the device, a block at a time. Every rank must hold the same
    weights already, and from now on run the same number of forward and backward passes: else FSDP's collectives deadlock.

    bf16: gather weights in bfloat16, as autocast rounds them; gradients are still summed in float32.
    """
    # It warns of changing a module's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    gathered, summed = (torch.bfloat16, torch.float32) if bf16 else (None, None)
    precision = MixedPrecisionPolicy(gathered, summed, cast_forward_inputs=False)
    # The root too: by default it would stay whole after a forward, with stale weights in `parameters()`.
    for module in [*blocks, model]:
        fully_shard(module, mesh=world_mesh(device.type), reshard_after_forward=True, mp_policy=precision)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor of everything; every rank must call it where the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to the norm `limit` (inf: leave them); returns the norm before, over all shards, as a scalar."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whole, on the CPU of rank 0; {} on the others. Every rank must call it."""
    return dcp.get_model_state_dict(model, options=WHOLE)  # type: ignore[return-value]


def full_moments(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' states as KIND.PARAMETER (exp_avg.fc.weight, ...), like `full_weights`; {} before a step."""
    if not optimizers[0].state:  # torch would make a step in order to have one
        return {}
    states: Any = dcp.get_optimizer_state_dict(model, optimizers, options=WHOLE).get("state", {})
    return {f"{kind}.{name}": value for name, state in states.items() for kind, value in state.items()}


def load_full(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    """Put all of what `full_weights` and `full_moments` gave into model and optimizers, sharded or not."""
    options = dcp.StateDictOptions(full_state_dict=True)
    if moments:
        states: dict[str, Any] = {}
        for key, value in moments.items():
            kind, _, name = key.partition(".")
            states.setdefault(name, {})[kind] = value.clone()
        # torch makes a step at rate 0 here, to have a state that it can fill; the weights come after it
        groups = dcp.get_optimizer_state_dict(model, optimizers)["param_groups"]
        dcp.set_optimizer_state_dict(model, optimizers, {"state": states, "param_groups": groups}, options=options)
    dcp.set_model_state_dict(model, dict(weights), options=options)
