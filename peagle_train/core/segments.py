"""One training step over a batch's segments, flat (S = 1) or as Algorithm 1 publishes it: each segment's forward runs its
own elements plus every earlier depth-0 element again, then goes backward at once.

Exact, and the oracle of the relay, which computes the same without running anything twice. B: rows, L: columns, N: elements
of a pass, P: context columns, T: the target's hidden size, V: draft vocabulary, K: depths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from peagle_train.core import attention
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import KV, DraftOutput, Labels, PEagleDraft
from peagle_train.core.elements import Elements, context_elements, gather_elements
from peagle_train.core.plan import Plan, Segment, plan_segments
from peagle_train.core.visibility import Visibility

Backward = Callable[[Tensor], None]


@dataclass
class TargetOutputs:
    """What the frozen target gives for a batch; on the drafter's device, or on the host to be copied piece by piece."""

    features: Tensor
    """[B, n, 3T]: n = L, or at least all columns that are no padding."""
    last_hidden: Tensor
    """[B, n, T], after the target's final norm."""
    head: Tensor
    """[V, T], the head's rows of the draft vocabulary; always on the drafter's device."""


@dataclass
class StepStats:
    """Sums over a step's supervised elements, on the device until someone reads them."""

    loss: Tensor
    """Scalar: sum of the elements' losses, unscaled."""
    hits: Tensor
    """int64 [K]: elements whose argmax is the target's, by depth."""
    totals: Tensor
    """int64 [K], on the host: supervised elements by depth."""


def new_stats(plan: Plan, device: torch.device, dtype: torch.dtype = torch.float32) -> StepStats:
    K = plan.supervised_per_depth.numel()
    return StepStats(
        torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=device),
        torch.zeros(K, dtype=torch.int64, device=device),
        plan.supervised_per_depth,
    )


def recompute_step(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
    *,
    num_depths: int | None = None,
    scale: float | Tensor = 1.0,
    loss: str = "kl",
    chunk_rows: int = 384,
    plan: Plan | None = None,
    backward: Backward | None = torch.autograd.backward,
    min_passes: int = 0,
) -> StepStats:
    """Forward and backward over every segment of a batch; parameters' gradients accumulate.

    With one segment this is the flat pass.

    Args:
        draft: the drafter (plain, sharded by FSDP2's `fully_shard`, or a `CompiledDraft`).
        batch: `CODCollator`'s, on the drafter's device.
        target: features and last hidden states of the same rows; ValueError where their shapes are not those of the batch.
        num_depths: K; None: the batch's own. ValueError for another.
        scale: multiplies the loss before backward: one over the optimizer step's supervised elements.
        loss, chunk_rows: see `chunked_linear_loss`.
        plan: `plan_segments` of the batch while it was still on the host; None computes it here.
        backward: called with each segment's scaled loss; None evaluates only.
        min_passes: run at least this many, the surplus on padding (sharded ranks must agree on the number).
    """
    plan = plan or plan_segments(batch, num_depths, static=isinstance(draft, CompiledDraft))
    check_step(draft, batch, target, plan, num_depths)
    stats = new_stats(plan, batch["anchor"].device, draft.dtype)
    passes = [s for s in plan.segments if s.supervised.numel()]
    for segment in passes:
        own = gather_elements(batch, segment.columns, draft.mask_token_id)
        P = segment.num_context
        if P:
            earlier = context_elements(batch, slice(0, P))
            # Rows whose segment starts further left than P own some of these columns themselves.
            context_end = segment.context_end.to(earlier.anchor.device, non_blocking=True)
            foreign = earlier.anchor < context_end[:, None]
            earlier = earlier._replace(depth=torch.where(foreign, earlier.depth, -1))
            elements = Elements(*(torch.cat(pair, dim=1) for pair in zip(earlier, own, strict=True)))
        else:
            elements = own
        visibility = visibility_of(
            elements, plan.num_depths, M=P + segment.num_depth0, first_rollout=P + segment.first_rollout, cut=P
        )
        labels = labels_of(own, segment, target, loss, chunk_rows, plan.static)
        with record_function("peagle::pass B forward"):
            output = run(draft, elements, target, slice(0, segment.anchors.stop), visibility, skip=P, labels=labels)
        account(stats, output, own, segment)
        of_segment = output.loss
        del output, visibility, labels  # hidden states, keys and values that the backward does without
        if backward is not None:
            assert of_segment is not None
            backward(of_segment * scale)
    for _ in range(min_passes - len(passes)):
        nothing = idle_pass(draft, batch, target)
        if backward is not None:
            backward(nothing)
    return stats


def check_step(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
    plan: Plan,
    num_depths: int | None,
) -> None:
    """ValueError where target, tokens or K are not those of the batch; reads shapes and the host's tensors alone."""
    if num_depths not in (None, plan.num_depths):
        raise ValueError(
            f"num_depths is {num_depths}, but the batch is of {plan.num_depths} depths: leave num_depths out"
        )
    config, head = draft.config, target.head
    B, L = batch["input_ids"].shape
    T = config.target_hidden_size
    assert T is not None
    if head.dim() != 2 or head.shape[0] != config.draft_vocab_size:
        raise ValueError(
            f"the target's head has shape {tuple(head.shape)}; the drafter's vocabulary needs"
            f" {config.draft_vocab_size} rows"
        )
    widths = ("features", target.features, 3 * T), ("last_hidden", target.last_hidden, head.shape[1])
    for name, tensor, width in widths:
        fits = tensor.dim() == 3 and (tensor.shape[0], tensor.shape[2]) == (B, width)
        if not fits or not plan.columns_read <= tensor.shape[1] <= L:
            raise ValueError(
                f"the target's {name} have shape {tuple(tensor.shape)}; this batch needs ({B}, {L}, {width}), where the"
                f" second may be as small as {plan.columns_read}, padding left out"
            )
    ids = plan.token_ids
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"input_ids hold token {wrong}; the drafter's vocabulary is 0..{config.vocab_size - 1}")
    if (ids == draft.mask_token_id).any():
        raise ValueError(
            f"input_ids hold the mask token, {draft.mask_token_id}: choose one that never occurs in data as ptd_token_id"
        )


def visibility_of(
    elements: Elements,
    num_depths: int,
    M: int,
    first_rollout: int,
    cut: int = 0,
    num_context: int = 0,
    context_end: Tensor | None = None,
) -> Visibility:
    if context_end is None:
        context_end = elements.anchor.new_zeros(elements.anchor.shape[0])
    return Visibility(
        start=elements.start,
        anchor=elements.anchor,
        depth=elements.depth,
        context_end=context_end.to(elements.anchor.device, non_blocking=True),
        num_context=num_context,
        num_depth0=M,
        first_rollout=first_rollout,
        num_depths=num_depths,
        cut=cut,
    )


def labels_of(
    own: Elements, segment: Segment, target: TargetOutputs, loss: str, chunk_rows: int, static: bool = False
) -> Labels:
    """The target's last hidden states of a segment's supervised elements, [m, T]; only these columns leave the host.

    static: of all elements, and which of them count: shapes that do not depend on the data.
    """
    device = own.anchor.device
    hidden = target.last_hidden[:, segment.labels].to(device, non_blocking=True)
    column_BN = (own.label - segment.labels.start).clamp(0, hidden.shape[1] - 1)
    B, n = column_BN.shape
    if static:
        row_B1 = torch.arange(B, device=device)[:, None]
        counted = own.supervised.flatten()
        return Labels(None, hidden[row_B1, column_BN].flatten(0, 1), target.head, loss, chunk_rows, counted)
    rows = segment.supervised.to(device, non_blocking=True)
    return Labels(rows, hidden[rows // n, column_BN.flatten()[rows]], target.head, loss, chunk_rows)


def run(
    draft: PEagleDraft | CompiledDraft,
    elements: Elements,
    target: TargetOutputs,
    columns: slice,
    visibility: Visibility,
    *,
    context: list[KV] | None = None,
    keys_values_only: bool = False,
    skip: int = 0,
    labels: Labels | None = None,
) -> DraftOutput:
    """Gather the depth-0 slots' features out of `columns` (which hold all their anchors) and run the drafter."""
    device = elements.anchor.device
    M = visibility.num_depth0
    features = target.features[:, columns].to(device, non_blocking=True)
    index_BM = (elements.anchor[:, :M] - columns.start).clamp(0, features.shape[1] - 1)
    features = features.gather(1, index_BM[:, :, None].expand(-1, -1, features.shape[2]))
    if attention.uses_flex(device):
        from peagle_train.core.flex import flex_tables_of_pass

        visibility.flex = flex_tables_of_pass(visibility, draft.config.num_hidden_layers, keys_values_only, skip)
    return draft(
        elements.token,
        elements.position,
        features,
        visibility,
        context=context,
        keys_values_only=keys_values_only,
        skip=skip,
        labels=labels,
    )


def account(stats: StepStats, output: DraftOutput, own: Elements, segment: Segment) -> None:
    """Add a pass's loss and hits to the step's."""
    assert output.loss is not None and output.hits is not None
    stats.loss += output.loss.detach()
    depth = own.depth.flatten()
    if output.hits.shape != depth.shape:
        depth = depth[segment.supervised.to(depth.device, non_blocking=True)]
    stats.hits.index_add_(0, depth.clamp(min=0), output.hits.long())


def idle_pass(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
) -> Tensor:
    """A pass over one padding element: a zero whose gradients are zero, but every collective of a sharded drafter takes
    place.
    """
    column = batch["anchor"].new_zeros(batch["anchor"].shape[0], 1)
    elements = context_elements(batch, slice(0, 1))._replace(depth=column - 1)
    visibility = visibility_of(elements, num_depths=1, M=1, first_rollout=1)
    nothing = column.new_zeros(0)
    labels = Labels(nothing, target.head[nothing], target.head)
    output = run(draft, elements, target, slice(0, 1), visibility, labels=labels)
    assert output.loss is not None and output.hidden is not None
    return output.loss + output.hidden.sum() * 0
