"""The target's tokenizer and special tokens, and the drafter's vocabulary. V: the target's ids, Vd: the drafter's."""

import logging
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from peagle_train.config import Data, Draft
from peagle_train.data.chat import ChatTemplate, read_template
from peagle_train.data.documents import Documents, SourceReport, find_all, read_documents
from peagle_train.data.encode import Encoder
from peagle_train.files import one_line

logger = logging.getLogger(__name__)

_CHUNK_TOKENS = 2**20
_SAMPLE_DOCUMENTS = 1000


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a target's folder; None, with a line in the log, where none can be used (ids need none)."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("target %s has no usable tokenizer (%s)", path, one_line(error, 200))
        return None


def load_config(path: str, trust_remote_code: bool) -> Any:
    """transformers' config of a target's folder; ValueError, one line, for a folder that is none."""
    if not (Path(path) / "config.json").is_file():
        hint = "of the hub: hf download NAME --local-dir DIR; for a plan its config.json is enough"
        what = "is not a folder or has no config.json; give a Hugging Face model folder"
        raise ValueError(f"target.path {path} {what} ({hint})")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a foreign or corrupt file makes transformers raise
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ValueError(f"target.path {path} has a config.json that cannot be read: {reason}") from error


def choose_mask_token(draft: Draft, data: Data, tokenizer: Any, vocab_size: int) -> int:
    """The recipe's mask token, or one that no text has: an id beyond the tokenizer's, or a token that its name reserves
    (an example that holds it all the same is refused). ValueError, with candidates, if there is none.
    """
    if (given := draft.mask_token_id) is not None:
        if given >= vocab_size:
            raise ValueError(
                f"draft.mask_token_id is {given}; it must lie in 0..{vocab_size - 1}, the target's vocabulary"
            )
        return given
    # Rows that pad the embedding table are the only ids that provably never occur in text.
    first_unused = vocab_size if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    if first_unused < vocab_size:
        logger.warning("draft.mask_token_id is %d, the first id that the tokenizer never produces", first_unused)
        return first_unused
    special = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    names = {i: name for i, name in sorted(special.items()) if i < vocab_size}
    for i, name in names.items():
        if re.search(r"reserved|unused", name, re.IGNORECASE):
            logger.warning("draft.mask_token_id is %d, %s, which the tokenizer reserves", i, name)
            return i
    # Texts may begin and end with these.
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad", "unk")}
    free = set(range(vocab_size)).difference(used, eos_token_ids(tokenizer), end_of_turn_ids(tokenizer, data))
    encoder = Encoder(data, tokenizer, vocab_size)
    read = read_documents(find_all(data)["sources"], SourceReport(), encoder, "100%")
    for _, example in islice(read, _SAMPLE_DOCUMENTS):
        free.difference_update(example.input_ids.tolist())
    candidates = [i for i in names if i in free] + sorted(free.difference(names), reverse=True)
    shown = ", ".join(f"{i} ({names[i]})" if i in names else str(i) for i in candidates[:6])
    missing = "draft.mask_token_id is missing and no id of the target's vocabulary is provably unused"
    unseen = f"not in its first {_SAMPLE_DOCUMENTS} documents: {shown or 'none'}"
    raise ValueError(f"{missing}: give the id of a token that never occurs in your data nor in prompts; {unseen}")


def eos_token_ids(*sources: Any) -> list[int]:
    """What ends a text according to configs, generation configs and tokenizers: their `eos_token_id`, one or many."""
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return sorted({i for eos in named for i in (eos if isinstance(eos, (list, tuple)) else [eos]) if i is not None})


def end_of_turn_ids(tokenizer: Any, data: Data | None = None) -> list[int]:
    """The added token that the chat template (`data`'s own, if it gives one) puts after an assistant's answer; [] for
    none. It ends most answers, and not every model's configs name it.
    """
    given, variables = (None, None) if data is None else (read_template(data.chat_template), data.template_kwargs)
    if tokenizer is None or not (given or getattr(tokenizer, "chat_template", None)):
        return []
    try:
        after = ChatTemplate(tokenizer, given, variables or {}).after_answer
    except ValueError as error:
        logger.warning("the end of a turn is not known: %s", error)
        return []
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[:1] if ids and ids[0] in tokenizer.added_tokens_decoder else []


def count_supervised(documents: Documents, times_D: np.ndarray, vocab_size: int) -> Tensor:
    """int64 [V]: how often each token occurs with a loss mask of 1, documents counted as often as `times_D` says."""
    store, starts_D, counts_V = documents.store, documents.starts_D, np.zeros(vocab_size, np.int64)
    for first in range(0, store.ids_n.size, _CHUNK_TOKENS):
        ids_n = store.ids_n[first : first + _CHUNK_TOKENS]
        document_n = np.searchsorted(starts_D, np.arange(first, first + ids_n.size), side="right") - 1
        weights_n = store.mask_n[first : first + _CHUNK_TOKENS] * times_D[document_n]
        counts_V += np.bincount(ids_n, weights_n, vocab_size).astype(np.int64)  # float64 is exact up to 2**53
    return torch.from_numpy(counts_V)


def choose_most_frequent(counts_V: Tensor, draft_vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """int64 [Vd], ascending, the tokens to draft: `always` (special and end tokens), then those of the highest `counts_V`
    (int64 [V], of equals the lower id first). ValueError unless Vd is in 1..V and has room for `always`.
    """
    vocab_size, kept = counts_V.numel(), sorted(set(always))
    if not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(f"draft_vocab_size is {draft_vocab_size}; the target's vocabulary allows 1 to {vocab_size}")
    if len(kept) > draft_vocab_size:
        raise ValueError(f"draft_vocab_size is {draft_vocab_size}; give at least {len(kept)}, always drafted")
    rank_V = counts_V.clone()
    rank_V[kept] = torch.iinfo(torch.int64).max
    # Stable: equal counts stay in ascending order of ids, those of tokens never seen included.
    order_V = torch.sort(rank_V, descending=True, stable=True).indices
    return order_V[:draft_vocab_size].sort().values
