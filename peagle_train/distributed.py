"""FSDP2: which runs are sharded, how, and how what is sharded becomes whole again, by parameter name.

The same raw `fully_shard` on GPUs and on CPUs: Accelerate's own FSDP2 becomes data parallelism on CPUs, silently; what a
launch's FSDP config asks for is read here. Nothing needs `register_fsdp_forward_method`: the drafter's loss is computed
inside its forward, and of the target only the forward of what is sharded runs.

What is gathered here works on plain parameters, too, so that saving and resuming are the same code for every run, and a
state that was saved from any number of ranks, sharded or not, can be put on any other.
"""

import atexit
import hashlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# ---- distributed
# What several processes must agree on: how they were launched, the sum of gradients, the number of passes.

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


# ---- peers
# Several processes as one run: they wait for each other where one may take minutes, and when one fails all of them end
# within a second or two, its own message first.
#
# Collectives are not for waiting: NCCL gives up after 10 minutes, and with a dead rank it hangs until then. Both go
# over the
# key-value store in which the processes met (torchrun's, or rank 0's).

POLL_SECONDS = 0.5
PATIENCE = timedelta(days=30)
"""Nobody waits so long: a rank that ends, ends all (see `Peers`), and so does whoever started them."""

# A run that torchrun has restarted meets in the same store.
PREFIX = f"peagle_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
FAILED = f"{PREFIX}/failed"


class Peers:
    """This process's line to the others. A thread watches whether one of them has failed, and then ends this process: the
    main thread may be in a collective that never ends.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = _connect()
        self._meetings = 0
        self._over = threading.Event()

    def watch(self) -> None:
        """Start the thread; it ends before Python does, which threads inside of a library's call do not survive well."""
        thread = threading.Thread(target=self._watch, args=[_connect()], daemon=True, name="peers")
        thread.start()

        def end() -> None:
            self._over.set()
            thread.join()

        atexit.register(end)

    def _watch(self, store: dist.Store) -> None:
        try:
            while not store.check([FAILED]):
                if self._over.wait(POLL_SECONDS):
                    return
            failed, code = json.loads(store.get(FAILED))
        except RuntimeError:  # the store is gone, so its owner has ended: well, or the launcher ends us
            return
        if failed != self.rank and not self._over.is_set():
            _say(f"peagle_train: rank {self.rank} stops because rank {failed} has failed; its message is above\n")
            os._exit(code)

    def collect(self, value: str = "", ranks: int | None = None) -> list[str]:
        """The values of all ranks, or of the first few, once all are here."""
        self._meetings += 1
        keys = [f"{PREFIX}/meeting {self._meetings}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], value)
        self.store.wait(keys, PATIENCE)
        values = [found.decode() for found in self.store.multi_get(keys[:ranks])]
        if self._meetings > 1:  # which everybody has left, or he would not be here
            self.store.delete_key(f"{PREFIX}/meeting {self._meetings - 1}/{self.rank}")
        return values

    def announce(self, text: str, code: int) -> None:
        """Print why this rank fails: in full if it is the first that does, in a line if a later one has another reason, not
        at all if it has the same.
        """
        self._over.set()
        try:
            if self.store.add(f"{FAILED}/number", 1) == 1:
                _say(_signed(text, self.rank))
                self.store.set(f"{FAILED}/text", text)
                self.store.set(FAILED, json.dumps([self.rank, code]))
                return
            self.store.wait([FAILED], timedelta(seconds=10))
            if self.store.get(f"{FAILED}/text").decode() == text:
                return
            _say(f"peagle_train: rank {self.rank} stops, too: {text.strip().splitlines()[-1]}\n")
        except RuntimeError:  # no store any more: say it in full
            _say(_signed(text, self.rank))


_peers: Peers | None = None


def connect() -> None:
    """Start to watch the others; the sooner the better once the processes have met. Nothing where there is a single one."""
    global _peers
    if _peers is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _peers = Peers()
        _peers.watch()


def wait_for_all() -> None:
    """Wait until every rank is here, however long that takes. No collective."""
    from_main()


def from_main(value: str = "") -> str:
    """Rank 0's value, on every rank, once all are here."""
    connect()
    return value if _peers is None else _peers.collect(value, ranks=1)[0]


def from_all(value: str) -> list[str]:
    """Every rank's value, by rank, on every rank, once all are here."""
    connect()
    return [value] if _peers is None else _peers.collect(value)


def agree(values: dict[str, str]) -> None:
    """Wait for all ranks; ValueError where a value, by the words for it, is not that of rank 0."""
    digests = {what: hashlib.sha256(value.encode()).hexdigest() for what, value in values.items()}
    first = json.loads(from_main(json.dumps(digests)))
    for what, digest in digests.items():
        if digest != first[what]:
            raise ValueError(
                f"this process has another {what} than rank 0: give the same recipe, files and target on every machine"
            )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """The processes of a machine do what is inside one after the other; all ranks come and go together."""
    connect()
    if _peers is None:
        yield
        return
    turn = int(os.environ.get("LOCAL_RANK", "0"))
    turns = max(map(int, from_all(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turns - turn):
        wait_for_all()


def stop(text: str, code: int) -> NoReturn:
    """Say why, and end this process and with it the run, at once: nothing at exit may wait for the others.

    `text`: whole lines, the same on every rank where the reason is the same: one of them then says it, with its rank.
    """
    peers = _peers
    if peers is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        try:  # a mistake that shows before the processes meet: torchrun's store is there already
            peers = Peers()
        except RuntimeError:
            pass
    if peers is None:
        _say(_signed(text, os.environ.get("RANK", "0")))
    else:
        peers.announce(text, code)
    os._exit(code)


def _connect() -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )


def _signed(text: str, rank: int | str) -> str:
    return f"{text.rstrip()} (rank {rank})\n"


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()


# ---- sharded
# FSDP2: which runs are sharded, how, and how what is sharded becomes whole again, by parameter name.
#
# The same raw `fully_shard` on GPUs and on CPUs: Accelerate's own FSDP2 becomes data parallelism on CPUs, silently; what a
# launch's FSDP config asks for is read here. Nothing needs `register_fsdp_forward_method`: the drafter's loss is computed
# inside its forward, and of the target only the forward of what is sharded runs.
#
# What is gathered here works on plain parameters, too, so that saving and resuming are the same code for every run, and a
# state that was saved from any number of ranks, sharded or not, can be put on any other.

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
