"""FSDP2: which runs are sharded, how, and how what is sharded becomes whole again, by parameter name.

The same raw `fully_shard` on GPUs and on CPUs: Accelerate's own FSDP2 becomes data parallelism on CPUs, silently; what a
launch's FSDP config asks for is read here. Nothing needs `register_fsdp_forward_method`: the drafter's loss is computed
inside its forward, and of the target only the forward of what is sharded runs.

What is gathered here works on plain parameters, too, so that saving and resuming are the same code for every run, and a
state that was saved from any number of ranks, sharded or not, can be put on any other.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)

LAUNCH_REFUSED = (
    ("FSDP_VERSION", "1", "fsdp_version", "set it to 2"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params", "it is unsupported, set it to false"),
    ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward", "it is unsupported, set it to true"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "true",
        "fsdp_activation_checkpointing",
        "set it to false, and train.activation_checkpointing to true",
    ),
    (
        "FSDP_CPU_RAM_EFFICIENT_LOADING",  # transformers acts on it without a word
        "true",
        "fsdp_cpu_ram_efficient_loading",
        "it would leave the target's weights empty on all processes of a machine but one, set it to false",
    ),
)
"""Of a launch's environment: variable, the value that is refused, the config's key, what to do."""


def check_sharding(asked: str, launched: DistributedType) -> bool:
    """Whether recipe (`asked`: train.sharding) or launch ask for FSDP2.

    Raises:
        ValueError: they contradict each other, or the launch's FSDP config asks for what is not done here.
    """
    by_launch = launched == DistributedType.FSDP
    by_launch |= os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # all that is left of it on CPUs
    if by_launch:
        for variable, refused, key, advice in LAUNCH_REFUSED:
            if os.environ.get(variable, "").lower() == refused:
                raise ValueError(
                    f"the launch's FSDP config has {key}: {refused}: {advice} (see recipes/accelerate/fsdp2.yaml)"
                )
    if by_launch and asked == "none":
        raise ValueError(
            "train.sharding is none, but the run was launched with an FSDP config: set it to auto or fsdp2, or launch with"
            " recipes/accelerate/ddp.yaml"
        )
    return by_launch or asked == "fsdp2"


def wants_sharding(asked: str, accelerator: Accelerator) -> bool:
    """Whether the drafter is to be sharded: `check_sharding`, and there are several processes."""
    wanted = check_sharding(asked, accelerator.distributed_type)
    if wanted and accelerator.num_processes == 1:
        logger.warning("FSDP2 was asked for, but there is a single process: the drafter stays whole")
    return wanted and accelerator.num_processes > 1


@lru_cache
def world_mesh(device_type: str) -> DeviceMesh:
    """All ranks in a row; the first call is a collective."""
    return init_device_mesh(device_type, (dist.get_world_size(),))


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, bf16: bool = False) -> None:
    """Shard a module over all ranks, in place, and move it to the device, a block at a time.

    bf16: gather weights in bfloat16, as autocast rounds them; gradients are summed in float32 all the same.

    Every rank must hold the same weights already. Blocks and the rest are whole only while they run: whoever does not see
    all ranks run the same number of forwards and backwards must wait for ever.
    """
    mesh = world_mesh(device.type)
    # Nothing here changes a module's output in place, which is what it warns of; tests compare with the unsharded drafter.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    # The root's default would be to stay whole after a forward, with stale weights in `parameters()` after an evaluation.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=precision)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor of everything; every rank must call it where the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to the norm `limit` (inf: leave them); returns the norm before, over all shards, as a scalar."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


# ---- whole states by name, on rank 0


@torch.no_grad()
def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whole, on the CPU of rank 0; an empty dict on the others. Every rank must call it.

    A tensor at a time is whole on a device.
    """
    return _on_rank_0(model.state_dict())


@torch.no_grad()
def full_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's state as `KIND.PARAMETER` (exp_avg.fc.weight, step.fc.weight, ...), as `full_weights` gives weights.

    Empty before the first step. `optimizer` may be Accelerate's.
    """
    state = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            state[f"{kind}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return _on_rank_0(state)


@torch.no_grad()
def load_full_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put rank 0's `weights` (the others' are not looked at) into the model, sharded or not, on all ranks.

    Raises:
        ValueError: on every rank, if names or shapes are not the model's.
    """
    own = model.state_dict()
    _check_names({n: tuple(t.shape) for n, t in own.items()}, _shapes_on_rank_0(weights), "weights")
    for name, tensor in own.items():
        tensor.copy_(_from_rank_0(weights.get(name), tensor))


@torch.no_grad()
def load_full_moments(model: nn.Module, optimizer: Any, moments: dict[str, Tensor]) -> None:
    """Put rank 0's `moments`, as `full_moments` gave them, into the optimizer, sharded or not, on all ranks.

    Raises:
        ValueError: on every rank, if a trained parameter has no state, or one of another shape.
    """
    shapes = _shapes_on_rank_0(moments)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = sorted({key.partition(".")[0] for key in shapes})
    expected = {f"{k}.{n}": () if k == "step" else tuple(p.shape) for k in kinds for n, p in trained.items()}
    _check_names(expected, shapes, "optimizer state")
    for name, parameter in trained.items():
        state = {}
        for kind in kinds:
            # fused AdamW reads the number of steps on the parameter's device
            like = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
            state[kind] = _from_rank_0(moments.get(f"{kind}.{name}"), like)
        optimizer.state[parameter] = state


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _on_rank_0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if _rank() == 0:
            out[name] = full.to("cpu", copy=True)
    return out


def _shapes_on_rank_0(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()}]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(shapes, src=0)
    return shapes[0]


def _check_names(own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], what: str) -> None:
    def words(shapes: dict[str, tuple[int, ...]], name: str) -> str:
        return f"of shape {list(shapes[name])}" if name in shapes else "missing"

    for name in [*own, *given]:
        if own.get(name) != given.get(name):
            raise ValueError(
                f"saved {what} do not fit: {name} is {words(given, name)} there and {words(own, name)} here"
            )


def _from_rank_0(value: Tensor | None, like: Tensor) -> Tensor:
    """Rank 0's value in the dtype, on the device and in the shards of `like`."""
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        local = torch.empty(like.shape, dtype=like.dtype, device=like.to_local().device)
        if _rank() == 0:
            assert value is not None
            local.copy_(value)
        return distribute_tensor(local, mesh, placements, src_data_rank=0)
    out = torch.empty_like(like)
    if _rank() == 0:
        assert value is not None
        out.copy_(value)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL does not reach what lies on the CPU.
        moved = out if like.device.type != "cpu" else out.to(_reachable())
        dist.broadcast(moved, src=0)
        out.copy_(moved)
    return out


def _reachable() -> torch.device:
    """Where collectives of the default group work."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
