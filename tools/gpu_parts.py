"""What tools/gpu_check.py's stages measure: drafters with all that training keeps of them, sequences, targets.

No file, no network: weights, tokens and features are random. T: the target's hidden size.
"""

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peagle_train.config import Cod, Data, Draft, Output, Recipe, Target, Train
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import StepStats, TargetOutputs
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import clip_gradients, counts_over_ranks, same_on_all_ranks, shard, sum_over_ranks, whole
from peagle_train.machine import GIB, Device
from peagle_train.memory import plan_memory, sizes_of
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.step import BatchRunner, make_optimizers

DATASHEET = 989e12
"""Dense bfloat16 operations a second of an H100 or H200 (SXM): what MFU is a share of."""
DEPTHS, RATIO = 8, 0.8

Shape = dict[str, Any]


def shape_of(hidden: int, inner: int, layers: int, heads: int, kv: int, head_dim: int, vocab: int, draft: int) -> Shape:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": vocab, "draft_vocab_size": draft,
    }  # fmt: skip


DRAFTER_8B = shape_of(4096, 12288, 4, 32, 8, 128, 151936, 32000)
DRAFTER_70B = shape_of(8192, 28672, 4, 64, 8, 128, 128256, 32000)
NARROW = shape_of(512, 1024, 2, 32, 8, 128, 4096, 2048)
TINY = shape_of(32, 48, 1, 4, 2, 16, 97, 61)


@dataclass(frozen=True)
class Check:
    """What a stage is told; goes to each of its processes."""

    dry: bool = False
    gpus: int = 1
    rows: str = os.devnull
    """The file that `note` appends to."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def pick(self, real: Any, tiny: Any) -> Any:
        return tiny if self.dry else real

    def note(self, **row: Any) -> None:
        """Keep a result at once, whatever becomes of the stage; with ok=False, the stage has failed."""
        with open(self.rows, "a", encoding="ascii") as file:
            file.write(json.dumps(row) + "\n")


def make_recipe(check: Check, shape: Shape, length: int, S: int, **train: Any) -> Recipe:
    backend = check.pick("inductor", "aot_eager")
    train = {"mixed_precision": "bf16", "compile": False, "compile_backend": backend, **train}
    draft = Draft(num_layers=shape["num_hidden_layers"], draft_vocab_size=shape["draft_vocab_size"])
    cod = Cod(DEPTHS, RATIO, 0.0, num_segments=S)
    return Recipe(Target("-"), Data(["-"], max_length=length), Output("-"), draft, cod, Train(**train))


def make_config(shape: Shape, length: int) -> PEagleDraftConfig:
    return PEagleDraftConfig(**shape, ptd_token_id=shape["vocab_size"] - 1, max_position_embeddings=length)


def make_draft(check: Check, shape: Shape, length: int) -> PEagleDraft:
    """In float32, its head frozen; made on the device, where that takes no time."""
    torch.manual_seed(0)
    with check.device:
        draft = PEagleDraft(make_config(shape, length))
    draft.lm_head.weight.requires_grad_(False)
    return draft


def make_batch(
    check: Check, shape: Shape, recipe: Recipe, documents: int = 1, supervised: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Full sequences, on the host: documents of nearly the same length, whose last `supervised` share is learned from."""
    lengths = [len(part) for part in torch.arange(recipe.data.max_length).tensor_split(documents)]
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(shape["vocab_size"] - 1, (n,), generator=generator) for n in lengths]
    mask = [(torch.arange(n) >= n * (1 - supervised)).long() for n in lengths]
    row = {"input_ids": ids, "loss_mask": mask, "row_key": seed}
    batch = make_collator(recipe, 0, check.device)([row] * recipe.train.batch_size)
    return {name: t.pin_memory() for name, t in batch.items()} if torch.cuda.is_available() else batch


class GivenTarget:
    """Stands in for the target: random features and last hidden states that are there already, in bfloat16."""

    def __init__(self, check: Check, shape: Shape, length: int, B: int = 1) -> None:
        T = shape["hidden_size"]
        torch.manual_seed(1)
        normal = partial(torch.randn, device=check.device, dtype=torch.bfloat16)
        self.head = normal(shape["draft_vocab_size"], T) * 0.02
        self.given = TargetOutputs(normal(B, length, 3 * T), normal(B, length, T), self.head)

    def head_rows(self, token_ids: Tensor) -> Tensor:
        return self.head

    def outputs(self, batch: Any, head_rows: Tensor) -> TargetOutputs:
        return self.given


def make_target(check: Check, shape: Shape, device: torch.device, layers: int) -> FrozenTarget:
    """A Llama of the drafter's shape but for its layers, in bfloat16; 36 of DRAFTER_8B's are 8 billion parameters."""
    config = {**shape, "num_hidden_layers": layers, "max_position_embeddings": 32768}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return FrozenTarget(LlamaForCausalLM(LlamaConfig(**config)))
    finally:
        torch.set_default_dtype(torch.float32)


class Stepper:
    """A drafter with all that training keeps of it, for sequences of `length`; runs one micro-batch as the trainer does."""

    def __init__(self, check: Check, shape: Shape, length: int, S: int, target: Any = None, **train: Any) -> None:
        self.check, self.shape = check, shape
        self.recipe = make_recipe(check, shape, length, S, **train)
        self.target = target or GivenTarget(check, shape, length, self.recipe.train.batch_size)
        self.draft = make_draft(check, shape, length)
        self.draft.gradient_checkpointing = self.recipe.train.activation_checkpointing
        accelerator = Accelerator(cpu=check.dry, mixed_precision="bf16")
        if dist.is_initialized():
            same_on_all_ranks(self.draft, check.device)
        if self.recipe.train.sharding == "fsdp2":
            shard(self.draft, self.draft.layers, check.device, bf16=True)
        self.trained = [p for p in self.draft.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.draft, self.recipe.train)
        self.runner = BatchRunner(self.recipe, accelerator, self.target, self.draft)  # type: ignore[arg-type]

    def batch(self, **options: Any) -> Any:
        return make_batch(self.check, self.shape, self.recipe, **options)

    def accumulate(self, batch: Any, count: Tensor | None = None) -> StepStats:
        """Add the gradients of the loss over `count` supervised elements, by default all ranks' batches'."""
        plan = self.runner.plan(batch)
        if count is None:
            count = counts_over_ranks([plan.num_supervised], self.check.device)
        return self.runner.run(batch, plan, (dist.get_world_size() if self.runner.sharded else 1) / count.float())

    def reduce(self) -> None:
        sum_over_ranks([] if self.runner.sharded else self.trained, also=[])

    def update(self) -> None:
        clip_gradients(self.trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.draft.zero_grad()

    def step(self, *batches: Any) -> None:
        for batch in batches:
            self.accumulate(batch)
        self.reduce()
        self.update()

    def gradients(self) -> dict[str, Tensor]:
        found = gradients_of(self.draft)
        self.draft.zero_grad(set_to_none=True)
        return found


def gradients_of(draft: PEagleDraft) -> dict[str, Tensor]:
    """Whole, in float64 on the CPU."""
    named = [(n, p, p.grad) for n, p in draft.named_parameters() if p.requires_grad]
    return {n: whole(torch.zeros_like(p) if g is None else g).to("cpu", torch.float64) for n, p, g in named}


def planned_gib(check: Check, shape: Shape, recipe: Recipe, target: Any = None) -> float:
    """The project's plan of what tensors hold at most (CUDA's context is no tensor); without a target, the drafter's."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    config, device = make_config(shape, recipe.data.max_length), Device(check.device.type, 0, world)
    sizes = sizes_of(recipe, target or make_target(check, shape, torch.device("meta"), 6), config, device)
    if target is None:
        sizes = replace(sizes, target_weights=0, target_forward=0)
    plan = plan_memory(sizes, recipe.cod.segments)
    return (plan.peak - plan.resident.get("CUDA context", 0)) / GIB


def model_flops(shape: Shape, batch: dict[str, Tensor]) -> float:
    """Operations (2 to a multiplication and its addition) that a batch's forward and backward need, however it is cut: no
    padding, no pass A, nothing twice.

        layers     6 x their matrices' weights x elements
        fc         4 x 3T x H x depth-0 elements (features need no gradient)
        heads      6 x V x H x supervised elements: the target's logits, the drafter's, a gradient (lm_head is frozen)
        attention  12 x heads x head_dim x layers x visible pairs: element (a, d) sees depth 0 from its document's start
                   to a, and d elements of its rollout

    Of a fully supervised sequence of 8k and DRAFTER_8B: 219 TFLOP.
    """
    H, layers = shape["hidden_size"], shape["num_hidden_layers"]
    query, key = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    projections = H * (query + 2 * key)  # once more in the first layer, which reads embeddings beside features
    weights = layers * (projections + query * H + 3 * H * shape["intermediate_size"]) + projections
    anchor, depth = batch["anchor"], batch["depth"]
    is_real = depth >= 0
    pairs = (batch["position_ids"].gather(1, anchor) + 1 + depth)[is_real].sum()
    total = 6 * weights * is_real.sum() + 4 * 3 * H * H * (depth == 0).sum() + 12 * query * layers * pairs
    return float(total + 6 * shape["draft_vocab_size"] * H * batch["supervised"].sum())


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - began


def measured(function: Callable[..., Any], *arguments: Any, repeats: int = 3) -> dict[str, float]:
    """Median milliseconds, and on a GPU the most that was allocated and reserved."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ms = 1e3 * median(seconds_of(function, *arguments) for _ in range(repeats))
    return {"ms": ms, **peaks()}


def peaks() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}


def free() -> None:
    """What the last measurement left, so that the next one begins with nothing."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean, relative, over all tensors together."""
    off = sum(float((found[n] - t).square().sum()) for n, t in expected.items())
    return (off / sum(float(t.square().sum()) for t in expected.values())) ** 0.5
