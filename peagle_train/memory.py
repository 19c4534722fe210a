"""What a training step needs of a device, and whether it fits: the plan from shapes, and S = auto.

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
size, T: the target's, V: the draft vocabulary, S: segments, c: bytes of a number in the drafter's activations, m: in its
master weights and in whatever is computed in float32 or wider.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env

from peagle_train.config import Recipe, with_segments
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.flex import BLOCK_SIZE
from peagle_train.core.visibility import MASK_BLOCK_BYTES, MASK_CACHE_BYTES, QUERY_BLOCK
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import check_sharding, from_all
from peagle_train.files import RunStopped, aligned, one_line
from peagle_train.machine import GIB, Device, available_ram, parse_device, resident_ram
from peagle_train.serving.start import make_draft_config, read_start
from peagle_train.target_model.frozen import FrozenTarget, TargetBase
from peagle_train.target_model.packed import BLOCK as TARGET_BLOCK

CUDA_CONTEXT = GIB  # CUDA's context, cuBLAS's workspaces, compiled kernels: assumed, not computed
CPU_EXTRA = 2**27
"""What libraries keep beside tensors (oneDNN's kernels and scratch, the allocator's holes): assumed, not computed."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Sizes:
    """All that memory depends on except the number of segments."""

    recipe: Recipe
    draft: Any  # the drafter's PEagleDraftConfig
    device: Device
    parameters: int  # of the drafter
    trained: int  # of these
    target_bytes: int = 2  # of a number in features and last hidden states
    cached_bytes: int = 0  # of one in the cache, if there is one
    target_weights: int = 0  # bytes of the target on the device
    target_forward: int = 0  # bytes of its largest forward: activations, masks, keys and values; not its outputs
    sharded: bool = False  # the drafter, over all ranks (FSDP2)

    def __post_init__(self) -> None:
        train, draft = self.recipe.train, self.draft
        self.on_cuda, self.autocast = self.device.kind == "cuda", train.mixed_precision == "bf16"
        self.m = 8 if train.dtype == "float64" else 4
        self.c = 2 if self.autocast else self.m
        self.query_size = draft.num_attention_heads * draft.head_dim
        self.kv_size = draft.num_key_value_heads * draft.head_dim
        self.fc_weights = draft.feature_size * draft.hidden_size
        self.all_layers = sum(self.layer_weights(i) for i in range(draft.num_hidden_layers))

    def keys(self, one: "Pass") -> int:
        """That a layer's attention keeps: on CUDA the context's and the pass's own are joined in a copy."""
        return one.N + (one.context if self.on_cuda else 0)

    def layer_weights(self, index: int) -> int:
        """Of a layer's matrices; the first one reads embeddings beside features."""
        H, width = self.draft.hidden_size, self.draft.hidden_size * (2 if index == 0 else 1)
        return width * (self.query_size + 2 * self.kv_size) + self.query_size * H + 3 * H * self.draft.intermediate_size


class Pass(NamedTuple):
    """The largest pass with gradients."""

    N: int
    Q: int
    M: int
    context: int  # positions whose keys and values enter as leaves (relay)


class MemoryPlan(NamedTuple):
    """The bytes of a step at one number of segments, on one device."""

    num_segments: int
    capacity: int
    resident: dict[str, int]  # what is there in every phase, by name
    outputs: int  # the target's of a batch
    phases: dict[str, int]  # everything together, by phase
    peak: int


def capacity_of(s: Sizes, num_segments: int) -> int:
    """C: elements of a sequence's segment."""
    return make_collator(with_segments(s.recipe, num_segments), 0, torch.device(s.device.kind)).capacity


def most_context(s: Sizes, layers: int = 1) -> int:
    """Positions that a pass's context has at most: all, or what windows let `layers` layers reach."""
    L, window = s.recipe.data.max_length, s.draft.sliding_window
    return L if window is None else min(L, layers * (window - 1))


def largest_pass(s: Sizes, num_segments: int, all_supervised: bool = False) -> Pass:
    """The elements that a pass can have at most. `all_supervised`: of sequences without a prompt, which have more rollouts,
    hence fewer depth-0 slots where passes are not padded.
    """
    train, B, L = s.recipe.train, s.recipe.train.batch_size, s.recipe.data.max_length
    capacity = capacity_of(s, num_segments)
    M = min(L, capacity)
    if all_supervised and not train.pads_passes(s.device.kind):
        M = min(L, -(-capacity * L // capacity_of(s, 1)))
    P, relay = 0, train.segment_mode == "relay"
    if num_segments > 1:
        P = L if train.pads_context(s.device.kind) or not all_supervised else L - L // num_segments
        P = min(P, most_context(s, 1 if relay else s.draft.num_hidden_layers))
    if relay or P == 0:
        return Pass(B * capacity, B * capacity, B * M, B * P)
    return Pass(B * (P + capacity), B * capacity, B * (P + M), 0)


def saved_bytes(s: Sizes, one: Pass) -> tuple[int, int]:
    """What autograd holds after a pass's forward, and at most in its backward; no masks, parameters or relay's buffers."""
    c, N, Q, H = s.c, one.N, one.Q, s.draft.hidden_size
    trains_head = s.recipe.draft.trains_head(H == s.draft.target_hidden_size)
    # The position ids' tables, the token ids, fc's input.
    before = one.M * s.draft.feature_size * c + 2 * N * s.draft.head_dim * c + 8 * N
    before += _norm(s, one.M, s.draft.feature_size) if s.draft.norm_before_fc or s.draft.fc_norm else 0
    after = _norm(s, Q) + Q * H * c + 8 * Q + (s.draft.draft_vocab_size * H * s.m if trains_head else 0)
    layers = [_layer(s, one, i) for i in range(s.draft.num_hidden_layers)]
    if not s.recipe.train.activation_checkpointing:
        whole = before + sum(layers) + after + ((s.fc_weights + s.all_layers) * c if s.autocast else 0)
        return whole, whole
    inputs = N * H * c  # of each layer; of the first, the embeddings, too
    fc_copy = s.fc_weights * c if s.autocast else 0
    # A layer is computed again with its input held already, which is what its norm saves unless that is a wide copy.
    peaks = []
    for i, layer in enumerate(layers):
        again = layer - (0 if s.autocast and not s.on_cuda else inputs * (2 if i == 0 else 1))
        copies = s.layer_weights(i) * c if s.autocast else 0
        peaks.append(before + (i + 2) * inputs + again + copies)
    return before + (len(layers) + 1) * inputs + after + fc_copy, max(peaks) + fc_copy


def _norm(s: Sizes, n: int, width: int = 0) -> int:
    """RMSNorm of n rows: its input and a number a row; on a CPU a wide copy of the input and one of the output."""
    width = width or s.draft.hidden_size
    return n * (width * s.c + s.m if s.on_cuda else (2 * width + 1) * s.m)


def _layer(s: Sizes, one: Pass, index: int) -> int:
    """One layer's. The norms' inputs are the residual stream, which nothing else holds."""
    c, N, H = s.c, one.N, s.draft.hidden_size
    Q = one.Q if index == s.draft.num_hidden_layers - 1 else N
    entering = (_norm(s, N) + N * H * c) * (2 if index == 0 else 1)
    attention = 2 * Q * s.query_size * c + Q * s.draft.num_attention_heads * s.m + 2 * s.keys(one) * s.kv_size * c
    if s.draft.layer_type == "qwen3":  # the norms of queries and keys
        attention += _norm(s, Q * s.draft.num_attention_heads + N * s.draft.num_key_value_heads, s.draft.head_dim)
    return entering + attention + _mlp(s, Q)


def _mlp(s: Sizes, n: int) -> int:
    return _norm(s, n) + n * (s.draft.hidden_size + 4 * s.draft.intermediate_size) * s.c


def _flowing(s: Sizes, one: Pass, relay: bool) -> int:
    """Gradients of activations at the start of the backward, where nearly everything that was saved is still there."""
    c, m, H = s.c, s.m, s.draft.hidden_size
    loss = 2 * one.Q * H * m
    mlp = 2 * one.Q * s.draft.intermediate_size * c + (0 if s.on_cuda else 2 * one.Q * H * m)
    owed = 2 * one.N * s.kv_size * c * s.draft.num_hidden_layers if relay else 0
    attention = 2 * one.Q * s.query_size * c
    if s.on_cuda:  # what flex's backward makes, when what the last layer's MLP saved is gone
        attention += one.Q * (H * c + s.draft.num_attention_heads * m) + 2 * s.keys(one) * s.kv_size * c
        attention -= _mlp(s, one.Q)
    else:
        attention += 2 * (one.N + one.context) * s.kv_size * (c + m)
    return max(loss, mlp, attention) + owed


def _masks(s: Sizes, one: Pass) -> int:
    B = s.recipe.train.batch_size
    if not s.on_cuda:
        keys = one.context + one.M + QUERY_BLOCK * B
        hidden = min(QUERY_BLOCK * keys, MASK_BLOCK_BYTES // s.c)
        return hidden * (s.c + 2) + min(MASK_CACHE_BYTES, one.N // B * keys)
    blocks = -(-one.Q // B // BLOCK_SIZE) * -(-s.keys(one) // B // BLOCK_SIZE) * B
    return blocks * (4 * 4 + 24) + s.keys(one) * 8 * 5


def plan_memory(s: Sizes, num_segments: int, all_supervised: bool = False) -> MemoryPlan:
    """Bytes of a step of `num_segments` segments on one device; see `largest_pass` for `all_supervised`."""
    train, S, c, m, t = s.recipe.train, num_segments, s.c, s.m, s.target_bytes
    B, L, layers, F = train.batch_size, s.recipe.data.max_length, s.draft.num_hidden_layers, s.draft.feature_size
    H, T, V = s.draft.hidden_size, s.draft.target_hidden_size, s.draft.draft_vocab_size
    one, capacity = largest_pass(s, S, all_supervised), capacity_of(s, S)
    relay = train.segment_mode == "relay" and S > 1
    again = S > 1 or train.gradient_accumulation_steps > 1
    checkpointing = train.activation_checkpointing
    ranks = s.device.world_size if s.sharded else 1

    two_layers = sum(s.layer_weights(i) for i in range(min(2, layers)))
    gathered = (s.parameters - s.all_layers + two_layers) * m if ranks > 1 else 0
    by_muon = s.all_layers + s.fc_weights if train.optimizer == "muon" else 0  # one momentum in place of two
    of_column, outputs = B * s.kv_size * 2 * layers, B * L * (F + T) * t
    resident = {
        "target weights": s.target_weights,
        "target head rows": V * T * t,
        "drafter weights": s.parameters * m // ranks + gathered + 8 * V + s.draft.vocab_size,
        # Sharded ones stay whole until the step's last pass reduces them.
        "gradients": s.trained * m // (1 if again else ranks),
        "optimizer": (2 * s.trained - by_muon) * m // ranks,
        "keys, values": L * of_column * c if relay else 0,
        "their gradients": most_context(s) * of_column * m if relay else 0,
        ("CUDA context" if s.on_cuda else "libraries"): CUDA_CONTEXT if s.on_cuda else CPU_EXTRA,
    }
    base = sum(resident.values())

    after_forward, in_backward = saved_bytes(s, one)
    kept = 0 if train.offload_features and s.on_cuda else outputs
    kept += 0 if s.on_cuda else B * L * (F + T) * s.cached_bytes  # read ahead
    if s.recipe.target.server and not s.on_cuda:
        kept += max(int(s.recipe.target.prefetch_gib * 2**30), outputs)
    pieces = one.M * F * t  # gathered out of the features, for one segment
    hidden = one.Q * (T * t + H * c)  # labels gathered out of the last hidden states, and what they are compared with
    # Flex attention's keys are a copy, context first; the pass's own are there until it has answered, or are handed on.
    own = 2 * one.N * s.kv_size * c * layers if s.on_cuda else 0
    tables = _masks(s, one) + B * L * 24 + S * capacity * B * 25 + one.N * 8 * 7
    chunk = min(train.chunk_rows(s.device.kind), one.Q) * V * (3 * m + (c if c < m else 0))
    chunk += (one.Q * T + V * T) * c if t != c else 0
    chunk += V * H * c if s.autocast else 0
    # Autocast keeps its copies (lm_head's excepted, which the loss makes) through a batch's segments, and their gradients
    # come last; not those of sharded weights, nor those of layers that are computed again, which clears them away.
    copies = (s.fc_weights + s.all_layers) * c if s.autocast and ranks == 1 else 0
    unsaved = copies - (s.layer_weights(0) + s.fc_weights) * c if copies and checkpointing else 0
    flowing = _flowing(s, one, relay)
    # Contexts that begin at another position in each sequence are copies.
    apart = B > 1 and (s.draft.sliding_window is not None or not train.pads_context(s.device.kind))
    contexts = 2 * one.context * s.kv_size * c * layers if apart else 0
    during = base + kept + pieces + tables + contexts
    to_come = 0 if again or ranks > 1 else resident["gradients"]  # while what was saved goes
    # With checkpointing a layer is computed again when those above it have their gradients: the first one's peak counts.
    above = sum(s.layer_weights(i) for i in range(1, layers)) * m if checkpointing else 0
    backward = during - max(to_come - above, 0) + in_backward + flowing
    embeddings = s.draft.vocab_size * H * m if s.recipe.draft.train_embeddings else 0
    largest = max(embeddings, H * s.draft.intermediate_size * (c + m), s.fc_weights * m)
    late = 0 if checkpointing else copies * (2 if S > 1 else 1)
    phases = {
        # A ring copies a sequence's outputs into the batch's.
        "target": base + outputs * (1 + (s.recipe.target.reuse > 1)) + s.target_forward + B * L * 24,
        "loss": during - to_come + unsaved + after_forward + own + hidden + chunk,
        "backward": backward + (unsaved if S > 1 else 0) + (own if relay else 0),
        "embedding": during + late + one.N * H * (c + m) * 2 + one.M * F * c + (largest if again else 0),
        "reduce": base + kept + (s.trained * m if s.device.world_size > 1 and not s.sharded else 0),
    }
    return MemoryPlan(S, capacity, resident, outputs, phases, max(phases.values()))


# Sizes, from a recipe and two configs; models are built on the meta device


def this_device() -> Device:
    """The device that this process trains on: CUDA's current one, or the CPU, whose RAM a machine's processes share."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        free, _ = torch.cuda.mem_get_info()
        # What other processes hold is not ours, what our own allocator has reserved is.
        return Device("cuda", free + torch.cuda.memory_reserved(), world_size)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Device("cpu", available_ram() // local + resident_ram(), world_size)


def read_target(recipe: Recipe, device: Device) -> FrozenTarget:
    """The target without weights, from its config.json; ValueError if that is wrong."""
    return FrozenTarget.from_recipe(recipe.target, torch.device(device.kind), where="meta")


def read_sizes(recipe: Recipe, device: Device, target: FrozenTarget | None = None) -> Sizes:
    """The sizes of a recipe that has not been started; ValueError where the target's or the drafter's config is wrong."""
    target = target or read_target(recipe, device)
    start, shaped = read_start(recipe, target)
    draft = make_draft_config(shaped, target, shaped.draft.mask_token_id or 0, start.config if start else None)
    return sizes_of(recipe, target, draft, device)


def sizes_of(recipe: Recipe, target: TargetBase, config: PEagleDraftConfig, device: Device) -> Sizes:
    """The sizes of a run. `target`: on a device, on meta, or a `StoredTarget`."""
    with torch.device("meta"):
        draft = PEagleDraft(config)
    draft.lm_head.requires_grad_(recipe.draft.trains_head(config.hidden_size == target.hidden_size))
    draft.embed_tokens.requires_grad_(recipe.draft.train_embeddings)
    all_of_it = sum(p.numel() for p in draft.parameters())
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    item = target.cache_dtype(recipe.target.cache_dtype).itemsize if recipe.target.cache else 0
    sharded = device.world_size > 1 and check_sharding(recipe.train.sharding)
    weights, forward, outputs = _target(recipe, target, device)
    return Sizes(recipe, config, device, all_of_it, trained, outputs, item, weights, forward, sharded)


def _target(recipe: Recipe, target: TargetBase, device: Device) -> tuple[int, int, int]:
    """Bytes of the target's weights on the device, of its largest forward, and of one number of its outputs."""
    settings = recipe.target
    if settings.cache or settings.server or not isinstance(target, FrozenTarget):  # it is not on this device
        return 0, 0, target.dtype.itemsize
    model, config = target.model, target.model.config
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    item = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    stored = getattr(config, "quantization_config", None)
    if next(model.parameters()).is_meta and stored:  # estimated from its bits or method
        bits = stored.get("bits") or {"fp8": 8, "finegrained_fp8": 8}.get(str(stored.get("quant_method")), 16)
        total = math.ceil(total * min(16, int(bits) + 0.5) / 16)
    if settings.shard and device.world_size > 1:
        head = target.head.weight.numel() * item  # type: ignore[operator,union-attr]
        layer = (total - 2 * head) // len(target.layers)  # whole while it runs, and the next one after it
        total = (total - head) // device.world_size + 2 * max(layer, head)
    attention = settings.attn_implementation or config._attn_implementation or "eager"
    return total, _target_forward(target.config, recipe, item, attention, device.kind == "cuda"), item


def _target_forward(config: Any, recipe: Recipe, item: int, attention: str, on_cuda: bool) -> int:
    """Bytes that the target's largest forward needs beside its weights and the outputs that training keeps, from above: one
    layer's activations, attention masks or scores as for packed sequences, and with chunks the keys and values of a
    document as long as a sequence. `attention`: transformers' name; sdpa is taken for our own way to call it.
    """
    B, L, H, heads = recipe.train.batch_size, recipe.data.max_length, config.hidden_size, config.num_attention_heads
    n = min(recipe.target.chunk_tokens or B * L, B * L)
    chunked = n < B * L
    D = getattr(config, "head_dim", None) or H // heads
    A, G = heads * D, (getattr(config, "num_key_value_heads", None) or heads) * D
    experts = getattr(config, "num_experts_per_tok", None) or 0
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    mlp = n * item * (experts * (3 * width + 2 * H) if experts else 3 * config.intermediate_size)
    attending = n * item * (3 * A + 4 * G)
    mask = 0
    if attention == "eager":
        scores = L * n if chunked else B * L * L
        mask = scores * item
        attending += scores * heads * (item + max(item, 4))
    elif attention == "sdpa":  # a bool mask of a block of queries, and the additive one that kernels make of it
        mask = TARGET_BLOCK * L
        attending += mask * item
    if A > G and (attention == "eager" or (on_cuda and attention == "sdpa")):
        attending += 2 * (L if chunked else n) * A * item  # heads of keys and values repeated
    total = 3 * n * H * item + mask + max(mlp, attending)
    if chunked:
        kinds = getattr(config, "layer_types", None) or []
        window = min(L, (getattr(config, "sliding_window", None) or L) + n)
        columns = sum(window if kind == "sliding_attention" else L for kind in kinds) or L * config.num_hidden_layers
        total += 2 * columns * G * item + 2 * L * G * item  # the cache, and a layer's as it is joined anew
    return total


# The table, the choice of S, and what to change


def plan_table(recipe: Recipe, on: str | None = None) -> tuple[str, bool]:
    """The table of memory by number of segments, with which one fits, on this machine or `on` another (`parse_device`);
    and whether any does.
    """
    device = parse_device(on) if on else this_device()
    sizes, asked, margin = read_sizes(recipe, device), recipe.cod.num_segments, recipe.train.memory_margin
    numbers = sorted({*CANDIDATES, *([] if asked == "auto" else [asked])})
    plans = [plan_memory(sizes, S) for S in numbers if S <= recipe.data.max_length]
    rows = [["GiB a device, by segments", *(f"{p.num_segments}{'*' * (p.num_segments == asked)}" for p in plans)]]
    rows.append(["elements of a segment", *(f"{p.capacity:,}" for p in plans)])
    for prefix, groups in (("", [p.resident for p in plans]), ("all, in: ", [p.phases for p in plans])):
        for name in groups[0]:
            if any(group[name] for group in groups):
                rows.append([prefix + name, *(f"{group[name] / GIB:.2f}" for group in groups)])
    rows.append(["peak", *(f"{p.peak / GIB:.2f}" for p in plans)])
    lines = [f"planned, not measured: {device}", aligned(rows, right=True)]
    room = f"{device.budget / GIB:.1f} GiB less {margin:.0%}"
    auto = choose_segments(sizes)
    if fitting := auto or choose_segments(sizes, numbers):  # the recipe's own may be more than auto tries
        which = f"cod.num_segments={'auto would be ' if auto else ''}{fitting.num_segments}"
        lines.append(f"{which}: the fewest that fit into {room}")
    else:
        lines.append(f"no number of segments up to {plans[-1].num_segments} fits into {room}: {advice(sizes)}")
    return "\n".join(lines), fitting is not None


def choose_segments(sizes: Sizes, candidates: Iterable[int] = CANDIDATES) -> MemoryPlan | None:
    """The plan with the fewest segments that leaves train.memory_margin of the device's budget free; None if none does."""
    room = sizes.device.budget * (1 - sizes.recipe.train.memory_margin)
    plans = (plan_memory(sizes, S) for S in candidates if S <= sizes.recipe.data.max_length)
    return next((plan for plan in plans if plan.peak <= room), None)


def resolve_segments(sizes: Sizes) -> tuple[int, str]:
    """The number of segments, auto resolved, the same on all ranks, and a line to log; ValueError on all if none fits."""
    asked, budget, margin = sizes.recipe.cod.num_segments, sizes.device.budget, sizes.recipe.train.memory_margin
    there = f"GiB planned of {budget / GIB:.2f}"
    if asked != "auto":
        peak = plan_memory(sizes, asked).peak
        return asked, f"memory: {peak / GIB:.2f} {there}" + (f", too much: {advice(sizes)}" if peak > budget else "")
    own = choose_segments(sizes)
    S = max(from_all(own.num_segments if own else 2 * CANDIDATES[-1]))
    if S > CANDIDATES[-1]:
        what = f"no number up to {CANDIDATES[-1]} fits ({sizes.device}, {margin:.0%} left free by train.memory_margin)"
        raise ValueError(f"cod.num_segments is auto, and {what}: {advice(sizes)}; `peagle-train plan` shows the table")
    return S, f"cod.num_segments: auto is {S}: {plan_memory(sizes, S).peak / GIB:.2f} {there} ({margin:.0%} left free)"


def advice(sizes: Sizes) -> str:
    """What to change if the recipe needs too much: one line."""
    asked = sizes.recipe.cod.num_segments
    if fitting := choose_segments(sizes, [S for S in CANDIDATES if asked != "auto" and S > asked]):
        return f"set cod.num_segments={fitting.num_segments} ({fitting.peak / GIB:.2f} GiB planned)"
    return (
        "more segments would not help: try train.mixed_precision=bf16, target.cache, target.chunk_tokens=2048, a smaller"
        " train.batch_size, data.max_length or draft.draft_vocab_size, or train.sharding=fsdp2 on several devices"
    )


@contextmanager
def memory_explained(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """Raise RunStopped, with what to change, in place of an out-of-memory error inside. `where`: called only then: what was
    being done, and how to resume.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_device = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # or torch's allocator of RAM
        if not (is_device or "DefaultCPUAllocator" in str(error)):
            raise
        line = f"{where()}: {one_line(error).partition('. ')[0][:200]}"
        with suppress(ValueError, OSError):  # what the recipe names may be gone by now
            line += f"; {advice(read_sizes(recipe, this_device()))}"
        raise RunStopped(line) from None
