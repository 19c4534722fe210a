"""A few tokens through the target at the start: are features and labels what training takes them for?

Cheap insurance against architectures that nobody here has met.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peagle_train.memory.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from peagle_train.target.frozen import FrozenTarget

logger = logging.getLogger(__name__)
TOLERANCE = 0.05
"""Of the Euclidean norm: bfloat16 stays below, a mistake does not."""
USUAL = (None, "eager", "sdpa")
"""What transformers attends with of its own accord."""


def check_target(target: "FrozenTarget") -> None:
    """See `FrozenTarget.check`."""
    chunk_tokens, target.chunk_tokens = target.chunk_tokens, None
    try:
        ids = torch.arange(1, 12, device=target.device)[None] % target.vocab_size
        position = torch.cat([torch.arange(6), torch.arange(5)]).to(target.device)[None]
        try:
            features, last = _isolated(target, ids, position)
            _refuse_non_finite(target, features, last)
        except Exception as error:  # whatever a kernel raises that transformers does not use unless it is told to
            chosen = getattr(target.config, "_attn_implementation", None)
            if chosen in USUAL or isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            name, dtype = type(target.model).__name__, str(target.model.dtype)[6:]
            raise ValueError(
                f"target {name} does not run on {target.device.type} in {dtype} with target.attn_implementation={chosen}"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}): set target.attn_implementation to null"
            ) from error
        if chunk_tokens is not None:
            _check_chunks(target, ids, position, features, last)
        _check_logits(target, ids[:, :6], position[:, :6], last[:, :6])
    finally:
        target.chunk_tokens = chunk_tokens


def _isolated(target: "FrozenTarget", ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Features and last hidden states of two packed documents; from here on, the second's are what it gets alone."""
    name = type(target.model).__name__
    packed, last = target.features(ids, position)
    alone, alone_last = target.features(ids[:, 6:], position[:, 6:])
    _refuse_non_finite(target, alone, alone_last)
    error = relative(packed[:, 6:], alone)
    if error <= TOLERANCE:
        return packed, last
    logger.warning(
        "target %s lets packed documents see each other (features are %.0f%% off): it is given one document at a time,"
        " which is right but slower where documents are short",
        name,
        100 * error,
    )
    target.apart = True
    return target.features(ids, position)


def _refuse_non_finite(target: "FrozenTarget", features: Tensor, last: Tensor) -> None:
    for what, values in (("features", features), ("last hidden states", last)):
        bad = int((~values.isfinite()).sum())
        if bad:
            raise ValueError(
                f"target {type(target.model).__name__} gives {what} that are not finite ({bad} of {values.numel()} values"
                f" of a few tokens, in {str(values.dtype)[6:]}): its weights are damaged, or target.dtype does not hold its"
                " numbers (bfloat16 and float32 reach further than float16)"
            )


def _check_chunks(target: "FrozenTarget", ids: Tensor, position: Tensor, features: Tensor, last: Tensor) -> None:
    target.chunk_tokens = 4
    chunked, chunked_last = target.features(ids, position)
    error = max(relative(chunked, features), relative(chunked_last, last))
    if not error <= TOLERANCE:  # not a number, too
        raise ValueError(
            f"target {type(target.model).__name__} gives other features in chunks ({error:.0%} off): set"
            " target.chunk_tokens to null"
        )


def _check_logits(target: "FrozenTarget", ids: Tensor, position: Tensor, last: Tensor) -> None:
    """The model's own logits must be its head's rows times its last hidden states."""
    model: Any = target.model
    name = type(model).__name__
    if target.has_plain_head:
        some = torch.arange(min(8, target.vocab_size), device=target.device)
        rows = nn.Linear(target.hidden_size, some.numel(), bias=False, device="meta")
        rows.weight = nn.Parameter(target.head_rows(some).to(last.device), requires_grad=False)
        tied = getattr(target.config, "tie_word_embeddings", False)
        model.set_output_embeddings(rows)
        try:
            logits = model(input_ids=ids, position_ids=position, use_cache=False).logits
        finally:
            model.set_output_embeddings(target.head)
        assert getattr(target.config, "tie_word_embeddings", False) == tied
        error = relative(logits.to(last.device), last @ rows.weight.T)
        what = f"changes its logits after the head (they are {error:.0%} off head * hidden)"
    else:
        logits = model(input_ids=ids, position_ids=position, use_cache=False).logits
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
