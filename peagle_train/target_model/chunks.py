"""A target's forward in chunks over a cache of keys and values, so that a long document needs no more memory than weights,
keys and values, and one chunk.

transformers isolates packed documents only without a cache. So short documents run side by side without one, as many as a
chunk holds, and a document longer than a chunk runs alone, chunk by chunk, with a fresh cache. N: tokens of all rows.
"""

import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peagle_train.target_model.attention import KINDS


@dataclass(frozen=True)
class Run:
    """Tokens that are given to the target together: columns start to stop of the N tokens."""

    start: int
    stop: int
    chunk: int | None
    """Tokens at a time, over a cache of its own; None: all at once, without a cache."""

    @property
    def forwards(self) -> int:
        return 1 if self.chunk is None else -(-(self.stop - self.start) // self.chunk)


def document_bounds(position_ids: Tensor) -> list[int]:
    """Where each document begins among the N tokens of all rows, ascending, and N.

    Args:
        position_ids: int64 [B, L], on the host. A document begins where a row does and wherever a position is not the
            one before plus 1, which is transformers' rule, too.
    """
    begins_BL = position_ids.new_ones(position_ids.shape).bool()
    begins_BL[:, 1:] = position_ids.diff(dim=1) != 1
    return [*begins_BL.flatten().nonzero().flatten().tolist(), position_ids.numel()]


def plan_runs(bounds: list[int], chunk_tokens: int | None, apart: bool = False) -> list[Run]:
    """Cut packed rows into runs of at most `chunk_tokens` tokens, and single documents that are longer.

    Args:
        bounds: see `document_bounds`.
        chunk_tokens: None for no limit.
        apart: no document shares a run with another. But for those of one token, padding among them: nobody reads their
            features (a document of n tokens has n - 1 rows), so they run together.
    """
    limit = bounds[-1] if chunk_tokens is None else chunk_tokens
    runs: list[Run] = []
    only_single = True  # the last run's documents have one token each
    for start, stop in pairwise(bounds):
        is_single = stop - start == 1
        may_join = not apart or (is_single and only_single)
        if stop - start > limit:
            runs.append(Run(start, stop, limit))
            only_single = False
        elif runs and runs[-1].chunk is None and stop - runs[-1].start <= limit and may_join:
            runs[-1] = Run(runs[-1].start, stop, None)
            only_single &= is_single
        else:
            runs.append(Run(start, stop, None))
            only_single = is_single
    return runs


def bounds_arguments(bounds: list[int], start: int, stop: int, device: torch.device) -> dict[str, Any]:
    """What tells attention where the documents among tokens start to stop lie: in the names of transformers' flash
    attention (which, left to itself, looks at the position ids in every layer, and of one row only), and as a list.
    """
    own = [start, *bounds[bisect_right(bounds, start) : bisect_left(bounds, stop)], stop]
    cumulative = (torch.tensor(own, dtype=torch.int32) - start).to(device, non_blocking=True)
    longest = max(b - a for a, b in pairwise(own))
    return {
        "documents": tuple(bound - start for bound in own),
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def check_chunkable(model: nn.Module, base: nn.Module, config: Any) -> None:
    """ValueError for a target whose layers keep something other than keys and values of all, or of the last, tokens."""
    kinds = sorted({*(getattr(config, "layer_types", None) or [])} - {*KINDS})
    cache = DynamicCache(config=config)
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if kinds or not known or cache_argument(base) is None:
        what = ", ".join(kinds) or "a cache of its own kind"
        raise ValueError(
            f"target.chunk_tokens is given, but target {type(model).__name__} has {what}, where chunks are not known to"
            " give what the whole gives: set target.chunk_tokens to null"
        )


def cache_argument(base: nn.Module) -> str | None:
    """What the base model calls the cache that it is given (transformers renamed it); None if it takes none."""
    names = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def forward_run(
    base: nn.Module,
    config: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    run: Run,
    bounds: list[int] | None,
    begin: Callable[[int, int], None],
    end: Callable[[Tensor], None],
) -> None:
    """Give the base model a run's tokens, chunk by chunk.

    Args:
        input_ids, position_ids: [B, N].
        bounds: see `document_bounds`; None for attention that is not told them.
        begin: called before each forward with its first token and the one behind its last.
        end: called after it with the last hidden states of these tokens, [B, stop - start, T].
    """
    if run.chunk is None:
        begin(run.start, run.stop)
        told = {} if bounds is None else bounds_arguments(bounds, run.start, run.stop, input_ids.device)
        end(_forward(base, input_ids, position_ids, run.start, run.stop, {"use_cache": False, **told}))
        return
    name = cache_argument(base)
    assert name is not None, "check_chunkable lets no such target through"
    cache = {name: DynamicCache(config=config), "use_cache": True}
    for start in range(run.start, run.stop, run.chunk):
        stop = min(start + run.chunk, run.stop)
        begin(start, stop)
        told = {} if bounds is None else bounds_arguments([], start, stop, input_ids.device)
        told.pop("cu_seq_lens_k", None)  # each layer's cache knows how many keys there are
        end(_forward(base, input_ids, position_ids, start, stop, {**cache, **told}))


def _forward(
    base: nn.Module, input_ids: Tensor, position_ids: Tensor, start: int, stop: int, further: dict[str, Any]
) -> Tensor:
    ids, positions = input_ids[:, start:stop], position_ids[:, start:stop]
    return base(input_ids=ids, position_ids=positions, attention_mask=None, **further).last_hidden_state
