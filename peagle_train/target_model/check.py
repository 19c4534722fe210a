"""A few tokens through the target at the start: are features and labels what training takes them for?

Cheap insurance against architectures that nobody here has met.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peagle_train.files import one_line

if TYPE_CHECKING:
    from peagle_train.target_model.frozen import FrozenTarget

logger = logging.getLogger(__name__)
TOLERANCE = 0.05
"""Of the Euclidean norm: bfloat16 stays below, a mistake does not."""
USUAL = (None, "eager", "sdpa")
"""What transformers attends with of its own accord."""
LENGTHS = [6, 5, 2, 3, 7, 3]
"""Of the documents that are run: the first three in one row, the others in another."""


def check_target(target: "FrozenTarget") -> None:
    """See `FrozenTarget.check`."""
    chunk_tokens, target.chunk_tokens = target.chunk_tokens, None
    try:
        ids_n = torch.arange(1, 1 + sum(LENGTHS)) % target.vocab_size
        try:
            expected = _alone(target, ids_n)
        except Exception as raised:  # whatever a kernel raises that transformers does not use unless it is told to
            chosen = getattr(target.config, "_attn_implementation", None)
            if chosen in USUAL or isinstance(raised, ValueError) or is_out_of_memory(raised):
                raise
            name, dtype = type(target.model).__name__, str(target.model.dtype)[6:]
            raise ValueError(
                f"target {name} does not run on {target.device.type} in {dtype} with target.attn_implementation={chosen}"
                f" ({type(raised).__name__}: {one_line(raised, 200)}): set target.attn_implementation to null"
            ) from raised
        _refuse_non_finite(target, *expected)
        off = partial(_packed_error, target, ids_n, expected)
        chunks = [None] if chunk_tokens is None else [None, 4]
        if target.flattens:
            _check_bounds(target, [partial(off, chunk) for chunk in chunks])
        if not target.flattens and not (error := off(None)) <= TOLERANCE:
            logger.warning(
                "target %s lets packed documents see each other (features are %.0f%% off): it is given one document at a"
                " time, which is right but slower where documents are short",
                type(target.model).__name__,
                100 * error,
            )
            target.apart = True
        if not target.flattens and not (error := off(chunks[-1])) <= TOLERANCE:
            raise ValueError(
                f"target {type(target.model).__name__} gives other features in chunks ({error:.0%} off): set"
                " target.chunk_tokens to null"
            )
        _check_logits(target, ids_n[: LENGTHS[0]], expected[1][: LENGTHS[0]])
    finally:
        target.chunk_tokens = chunk_tokens


def _alone(target: "FrozenTarget", ids_n: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 3T] and last hidden states [n, T] of documents that have a row each, with padding after them."""
    rows_BL = pad_sequence(ids_n.split(LENGTHS), batch_first=True)
    column_BL = torch.arange(rows_BL.shape[1]).expand_as(rows_BL).contiguous()
    flattens, target.flattens = target.flattens, False
    try:
        features, last = target.features(rows_BL, column_BL)
    finally:
        target.flattens = flattens
    own_BL = (column_BL < torch.tensor(LENGTHS)[:, None]).to(features.device)
    return features[own_BL], last[own_BL]


def _packed_error(
    target: "FrozenTarget", ids_n: Tensor, expected: tuple[Tensor, Tensor], chunk_tokens: int | None
) -> float:
    """The largest error of a document's features or last hidden states, packed in two rows."""
    target.chunk_tokens = chunk_tokens
    position_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, -1)
    found = target.features(ids_n.view_as(position_BL), position_BL)
    pairs = [p for a, b in zip(found, expected) for p in zip(a.flatten(0, 1).split(LENGTHS), b.split(LENGTHS))]
    return max(math.inf if math.isnan(error) else error for error in (relative(a, b) for a, b in pairs))


def _check_bounds(target: "FrozenTarget", errors: list[Callable[[], float]]) -> None:
    """Leave documents to transformers where telling attention their bounds does not do."""
    try:
        error = max(measure() for measure in errors)
        if error <= TOLERANCE:
            return
        why = f"features are {error:.0%} off"
    except Exception as raised:  # whatever a model raises that knows no such arguments
        why = one_line(raised, 200)
    logger.warning(
        "target %s does not heed the bounds of packed documents (%s): transformers' own masks keep them apart, which takes"
        " memory for tokens x tokens",
        type(target.model).__name__,
        why,
    )
    target.flattens = False


def _refuse_non_finite(target: "FrozenTarget", features: Tensor, last: Tensor) -> None:
    for what, values in (("features", features), ("last hidden states", last)):
        bad = int((~values.isfinite()).sum())
        if bad:
            raise ValueError(
                f"target {type(target.model).__name__} gives {what} that are not finite ({bad} of {values.numel()} values"
                f" of a few tokens, in {str(values.dtype)[6:]}): its weights are damaged, or target.dtype does not hold its"
                " numbers (bfloat16 and float32 reach further than float16)"
            )


def _check_logits(target: "FrozenTarget", ids_n: Tensor, last: Tensor) -> None:
    """The model's own logits must be its head's rows times its last hidden states [n, T]."""
    model: Any = target.model
    position_ids = torch.arange(ids_n.numel(), device=target.device)[None]
    given = {"input_ids": ids_n[None].to(target.device), "position_ids": position_ids, "use_cache": False}
    name = type(model).__name__
    if target.has_plain_head:
        some = torch.arange(min(8, target.vocab_size), device=target.device)
        rows = nn.Linear(target.hidden_size, some.numel(), bias=False, device="meta")
        rows.weight = nn.Parameter(target.head_rows(some).to(last.device), requires_grad=False)
        tied = getattr(target.config, "tie_word_embeddings", False)
        model.set_output_embeddings(rows)
        try:
            logits = model(**given).logits[0]
        finally:
            model.set_output_embeddings(target.head)
        assert getattr(target.config, "tie_word_embeddings", False) == tied
        error = relative(logits.to(last.device), last @ rows.weight.T)
        what = f"changes its logits after the head (they are {error:.0%} off head * hidden)"
    else:
        logits = model(**given).logits[0]
        error = relative(logits.to(last.device), last @ target.head_weight().T)
        what = (
            f"has a quantised head ({type(target.head).__name__}) whose logits are {error:.0%} off the matrix that it"
            " multiplies by"
        )
    if not error <= TOLERANCE:  # not a number, too
        raise ValueError(f"target {name} {what}: labels would be wrong, it is unsupported")


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host's allocator in torch, had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
