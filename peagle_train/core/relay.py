"""Relay: exact segments at the cost of a single pass.

Depth-0 elements never look at deeper ones, and every element looks at the past through depth-0 keys and values only. So a
segment needs of its past nothing but those keys and values, and owes the past nothing but their gradients:

    pass A, no grad, left to right: depth-0 columns through all layers; each layer's keys and values are kept (of the last
        layer only they are computed). Columns that no later segment reads are left out.
    pass B, right to left: each segment's own elements with grad, the earlier keys and values entering as leaves. Back-
        propagated are the segment's loss and <K_own, dK_own> + <V_own, dV_own>, where dK_own, dV_own are what the
        segments to the right have handed back; the leaves' gradients are handed on to the left.

Every element runs with grad exactly once, and activations of one segment exist at a time. `recompute_step` is the oracle.
B: rows, L: columns, P: context columns, W: the most of them in any pass, G: key/value heads, D: head dim.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.profiler import record_function

from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import KV, PEagleDraft
from peagle_train.core.elements import Elements
from peagle_train.core.loss import Loss
from peagle_train.core.passes import Passes, StepStats, TargetOutputs, plan_of, visibility_of
from peagle_train.core.plan import Context, Plan
from peagle_train.core.visibility import GRID

Backward = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]


class RelayBuffers:
    """Each layer's keys and values by column, [B, G, L, D], and their gradients, [B, G, W, D], of the columns that are
    context; made once, used by every step.

    Keys and values are in the dtype that the drafter computes them in, gradients in float32 or wider.
    """

    def __init__(self) -> None:
        self.keys_values: list[KV] = []
        self.gradients: list[KV] = []
        self.first: Tensor | None = None
        """int64 [B], on the host: the column of the gradients' first slot; None where none are owed yet."""
        self._made_for: object = None

    def prepare(self, passes: Passes) -> None:
        """Allocate what these passes need, unless it is here already.

        Zeroed for each batch: columns that it does not write are masked out, but no mask hides an earlier batch's nan.
        """
        config, device, (B, L) = passes.draft.config, passes.device, passes.batch["input_ids"].shape
        heads, head_dim, W = config.num_key_value_heads, config.head_dim, passes.plan.most_context()
        assert heads is not None and head_dim is not None
        dtype = passes.draft.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:  # which it leaves as it is
            dtype = torch.get_autocast_dtype(device.type)
        wanted = (config.num_hidden_layers, B, heads, L, W, head_dim, dtype, device)

        def pairs(columns: int, dtype: torch.dtype) -> list[KV]:
            made = [torch.empty(B, heads, columns, head_dim, dtype=dtype, device=device) for _ in range(2 * wanted[0])]
            return list(zip(made[::2], made[1::2]))

        if self._made_for != wanted:
            self.keys_values, self.gradients = [], []  # let go of the old ones first
            self.keys_values, self.gradients = pairs(L, dtype), pairs(W, torch.promote_types(dtype, torch.float32))
            self._made_for = wanted
        for tensor in chain(*self.keys_values, *self.gradients):
            tensor.zero_()

    def context(self, context: Context, with_gradients: bool) -> list[KV] | None:
        """Keys and values of these columns: views, but for several rows that may differ; None of no column. With gradients,
        leaves: what they get is added to the buffers the moment it is known, then freed.
        """
        starts, columns = context.first.tolist(), context.columns

        def cut(tensor: Tensor, gradient: Tensor) -> Tensor:
            if len(starts) == 1 or columns == tensor.shape[2]:
                out = tensor[:, :, starts[0] : starts[0] + columns]
            else:
                rows = zip(tensor, starts, strict=True)
                out = torch.stack([row[:, start : start + columns] for row, start in rows])

            def hand_back(leaf: Tensor) -> None:
                assert leaf.grad is not None
                gradient[:, :, :columns] += leaf.grad
                leaf.grad = None

            if with_gradients:
                out = out.detach().requires_grad_()
                out.register_post_accumulate_grad_hook(hand_back)
            return out

        pairs = zip(self.keys_values, self.gradients, strict=True)
        return [(cut(k, dk), cut(v, dv)) for (k, v), (dk, dv) in pairs] if columns else None

    def owed(self, own: Elements) -> list[KV]:
        """What segments to the right owe these elements' keys and values: [B, G, n, D], zero where depth is not 0."""
        assert self.first is not None
        slot_Bn = own.anchor - self.first.to(own.anchor.device, non_blocking=True)[:, None]
        is_owed_B1n1 = ((own.depth == 0) & (slot_Bn >= 0))[:, None, :, None]
        dtype = self.keys_values[0][0].dtype

        def take(gradient: Tensor) -> Tensor:
            G, W, D = gradient.shape[1:]
            slot_B1n1 = slot_Bn.clamp(0, W - 1)[:, None, :, None]
            taken = gradient.gather(2, slot_B1n1.expand(-1, G, -1, D))
            return torch.where(is_owed_B1n1, taken, 0).to(dtype)

        return [(take(dk), take(dv)) for dk, dv in self.gradients]

    def move(self, first: Tensor) -> None:
        """Let the gradients' slots begin at columns `first`, int64 [B] on the host.

        What is pushed out has been handed to the segment that owns it, or is zero.
        """
        shifts = [0] * first.numel() if self.first is None else (self.first - first).tolist()
        self.first = first
        for tensor in chain(*self.gradients):
            for row_GWD, shift in zip(tensor, shifts, strict=True):
                if shift:
                    is_new = slice(shift) if shift > 0 else slice(shift, None)
                    row_GWD.copy_(row_GWD.roll(shift, dims=1))[:, is_new] = 0


def relay_step(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
    *,
    scale: float | Tensor = 1.0,
    loss: Loss = "kl",
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
    plan, buffers = plan or plan_of(batch, draft), buffers or RelayBuffers()
    passes = Passes(draft, batch, target, plan, loss, chunk_rows, depth_decay)
    segments = plan.learning if backward is None else plan.segments
    contexts = [plan.context(s.context_end, s.reads_from) for s in segments]
    buffers.first = None
    if any(context.columns for context in contexts):
        buffers.prepare(passes)
    chunks = context_chunks(plan)
    least_a, least_b = min_passes or (0, 0)

    with record_function("peagle::pass A"), torch.no_grad():
        for columns in chunks:
            _run_context(passes, buffers, columns, chunks[0].start)
        for _ in range(least_a - len(chunks)):
            passes.idle()
    torch.clear_autocast_cache()  # weights cast without grad in pass A must not serve pass B

    for segment, context in zip(reversed(segments), reversed(contexts), strict=True):
        own = passes.own(segment)
        visibility = visibility_of(own, plan.num_depths, segment.num_depth0, segment.first_rollout, context=context)
        read = buffers.context(context, with_gradients=backward is not None)
        has_labels = segment.supervised.numel() > 0
        # Sharded ranks and compiled drafters run every pass in full, whether it has something to learn or not.
        if has_labels or min_passes is not None or plan.static:
            output = passes.learn(own, own, segment.anchors, visibility, segment, read)
        else:
            output = passes.run(own, segment.anchors, visibility, context=read, keys_values_only=True)
        if backward is None:
            continue
        tensors: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if output.loss is not None:
            assert output.hidden is not None
            # Without labels the hidden states still tie every parameter in, at no weight.
            tensors.append(output.loss * scale if has_labels else output.loss + output.hidden.sum() * 0)
            gradients.append(None)
        if buffers.first is not None:
            for pair, owed in zip(output.keys_values, buffers.owed(own), strict=True):
                tensors += pair
                gradients += owed
            del pair, owed
        if context.columns:
            buffers.move(context.first)
        del output, read, visibility
        backward(tensors, gradients)
        del tensors, gradients
    for _ in range(least_b - len(segments)):
        nothing = passes.idle()
        if backward is not None:
            backward([nothing], [None])
    return passes.stats


def context_chunks(plan: Plan) -> list[slice]:
    """Columns for pass A: those that some segment reads, in runs no longer than the longest segment is.

    In a static plan every run is as long as the longest segment can be, and begins on the grid or is the row's last; it may
    overlap the one before, and computes the same again.
    """
    read = plan.read.nonzero().flatten()
    if not read.numel():
        return []
    first, end = int(read[0]), int(read[-1]) + 1
    if plan.static:
        size = min(plan.capacity, plan.row_length)
        step = size // GRID * GRID or size
        starts = (min(start, plan.row_length - size) for start in range(first // GRID * GRID, end, step))
        chunks = [slice(start, start + size) for start in starts]
    else:
        size = max(s.num_elements for s in plan.segments)
        chunks = [slice(start, min(start + size, end)) for start in range(first, end, size)]
    return [chunk for chunk in chunks if plan.read[chunk].any()]


def _run_context(passes: Passes, buffers: RelayBuffers, columns: slice, reads_from: int) -> None:
    """Pass A over some columns, which read columns from `reads_from` on: write their keys and values into the buffers."""
    n, B = columns.stop - columns.start, passes.batch["input_ids"].shape[0]
    context = passes.plan.context(torch.full((B,), columns.start), torch.full((B,), reads_from))
    elements = passes.context_elements(context.end, n)
    visibility = visibility_of(elements, passes.plan.num_depths, n, first_rollout=n, context=context)
    read = buffers.context(context, with_gradients=False)
    output = passes.run(elements, columns, visibility, context=read, keys_values_only=True)
    for (k, v), (key, value) in zip(buffers.keys_values, output.keys_values, strict=True):
        k[:, :, columns], v[:, :, columns] = key, value
