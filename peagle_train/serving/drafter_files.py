"""Reading a drafter's folder, ours or another's: either format, one file or shards, never pickle.

Vd: the draft vocabulary.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.serving.draft_formats import format_of, layer_config, parse_config
from peagle_train.serving.drafter_tensors import check_layers, fit_tensors, standard_names

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class DrafterFiles:
    """What a folder holds: nothing is missing from it that it does not say in `missing`."""

    folder: Path
    format: str
    raw: dict[str, Any]
    """config.json as it is."""
    config: PEagleDraftConfig
    tensors: dict[str, Tensor]
    """Under this project's names, shapes checked, draft vocabulary ascending."""
    missing: list[str]
    """Those of MAY_LACK that are not there."""
    notes: list[str] = field(default_factory=list)
    """What was renamed, dropped, filled in or brought into order."""

    @property
    def draft_token_ids(self) -> Tensor:
        """int64 [Vd]: the target's ids of the draft vocabulary, ascending."""
        assert self.config.draft_vocab_size is not None
        ids = torch.arange(self.config.draft_vocab_size)
        return ids + self.tensors["d2t"] if "d2t" in self.tensors else ids


def load_drafter(folder: str | Path, dtype: torch.dtype | None = None) -> PEagleDraft:
    """A drafter from a folder in either format: `final/`, `best/`, `checkpoint-N/`, an export, another's P-EAGLE.

    Args:
        dtype: of the weights; None keeps the file's.

    Returns:
        On the CPU, in eval mode.

    Raises:
        ValueError: one line, for a folder that holds no whole P-EAGLE drafter.
    """
    files = read_drafter(folder)
    if files.config.ptd_token_id is None or files.missing:
        lacking = files.missing + (["a mask token"] if files.config.ptd_token_id is None else [])
        raise ValueError(
            f"{folder} lacks {', '.join(lacking)}, so it is no whole P-EAGLE drafter: tools/import.py can complete it"
        )
    for note in files.notes:
        logger.warning("%s: %s", folder, note)
    return build_draft(files.config, files.tensors, dtype).eval()


def read_drafter(folder: str | Path) -> DrafterFiles:
    """All of a drafter's folder, in this project's names; ValueError, one line, for what is broken or of another kind."""
    folder = Path(folder)
    raw = read_config(folder)
    try:
        config = parse_config(raw)
        stored = read_tensors(folder)
        tensors, notes = standard_names(stored)
        check_layers(config, tensors)
        missing, filled = fit_tensors(config, tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    is_tied = raw.get("tie_word_embeddings") or layer_config(raw).get("tie_word_embeddings")
    if is_tied and "lm_head.weight" in tensors:
        notes.append("its config.json ties the head to the embeddings; the head in the file is taken")
    return DrafterFiles(folder, format_of(raw), raw, config, tensors, missing, notes + filled)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a drafter's folder on this machine")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json; give a drafter's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / 'config.json'} is a {type(raw).__name__}, not a mapping")
    return raw


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files that hold the weights, each with the names that the index says are in it (None: no index)."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"it has {WEIGHTS} and {INDEX}: readers differ in which they take; remove one")
    if single.exists():
        return {WEIGHTS: None}
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"its weights are pickled ({pickles[0]}), which are never loaded: convert them to {WEIGHTS}"
            )
        raise ValueError(f"it has no {WEIGHTS}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str] | None] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{shard!r} is no safetensors file of this folder")
            names = shards.setdefault(shard, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} cannot be read: {type(error).__name__}: {error}") from None
    if not shards:
        raise ValueError(f"{INDEX} names no tensor")
    return shards


def tensor_names(folder: Path) -> list[str]:
    """The names in the weights' files; nothing is loaded. ValueError for what is no safetensors file."""
    names: list[str] = []
    for shard in weight_files(folder):
        try:
            with safe_open(folder / shard, framework="pt") as file:
                names += file.keys()
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{shard} {_why_unreadable(folder / shard, error)}") from None
    return names


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder under the name that it has there."""
    tensors: dict[str, Tensor] = {}
    for shard, names in weight_files(folder).items():
        try:
            with safe_open(folder / shard, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{shard} {_why_unreadable(folder / shard, error)}") from None
        if names is not None and set(names) != found.keys():
            odd = sorted(set(names) ^ found.keys())[0]
            raise ValueError(f"{shard} does not hold what {INDEX} says of it: {odd} is in one of them only")
        tensors |= found
    return tensors


def _why_unreadable(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"is missing, but {INDEX} names it"
    if not path.is_file():
        return "is a folder"
    with path.open("rb") as file:
        if file.read(100).startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the weights: fetch them"
    return f"is no whole safetensors file ({' '.join(str(error).split())}): cut or damaged, fetch it again"


def build_draft(config: PEagleDraftConfig, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> PEagleDraft:
    """A drafter on the CPU whose weights are copies of `tensors` (all of them), in `dtype` or fc's."""
    dtype = dtype or tensors["fc.weight"].dtype
    with torch.device("meta"):
        draft = PEagleDraft(config)
    state = {n: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in tensors.items()}
    draft.load_state_dict(state, assign=True)
    draft.config.dtype = dtype
    # The rotary table is in no file, and only right if made on a real device.
    draft.rotary_emb = PEagleDraft.make_rotary(config)
    return draft
