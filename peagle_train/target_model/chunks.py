"""How packed sequences are given to the target: as few forwards as keep documents apart and fit into a chunk.

Short documents run side by side without a cache, as many as a chunk holds, and attention is told their bounds. A document
longer than a chunk runs alone, chunk by chunk, over a cache of its own: it needs no more memory than weights, keys and
values, and one chunk. N: tokens of all sequences.
"""

import inspect
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn


class Way(NamedTuple):
    """How packed documents are kept apart, and how many tokens the target is given at a time."""

    apart: bool  # one document at a time, for a target whose attention does not heed documents' bounds
    chunk_tokens: int | None = None  # at most this many tokens a forward; None: the whole batch


def document_bounds(position_ids: Tensor) -> list[int]:
    """Where each document begins among the N tokens of all sequences, ascending, and N: where a sequence does and, as in
    transformers, wherever a position is not the one before plus 1. `position_ids`: int64 [B, L], on the host.
    """
    begins_BL = position_ids.new_ones(position_ids.shape).bool()
    begins_BL[:, 1:] = position_ids.diff(dim=1) != 1
    return [*begins_BL.flatten().nonzero().flatten().tolist(), position_ids.numel()]


def plan_runs(bounds: list[int], way: Way) -> list[list[slice]]:
    """Cut packed sequences, by their `document_bounds`, into runs of at most a chunk, and single documents that are longer.

    Returns spans of the N tokens: those of a run are given one after the other, over a cache if they are several. Where
    documents run one at a time, those of one token (padding is such) are skipped, as they have no position that drafts,
    unless that token is all there is.
    """
    limit = way.chunk_tokens or bounds[-1]
    runs: list[list[slice]] = []
    for start, stop in pairwise(bounds):
        if way.apart and stop - start == 1 and bounds[-1] > 1:
            continue
        if runs and not way.apart and len(runs[-1]) == 1 and stop - runs[-1][0].start <= limit:
            runs[-1] = [slice(runs[-1][0].start, stop)]
        else:
            runs.append([slice(first, min(first + limit, stop)) for first in range(start, stop, limit)])
    return runs


def cache_argument(base: nn.Module) -> str:
    """What the base model calls the cache that it is given: transformers renamed it."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
