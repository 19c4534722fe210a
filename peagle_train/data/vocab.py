"""The drafter's vocabulary: the target's most frequent tokens, in the form that engines read (d2t, t2d)."""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peagle_train.data.chat_template import read_template
from peagle_train.errors import one_line

if TYPE_CHECKING:
    from peagle_train.data.document_table import DocumentTable
    from peagle_train.data.sources import Document
    from peagle_train.recipe import Data

logger = logging.getLogger(__name__)


def choose_draft_vocab(
    data: Sequence["Document"] | tuple[Tensor, Tensor],
    vocab_size: int,
    draft_vocab_size: int,
    always: Iterable[int] = (),
) -> Tensor:
    """`choose_most_frequent` of the supervised tokens of `data`: documents, or flat `(input_ids, loss_mask)`."""
    return choose_most_frequent(count_supervised(data, vocab_size), draft_vocab_size, always)


def choose_most_frequent(counts_V: Tensor, draft_vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """The tokens to draft: `always`, then the most frequent supervised ones (of equals, the lower id first).

    Args:
        counts_V: int64 [V], V the target's vocabulary: see `count_supervised`. Not changed.
        draft_vocab_size: Vd in 1..V.
        always: special and end tokens that the drafter must be able to draft, whatever their frequency.

    Returns:
        int64 [Vd], ascending.
    """
    vocab_size = counts_V.numel()
    if not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"draft_vocab_size is {draft_vocab_size}, but the target's vocabulary has {vocab_size} tokens:"
            f" give 1 to {vocab_size}"
        )
    kept = sorted(set(always))
    outside = [token for token in kept if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"token {outside[0]} must always be drafted, but the vocabulary is 0..{vocab_size - 1}")
    if len(kept) > draft_vocab_size:
        raise ValueError(
            f"draft_vocab_size is {draft_vocab_size}, but {len(kept)} tokens must always be drafted:"
            f" give at least {len(kept)}"
        )
    rank_V = counts_V.clone()
    rank_V[kept] = torch.iinfo(torch.int64).max
    # Stable: equal counts stay in ascending order of ids, those of tokens never seen included.
    order_V = torch.sort(rank_V, descending=True, stable=True).indices
    return order_V[:draft_vocab_size].sort().values


def count_supervised(data: Sequence["Document"] | tuple[Tensor, Tensor], vocab_size: int) -> Tensor:
    """int64 [V]: how often each token occurs with a loss mask of 1."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        pairs = [data]
    else:
        pairs = [(document.input_ids, document.loss_mask) for document in data]
    supervised = torch.cat([torch.zeros(0, dtype=torch.int64), *(ids[mask != 0].long() for ids, mask in pairs)])
    if supervised.numel() and not 0 <= int(supervised.min()) <= int(supervised.max()) < vocab_size:
        raise ValueError(f"the data holds ids outside of the vocabulary 0..{vocab_size - 1}")
    return torch.bincount(supervised, minlength=vocab_size)


def count_repeated(table: "DocumentTable", times_D: np.ndarray, vocab_size: int) -> Tensor:
    """int64 [V]: `count_supervised` of a table's documents, each counted as often as `times_D` (int64) says."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    shards = zip(table.store.shards, table.store.starts, table.store.starts[1:], strict=False)
    for (ids, mask), begin, end in shards:
        own = (table.starts_D >= begin) & (table.starts_D < end)
        times_n = torch.from_numpy(np.repeat(times_D[own], table.lengths_D[own]))
        for times in np.unique(times_D[own]).tolist():
            counts_V += times * count_supervised((ids, mask * (times_n == times)), vocab_size)
    return counts_V


def t2d_mask(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """bool [V]: which of the target's tokens can be drafted (vLLM's `t2d`)."""
    mask_V = torch.zeros(vocab_size, dtype=torch.bool)
    mask_V[draft_ids] = True
    return mask_V


def coverage(draft_ids: Tensor, counts_V: Tensor) -> float:
    """Share of the counted occurrences whose token can be drafted."""
    total = int(counts_V.sum())
    if total == 0:
        raise ValueError("no supervised token was counted, so a draft vocabulary covers no share of them")
    return int(counts_V[draft_ids].sum()) / total


def default_mask_token_id(tokenizer: Any, vocab_size: int) -> int | None:
    """The first id behind all that the tokenizer knows, if the model's vocabulary has one; else None.

    Rows that pad the embedding table are the only ids that provably never occur in text.
    """
    known = tokenizer.get_vocab().values()
    first_unused = max(known, default=-1) + 1
    return first_unused if first_unused < vocab_size else None


def eos_token_ids(*sources: Any) -> list[int]:
    """What ends a text according to configs, generation configs and tokenizers: their `eos_token_id`, one or many."""
    ids: set[int] = set()
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos} if eos is not None else set()
    return sorted(ids)


def end_of_turn_ids(tokenizer: Any, data: "Data | None" = None) -> list[int]:
    """The added token that the chat template puts behind an assistant's answer ([]: none, or no template).

    It ends most answers, and not every model's configs name it. The template and its variables are those of `data`, a
    recipe's section, where it gives them.
    """
    given = None if data is None or data.chat_template is None else read_template(data.chat_template)
    if tokenizer is None or (given is None and not getattr(tokenizer, "chat_template", None)):
        return []
    variables = (None if data is None else data.template_kwargs) or {}
    answer = "placeholder"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(chat, chat_template=given, tokenize=False, **variables)
    except Exception as error:  # templates raise what they like
        logger.warning("the chat template fails, so its end of turn is not known: %s", one_line(error, 200))
        return []
    _, found, behind = text.rpartition(answer)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []
