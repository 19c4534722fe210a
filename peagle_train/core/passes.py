"""What relay and recompute share: one batch's passes through the drafter, each prepared and run in the same way; and
recompute, the plain step, in which each segment's forward runs its own elements plus every earlier depth-0 element again.

B: sequences, L: positions, N: elements of a pass, n: own elements of a segment, M: leading slots that may hold depth-0
elements, P: context positions, T: the target's hidden size, V: draft vocabulary, K: depths.
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
from peagle_train.core.flex import flex_tables
from peagle_train.core.loss import Loss
from peagle_train.core.plan import Context, Plan, Segment, plan_segments
from peagle_train.core.visibility import Visibility


@dataclass
class TargetOutputs:
    """What the frozen target gives for a batch; on the drafter's device, or on the host to be copied piece by piece."""

    features: Tensor
    """[B, n, F]: n = L, or at least all columns that are no padding."""
    last_hidden: Tensor
    """[B, n, T], after the target's final norm."""
    head: Tensor
    """[V, T], the head's rows of the draft vocabulary; always on the drafter's device."""


@dataclass
class StepStats:
    """Sums over a step's supervised elements, on the device until someone reads them."""

    loss: Tensor
    """Scalar: sum of the elements' losses, times g**depth, unscaled."""
    hits: Tensor
    """int64 [K]: elements whose argmax is the target's, by depth."""
    totals: Tensor
    """int64 [K], on the host: supervised elements by depth."""


@dataclass
class Passes:
    """The passes of one batch.

    ValueError: the target's shapes are not those of batch and drafter, or the drafter cannot take the batch.
    """

    draft: PEagleDraft | CompiledDraft
    """Plain, sharded by FSDP2's `fully_shard`, or compiled."""
    batch: dict[str, Tensor]
    """`CODCollator`'s, on the drafter's device."""
    target: TargetOutputs
    plan: Plan
    """Of this batch."""
    loss: Loss
    chunk_rows: int
    """Both as in `chunked_linear_loss`."""
    depth_decay: float
    """g: an element's loss is multiplied by g**depth."""

    def __post_init__(self) -> None:
        self.window = self.draft.config.sliding_window
        assert self.plan.window == self.window, "the plan is of another drafter"
        self._check_inputs()
        self.device = self.batch["anchor"].device
        wide = torch.promote_types(self.draft.dtype, torch.float32)
        self.stats = StepStats(
            torch.zeros((), dtype=wide, device=self.device),
            torch.zeros(self.plan.num_depths, dtype=torch.int64, device=self.device),
            self.plan.supervised_per_depth,
        )

    def _check_inputs(self) -> None:
        config, plan, target, (B, L) = self.draft.config, self.plan, self.target, self.batch["input_ids"].shape
        if self.window is not None and self.window < plan.num_depths:
            raise ValueError(f"sliding_window is {self.window}, less than the batch's num_depths, {plan.num_depths}")
        T = target.head.shape[-1]
        shapes = {
            "head": (config.draft_vocab_size, T),
            "features": (B, L, config.feature_size),
            "last_hidden": (B, L, T),
        }
        for name, shape in shapes.items():
            found = tuple(getattr(target, name).shape)
            if name != "head" and plan.columns_read <= found[1] <= L:  # padding may be left out
                shape = (B, found[1], shape[2])
            if found != shape:
                raise ValueError(f"the target's {name} has shape {found}; this batch and drafter need {shape}")
        ids, V = plan.token_ids, config.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(
                f"input_ids are {int(ids.min())} to {int(ids.max())}; the drafter's vocabulary is 0..{V - 1}"
            )
        if (ids == self.draft.mask_token_id).any():
            what = f"input_ids hold the mask token, {self.draft.mask_token_id}"
            raise ValueError(f"{what}: give mask_token_id one that never occurs in data")

    def own(self, segment: Segment) -> Elements:
        return gather_elements(self.batch, segment.columns, self.draft.mask_token_id, self.window)

    def context_elements(self, first: Tensor, count: int) -> Elements:
        """The depth-0 elements of `count` columns from `first`, int64 [B], on."""
        column_BP = first.to(self.device, non_blocking=True)[:, None] + torch.arange(count, device=self.device)
        return context_elements(self.batch, column_BP, self.window)

    def run(
        self,
        elements: Elements,
        columns: slice,
        visibility: Visibility,
        *,
        context: list[KV] | None = None,
        keys_values_only: bool = False,
        labels: Labels | None = None,
    ) -> DraftOutput:
        """Gather the depth-0 slots' features out of `columns` (which hold all their anchors) and run the drafter."""
        features = self.target.features[:, columns].to(self.device, non_blocking=True)
        index_BM = (elements.anchor[:, : visibility.num_depth0] - columns.start).clamp(0, features.shape[1] - 1)
        features = features.gather(1, index_BM[:, :, None].expand(-1, -1, features.shape[2]))
        if attention.uses_flex(self.device):
            skips = {0} if self.draft.config.num_hidden_layers > 1 else set()
            if not keys_values_only:
                skips.add(visibility.cut)  # where the last layer's queries begin
            visibility.flex = {skip: flex_tables(visibility, skip) for skip in skips}
        return self.draft(
            elements.token,
            elements.position,
            features,
            visibility,
            context=context,
            keys_values_only=keys_values_only,
            skip=visibility.cut,
            labels=labels,
        )

    def labels(self, own: Elements, segment: Segment) -> Labels:
        """The target's last hidden states of a segment's supervised elements, [m, T]; only these columns leave the host.

        In a static plan of all elements, and which of them count: shapes that do not depend on the data.
        """
        columns = slice(segment.anchors.start + 1, segment.anchors.stop + self.plan.num_depths)
        hidden = self.target.last_hidden[:, columns].to(self.device, non_blocking=True)
        row_N = torch.arange(own.label.shape[0], device=self.device).repeat_interleave(own.label.shape[1])
        column_N = (own.label - columns.start).clamp(0, hidden.shape[1] - 1).flatten()
        depth_N, rows, counted = own.depth.flatten(), None, None
        if self.plan.static:
            counted = own.supervised.flatten()
        else:
            rows = segment.supervised.to(self.device, non_blocking=True)
            row_N, column_N, depth_N = row_N[rows], column_N[rows], depth_N[rows]
        weight = None if self.depth_decay == 1 else self.depth_decay ** depth_N.to(self.stats.loss.dtype)
        return Labels(rows, hidden[row_N, column_N], self.target.head, self.loss, self.chunk_rows, counted, weight)

    def learn(
        self,
        elements: Elements,
        own: Elements,
        columns: slice,
        visibility: Visibility,
        segment: Segment,
        context: list[KV] | None = None,
    ) -> DraftOutput:
        """Run `segment`, whose elements are the last of `elements`, with its loss; counted in `stats`."""
        with record_function("peagle::pass B forward"):
            labels = self.labels(own, segment)
            output = self.run(elements, columns, visibility, context=context, labels=labels)
        assert output.loss is not None and output.hits is not None
        self.stats.loss += output.loss.detach()
        depth = own.depth.flatten()
        if labels.rows is not None:
            depth = depth[labels.rows]
        self.stats.hits.index_add_(0, depth.clamp(min=0), output.hits.long())
        return output

    def idle(self) -> Tensor:
        """A pass over one padding element: a zero with zero gradients. A sharded drafter runs all its collectives."""
        column = self.batch["anchor"].new_zeros(self.batch["anchor"].shape[0], 1)
        elements = context_elements(self.batch, column)._replace(depth=column - 1)
        nothing = column.new_zeros(0)
        labels = Labels(nothing, self.target.head[nothing], self.target.head)
        output = self.run(elements, slice(0, 1), visibility_of(elements, 1, M=1, first_rollout=1), labels=labels)
        assert output.loss is not None and output.hidden is not None
        return output.loss + output.hidden.sum() * 0


def visibility_of(
    elements: Elements, num_depths: int, M: int, first_rollout: int, cut: int = 0, context: Context | None = None
) -> Visibility:
    """Columns are counted from each row's first one of the context; see `Visibility` for the rest."""
    first_B = end_B = elements.anchor.new_zeros(elements.anchor.shape[0])
    if context is not None:
        first_B, end_B = (t.to(first_B.device, non_blocking=True) for t in (context.first, context.end))
    return Visibility(
        start=(elements.start - first_B[:, None]).clamp(min=0),
        anchor=elements.anchor - first_B[:, None],
        depth=elements.depth,
        context_end=end_B - first_B,
        num_context=context.columns if context else 0,
        num_depth0=M,
        first_rollout=first_rollout,
        num_depths=num_depths,
        cut=cut,
    )


def plan_of(batch: dict[str, Tensor], draft: PEagleDraft | CompiledDraft) -> Plan:
    """The `plan_segments` that a drafter's step needs."""
    static, config = isinstance(draft, CompiledDraft), draft.config
    return plan_segments(batch, static, window=config.sliding_window, layers=config.num_hidden_layers)


def recompute_step(
    draft: PEagleDraft | CompiledDraft,
    batch: dict[str, Tensor],
    target: TargetOutputs,
    *,
    scale: float | Tensor = 1.0,
    loss: Loss = "kl",
    chunk_rows: int = 384,
    depth_decay: float = 1.0,
    plan: Plan | None = None,
    backward: Callable[[Tensor], None] | None = torch.autograd.backward,
    min_passes: int = 0,
) -> StepStats:
    """Forward and backward over every segment of a batch, as Algorithm 1 publishes it; parameters' gradients accumulate.

    Exact, and the oracle of the relay, which computes the same without running anything twice. With one segment this is the
    flat pass. Arguments and errors as in `Passes`, and:

    Args:
        plan: `plan_segments` of the batch while it was still on the host; None computes it here.
        scale: multiplies the loss before backward: one over the optimizer step's supervised elements.
        backward: called with each segment's scaled loss; None evaluates only.
        min_passes: run at least this many, the surplus on padding (sharded ranks must agree on the number).
    """
    plan = plan or plan_of(batch, draft)
    passes, segments = Passes(draft, batch, target, plan, loss, chunk_rows, depth_decay), plan.learning
    for segment in segments:
        own = elements = passes.own(segment)
        first, end, P = plan.context(segment.context_end, segment.reads_from, draft.config.num_hidden_layers)
        if P:
            earlier = passes.context_elements(first, P)
            # Rows whose segment starts further left than P own some of these columns themselves.
            is_earlier = earlier.anchor < end.to(passes.device, non_blocking=True)[:, None]
            earlier = earlier._replace(depth=torch.where(is_earlier, earlier.depth, -1))
            elements = Elements(*(torch.cat(pair, dim=1) for pair in zip(earlier, own, strict=True)))
        M, first_rollout = P + segment.num_depth0, P + segment.first_rollout
        visibility = visibility_of(elements, plan.num_depths, M, first_rollout, cut=P)
        columns = slice(min(int(first.min()), segment.anchors.start), segment.anchors.stop)
        of_segment = passes.learn(elements, own, columns, visibility, segment).loss
        del visibility  # masks that the backward does without
        if backward is not None:
            assert of_segment is not None
            backward(of_segment * scale)
    for _ in range(min_passes - len(segments)):
        nothing = passes.idle()
        if backward is not None:
            backward(nothing)
    return passes.stats
