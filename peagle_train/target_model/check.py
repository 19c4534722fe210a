"""A few tokens through the target at the start: are features and labels what training takes them for?

Cheap insurance against architectures that were never tried. T: the target's hidden size, n: tokens.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peagle_train.files import one_line
from peagle_train.target_model.chunks import Way

logger = logging.getLogger(__name__)
TOLERANCE = 0.05
"""Of the Euclidean norm: bfloat16 stays below, a mistake does not."""
USUAL = (None, "eager", "sdpa")
"""What transformers attends with unless told otherwise."""
LENGTHS = [6, 5, 2, 3, 7, 3]
"""Of the documents that are run: the first three in one sequence, the others in another."""

Features = Callable[[Tensor, Tensor, Way], tuple[Tensor, Tensor]]
"""`FrozenTarget.features` in a given way."""


def choose_way(model: Any, features: Features, way: Way, vocab_size: int) -> Way:
    """`way`, or the next best one, in which packed documents get what they get alone; ValueError where there is none, and
    where features are not finite.
    """
    name = type(model).__name__
    ids_n = torch.arange(1, 1 + sum(LENGTHS)) % vocab_size
    expected = _alone(model, features, replace(way, flattens=False, chunk_tokens=None), ids_n)
    for what, values in zip(("features", "last hidden states"), expected, strict=True):
        if bad := int((~values.isfinite()).sum()):
            raise ValueError(
                f"target {name} gives {what} that are not finite ({bad} of {values.numel()} values of a few tokens, in"
                f" {str(values.dtype)[6:]}): its weights are damaged, or target.dtype does not hold its numbers (bfloat16"
                " and float32 reach further than float16)"
            )

    document_n = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))

    def error(way: Way) -> float:
        """How far packed documents are off what they give alone, or off themselves beside other documents.

        Both in the worst case, but the first, in 16 bits, in the median: there a few tokens of a model with massive
        activations are off by half when any shape changes, packed or not. A neighbour changes no shape.
        """
        packed = _by_document(features, way, ids_n)
        alone = [relative_pair(a, b) for a, b in zip(packed, zip(*(e.split(LENGTHS) for e in expected)))]
        moved = []
        for one in range(3):  # of each sequence's three documents
            stays_n = document_n % 3 == one
            again = _by_document(features, way, torch.where(stays_n, ids_n, (ids_n + vocab_size // 2) % vocab_size))
            moved += [relative_pair(a, b) for a, b in zip(again[one::3], packed[one::3])]
        is_rough = expected[0].dtype.itemsize < 4
        return max(sorted(alone)[len(alone) // 2] if is_rough else max(alone), *moved)

    def whole_and_chunked(way: Way) -> list[Way]:
        return [replace(way, chunk_tokens=None), *([replace(way, chunk_tokens=4)] if way.chunk_tokens else [])]

    if way.flattens:
        try:
            off = max(map(error, whole_and_chunked(way)))
            why = f"features are {off:.0%} off" if off > TOLERANCE else ""
        except Exception as raised:  # whatever a model raises that knows no such arguments
            why = one_line(raised, 200) or type(raised).__name__
        if not why:
            return way
        logger.warning(
            "target %s does not heed the bounds of packed documents (%s): transformers' own masks keep them apart, which"
            " takes memory for tokens x tokens",
            name,
            why,
        )
        way = replace(way, flattens=False)
    if (off := error(replace(way, chunk_tokens=None))) > TOLERANCE:
        logger.warning(
            "target %s lets packed documents see each other (features are %.0f%% off): it is given one document at a"
            " time, which is right but slower where documents are short",
            name,
            100 * off,
        )
        way = replace(way, apart=True)
    if (off := error(whole_and_chunked(way)[-1])) > TOLERANCE:
        if way.chunk_tokens is None:
            raise ValueError(f"target {name} gives other features in other company ({off:.0%} off): it is unsupported")
        raise ValueError(
            f"target {name} gives other features in chunks ({off:.0%} off): set target.chunk_tokens to null"
        )
    return way


def _by_document(features: Features, way: Way, ids_n: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Features and last hidden states of each document, packed in two sequences."""
    position_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, -1)
    found = features(ids_n.view_as(position_BL), position_BL, way)
    return list(zip(*(values.flatten(0, 1).split(LENGTHS) for values in found)))


def _alone(model: Any, features: Features, way: Way, ids_n: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 3T] and last hidden states [n, T] of documents that have a sequence each, with padding after them."""
    rows_BL = pad_sequence(ids_n.split(LENGTHS), batch_first=True)
    column_BL = torch.arange(rows_BL.shape[1]).expand_as(rows_BL).contiguous()
    try:
        found, last = features(rows_BL, column_BL, way)
    except Exception as raised:  # whatever a kernel raises that transformers does not use unless it is told to
        chosen = model.config.get_text_config()._attn_implementation
        if chosen in USUAL or isinstance(raised, ValueError) or is_out_of_memory(raised):
            raise
        raise ValueError(
            f"target {type(model).__name__} does not run on {model.device.type} in {str(model.dtype)[6:]} with"
            f" target.attn_implementation={chosen} ({type(raised).__name__}: {one_line(raised, 200)}): set"
            " target.attn_implementation to null"
        ) from raised
    own_BL = (column_BL < torch.tensor(LENGTHS)[:, None]).to(found.device)
    return found[own_BL], last[own_BL]


def check_logits(model: Any, ids_1n: Tensor, last_nT: Tensor, rows_mT: Tensor) -> None:
    """ValueError unless the model's own logits are its head's first m rows times its last hidden states.

    Args:
        ids_1n: on the device where the model takes ids, a document of its own. last_nT: its last hidden states.
    """
    rows = nn.Linear(rows_mT.shape[1], rows_mT.shape[0], bias=False, device="meta")
    rows.weight = nn.Parameter(rows_mT.to(last_nT.device), requires_grad=False)
    head = model.get_output_embeddings()
    model.set_output_embeddings(rows)  # no logits of the whole vocabulary
    try:
        position_ids = torch.arange(ids_1n.shape[1], device=ids_1n.device)[None]
        logits_nm = model(input_ids=ids_1n, position_ids=position_ids, use_cache=False).logits[0]
    finally:
        model.set_output_embeddings(head)
    error = relative(logits_nm.to(last_nT.device), last_nT @ rows.weight.T)
    if not error <= TOLERANCE:  # not a number, too
        raise ValueError(
            f"target {type(model).__name__} changes its logits after the head (they are {error:.0%} off head * hidden):"
            " labels would be wrong, it is unsupported"
        )


def relative_pair(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The larger of both `relative`s; infinite if one is not a number."""
    off = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    return math.inf if any(map(math.isnan, off)) else max(off)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host's allocator in torch, had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
