"""What a training step keeps in memory, computed from sizes alone: nothing is loaded, nothing is run.

A step's phases follow each other, and the peak is the largest of them:

    target      the target's forward; features and last hidden states appear
    loss        a segment's activations are all there, and a chunk of both models' logits on top
    backward    the same activations, and the gradients that begin to run through the last layer
    embedding   the activations are gone, and a dense gradient of the embeddings is added to the one of earlier segments;
                autocast's copies of the weights are kept for the next segment, and their gradients come last
    reduce      the gradients' second copy, where ranks sum them

AdamW, fused, makes nothing beside its state. What autograd saves is listed layer by layer in `saved_bytes`, as draft.py
computes; tests hold it against what autograd really holds. Everything is in bytes. N: elements of a pass, Q: of these the
last layer's queries, M: slots whose features are gathered, P: context columns, H: the drafter's hidden size, T: the
target's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from peagle_train.core.partition import max_elements, segment_capacity
from peagle_train.core.visibility import MASK_BLOCK_BYTES, MASK_CACHE_BYTES, QUERY_BLOCK

GIB = 2**30
CUDA_CONTEXT = GIB
"""CUDA's context, cuBLAS's workspaces, compiled kernels: assumed, not computed."""
CPU_EXTRA = 2**27
"""What libraries keep beside tensors (oneDNN's kernels and scratch, the allocator's holes): assumed, not computed."""
BLOCK = 128
"""flex_attention's."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Sizes:
    """Everything that memory depends on but the number of segments; counts of elements unless they say bytes."""

    batch_size: int
    length: int
    """Columns of a row, L."""
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
    """Of a number of features as a cache has it, where there is one."""
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
    """Keys that a layer's attention joins beside its own (CUDA): context columns."""
    context: int
    """Columns whose keys and values enter as leaves (relay)."""


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

    all_supervised: rows without a prompt, which have more rollouts, hence fewer depth-0 slots where passes are not padded.
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
    """C: elements of a row's segment."""
    s = sizes
    if num_segments == 1:
        return max_elements(s.length, s.num_depths, s.ratio, s.ratio_min)
    return segment_capacity(s.length, s.num_depths, s.ratio, s.ratio_min, num_segments, s.boundaries)


def saved_bytes(sizes: Sizes, one: Pass) -> int:
    """The most that autograd holds at a time for a pass, masks, parameters and the relay's buffers not counted."""
    return max(_saved(sizes, one))


def _saved(s: Sizes, one: Pass) -> tuple[int, int]:
    """What autograd holds behind the forward, and the most that it holds in the backward."""
    c, N, Q = s.compute_bytes, one.N, one.Q
    # The position ids' tables, the token ids, fc's input.
    before = one.M * 3 * s.target_hidden * c + 2 * N * s.head_dim * c + 8 * N
    behind = _norm(s, Q) + Q * s.hidden * c + 8 * Q + (s.draft_vocab * s.hidden * s.wide if s.train_head else 0)
    layers = [_layer(s, one, i) for i in range(s.layers)]
    if not s.checkpointing:
        whole = before + sum(layers) + behind + (s.linear_weights * c if s.autocast else 0)
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
    return before + (s.layers + 1) * inputs + behind + fc_copy, max(peaks) + fc_copy


def _norm(s: Sizes, n: int) -> int:
    """RMSNorm of n rows: its input and a number a row; on a CPU a wide copy of the input, and one of what becomes of it."""
    return n * (s.hidden * s.compute_bytes + s.wide if s.on_cuda else (2 * s.hidden + 1) * s.wide)


def _layer(s: Sizes, one: Pass, index: int) -> int:
    """One layer's. The norms' inputs are the residual stream, which nothing else holds."""
    c, N = s.compute_bytes, one.N
    Q = one.Q if index == s.layers - 1 else N
    entering = 2 * _norm(s, N) + 2 * N * s.hidden * c if index == 0 else _norm(s, N) + N * s.hidden * c
    attention = 2 * Q * s.query_size * c + Q * s.heads * s.wide + 2 * (N + one.joined) * s.kv_size * c
    mlp = _norm(s, Q) + Q * s.hidden * c + 4 * Q * s.intermediate * c
    return entering + attention + mlp


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

    behind_forward, in_backward = _saved(s, one)
    kept = 0 if s.offload_features and s.on_cuda else outputs
    kept += 0 if s.on_cuda else B * L * 4 * T * s.cached_bytes  # read ahead
    pieces = one.M * 3 * T * t  # gathered out of the features, for one segment
    hidden = one.Q * (T * t + H * c)  # labels gathered out of the last hidden states, and what they are compared with
    # Flex attention's keys are a copy, context first; the pass's own are there until it has answered, or are handed on.
    own = 2 * one.N * s.kv_size * c * s.layers if s.on_cuda else 0
    batch = B * L * 24 + S * capacity_of(s, S) * B * 25 + one.N * 8 * 7
    masks = _masks(s, one)
    chunk = min(s.chunk_rows, one.Q) * V * (3 * w + (c if c != w else 0))
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
        "saved for backward": max(behind_forward, in_backward),
        "loss chunk": chunk,
        "gradients in flight": flowing,
        "masks and tables": masks + batch,
    }
    during = base + kept + pieces + masks + batch
    phases = {
        "target": base + outputs + s.target_forward + B * L * 24,
        "loss": during + unsaved + behind_forward + own + hidden + chunk,
        "backward": during + (unsaved if S > 1 else 0) + in_backward + (own if relay else 0) + flowing,
    }
    again = S > 1 or s.accumulates
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
    attention = 2 * (one.N + one.context) * s.kv_size * (c + w) + 2 * one.Q * s.query_size * c
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
    """Those that a row has columns for."""
    return [S for S in candidates if S <= sizes.length]
