"""One training step over a batch's segments, flat (S = 1) or as Algorithm 1 publishes it: each segment's forward runs its
own elements plus every earlier depth-0 element again, then goes backward at once.

Exact, and the oracle of the relay, which computes the same without running anything twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.elements import Elements
from peagle_train.core.loss import Loss
from peagle_train.core.passes import Passes, StepStats, TargetOutputs, visibility_of
from peagle_train.core.plan import Plan, Segment


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
    """Forward and backward over every segment of a batch; parameters' gradients accumulate.

    With one segment this is the flat pass. Arguments and errors as in `Passes`, and:

    Args:
        scale: multiplies the loss before backward: one over the optimizer step's supervised elements.
        backward: called with each segment's scaled loss; None evaluates only.
        min_passes: run at least this many, the surplus on padding (sharded ranks must agree on the number).
    """
    passes = Passes(draft, batch, target, plan, loss, chunk_rows, depth_decay)
    plan, segments = passes.plan, passes.learning()
    for segment in segments:
        own, layers = passes.own(segment), draft.config.num_hidden_layers
        first, P = plan.context(segment.context_end, segment.reads_from, layers)
        elements = _after_context(passes, segment, first, P, own) if P else own
        visibility = visibility_of(
            elements, plan.num_depths, P + segment.num_depth0, first_rollout=P + segment.first_rollout, cut=P
        )
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


def _after_context(passes: Passes, segment: Segment, first: Tensor, P: int, own: Elements) -> Elements:
    """A segment's own elements after the depth-0 elements of the P columns from `first`, int64 [B], on."""
    earlier = passes.context_elements(first, P)
    # Rows whose segment starts further left than P own some of these columns themselves.
    context_end = segment.context_end.to(earlier.anchor.device, non_blocking=True)
    earlier = earlier._replace(depth=torch.where(earlier.anchor < context_end[:, None], earlier.depth, -1))
    return Elements(*(torch.cat(pair, dim=1) for pair in zip(earlier, own, strict=True)))
