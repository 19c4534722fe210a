"""The target's tokenizer and special tokens, and the drafter's vocabulary. V: the target's ids, Vd: the drafter's."""

import logging
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from peagle_train.config import Data, Draft
from peagle_train.data.chat import ChatTemplate, read_template
from peagle_train.files import one_line

logger = logging.getLogger(__name__)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a target's folder; None where it has none, or, with a line in the log, one that cannot be used."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if any(Path(path).glob("*token*")):  # else nothing is wrong: prepared ids, say, need none
            logger.warning("target %s has no usable tokenizer (%s)", path, one_line(error, 200))
        return None


def load_config(path: str, trust_remote_code: bool) -> Any:
    """transformers' config of a target's folder; ValueError, one line, for a folder that is none."""
    if not (Path(path) / "config.json").is_file():
        hint = "hf download NAME --local-dir DIR makes one; for a plan its config.json is enough"
        raise ValueError(f"target.path {path} is not a folder of a Hugging Face model, with its config.json ({hint})")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a foreign or corrupt file makes transformers raise
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ValueError(f"target.path {path} has a config.json that cannot be read: {reason}") from error


def choose_mask_token(draft: Draft, tokenizer: Any, vocab_size: int) -> int:
    """The recipe's mask token, or one that no text has: an id beyond the tokenizer's, or a token that its name reserves
    (an example that holds it all the same is refused). ValueError if there is none, with other special tokens.
    """
    if (given := draft.mask_token_id) is not None:
        if given >= vocab_size:
            raise ValueError(f"draft.mask_token_id is {given}; it must lie in 0..{vocab_size - 1}, the target's ids")
        return given
    # Rows that pad the embedding table are the only ids that provably never occur in text.
    first_unused = vocab_size if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    if first_unused < vocab_size:
        logger.warning("draft.mask_token_id is %d, the first id that the tokenizer never produces", first_unused)
        return first_unused
    # Texts may begin and end with these.
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "pad", "unk")}
    used.update(eos_token_ids(tokenizer), end_of_turn_ids(tokenizer))
    special = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    free = {i: name for i, name in sorted(special.items()) if i < vocab_size and i not in used}
    for i, name in free.items():
        if re.search(r"reserved|unused", name, re.IGNORECASE):
            logger.warning("draft.mask_token_id is %d, %s, which the tokenizer reserves", i, name)
            return i
    shown = ", ".join(f"{i} ({name})" for i, name in islice(free.items(), 6)) or "none"
    missing = "draft.mask_token_id is missing and no id of the target's vocabulary is provably unused"
    how = "give the id of a token that never occurs in your data nor in prompts"
    raise ValueError(f"{missing}: {how}; special tokens that may be free: {shown}")


def eos_token_ids(*sources: Any) -> list[int]:
    """What ends a text according to configs, generation configs and tokenizers: their `eos_token_id`, one or many."""
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return sorted({i for eos in named for i in (eos if isinstance(eos, (list, tuple)) else [eos]) if i is not None})


def end_of_turn_ids(tokenizer: Any, data: Data | None = None) -> list[int]:
    """The added token that the chat template (`data`'s, if it gives one) puts after an answer; [] for none."""
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


def choose_most_frequent(counts_V: Tensor, draft_vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """int64 [Vd], ascending, the tokens to draft: `always` (special and end tokens), then those of the highest `counts_V`
    (int64 [V], of equals the lower id first). ValueError unless Vd, which is in 1..V, has room for `always`.
    """
    kept = sorted(set(always))
    if len(kept) > draft_vocab_size:
        raise ValueError(f"draft_vocab_size is {draft_vocab_size}; give at least {len(kept)}, always drafted")
    rank_V = counts_V.clone()
    rank_V[kept] = torch.iinfo(torch.int64).max
    # Stable: equal counts stay in ascending order of ids, those of tokens never seen included.
    order_V = torch.sort(rank_V, descending=True, stable=True).indices
    return order_V[:draft_vocab_size].sort().values
