"""What a training step needs of a device, and whether it fits: the plan from shapes, S = auto, the probe step.

The plan is computed from sizes alone; nothing is loaded or run. A step's phases follow each other, and its peak is the
largest of them:

    target      the target's forward; features and last hidden states appear
    loss        a segment's activations are all there, and a chunk of both models' logits on top
    backward    the same activations, and the gradients that begin to run through the last layer
    embedding   the activations are gone, and a dense gradient of the embeddings is added to the one of earlier segments;
                autocast's copies of the weights are kept for the next segment, and their gradients come last
    reduce      the gradients' second copy, where ranks sum them

Fused AdamW makes nothing beside its state. What autograd saves is listed layer by layer in `_layer`, as draft.py computes;
tests compare it with what autograd really holds. Everything is in bytes. B: sequences, L: positions, N: elements of a pass,
Q: of these the last layer's queries, M: slots whose features are gathered, P: context positions, H: the drafter's hidden
size, T: the target's.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from peagle_train.config import Recipe
from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.partition import max_elements, segment_capacity
from peagle_train.core.visibility import MASK_BLOCK_BYTES, MASK_CACHE_BYTES, QUERY_BLOCK
from peagle_train.data.vocab import draft_vocab_size_of, load_config
from peagle_train.distributed import check_sharding, clip_gradients, from_all
from peagle_train.files import RunStopped, one_line
from peagle_train.machine import GIB, Device, available_ram, parse_device, peak_ram, resident_ram
from peagle_train.serving.start import make_draft_config, read_start
from peagle_train.target_model.attention import BLOCK as TARGET_BLOCK
from peagle_train.target_model.attention import NAME
from peagle_train.target_model.check import is_out_of_memory
from peagle_train.target_model.frozen import FrozenTarget, TargetBase
from peagle_train.target_model.loading import refuse_unfit, resolve_dtype

CUDA_CONTEXT = GIB
"""CUDA's context, cuBLAS's workspaces, compiled kernels: assumed, not computed."""
CPU_EXTRA = 2**27
"""What libraries keep beside tensors (oneDNN's kernels and scratch, the allocator's holes): assumed, not computed."""
BLOCK = 128
"""flex_attention's."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Sizes:
    """All that memory depends on except the number of segments; counts of numbers unless named bytes."""

    batch_size: int
    length: int
    """Positions of a sequence, L."""
    num_depths: int
    ratio: float
    ratio_min: float
    boundaries: str
    hidden: int
    target_hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    draft_vocab: int
    parameters: int
    """Of the drafter, all."""
    trained: int
    train_head: bool = False
    train_embeddings: bool = True
    chunk_rows: int = 384
    max_anchors: int | None = None
    accumulates: bool = False
    """Several micro-batches in a step."""
    relay: bool = True
    checkpointing: bool = False
    offload_features: bool = False
    on_cuda: bool = False
    static: bool = False
    """Passes are padded to the segment's capacity (see `plan_segments`)."""
    pad_context: bool = False
    world_size: int = 1
    sharded: bool = False
    """The drafter is, over all ranks (FSDP2)."""
    master_bytes: int = 4
    compute_bytes: int = 4
    """Of the drafter's activations: 2 under bf16 autocast."""
    target_bytes: int = 2
    """Of features and last hidden states."""
    cached_bytes: int = 0
    """Of a feature's number in the cache, if there is one."""
    target_weights: int = 0
    """Bytes of the target on the device."""
    target_forward: int = 0
    """Bytes of its largest forward: activations, masks, keys and values; not its outputs."""

    @property
    def wide(self) -> int:
        return max(4, self.master_bytes)

    @property
    def autocast(self) -> bool:
        return self.compute_bytes != self.master_bytes

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def fc_weights(self) -> int:
        return 3 * self.target_hidden * self.hidden

    def layer_weights(self, fused: bool) -> int:
        """Of a layer's matrices."""
        H, width = self.hidden, self.hidden * (2 if fused else 1)
        return width * (self.query_size + 2 * self.kv_size) + self.query_size * H + 3 * H * self.intermediate

    @property
    def linear_weights(self) -> int:
        """Of the matrices that autocast copies, once a step: all but lm_head's, which the loss copies itself."""
        return self.fc_weights + sum(self.layer_weights(i == 0) for i in range(self.layers))


@dataclass(frozen=True)
class Pass:
    """The largest pass with gradients."""

    N: int
    Q: int
    M: int
    joined: int
    """Keys that a layer's attention joins beside its own (CUDA): context positions."""
    context: int
    """Positions whose keys and values enter as leaves (relay)."""


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of a step at one number of segments, on one device."""

    num_segments: int
    capacity: int
    resident: dict[str, int]
    """What is there in every phase, by name."""
    step: dict[str, int]
    """What is there in some phases only, by name; not all of it at once."""
    phases: dict[str, int]
    """Everything together, by phase."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def largest_pass(sizes: Sizes, num_segments: int, all_supervised: bool = False) -> Pass:
    """The elements that a pass can have at most.

    all_supervised: sequences without a prompt have more rollouts, hence fewer depth-0 slots where passes are not padded.
    """
    s, B, L = sizes, sizes.batch_size, sizes.length
    capacity = capacity_of(s, num_segments)
    M = min(L, capacity)
    if all_supervised and not s.static:
        M = min(L, -(-capacity * L // capacity_of(s, 1)))
    P = 0
    if num_segments > 1:
        P = L if s.pad_context or not all_supervised else L - L // num_segments
    if s.relay or P == 0:
        return Pass(B * capacity, B * capacity, B * M, joined=B * P if s.on_cuda else 0, context=B * P)
    return Pass(B * (P + capacity), B * capacity, B * (P + M), joined=0, context=0)


def capacity_of(sizes: Sizes, num_segments: int) -> int:
    """C: elements of a sequence's segment."""
    s = sizes
    cod = s.length, s.num_depths, s.ratio, s.ratio_min
    if num_segments == 1:
        C = max_elements(*cod, s.max_anchors)
    else:
        C = segment_capacity(*cod, num_segments, s.boundaries, s.max_anchors)
    return -(-C // BLOCK) * BLOCK if s.on_cuda else C


def saved_bytes(sizes: Sizes, one: Pass) -> int:
    """The most that autograd holds at a time for a pass, masks, parameters and the relay's buffers not counted."""
    return max(_saved(sizes, one))


def _saved(s: Sizes, one: Pass) -> tuple[int, int]:
    """What autograd holds after the forward, and the most that it holds in the backward."""
    c, N, Q = s.compute_bytes, one.N, one.Q
    # The position ids' tables, the token ids, fc's input.
    before = one.M * 3 * s.target_hidden * c + 2 * N * s.head_dim * c + 8 * N
    after = _norm(s, Q) + Q * s.hidden * c + 8 * Q + (s.draft_vocab * s.hidden * s.wide if s.train_head else 0)
    layers = [_layer(s, one, i) for i in range(s.layers)]
    if not s.checkpointing:
        whole = before + sum(layers) + after + (s.linear_weights * c if s.autocast else 0)
        return whole, whole
    inputs = N * s.hidden * c  # of each layer; of the first, the embeddings, too
    fc_copy = s.fc_weights * c if s.autocast else 0
    # A layer is computed again with its input held already, which is what its norm saves unless that is a wide copy.
    peaks = []
    for i, layer in enumerate(layers):
        held = (i + 2) * inputs
        again = layer - (0 if s.autocast and not s.on_cuda else inputs * (2 if i == 0 else 1))
        copies = s.layer_weights(i == 0) * c if s.autocast else 0
        peaks.append(before + held + again + copies)
    return before + (s.layers + 1) * inputs + after + fc_copy, max(peaks) + fc_copy


def _norm(s: Sizes, n: int) -> int:
    """RMSNorm of n rows: its input and a number a row; on a CPU a wide copy of the input and one of the output."""
    return n * (s.hidden * s.compute_bytes + s.wide if s.on_cuda else (2 * s.hidden + 1) * s.wide)


def _layer(s: Sizes, one: Pass, index: int) -> int:
    """One layer's. The norms' inputs are the residual stream, which nothing else holds."""
    c, N = s.compute_bytes, one.N
    Q = one.Q if index == s.layers - 1 else N
    entering = 2 * _norm(s, N) + 2 * N * s.hidden * c if index == 0 else _norm(s, N) + N * s.hidden * c
    attention = 2 * Q * s.query_size * c + Q * s.heads * s.wide + 2 * (N + one.joined) * s.kv_size * c
    return entering + attention + _mlp(s, Q)


def _mlp(s: Sizes, n: int) -> int:
    return _norm(s, n) + n * (s.hidden + 4 * s.intermediate) * s.compute_bytes


def plan_memory(sizes: Sizes, num_segments: int, all_supervised: bool = False) -> MemoryPlan:
    """Bytes of a step of `num_segments` segments on one device; see `largest_pass` for `all_supervised`."""
    s, S = sizes, num_segments
    c, w, m, t = s.compute_bytes, s.wide, s.master_bytes, s.target_bytes
    B, L, H, T, V = s.batch_size, s.length, s.hidden, s.target_hidden, s.draft_vocab
    one = largest_pass(s, S, all_supervised)
    relay = s.relay and S > 1
    ranks = s.world_size if s.sharded else 1

    root = s.parameters - sum(s.layer_weights(i == 0) for i in range(s.layers))
    gathered = (root + s.layer_weights(True) + (s.layer_weights(False) if s.layers > 1 else 0)) * m if ranks > 1 else 0
    # Sharded gradients stay whole until the step's last pass reduces them.
    whole_gradients = ranks == 1 or S > 1 or s.accumulates
    columns = B * L * s.kv_size * 2 * s.layers
    outputs = B * L * 4 * T * t
    resident = {
        "target weights": s.target_weights,
        "target head rows": V * T * t,
        "drafter weights": s.parameters * m // ranks + gathered + 8 * V + s.vocab,
        "gradients": s.trained * m // (1 if whole_gradients else ranks),
        "optimizer": 2 * s.trained * m // ranks,
        "keys, values": columns * c if relay else 0,
        "their gradients": columns * w if relay else 0,
    }
    resident["CUDA context" if s.on_cuda else "libraries"] = CUDA_CONTEXT if s.on_cuda else CPU_EXTRA
    base = sum(resident.values())

    after_forward, in_backward = _saved(s, one)
    kept = 0 if s.offload_features and s.on_cuda else outputs
    kept += 0 if s.on_cuda else B * L * 4 * T * s.cached_bytes  # read ahead
    pieces = one.M * 3 * T * t  # gathered out of the features, for one segment
    hidden = one.Q * (T * t + H * c)  # labels gathered out of the last hidden states, and what they are compared with
    # Flex attention's keys are a copy, context first; the pass's own are there until it has answered, or are handed on.
    own = 2 * one.N * s.kv_size * c * s.layers if s.on_cuda else 0
    batch = B * L * 24 + S * capacity_of(s, S) * B * 25 + one.N * 8 * 7
    masks = _masks(s, one)
    chunk = min(s.chunk_rows, one.Q) * V * (3 * w + (c if c < w else 0))
    chunk += (one.Q * T + V * T) * c if t != c else 0
    chunk += V * H * c if s.autocast else 0
    # Autocast keeps its copies through a batch's segments, and their gradients come last; not those of sharded weights,
    # nor those of layers that are computed again, which clears them away.
    copies = s.linear_weights * c if s.autocast and ranks == 1 else 0
    unsaved = copies - (s.layer_weights(True) + s.fc_weights) * c if copies and s.checkpointing else 0
    flowing = _flowing(s, one, relay)
    step = {
        "features": outputs,
        "target's forward": s.target_forward,
        "saved for backward": max(after_forward, in_backward),
        "loss chunk": chunk,
        "gradients in flight": flowing,
        "masks and tables": masks + batch,
    }
    during = base + kept + pieces + masks + batch
    again = S > 1 or s.accumulates
    to_come = 0 if again or ranks > 1 else resident["gradients"]  # while what was saved goes
    # With checkpointing a layer is computed again when those above it have their gradients: the first one's peak counts.
    above = sum(s.layer_weights(False) for _ in range(1, s.layers)) * m if s.checkpointing else 0
    phases = {
        "target": base + outputs + s.target_forward + B * L * 24,
        "loss": during - to_come + unsaved + after_forward + own + hidden + chunk,
        "backward": during
        - max(to_come - above, 0)
        + (unsaved if S > 1 else 0)
        + in_backward
        + (own if relay else 0)
        + flowing,
    }
    largest = max(s.vocab * H * m if s.train_embeddings else 0, s.hidden * s.intermediate * (c + m), s.fc_weights * m)
    late = 0 if s.checkpointing else copies * (2 if S > 1 else 1)
    phases["embedding"] = during + late + one.N * H * (c + m) * 2 + one.M * 3 * T * c + (largest if again else 0)
    phases["reduce"] = base + kept + (s.trained * m if s.world_size > 1 and not s.sharded else 0)
    return MemoryPlan(S, capacity_of(s, S), resident, step, phases)


def _flowing(s: Sizes, one: Pass, relay: bool) -> int:
    """Gradients of activations at the start of the backward, where nearly everything that was saved is still there."""
    c, w = s.compute_bytes, s.wide
    loss = 2 * one.Q * s.hidden * w
    mlp = 2 * one.Q * s.intermediate * c + (0 if s.on_cuda else 2 * one.Q * s.hidden * w)
    owed = 2 * one.N * s.kv_size * c * s.layers if relay else 0
    attention = 2 * one.Q * s.query_size * c
    if s.on_cuda:  # what flex's backward makes, when what the last layer's MLP saved is gone
        attention += one.Q * (s.hidden * c + s.heads * w) + 2 * (one.N + one.joined) * s.kv_size * c - _mlp(s, one.Q)
    else:
        attention += 2 * (one.N + one.context) * s.kv_size * (c + w)
    return max(loss, mlp, attention) + owed


def _masks(s: Sizes, one: Pass) -> int:
    if not s.on_cuda:
        keys = one.context + one.M + QUERY_BLOCK * s.batch_size
        hidden = min(QUERY_BLOCK * keys, MASK_BLOCK_BYTES // s.compute_bytes)
        return hidden * (s.compute_bytes + 2) + min(MASK_CACHE_BYTES, one.N // s.batch_size * keys)
    blocks = -(-one.Q // s.batch_size // BLOCK) * -(-(one.N + one.joined) // s.batch_size // BLOCK) * s.batch_size
    return blocks * (4 * 4 + 24) + (one.N + one.joined) * 8 * 5


def choose_segments(
    sizes: Sizes, budget: int, margin: float, candidates: Iterable[int] = CANDIDATES
) -> MemoryPlan | None:
    """The plan with the fewest segments whose peak leaves a share of `margin` of the budget free; None if none does."""
    for plan in (plan_memory(sizes, S) for S in allowed_segments(sizes, candidates)):
        if plan.peak <= budget * (1 - margin):
            return plan
    return None


def allowed_segments(sizes: Sizes, candidates: Iterable[int] = CANDIDATES) -> list[int]:
    """Those of the candidates that a sequence has positions for."""
    return [S for S in candidates if S <= sizes.length]


# Sizes, from a recipe and two configs; models are built on the meta device


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


class TargetShapes(FrozenTarget):
    """A target on the meta device: nothing but shapes."""

    def head_weight(self) -> Tensor:
        return self.head.weight  # type: ignore[return-value]


def read_sizes(recipe: Recipe, device: Device) -> Sizes:
    """The sizes of a recipe that has not been started; of the target, only config.json is read.

    Raises:
        ValueError: the target's or the drafter's config is wrong.
    """
    settings = recipe.target
    path = Path(settings.path)
    config = load_config(settings.path, settings.trust_remote_code)
    try:
        refuse_unfit(config.get_text_config())
        dtype = resolve_dtype(settings.dtype, torch.device(device.kind))
        if dtype == "auto":
            dtype = config.get_text_config().dtype or _stored_dtype(path)
        given = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code, **given
            )
    except Exception as error:  # whatever a foreign or corrupt file makes the loaders raise
        raise ValueError(
            f"target.path {path} cannot be read: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    target = TargetShapes(model, settings.layer_ids, settings.chunk_tokens)
    start = read_start(recipe, target)
    shaped = start.recipe if start else recipe
    if recipe.draft.vocab_from:
        shaped = replace(shaped, draft=replace(shaped.draft, draft_vocab_size=draft_vocab_size_of(recipe.draft)))
    mask_token_id = shaped.draft.mask_token_id
    draft = make_draft_config(
        shaped, target, 0 if mask_token_id is None else mask_token_id, start.files.config if start else None
    )
    return sizes_of(recipe, target, draft, device)


def _stored_dtype(folder: Path) -> torch.dtype:
    """What `auto` makes of a target whose config names no dtype: its weights', else bfloat16, as nearly all have it."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        with safe_open(file, framework="pt") as tensors:
            kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]
        return next((names[kind] for kind in kinds if kind in names), torch.bfloat16)
    return torch.bfloat16


def sizes_of(recipe: Recipe, target: TargetBase, config: PEagleDraftConfig, device: Device) -> Sizes:
    """The sizes of a run. `target`: on a device, on meta, or a `StoredTarget`."""
    cod, train = recipe.cod, recipe.train
    with torch.device("meta"):
        draft = PEagleDraft(config)
    train_head = recipe.draft.trains_head(config.hidden_size == target.hidden_size)
    draft.lm_head.requires_grad_(train_head)
    draft.embed_tokens.requires_grad_(recipe.draft.train_embeddings)
    master = 8 if train.dtype == "float64" else 4
    assert config.num_key_value_heads and config.head_dim and config.draft_vocab_size
    weights, forward, item = _target(recipe, target, device)
    cached = target.cache_dtype(recipe.target.cache_dtype).itemsize if recipe.target.cache else 0
    return Sizes(
        batch_size=train.batch_size,
        length=recipe.data.max_length,
        num_depths=cod.num_depths,
        ratio=cod.down_sample_ratio,
        ratio_min=cod.down_sample_ratio_min,
        max_anchors=cod.max_anchors,
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
        static=train.pads_passes(device.kind),
        pad_context=train.pads_context(device.kind),
        world_size=device.world_size,
        sharded=device.world_size > 1 and check_sharding(train.sharding),
        master_bytes=master,
        compute_bytes=2 if train.mixed_precision == "bf16" else master,
        target_bytes=item,
        cached_bytes=cached,
        target_weights=weights,
        target_forward=forward,
    )


def _target(recipe: Recipe, target: TargetBase, device: Device) -> tuple[int, int, int]:
    """Bytes of the target's weights on the device, of its largest forward, and of one number of its outputs."""
    settings = recipe.target
    if settings.cache:
        return 0, 0, target.dtype.itemsize
    assert isinstance(target, FrozenTarget)
    model = target.model
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(t.numel() * t.element_size() for t in tensors)
    item = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    config: Any = model.config
    if next(model.parameters()).is_meta:
        total = _as_stored(config, total)
    if settings.shard and device.world_size > 1:
        head = target.head_weight().numel() * item
        layer = (total - 2 * head) // len(target.layers)  # whole while it runs, and the next one after it
        total = (total - head) // device.world_size + 2 * max(layer, head)
    elif settings.device_map and device.kind == "cuda":
        total //= max(1, torch.cuda.device_count())
    attention = settings.attn_implementation or config._attn_implementation or "eager"
    if attention == "sdpa" and not target.way.apart:
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
    """A quantised model's bytes, estimated from its config's bits or method."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return total
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = given.get("bits") or {"fp8": 8, "finegrained_fp8": 8}.get(str(given.get("quant_method")), 16)
    return math.ceil(total * min(16, int(bits) + 0.5) / 16)


def target_forward_bytes(
    config: Any, B: int, L: int, chunk_tokens: int | None, item: int, attention: str, on_cuda: bool
) -> int:
    """Bytes that a decoder's largest forward needs beside its weights and the outputs that training keeps.

    An estimate from above: one layer's activations, attention masks or scores as they are made for packed sequences, and
    with chunks the keys and values of a document as long as a sequence.

    Args:
        attention: transformers' name, or that of `peagle_train.target_model.attention`.
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
        # A bool mask, and the additive one that kernels make of it; a block of queries' at most if it is ours.
        mask = TARGET_BLOCK * L if attention == NAME else n * L if chunked else B * L * L
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


# Tables, choices and refusals


def dry_run(recipe: Recipe, on: str | None = None) -> str:
    """The table of memory by number of segments, and which one fits, on this machine or `on` another (`parse_device`).

    Raises:
        ValueError: the recipe or the target's config.json is wrong.
    """
    device = parse_device(on) if on else this_device()
    return f"planned, not measured: {device}\n" + describe(recipe, read_sizes(recipe, device), device)


def describe(recipe: Recipe, sizes: Sizes, device: Device) -> str:
    """The table, and the numbers of segments that fit."""
    asked, margin = recipe.cod.num_segments, recipe.train.memory_margin
    numbers = allowed_segments(sizes, sorted({*CANDIDATES, *([] if asked == "auto" else [asked])}))
    lines = [table_of([plan_memory(sizes, S) for S in numbers], asked)]
    room = f"{device.budget / GIB:.1f} GiB less {margin:.0%}"
    fitting = choose_segments(sizes, device.budget, margin)
    if fitting is None:
        lines.append(f"no number of segments up to {numbers[-1]} fits into {room}: {advice(recipe, sizes)}")
    else:
        lines.append(f"cod.num_segments=auto would be {fitting.num_segments}: the fewest that fit into {room}")
    if asked != "auto":
        peak, budget = plan_memory(sizes, asked).peak, device.budget
        verdict = "fits" if peak <= budget * (1 - margin) else "is close" if peak <= budget else "is too much"
        lines.append(f"this recipe: {asked} segments, {peak / GIB:.2f} GiB: {verdict}")
    return "\n".join(lines)


def table_of(plans: Sequence[MemoryPlan], asked: int | str = "auto") -> str:
    """A column for each number of segments, the recipe's own marked; GiB for each device."""
    columns = [f"{p.num_segments}{'*' if p.num_segments == asked else ''}" for p in plans]
    rows = [["GiB a device, by segments", *columns]]
    rows.append(["elements of a segment", *(f"{p.capacity:,}" for p in plans)])
    for group in ("resident", "step"):
        for name in getattr(plans[0], group) | getattr(plans[-1], group):
            values = [getattr(p, group).get(name, 0) for p in plans]
            if any(values):
                rows.append([("" if group == "resident" else "  ") + name, *(f"{v / GIB:.2f}" for v in values)])
    rows.append(["peak", *(f"{p.peak / GIB:.2f}" for p in plans)])
    rows.append(["in", *(p.fullest for p in plans)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def advice(recipe: Recipe, sizes: Sizes) -> str:
    """What else takes less memory, if segments do not help."""
    train, target = recipe.train, recipe.target
    options = {
        "train.mixed_precision=bf16": train.mixed_precision == "no" and train.dtype == "float32",
        "train.segment_mode=relay": train.segment_mode != "relay",
        "train.batch_size=1": train.batch_size > 1,
        "target.chunk_tokens=2048": target.chunk_tokens is None and not target.cache and sizes.length > 2048,
        "train.offload_features=true": sizes.on_cuda and not train.offload_features,
        "target.cache (the target then need not be loaded)": not target.cache,
        "train.sharding=fsdp2": sizes.world_size > 1 and not sizes.sharded,
        "a smaller data.max_length or draft.draft_vocab_size": True,
    }
    return "try " + ", ".join(option for option, helps in options.items() if helps)


def resolve_segments(recipe: Recipe, sizes: Sizes, device: Device) -> tuple[Recipe, str]:
    """The recipe with a number in place of cod.num_segments = auto, the same on every rank, and a line to log.

    Raises:
        ValueError: on every rank, if no number fits on one of them.
    """
    assert recipe.cod.num_segments == "auto"
    margin = recipe.train.memory_margin
    own = choose_segments(sizes, device.budget, margin)
    none = 2 * CANDIDATES[-1]
    S = max(from_all(own.num_segments if own else none))
    if S == none:
        raise ValueError(
            f"cod.num_segments is auto, and no number up to {CANDIDATES[-1]} fits ({device}, {margin:.0%} of it left free"
            f" by train.memory_margin; {plan_memory(sizes, allowed_segments(sizes)[-1]).peak / GIB:.1f} GiB planned):"
            f" {advice(recipe, sizes)}; --dry-run shows the table"
        )
    plan = plan_memory(sizes, S)
    line = (
        f"cod.num_segments: auto is {S}: {plan.peak / GIB:.2f} GiB planned of {device.budget / GIB:.2f}"
        f" ({margin:.0%} left free)"
    )
    return replace(recipe, cod=replace(recipe.cod, num_segments=S)), line


def way_out(recipe: Recipe, sizes: Sizes, device: Device, num_segments: int) -> str:
    """What to change if this many segments need too much."""
    larger = [n for n in allowed_segments(sizes) if n > num_segments]
    fitting = choose_segments(sizes, device.budget, recipe.train.memory_margin, larger)
    if fitting:
        return f"set cod.num_segments={fitting.num_segments} ({fitting.peak / GIB:.2f} GiB planned)"
    return f"more segments would not help: {advice(recipe, sizes)}"


def refuse_hopeless(recipe: Recipe, device: Device) -> None:
    """Print the table and raise ValueError for a run that is planned to take over twice what its device has.

    Loads nothing. Mistakes that make a plan impossible are left to the run, which reports them.
    """
    S = recipe.cod.num_segments
    if S == "auto":  # `resolve_segments` refuses what does not fit
        return
    logging.disable(logging.WARNING)  # the run gives these warnings itself
    try:
        sizes = read_sizes(recipe, device)
    except (ValueError, RuntimeError):
        return
    finally:
        logging.disable(logging.NOTSET)
    peak = plan_memory(sizes, S).peak
    if peak > 2 * device.budget:
        sys.stderr.write(f"{describe(recipe, sizes, device)}\n")
        raise ValueError(
            f"{peak / GIB:,.1f} GiB are planned for {S} segments, over twice what there is ({device}):"
            f" {way_out(recipe, sizes, device, S)}; --force starts the run anyway"
        )


@contextmanager
def memory_explained(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """Raise RunStopped in place of an out-of-memory error inside, after printing the table to stderr.

    Args:
        where: called only then: what was being done, and how to resume.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunStopped) or not is_out_of_memory(error):
            raise
        line = f"{where()}: {one_line(error).partition('. ')[0][:200]}"
        device, S = this_device(), recipe.cod.num_segments
        try:
            sizes = read_sizes(recipe, device)
        except (ValueError, RuntimeError) as failure:  # the first error counts, whatever is wrong with the plan
            raise RunStopped(f"{line}; no plan can be made: {one_line(failure)}") from None
        if S == "auto":
            S = allowed_segments(sizes)[-1]
        sys.stderr.write(f"{describe(recipe, sizes, device)}\n")
        planned = f"{plan_memory(sizes, S).peak / GIB:.2f} GiB were planned for {S} segments"
        there = f"{device.budget / GIB:.2f} are there"
        raise RunStopped(f"{line}; {planned}, {there}: {way_out(recipe, sizes, device, S)}") from None


# The probe


def probe_step(
    recipe: Recipe,
    target: TargetBase,
    draft: PEagleDraft,
    collator: CODCollator,
    optimizer: torch.optim.Optimizer,
    accumulate: Callable[[list[dict[str, Tensor]]], object],
) -> str:
    """Run one full-length step on every rank and undo it: if it fits here, the whole run fits.

    Sequences that are full, supervised throughout and as long as they get need all that any step can need. No weight, no
    optimizer state, no generator and no file changes.

    Args:
        accumulate: leaves an optimizer step's gradients, given its micro-batches.

    Returns:
        the line that says what it took on this rank.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device = draft.device
    trained = [p for p in draft.parameters() if p.requires_grad]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    B, L = recipe.train.batch_size, recipe.data.max_length
    if not recipe.target.cache:
        # Sequences of several documents may take a mask of L x L, which a document alone does without.
        position = torch.cat([torch.arange(L - L // 2), torch.arange(L // 2)])[None].expand(B, -1)
        ids = torch.zeros(B, L, dtype=torch.int64)
        target.outputs({"input_ids": ids, "position_ids": position.contiguous()}, draft.lm_head.weight)
    # AdamW's state is there in every step but the first; in a resumed run, it is there already.
    states = [torch.zeros_like(p) for p in trained if not optimizer.state.get(p) for _ in range(2)]
    batch = full_batch(recipe, target, draft, collator)
    try:
        accumulate([batch] * min(2, recipe.train.gradient_accumulation_steps))
        clip_gradients(trained, math.inf)
    finally:
        del states, batch
        optimizer.zero_grad(set_to_none=True)
    return _line(device)


def full_batch(recipe: Recipe, target: TargetBase, draft: PEagleDraft, collator: CODCollator) -> dict[str, Tensor]:
    """A batch, on the host, of sequences as long and with as many elements as any can have."""
    L, generator = recipe.data.max_length, torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size - 1, (L,), generator=generator)
    ids += ids >= draft.mask_token_id  # which no sequence may hold
    row: dict[str, Any] = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "row_key": 0, "epoch": 0}
    if recipe.target.cache:
        dtype = target.cache_dtype(recipe.target.cache_dtype)
        row["features"] = torch.zeros(L, 3 * target.hidden_size, dtype=dtype)
        row["last_hidden"] = torch.zeros(L, target.hidden_size, dtype=dtype)
    return collator([row] * recipe.train.batch_size)


def _line(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What lies outside of the allocator (CUDA's context, other processes), and the most that it ever held.
        peak = total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak, total = peak_ram(), available_ram() + resident_ram()
    return f"fits: peak {peak / GIB:.2f} of {total / GIB:.2f} GiB in a full-length step (train.probe)"
