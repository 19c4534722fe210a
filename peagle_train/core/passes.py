"""What relay and recompute share: one batch's passes through the drafter, each prepared and run in the same way.

B: sequences, L: positions, N: elements of a pass, n: own elements of a segment, M: leading slots that may hold depth-0
elements, P: context positions, T: the target's hidden size, V: draft vocabulary, K: depths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from peagle_train.core import attention
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import KV, DraftOutput, Labels, PEagleDraft
from peagle_train.core.elements import Elements, context_elements, gather_elements
from peagle_train.core.loss import Loss
from peagle_train.core.plan import Plan, Segment, plan_segments
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


class Passes:
    """The passes of one batch.

    Args:
        draft: the drafter (plain, sharded by FSDP2's `fully_shard`, or a `CompiledDraft`).
        batch: `CODCollator`'s, on the drafter's device.
        target: features and last hidden states of the same rows; ValueError where their shapes are not those of the batch.
        plan: `plan_segments` of the batch while it was still on the host; None computes it here.
        loss, chunk_rows: see `chunked_linear_loss`.
        depth_decay: g; an element's loss is multiplied by g**depth.
    """

    def __init__(
        self,
        draft: PEagleDraft | CompiledDraft,
        batch: dict[str, Tensor],
        target: TargetOutputs,
        plan: Plan | None,
        loss: Loss,
        chunk_rows: int,
        depth_decay: float,
    ) -> None:
        self.draft, self.batch, self.target, self.loss, self.chunk_rows = draft, batch, target, loss, chunk_rows
        self.depth_decay = depth_decay
        self.window, layers = draft.config.sliding_window, draft.config.num_hidden_layers
        static = isinstance(draft, CompiledDraft)
        self.plan = plan = plan or plan_segments(batch, static, window=self.window, layers=layers)
        assert plan.window == self.window, "the plan is of another drafter"
        if self.window is not None and self.window < plan.num_depths:
            raise ValueError(
                f"the drafter's sliding_window is {self.window}, the batch's num_depths {plan.num_depths}: give at least as"
                " many positions"
            )
        check_target(draft, batch, target, plan)
        check_tokens(draft, plan)
        self.device = batch["anchor"].device
        wide = torch.promote_types(draft.dtype, torch.float32)
        self.stats = StepStats(
            torch.zeros((), dtype=wide, device=self.device),
            torch.zeros(plan.num_depths, dtype=torch.int64, device=self.device),
            plan.supervised_per_depth,
        )

    def learning(self) -> list[Segment]:
        """The segments that own a supervised element."""
        return [s for s in self.plan.segments if s.supervised.numel()]

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
        skip = visibility.cut
        if attention.uses_flex(self.device):
            from peagle_train.core.flex import flex_tables_of_pass

            layers = self.draft.config.num_hidden_layers
            visibility.flex = flex_tables_of_pass(visibility, layers, keys_values_only, skip)
        return self.draft(
            elements.token,
            elements.position,
            features,
            visibility,
            context=context,
            keys_values_only=keys_values_only,
            skip=skip,
            labels=labels,
        )

    def labels(self, own: Elements, segment: Segment) -> Labels:
        """The target's last hidden states of a segment's supervised elements, [m, T]; only these columns leave the host.

        In a static plan of all elements, and which of them count: shapes that do not depend on the data.
        """
        hidden = self.target.last_hidden[:, segment.labels].to(self.device, non_blocking=True)
        column_Bn = (own.label - segment.labels.start).clamp(0, hidden.shape[1] - 1)
        B, n = column_Bn.shape
        head, loss, chunk_rows = self.target.head, self.loss, self.chunk_rows
        weight = None
        if self.depth_decay != 1:
            weight = torch.pow(self.depth_decay, own.depth.flatten().to(self.stats.loss.dtype))
        if self.plan.static:
            row_B1 = torch.arange(B, device=self.device)[:, None]
            hidden = hidden[row_B1, column_Bn].flatten(0, 1)
            return Labels(None, hidden, head, loss, chunk_rows, own.supervised.flatten(), weight)
        rows = segment.supervised.to(self.device, non_blocking=True)
        weight = None if weight is None else weight[rows]
        return Labels(rows, hidden[rows // n, column_Bn.flatten()[rows]], head, loss, chunk_rows, None, weight)

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
    elements: Elements,
    num_depths: int,
    M: int,
    first_rollout: int,
    cut: int = 0,
    num_context: int = 0,
    context_first: Tensor | None = None,
    context_end: Tensor | None = None,
) -> Visibility:
    """context_first, context_end: int64 [B], each row's context is the columns between; None: 0."""
    device, none = elements.anchor.device, elements.anchor.new_zeros(elements.anchor.shape[0])
    first_B, end_B = (none if t is None else t.to(device, non_blocking=True) for t in (context_first, context_end))
    return Visibility(
        start=(elements.start - first_B[:, None]).clamp(min=0),
        anchor=elements.anchor - first_B[:, None],
        depth=elements.depth,
        context_end=end_B - first_B,
        num_context=num_context,
        num_depth0=M,
        first_rollout=first_rollout,
        num_depths=num_depths,
        cut=cut,
    )


def check_target(
    draft: PEagleDraft | CompiledDraft, batch: dict[str, Tensor], target: TargetOutputs, plan: Plan
) -> None:
    """ValueError where the target's shapes are not those of batch and drafter."""
    config, head = draft.config, target.head
    B, L = batch["input_ids"].shape
    if head.dim() != 2 or head.shape[0] != config.draft_vocab_size:
        raise ValueError(
            f"the target's head has shape {tuple(head.shape)}; the drafter's vocabulary needs"
            f" {config.draft_vocab_size} rows"
        )
    widths = (
        ("features", target.features, config.feature_size),
        ("last_hidden", target.last_hidden, head.shape[1]),
    )
    for name, tensor, width in widths:
        fits = tensor.dim() == 3 and (tensor.shape[0], tensor.shape[2]) == (B, width)
        if not fits or not plan.columns_read <= tensor.shape[1] <= L:
            raise ValueError(
                f"the target's {name} have shape {tuple(tensor.shape)}; this batch needs ({B}, {L}, {width}), where the"
                f" second may be as small as {plan.columns_read}, padding left out"
            )


def check_tokens(draft: PEagleDraft | CompiledDraft, plan: Plan) -> None:
    """ValueError for ids that the drafter has no embedding for, or its mask token; they are on the host."""
    ids, vocab_size = plan.token_ids, draft.config.vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"input_ids hold token {wrong}; the drafter's vocabulary is 0..{vocab_size - 1}")
    if (ids == draft.mask_token_id).any():
        raise ValueError(
            f"input_ids hold the mask token, {draft.mask_token_id}: give mask_token_id one that never occurs in data"
        )
