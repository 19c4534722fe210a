"""A few tokens through the target at the start: are features and labels what training takes them for?

Cheap insurance against architectures that nobody here has met.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peagle_train.memory.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from peagle_train.target.frozen import FrozenTarget

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
        except Exception as error:  # whatever a kernel raises that transformers does not use unless it is told to
            chosen = getattr(target.config, "_attn_implementation", None)
            if chosen in USUAL or isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            name, dtype = type(target.model).__name__, str(target.model.dtype)[6:]
            raise ValueError(
                f"target {name} does not run on {target.device.type} in {dtype} with target.attn_implementation={chosen}"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}): set target.attn_implementation to null"
            ) from error
        _refuse_non_finite(target, *expected)
        ids_BL = ids_n.view(2, -1)
        position_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view_as(ids_BL)
        off = _error(target.features(ids_BL, position_BL), expected)
        if not off <= TOLERANCE:  # not a number, too
            logger.warning(
                "target %s lets packed documents see each other (features are %.0f%% off): it is given one document at a"
                " time, which is right but slower where documents are short",
                type(target.model).__name__,
                100 * off,
            )
            target.apart = True
        if chunk_tokens is not None:
            target.chunk_tokens = 4
            off = _error(target.features(ids_BL, position_BL), expected)
            if not off <= TOLERANCE:
                raise ValueError(
                    f"target {type(target.model).__name__} gives other features in chunks ({off:.0%} off): set"
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


def _error(packed: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest error of a document's features or last hidden states."""
    parts = [zip(a.flatten(0, 1).split(LENGTHS), b.split(LENGTHS)) for a, b in zip(packed, expected)]
    errors = [relative(a, b) for part in parts for a, b in part]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


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
