"""A few tokens through the target at the start: are features and labels what training takes them for? n: tokens."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from peagle_train.files import one_line
from peagle_train.target_model.chunks import Way

logger = logging.getLogger(__name__)
TOLERANCE = 0.05  # of the Euclidean norm: bfloat16 stays below, a mistake does not
LENGTHS = [6, 5, 2, 3, 7, 3]  # of the documents that are run: the first three in one sequence, the others in another

Features = Callable[[Tensor, Tensor, Way], tuple[Tensor, Tensor]]  # `FrozenTarget.features` in a given way


def choose_way(name: str, features: Features, way: Way, vocab_size: int) -> Way:
    """`way`, or one document at a time where packed ones do not get what they get alone. `name`: the target's.

    ValueError: features are not finite, or chunks give others.
    """
    ids_n = torch.arange(1, 1 + sum(LENGTHS)) % vocab_size
    document_n = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, -1)

    def run(way: Way, ids_n: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features and last hidden states of each document, packed in two sequences."""
        packed = features(ids_n.view_as(position_BL), position_BL, way)
        return list(zip(*(values.flatten(0, 1).split(LENGTHS) for values in packed), strict=True))

    expected = run(Way(apart=True), ids_n)
    for what, parts in zip(("features", "last hidden states"), zip(*expected), strict=True):
        if not all(bool(values.isfinite().all()) for values in parts):
            what = f"{what} that are not finite in {str(parts[0].dtype)[6:]}"
            raise ValueError(f"target {name} gives {what}: its weights are damaged, or target.dtype is too narrow")

    def error(way: Way) -> float:
        """How far packed documents are off what they give alone, or off themselves beside other documents.

        Both in the worst case, but the first, in 16 bits, in the median: there a few tokens of a model with massive
        activations are off by half when any shape changes, packed or not. A neighbour changes no shape.
        """
        packed = run(way, ids_n)
        alone = sorted(max(map(relative, a, b)) for a, b in zip(packed, expected, strict=True))
        moved = []
        for one in range(3):  # of each sequence's three documents
            others_n = torch.where(document_n % 3 == one, ids_n, (ids_n + vocab_size // 2) % vocab_size)
            moved += [max(map(relative, a, b)) for a, b in zip(run(way, others_n)[one::3], packed[one::3], strict=True)]
        is_rough = expected[0][0].dtype.itemsize < 4
        return max(alone[len(alone) // 2] if is_rough else alone[-1], *moved)

    for one in dict.fromkeys((way, way._replace(apart=True))):
        try:
            off = max(error(one._replace(chunk_tokens=n)) for n in ((None, 4) if way.chunk_tokens else (None,)))
            why = f"features are {off:.0%} off" if off > TOLERANCE else ""
        except Exception as raised:  # whatever a model raises that knows no such arguments
            why = one_line(raised, 200) or type(raised).__name__
        if not why:
            return one
        if not one.apart:
            what = "does not heed the bounds of packed documents"
            logger.warning("target %s %s (%s): one document at a time, right but slower", name, what, why)
    raise ValueError(f"target {name} gives other features in chunks ({why}): set target.chunk_tokens to null")


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite if that is not a number."""
    found, expected = found.double(), expected.double()
    off = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(off) else off
