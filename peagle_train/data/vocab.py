"""The draft vocabulary of another drafter: so that two can be compared, or one can take the other's place."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.config import Data, Draft
from peagle_train.data.chat import read_template
from peagle_train.files import one_line

if TYPE_CHECKING:
    from peagle_train.config import Data
    from peagle_train.data.documents import Document, DocumentTable


# ---- vocab
# The drafter's vocabulary: the target's most frequent tokens, in the form that engines read (d2t, t2d).

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


# ---- vocab_from
# The draft vocabulary of another drafter: so that two can be compared, or one can take the other's place.


def read_draft_vocab(
    draft: Draft, target: Any, tokenizer: Any, always: Iterable[int], data: Data | None = None
) -> Tensor:
    """int64 [Vd], ascending: the target's tokens that `draft.vocab_from` drafts.

    Args:
        draft: `vocab_from` names a folder or a .safetensors file with `d2t` [Vd] (offsets: draft token i is the target's
            i + d2t[i]) and, mostly, `t2d` [V] in vLLM's and speculators' names, or without them if config.json says that
            Vd is V, or a folder with d2t.npy and t2d.npy, as speculators prepares them. `draft_vocab_size`, if given,
            must be Vd.
        data: the recipe's section, which may give a chat template.
        always: special and end tokens. Those that the mapping lacks are logged; one that can end an answer must be there.

    Raises:
        ValueError: one line that says what does not fit.
    """
    assert draft.vocab_from is not None
    where = f"draft.vocab_from {draft.vocab_from}"
    path = Path(draft.vocab_from)
    d2t, t2d = _read(path, where)
    ids = _draft_ids(d2t, where)
    size = t2d.numel() if t2d is not None else _config_sizes(path)[0]
    if size is not None and size != target.vocab_size:
        raise ValueError(
            f"{where} is for a vocabulary of {size} tokens, the target has {target.vocab_size}: give one for this target"
        )
    if int(ids[-1]) >= target.vocab_size:
        raise ValueError(
            f"{where} drafts token {int(ids[-1])}, but the target's vocabulary is 0..{target.vocab_size - 1}"
        )
    if t2d is not None and not torch.equal(t2d != 0, t2d_mask(ids, target.vocab_size)):
        raise ValueError(f"{where}: its d2t and t2d disagree; d2t must hold offsets, t2d what can be drafted")
    if draft.draft_vocab_size not in (None, ids.numel()):
        raise ValueError(
            f"draft.draft_vocab_size is {draft.draft_vocab_size}, but {where} drafts {ids.numel()} tokens: leave one out"
        )
    ends = {*target.eos_token_ids(), *eos_token_ids(tokenizer), *end_of_turn_ids(tokenizer, data)}
    _check_ends(set(ids.tolist()), ends, always, where)
    return ids


def draft_vocab_size_of(draft: Draft) -> int:
    """Vd of the drafter that `draft.vocab_from` names; ValueError as in `read_draft_vocab`."""
    assert draft.vocab_from is not None
    where = f"draft.vocab_from {draft.vocab_from}"
    return _draft_ids(_read(Path(draft.vocab_from), where)[0], where).numel()


def _check_ends(drafted: set[int], ends: set[int], always: Iterable[int], where: str) -> None:
    if ends and not ends & drafted:
        raise ValueError(
            f"{where} lacks every end token ({', '.join(map(str, sorted(ends)))}): its drafter could never end an answer"
        )
    missing = sorted(set(always) - drafted)
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        logger.warning("%s lacks %d special or end tokens, which will not be drafted: %s", where, len(missing), listed)


def _draft_ids(d2t: Tensor, where: str) -> Tensor:
    if d2t.dim() != 1 or d2t.numel() == 0 or d2t.is_floating_point() or d2t.is_complex() or d2t.dtype == torch.bool:
        raise ValueError(f"{where}: d2t is {d2t.dtype} {list(d2t.shape)}; it must be a vector of integers")
    ids = d2t.long() + torch.arange(d2t.numel())
    if int(ids[0]) < 0:
        raise ValueError(f"{where}: its d2t leads to token {int(ids[0])}, below 0")
    falls = (ids[1:] <= ids[:-1]).nonzero()
    if falls.numel():
        at = int(falls[0, 0])
        what = "twice" if ids[at] == ids[at + 1] else f"behind token {int(ids[at])}"
        raise ValueError(f"{where}: its d2t leads to token {int(ids[at + 1])} {what}; draft tokens must ascend")
    return ids


def _read(path: Path, where: str) -> tuple[Tensor, Tensor | None]:
    """d2t and t2d (None if there is none) of whatever the path is."""
    if path.is_dir() and (path / "d2t.npy").is_file():
        t2d = path / "t2d.npy"
        return _read_npy(path / "d2t.npy", where), _read_npy(t2d, where) if t2d.is_file() else None
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or not files or files[0].suffix != ".safetensors":
        raise ValueError(f"{where}: give a drafter's folder or .safetensors file (or a folder with d2t.npy)")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in ("d2t", "t2d") if name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{where}: cannot read {file.name}: {' '.join(str(error).split())}") from None
    if "d2t" not in found:
        vocab_size, draft_vocab_size = _config_sizes(path)
        if vocab_size is None or draft_vocab_size != vocab_size:
            raise ValueError(f"{where} has no d2t: it is no drafter, or drafts the full vocabulary and does not say so")
        found["d2t"] = torch.zeros(vocab_size, dtype=torch.int64)
    return found["d2t"], found.get("t2d")


def _read_npy(file: Path, where: str) -> Tensor:
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{where}: cannot read {file.name}: {' '.join(str(error).split())[:200]}") from None


def _config_sizes(path: Path) -> tuple[int | None, int | None]:
    """V and Vd by the drafter's config.json (V in speculators' transformer_layer_config); None where unknown."""
    try:
        config = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_bytes())
        vocab_size = config.get("vocab_size", config.get("transformer_layer_config", {}).get("vocab_size"))
        sizes = (vocab_size, config.get("draft_vocab_size"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None, None
    vocab_size, draft_vocab_size = (size if type(size) is int and 0 < size <= 2**24 else None for size in sizes)
    return vocab_size, draft_vocab_size
