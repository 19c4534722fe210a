"""A drafter's folder, ours or anyone's, read and written. Either format, one file or shards, never pickle.

Reading brings tensors under this project's names and refuses what no engine would load.

V: the target's vocabulary, Vd: the draft vocabulary, T: the target's hidden size.
"""

import copy
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.data.vocab import t2d_mask
from peagle_train.files import NonFiniteWeights, one_line, write_folder
from peagle_train.serving.formats import OtherKind, format_of, parse_config

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = {"d2t": (INTEGERS, "int64, what to add to a draft id"), "t2d": ((torch.bool, *INTEGERS), "bool")}
MAY_LACK = ("mask_hidden", "embed_tokens.weight", "lm_head.weight")
"""What an EAGLE-3 drafter may lack: the first is P-EAGLE's, the others are the target's then."""
NOT_READ = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|verifier_(norm|lm_head)\.weight")
"""Rotary tables, and copies of the target's weights that speculators saves."""

# Reading


@dataclass
class DrafterFiles:
    """The tensors and config in a drafter's folder."""

    folder: Path
    raw: dict[str, Any]
    """config.json as it is."""
    config: PEagleDraftConfig
    where: dict[str, str]
    """The file of each tensor, by its name there."""
    tensors: dict[str, Tensor]
    """Under this project's names, shapes checked, draft vocabulary ascending."""
    missing: list[str]
    """Those of MAY_LACK that are not in the files."""
    notes: list[str]
    """What was renamed, dropped, filled in or reordered."""

    @property
    def format(self) -> str:
        return format_of(self.raw)

    @property
    def draft_token_ids(self) -> Tensor:
        """int64 [Vd]: the target's ids of the draft vocabulary, ascending."""
        assert self.config.draft_vocab_size is not None
        ids = torch.arange(self.config.draft_vocab_size)
        return ids + self.tensors["d2t"] if "d2t" in self.tensors else ids

    @property
    def lacking(self) -> list[str]:
        """What keeps this from being a whole P-EAGLE drafter."""
        return self.missing + (["a mask token"] if self.config.ptd_token_id is None else [])


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
    if files.lacking:
        raise ValueError(
            f"{folder} lacks {', '.join(files.lacking)}: it is no whole P-EAGLE drafter; peagle-train import can complete"
            " it"
        )
    for note in files.notes:
        logger.warning("%s: %s", folder, note)
    dtype = dtype or files.tensors["fc.weight"].dtype
    with torch.device("meta"):
        draft = PEagleDraft(files.config)
    # copies: the file's own are mapped into memory
    state = {n: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in files.tensors.items()}
    draft.load_state_dict(state, assign=True)
    draft.config.dtype = dtype
    # The rotary table is in no file, and only right if made on a real device.
    draft.rotary_emb = PEagleDraft.make_rotary(files.config)
    return draft.eval()


def read_drafter(folder: str | Path) -> DrafterFiles:
    """All of a drafter's folder, in this project's names.

    Raises:
        OtherKind: a drafter that engines may serve, but this project does not have.
        ValueError: one line, for a folder that is broken.
    """
    folder = Path(folder)
    raw = read_config(folder)
    try:
        where = tensor_files(folder)
        names, notes = _standard_names(where)
        if "fc.weight" not in names:
            what = f"no drafter of this kind but perhaps a whole model ({raw.get('architectures')})"
            raise ValueError(f"fc.weight is missing: {what}; give a drafter's folder")
        config = parse_config(raw)
        if config.ptd_token_id is not None:
            config.check_trainable()
        layers = {int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in names) if match}
        if layers != {*range(min(config.num_hidden_layers, len(where)))}:
            listed = ", ".join(map(str, sorted(layers))) or "none"
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, but the weights have layers {listed}")
        stored = read_tensors(folder, {name: where[name] for name in names.values()})
        tensors = {name: stored[given] for name, given in names.items()}
        missing, changed = _fit(config, tensors)
    except ValueError as error:
        kind = OtherKind if isinstance(error, OtherKind) else ValueError
        raise kind(f"{folder}: {error}") from error
    return DrafterFiles(folder, raw, config, where, tensors, missing, notes + changed)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder, a drafter's or a target's; ValueError if it cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a model's folder on this machine")
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json; give a model's folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is a {type(raw).__name__}, not a mapping")
    return raw


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor in a model's folder, by name; only headers are read.

    Raises:
        ValueError: a file is missing, pickled or damaged, or the index is wrong.
    """
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f": its weights are pickled ({pickled[0]}), which are never loaded; convert them" if pickled else ""
            raise ValueError(f"it has no {WEIGHTS}{hint}")
        return dict.fromkeys(_header(folder / WEIGHTS), WEIGHTS)
    if (folder / WEIGHTS).exists():
        raise ValueError(f"it has {WEIGHTS} and {INDEX}: readers differ in which they take; remove one")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        named = {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} cannot be read: {type(error).__name__}: {one_line(error)}") from None
    files = sorted(set(named.values()))
    if outside := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise ValueError(f"{INDEX}: {outside[0]!r} is no safetensors file of this folder")
    found = {name: file for file in files for name in _header(folder / file)}
    if odd := sorted({name for name, _ in found.items() ^ named.items()}):
        raise ValueError(f"{INDEX} does not fit the files: {odd[0]} is in one of them only")
    return found


def _header(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"is no whole safetensors file ({one_line(error)}): cut or damaged, fetch it again"
        if not path.exists():
            reason = f"is missing, but {INDEX} names it"
        elif path.is_file() and path.open("rb").read(100).startswith(b"version https://git-lfs"):
            reason = "is a Git LFS pointer, not the weights: fetch them"
        raise ValueError(f"{path.name} {reason}") from None


def read_tensors(folder: Path, where: Mapping[str, str]) -> dict[str, Tensor]:
    """Some of what `tensor_files` found, under the names in the files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(set(where.values())):
        with safe_open(folder / path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in where if where[name] == path}
    return tensors


def standard_name(name: str) -> str:
    """This project's (and vLLM's) name of a tensor."""
    name = re.sub(r"^midlayer\.", "layers.0.", name.removeprefix("model."))
    return "d2t" if name == "draft_id_to_target_id" else name


def _standard_names(stored: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The files' name of each tensor that is read, by `standard_name`, and notes; ValueError where two get the same."""
    names: dict[str, str] = {}
    dropped = sorted(name for name in stored if NOT_READ.fullmatch(standard_name(name)))
    for name in stored:
        standard = standard_name(name)
        if standard in names:
            raise ValueError(f"two of its tensors are {standard}: {name} is one of them")
        if name not in dropped:
            names[standard] = name
    renamed = sum(name != standard for standard, name in names.items())
    notes = [f"{renamed} tensors renamed (model. or midlayer. in front)"] if renamed else []
    return names, notes + ([f"not read: {', '.join(dropped)}"] if dropped else [])


def expected_shapes(config: PEagleDraftConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole drafter's tensors; d2t and t2d of a pruned vocabulary only."""
    shaped = copy.copy(config)
    if shaped.ptd_token_id is None:  # an EAGLE-3 drafter's, whose shapes are the same
        shaped.ptd_token_id = 0
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in PEagleDraft(shaped).state_dict().items()}


def _fit(config: PEagleDraftConfig, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Make `tensors`, in place, those of a PEagleDraft of this config.

    Returns:
        (which of MAY_LACK are missing, what was filled in or changed).

    Raises:
        ValueError: tensors are missing, misshapen, unknown or not finite, by name; or the vocabulary mapping is wrong.
    """
    notes: list[str] = []
    if "mask_hidden" in tensors:  # [1, 3T] and [3T] exist too; engines flatten it
        tensors["mask_hidden"] = tensors["mask_hidden"].reshape(1, 1, -1)
    Vd: Any = config.draft_vocab_size
    shapes = expected_shapes(config)
    is_pruned = "d2t" in shapes
    known = {**shapes, "d2t": (Vd,), "t2d": (config.vocab_size,)}
    lost = sorted(shapes.keys() - tensors.keys() - {*MAY_LACK, "t2d"})
    wrong = [f"{name} {list(shapes[name])} is missing" for name in lost]
    for name, tensor in tensors.items():
        if name not in known:
            wrong.append(f"{name} is no tensor of such a drafter")
        elif tuple(tensor.shape) != known[name]:
            wrong.append(f"{name} is {list(tensor.shape)}; config.json makes it {list(known[name])}")
        elif tensor.dtype not in (allowed := DTYPES.get(name, (FLOATS, "floating point, of 16, 32 or 64 bits")))[0]:
            wrong.append(f"{name} is {tensor.dtype}; it must be {allowed[1]}")
    if wrong:
        raise ValueError("; ".join(wrong[:5]) + (f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""))
    check_finite(tensors, "its")
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    ids = _draft_ids(torch.zeros(Vd, dtype=torch.int64) if d2t is None else d2t, t2d, config.vocab_size)
    order = ids.argsort()
    if bool((ids[1:] < ids[:-1]).any()):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        notes.append("the draft vocabulary was brought into ascending order, lm_head with it")
    if is_pruned:
        tensors["d2t"], tensors["t2d"] = ids[order] - torch.arange(Vd), t2d_mask(ids, config.vocab_size)
        if t2d is None:
            notes.append("t2d was filled in from d2t")
    elif d2t is not None or t2d is not None:
        notes.append("d2t and t2d dropped: the vocabulary is the full one")
    return [name for name in MAY_LACK if name not in tensors], notes


def check_finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """NonFiniteWeights that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (bad := count_non_finite(tensor)):
            raise NonFiniteWeights(f"{whose} {name} has {bad} values that are not finite")


def count_non_finite(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum())


def _draft_ids(d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> Tensor:
    """int64 [Vd], the target's ids of the draft vocabulary in the file's order; ValueError where d2t or t2d are wrong."""
    ids = d2t.long() + torch.arange(d2t.numel())
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    is_ids = d2t.numel() > 1 and bool((d2t[1:] > d2t[:-1]).all()) and 0 <= int(d2t[0]) and int(d2t[-1]) < vocab_size
    hint = " (it looks like the ids themselves; offsets are wanted: id - index)" if is_ids else ""
    if outside.numel():
        raise ValueError(f"d2t maps to token {int(outside[0])}, outside of the vocabulary 0..{vocab_size - 1}{hint}")
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"d2t maps two draft tokens to the same token{hint}")
    if t2d is not None and (odd := (t2d_mask(ids, vocab_size) != t2d.bool()).nonzero()).numel():
        raise ValueError(f"t2d and d2t disagree about token {int(odd[0])}")
    return ids


# Writing


def save_drafter(path: Path, config: PEagleDraftConfig, state: Mapping[str, Tensor], extra: dict[str, str]) -> None:
    """Write a drafter's folder whole or not at all, replacing what is there; see `fill_drafter`."""
    write_folder(path, lambda folder: fill_drafter(folder, config, state, extra))


def fill_drafter(folder: Path, config: PEagleDraftConfig, state: Mapping[str, Tensor], extra: dict[str, str]) -> None:
    """Write `model.safetensors` and `config.json` as vLLM loads them into an existing folder.

    Args:
        extra: texts of further files by name; a `config.json` takes the place of the config's own.

    Raises:
        NonFiniteWeights: a weight is not finite. OSError: a file cannot be written.
    """
    check_finite(state, "the drafter's")
    config.dtype = state["fc.weight"].dtype
    for name, text in {"config.json": config.to_json_string(), **extra}.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_tensors(folder / WEIGHTS, state)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; OSError where that fails."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
