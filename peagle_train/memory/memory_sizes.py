"""From a recipe and two configs to the sizes that memory_plan.py computes with, and what a device has.

Models are built on the meta device: shapes and parameter counts, no weights. B: rows, L: columns.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.data.vocab_from import draft_vocab_size_of
from peagle_train.errors import one_line
from peagle_train.memory.memory_plan import GIB, Sizes
from peagle_train.recipe import Recipe
from peagle_train.serving.warm_start import read_start
from peagle_train.target.attention import BLOCK, NAME
from peagle_train.target.base import TargetBase
from peagle_train.target.cached_target import CachedTarget
from peagle_train.target.frozen import FrozenTarget
from peagle_train.target.loading import refuse_unfit, resolve_dtype
from peagle_train.training.build import make_draft_config

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """What one process has to itself."""

    kind: str
    """cuda or cpu."""
    budget: int
    """Bytes, those that this process holds already included."""
    world_size: int = 1

    def __str__(self) -> str:
        what = "CUDA memory" if self.kind == "cuda" else "RAM"
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{processes}, {self.budget / GIB:.1f} GiB of {what} each"


def this_device(device: torch.device | None = None) -> Device:
    """The device that this process trains on. A CPU's RAM is shared by the processes of a machine."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if device is None:
        on_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
    if device.type == "cuda":
        # What other processes hold is not ours, what our own allocator has reserved is.
        free, _ = torch.cuda.mem_get_info(device)
        return Device("cuda", free + torch.cuda.memory_reserved(device), world_size)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device("cpu", available_ram() // local + resident_ram(), world_size)


def parse_device(text: str) -> Device:
    """`cuda:79`, `cpu:16` (GiB for each process), `cuda:79x8` (8 processes); ValueError for anything else."""
    found = re.fullmatch(r"(cuda|cpu):(\d+(?:\.\d+)?)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError(f"--on {text}: give KIND:GIB or KIND:GIBxPROCESSES, as in cuda:79, cpu:16 or cuda:79x8")
    return Device(found[1], int(float(found[2]) * GIB), int(found[3] or 1))


def available_ram() -> int:
    """Bytes that processes can still get: of the machine, or of the control group where that allows less."""
    available = 0
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            available = min(available, max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass  # no control groups, or of another kind
    return available


def resident_ram() -> int:
    """Bytes of RAM that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class TargetShapes(FrozenTarget):
    """A target on the meta device: nothing but shapes."""

    def head_weight(self) -> Tensor:
        return self.head.weight  # type: ignore[return-value]


def read_sizes(recipe: Recipe, device: Device) -> Sizes:
    """The sizes of a recipe that has not been started: of the target, only config.json is read.

    Raises:
        ValueError: what the target's or the drafter's config alone shows to be wrong.
    """
    settings = recipe.target
    path = Path(settings.path)
    if not (path / "config.json").is_file():
        raise ValueError(f"target.path {path} has no config.json; give a Hugging Face model folder")
    remote = {"trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, **remote)
        refuse_unfit(config.get_text_config())
        dtype = resolve_dtype(settings.dtype, torch.device(device.kind))
        dtype = _stored_dtype(path, config) if dtype == "auto" else dtype
        given = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **given, **remote)
    except Exception as error:  # whatever a foreign or corrupt file makes the loaders raise
        raise ValueError(
            f"target.path {path} cannot be read: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    target = TargetShapes(model, settings.layer_ids, settings.chunk_tokens)
    start = read_start(recipe, target)
    shaped = start.recipe if start else recipe
    if recipe.draft.vocab_from:
        shaped = replace(recipe, draft=replace(recipe.draft, draft_vocab_size=draft_vocab_size_of(recipe.draft)))
    mask_token_id = shaped.draft.mask_token_id
    draft = make_draft_config(
        shaped, target, 0 if mask_token_id is None else mask_token_id, start.files.config if start else None
    )
    return sizes_of(recipe, target, draft, device)


def _stored_dtype(path: Path, config: Any) -> torch.dtype:
    """What dtype auto makes of a target: its config's, else its weights', else bfloat16, as nearly all have it."""
    stated = config.get_text_config().dtype
    if stated is not None:
        return stated
    for file in sorted(path.glob("*.safetensors"))[:1]:
        with safe_open(file, framework="pt") as tensors:
            kinds = [str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()]
        return next((FLOATS[kind] for kind in kinds if kind in FLOATS), torch.bfloat16)
    return torch.bfloat16


def sizes_of(recipe: Recipe, target: TargetBase, config: PEagleDraftConfig, device: Device) -> Sizes:
    """The sizes of a run. `target`: on a device, on meta, or a `CachedTarget`."""
    cod, train = recipe.cod, recipe.train
    with torch.device("meta"):
        draft = PEagleDraft(config)
    fits = config.hidden_size == target.hidden_size
    train_head = recipe.draft.train_lm_head or not (fits and recipe.draft.lm_head_from_target)
    draft.lm_head.requires_grad_(train_head)
    draft.embed_tokens.requires_grad_(recipe.draft.train_embeddings)
    master = 8 if train.dtype == "float64" else 4
    assert config.num_key_value_heads and config.head_dim and config.draft_vocab_size
    sharded = train.sharding == "fsdp2" or (
        train.sharding == "auto" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    )
    pad_context = train.compile is True or device.kind == "cuda"
    weights, forward, item = _target(recipe, target, device)
    cached = 0
    if recipe.target.cache:
        name = target.cache.index.dtype if isinstance(target, CachedTarget) else recipe.target.cache_dtype
        cached = item if name == "auto" else getattr(torch, name).itemsize
    return Sizes(
        batch_size=train.batch_size,
        length=recipe.data.max_length,
        num_depths=cod.num_depths,
        ratio=cod.down_sample_ratio,
        ratio_min=cod.down_sample_ratio_min,
        boundaries=cod.boundaries,
        hidden=config.hidden_size,
        target_hidden=target.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        draft_vocab=config.draft_vocab_size,
        parameters=sum(p.numel() for p in draft.parameters()),
        trained=sum(p.numel() for p in draft.parameters() if p.requires_grad),
        train_head=train_head,
        train_embeddings=recipe.draft.train_embeddings,
        chunk_rows=train.chunk_rows(device.kind),
        accumulates=train.gradient_accumulation_steps > 1,
        relay=train.segment_mode == "relay",
        checkpointing=train.activation_checkpointing,
        offload_features=train.offload_features,
        on_cuda=device.kind == "cuda",
        static=pad_context or train.mixed_precision == "bf16",
        pad_context=pad_context,
        world_size=device.world_size,
        sharded=sharded and device.world_size > 1,
        master_bytes=master,
        compute_bytes=2 if train.mixed_precision == "bf16" else master,
        target_bytes=item,
        cached_bytes=cached,
        target_weights=weights,
        target_forward=forward,
    )


def _target(recipe: Recipe, target: TargetBase, device: Device) -> tuple[int, int, int]:
    """Bytes of the target's weights on the device, of its largest forward, and of a number of its outputs."""
    settings = recipe.target
    if isinstance(target, CachedTarget):
        return 0, 0, getattr(torch, target.cache.index.computed_in).itemsize
    assert isinstance(target, FrozenTarget)
    model = target.model
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(t.numel() * t.element_size() for t in tensors)
    item = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    config: Any = model.config
    if settings.cache:
        return 0, 0, item
    if next(model.parameters()).is_meta:
        total = _as_stored(config, total)
    if settings.shard and device.world_size > 1:
        head = target.head_weight().numel() * item
        layer = (total - 2 * head) // len(target.layers)  # whole while it runs, and the next one behind it
        total = (total - head) // device.world_size + 2 * max(layer, head)
    elif settings.device_map and device.kind == "cuda":
        total //= max(1, torch.cuda.device_count())
    attention = settings.attn_implementation or config._attn_implementation or "eager"
    if attention == "sdpa" and target.flattens:
        attention = NAME
    forward = target_forward_bytes(
        target.config,
        recipe.train.batch_size,
        recipe.data.max_length,
        settings.chunk_tokens,
        item,
        attention,
        device.kind == "cuda",
    )
    return total, forward, item


def _as_stored(config: Any, total: int) -> int:
    """A quantised model's bytes, which its config tells by method only; what is unpacked when it is loaded stays whole."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return total
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = given.get("bits") or {"fp8": 8, "finegrained_fp8": 8}.get(str(given.get("quant_method")), 16)
    return math.ceil(total * min(16, int(bits) + 0.5) / 16)


def target_forward_bytes(
    config: Any, B: int, L: int, chunk_tokens: int | None, item: int, attention: str, on_cuda: bool
) -> int:
    """Bytes beside its weights that a decoder's largest forward needs, without the outputs that training keeps.

    An estimate from above: one layer's activations, attention masks or scores as they are made for packed rows, and with
    chunks the keys and values of a document as long as a row.

    Args:
        attention: transformers' name, or that of `peagle_train.target.attention`.
    """
    n = B * L if chunk_tokens is None else min(chunk_tokens, B * L)
    chunked = n < B * L
    H, D = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    A = config.num_attention_heads * D
    G = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * D
    experts = getattr(config, "num_experts_per_tok", None) or 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    mlp = n * item * (experts * (3 * width + 2 * H) if experts else 3 * config.intermediate_size)
    attending = n * item * (3 * A + 4 * G)
    norm = n * H * 8  # in float32, twice
    mask = 0
    if attention == "eager":
        rows, keys = (1, L) if chunked else (B, L)
        queries = n if chunked else L
        mask = rows * queries * keys * item
        attending += rows * config.num_attention_heads * queries * keys * (item + max(item, 4))
    elif attention in ("sdpa", NAME):
        # A bool mask, and the additive one that kernels make of it; a block of queries' at most, where it is ours.
        mask = BLOCK * L if attention == NAME else n * L if chunked else B * L * L
        attending += mask * item
    if A > G and (attention == "eager" or (on_cuda and attention == NAME)):
        attending += 2 * (L if chunked else n) * A * item  # heads of keys and values repeated
    bytes_ = 3 * n * H * item + mask + max(mlp, attending, norm)
    if chunked:
        kinds = getattr(config, "layer_types", None) or []
        window = min(L, (getattr(config, "sliding_window", None) or L) + n)
        columns = sum(window if kind == "sliding_attention" else L for kind in kinds) or L * config.num_hidden_layers
        bytes_ += 2 * columns * G * item + 2 * L * G * item  # the cache, and a layer's as it is joined anew
    return bytes_
