"""The draft vocabulary of another drafter: so that two can be compared, or one can take the other's place."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.data.vocab import end_of_turn_ids, eos_token_ids, t2d_mask
from peagle_train.recipe import Data, Draft

logger = logging.getLogger(__name__)


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
