"""Relay: exact segments at the cost of a single pass.

Depth-0 elements never look at deeper ones, and every element looks at the past through depth-0 keys and values only. So a
segment needs of its past nothing but those keys and values, and owes the past nothing but their gradients:

    pass A, no grad, left to right: depth-0 columns through all layers; each layer's keys and values are kept (of the last
        layer only they are computed). Columns to the left and to the right of all that later segments read are left out.
    pass B, right to left: each segment's own elements with grad, the earlier keys and values entering as leaves. Back-
        propagated are the segment's loss and <K_own, dK_own> + <V_own, dV_own>, where dK_own, dV_own are what the
        segments to the right have handed back; the leaves' gradients are handed on to the left.

Every element runs with grad exactly once, and activations of one segment exist at a time. Algorithm 1 (recompute.py) is the
oracle. B: rows, L: columns, P: context columns, M: own slots that may hold depth-0 elements, G: key/value heads, D: head
dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import KV, PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.elements import Elements, context_elements
from peagle_train.core.passes import Passes, StepStats, TargetOutputs, visibility_of
from peagle_train.core.plan import Plan, Segment
from peagle_train.core.visibility import GRID

Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]


class RelayBuffers:
    """Each layer's keys, values and their gradients, [B, G, L, D], by column; made once, used by every step.

    Keys and values are in the dtype that the drafter computes them in, gradients in float32 or wider.
    """

    def __init__(self) -> None:
        self.keys_values: list[KV] = []
        self.gradients: list[KV] = []
        self._made_for: object = None

    def prepare(self, config: PEagleDraftConfig, batch_size: int, length: int, like: Tensor) -> None:
        """Allocate for rows of `length` columns in the dtype and on the device of `like`, unless that is here already."""
        assert config.num_key_value_heads is not None and config.head_dim is not None
        shape = (batch_size, config.num_key_value_heads, length, config.head_dim)
        wanted = (config.num_hidden_layers, shape, like.dtype, like.device)
        if self._made_for == wanted:
            return
        self.keys_values, self.gradients = [], []  # let go of the old ones first
        wide = torch.promote_types(like.dtype, torch.float32)

        def pair(dtype: torch.dtype) -> KV:
            key, value = (torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(2))
            return key, value

        self.keys_values = [pair(like.dtype) for _ in range(config.num_hidden_layers)]
        self.gradients = [pair(wide) for _ in range(config.num_hidden_layers)]
        self._made_for = wanted

    def forget(self, owed: int) -> None:
        """Before each batch, which may owe gradients to the first `owed` columns.

        Columns that it does not write are masked out, but no mask hides an earlier batch's nan.
        """
        for pair in self.keys_values:
            for tensor in pair:
                tensor.zero_()
        for pair in self.gradients:
            for tensor in pair:
                tensor[:, :, :owed] = 0

    def context(self, columns: int) -> list[KV]:
        """Views of the first `columns` columns."""
        return [(k[:, :, :columns], v[:, :, :columns]) for k, v in self.keys_values]

    def leaves(self, columns: int) -> list[KV]:
        """As `context`, but leaves whose gradients are added to the buffers the moment they are known, then freed."""

        def leaf(value: Tensor, gradient: Tensor) -> Tensor:
            out = value[:, :, :columns].detach().requires_grad_()

            def hand_back(tensor: Tensor) -> None:
                assert tensor.grad is not None
                gradient[:, :, :columns] += tensor.grad
                tensor.grad = None

            out.register_post_accumulate_grad_hook(hand_back)
            return out

        return [(leaf(k, dk), leaf(v, dv)) for (k, v), (dk, dv) in zip(self.keys_values, self.gradients, strict=True)]


def relay_step(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
    *,
    num_depths: int | None = None,
    scale: float | Tensor = 1.0,
    loss: str = "kl",
    chunk_rows: int = 384,
    depth_decay: float = 1.0,
    plan: Plan | None = None,
    buffers: RelayBuffers | None = None,
    backward: Backward | None = torch.autograd.backward,
    min_passes: tuple[int, int] | None = None,
) -> StepStats:
    """Forward and backward over every segment of a batch; parameters' gradients accumulate.

    The loss and every gradient are those of the flat pass. Arguments as in `recompute_step`, and:

    Args:
        buffers: kept by the caller from step to step, so that nothing large is allocated twice.
        backward: called with (tensors, their gradients), as `torch.autograd.backward`; None evaluates only.
        min_passes: for sharded drafters, whose ranks must agree on the number of passes: (A, B) passes that this rank runs
            at least, the surplus on padding. Segments then take part in all layers and in the loss even where they have
            nothing to learn, so that every parameter gets a gradient in every pass.
    """
    passes = Passes(draft, batch, target, num_depths, plan, loss, chunk_rows, depth_decay)
    plan, buffers = passes.plan, buffers or RelayBuffers()
    segments = passes.learning() if backward is None else needed_segments(plan)
    end = max((int(s.context_end.max()) for s in segments), default=0)  # columns that pass A is about
    if any(s.num_context for s in segments):
        like = torch.empty(0, dtype=compute_dtype(draft, passes.device), device=passes.device)
        B, L = batch["input_ids"].shape
        buffers.prepare(draft.config, B, L, like)
        buffers.forget(0 if backward is None else end)
    chunks = context_chunks(plan, segments)
    least_a, least_b = min_passes or (0, 0)

    with record_function("peagle::pass A"), torch.no_grad():
        for columns in chunks:
            _run_context(passes, buffers, columns)
        for _ in range(least_a - len(chunks)):
            passes.idle()
    torch.clear_autocast_cache()  # weights cast without grad in pass A must not serve pass B

    for segment in reversed(segments):
        own, P = passes.own(segment), segment.num_context
        visibility = visibility_of(
            own,
            plan.num_depths,
            segment.num_depth0,
            first_rollout=segment.first_rollout,
            num_context=P,
            context_end=segment.context_end,
        )
        context = None if P == 0 else buffers.context(P) if backward is None else buffers.leaves(P)
        has_labels = segment.supervised.numel() > 0
        # Sharded ranks and compiled drafters run every pass in full, whether it has something to learn or not.
        if has_labels or min_passes is not None or plan.static:
            output = passes.learn(own, own, segment.anchors, visibility, segment, context)
        else:
            output = passes.run(own, segment.anchors, visibility, context=context, keys_values_only=True)
        if backward is None:
            continue
        tensors: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if output.loss is not None:
            assert output.hidden is not None
            # Without labels the hidden states still tie every parameter in, at no weight.
            tensors.append(output.loss * scale if has_labels else output.loss + output.hidden.sum() * 0)
            gradients.append(None)
        if end:
            for pair, owed in zip(output.keys_values, handed_back(buffers, own, end), strict=True):
                tensors += pair
                gradients += owed
            del pair, owed
        del output, context, visibility
        backward(tensors, gradients)
        del tensors, gradients
    for _ in range(least_b - len(segments)):
        nothing = passes.idle()
        if backward is not None:
            backward([nothing], [None])
    return passes.stats


def needed_segments(plan: Plan) -> list[Segment]:
    """Segments that own something to learn, or whose keys some segment to their right, itself needed, can see."""
    needed: list[Segment] = []
    reads_from = None  # int64 [B], first column that the needed segments read
    for segment in reversed(plan.segments):
        is_read = reads_from is not None and bool((reads_from <= segment.latest).any())
        if segment.supervised.numel() or is_read:
            needed.append(segment)
            reads_from = segment.earliest if reads_from is None else torch.minimum(reads_from, segment.earliest)
    return needed[::-1]


def context_chunks(plan: Plan, passes: list[Segment]) -> list[slice]:
    """Columns for pass A: from the first that some pass reads to the last, in runs no longer than the longest segment is.

    In a static plan every run is as long as the longest segment can be, and begins on the grid or is the row's last; it may
    overlap the one before, and computes the same again.
    """
    first, end = plan.row_length, 0
    for segment in passes:
        reads_B = segment.earliest < segment.context_end
        if reads_B.any():
            first = min(first, int(segment.earliest[reads_B].min()))
            end = max(end, int(segment.context_end[reads_B].max()))
    if plan.static:
        size = min(plan.capacity, plan.row_length)
        step = size // GRID * GRID or size
        starts = (min(start, plan.row_length - size) for start in range(first // GRID * GRID, end, step))
        return [slice(start, start + size) for start in starts]
    size = max((s.num_elements for s in plan.segments), default=1)
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def compute_dtype(draft: PEagleDraft | CompiledDraft, device: torch.device) -> torch.dtype:
    """The dtype of the drafter's keys and values: autocast's where that is on, which leaves float64 as it is."""
    autocast = torch.is_autocast_enabled(device.type) and draft.dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if autocast else draft.dtype


def _run_context(passes: Passes, buffers: RelayBuffers, columns: slice) -> None:
    """Pass A over some columns: write their keys and values into the buffers."""
    elements = context_elements(passes.batch, columns)
    n, start = columns.stop - columns.start, columns.start
    P = passes.plan.row_length if passes.plan.pad_context else start
    visibility = visibility_of(
        elements,
        passes.plan.num_depths,
        n,
        first_rollout=n,
        num_context=P,
        context_end=torch.full((elements.anchor.shape[0],), start),
    )
    context = buffers.context(P) if P else None
    output = passes.run(elements, columns, visibility, context=context, keys_values_only=True)
    for (k, v), (key, value) in zip(buffers.keys_values, output.keys_values, strict=True):
        k[:, :, columns], v[:, :, columns] = key, value


def handed_back(buffers: RelayBuffers, own: Elements, length: int) -> list[KV]:
    """What the segments to the right owe this one's keys and values: [B, G, n, D], zero where depth is not 0."""
    anchor_B1n1 = own.anchor.clamp(max=length - 1)[:, None, :, None]
    is_read_B1n1 = ((own.depth == 0) & (own.anchor < length))[:, None, :, None]

    def take(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        G, D = gradient.shape[1], gradient.shape[3]
        taken = gradient.gather(2, anchor_B1n1.expand(-1, G, -1, D))
        return torch.where(is_read_B1n1, taken, 0).to(dtype)

    dtype = buffers.keys_values[0][0].dtype
    return [(take(dk, dtype), take(dv, dtype)) for dk, dv in buffers.gradients]
