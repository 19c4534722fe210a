"""A drafter's folder, ours or anyone's, read and written: either format, every .safetensors in it, never pickle.

Reading brings tensors under this project's names and refuses what no engine would load.

V: the target's vocabulary, Vd: the draft vocabulary, T: the target's hidden size.
"""

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.files import NonFiniteWeights, one_line, save_tensors, write_folder
from peagle_train.serving.formats import parse_config
from peagle_train.target_model.frozen import PLAIN, TargetBase
from peagle_train.target_model.loading import default_layer_ids, stored_tensors

MAY_LACK = ("mask_hidden", "embed_tokens.weight", "lm_head.weight")
"""What an EAGLE-3 drafter may lack: the first is P-EAGLE's, the others are the target's then."""
NOT_READ = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|verifier_(norm|lm_head)\.weight|t2d")
"""Rotary tables, copies of the target's weights that speculators saves, and what follows from d2t."""

# Reading


@dataclass
class DrafterFiles:
    """The tensors and config in a drafter's folder."""

    folder: Path
    raw: dict[str, Any]  # config.json as it is
    config: PEagleDraftConfig
    tensors: dict[str, Tensor]  # under this project's names, shapes checked

    @property
    def missing(self) -> list[str]:
        """Those of MAY_LACK that are not in the files."""
        return [name for name in MAY_LACK if name not in self.tensors]

    @property
    def draft_token_ids(self) -> Tensor:
        """int64 [Vd]: the target's ids of the draft vocabulary, ascending."""
        is_drafted_V = self.tensors.get("t2d", torch.ones(self.config.vocab_size))
        return is_drafted_V.nonzero()[:, 0]

    def check_whole(self) -> None:
        """ValueError for what is no whole P-EAGLE drafter, but an EAGLE-3 one."""
        if lacking := self.missing + (["a mask token"] if self.config.ptd_token_id is None else []):
            what = f"{self.folder} lacks {', '.join(lacking)}: it is no whole P-EAGLE drafter"
            raise ValueError(f"{what}; a run can start from it (draft.init_from)")


def load_drafter(folder: str | Path) -> PEagleDraft:
    """A drafter of either format, on the CPU, in eval mode, in `fc`'s dtype; ValueError if it is no whole P-EAGLE one."""
    files = read_drafter(folder)
    files.check_whole()
    dtype = files.tensors["fc.weight"].dtype
    with torch.device("meta"):
        draft = PEagleDraft(files.config)
    # copies: the file's own are mapped into memory
    state = {n: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in files.tensors.items()}
    draft.load_state_dict(state, assign=True)
    # The rotary table is in no file, and only right if made on a real device.
    draft.rotary_emb = PEagleDraft.make_rotary(files.config)
    return draft.eval()


def read_drafter(folder: str | Path) -> DrafterFiles:
    """All of a drafter's folder, in this project's names; ValueError, one line, if it is broken or of another kind."""
    folder = Path(folder)
    raw = read_config(folder)
    try:
        stored = {name: file.get_tensor(name) for name, file in stored_tensors(folder).items()}
        if not stored:
            raise ValueError("it has no tensors in .safetensors files (pickled weights are never loaded): convert them")
        tensors = _standard_names(stored)
        if "fc.weight" not in tensors:
            what = f"perhaps a whole model ({raw.get('architectures')}), no drafter of this kind"
            raise ValueError(f"fc.weight is missing: {what}; give a drafter's folder")
        config = parse_config(raw)
        if config.num_hidden_layers > len(tensors):  # that many are built, to compare shapes with
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, but there are {len(tensors)} tensors")
        _fit(config, tensors)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
    return DrafterFiles(folder, raw, config, tensors)


def check_fit(config: PEagleDraftConfig, target: TargetBase, which: str) -> None:
    """ValueError if the drafter, called `which`, is for another target, or reads other layers than `target` gives."""
    theirs, mine = (config.vocab_size, config.target_hidden_size), (target.vocab_size, target.hidden_size)
    if theirs != mine:
        raise ValueError(f"{which} is for a target of vocabulary and hidden size {theirs}; this target's are {mine}")
    layers = list(config.eagle_aux_hidden_state_layer_ids or default_layer_ids(target.config.num_hidden_layers))
    if layers != target.layer_ids:
        given = f"{target.layer_ids} are read here (in a recipe: target.layer_ids={layers})"
        raise ValueError(f"{which} reads layers {layers} of its target, but {given}")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder, a drafter's or a target's; ValueError if it cannot be read."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}); give a model's folder on this machine") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is a {type(raw).__name__}, not a mapping")
    return raw


def _standard_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are read, by this project's (and vLLM's) names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        standard = re.sub(r"^midlayer\.", "layers.0.", name.removeprefix("model."))
        if not NOT_READ.fullmatch(standard):
            tensors["d2t" if standard == "draft_id_to_target_id" else standard] = tensor
    return tensors


def _fit(config: PEagleDraftConfig, tensors: dict[str, Tensor]) -> None:
    """Make `tensors`, in place, those of a PEagleDraft of this config. ValueError, by name: they are missing, misshapen,
    unknown or not finite, or the vocabulary mapping is wrong.
    """
    if "mask_hidden" in tensors:  # [1, 3T] and [3T] exist too; engines flatten it
        tensors["mask_hidden"] = tensors["mask_hidden"].reshape(1, 1, -1)
    V, Vd = config.vocab_size, config.draft_vocab_size
    assert Vd is not None
    shaped = copy.copy(config)
    shaped.ptd_token_id = config.ptd_token_id or 0  # an EAGLE-3 drafter, which has none, has the same shapes
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in PEagleDraft(shaped).state_dict().items()}
    lost = sorted(shapes.keys() - tensors.keys() - {*MAY_LACK, "t2d"})
    wrong = [f"{name} {list(shapes[name])} is missing" for name in lost]
    for name, tensor in tensors.items():
        if name not in shapes:
            wrong.append(f"{name} is no tensor of such a drafter")
        elif tuple(tensor.shape) != shapes[name]:
            wrong.append(f"{name} is {list(tensor.shape)}; config.json makes it {list(shapes[name])}")
        elif (tensor.dtype in PLAIN) == (name == "d2t"):
            wrong.append(f"{name} is {tensor.dtype}; it must be {'int64' if name == 'd2t' else 'floating point'}")
    if wrong:
        raise ValueError("; ".join(wrong[:5]) + (f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""))
    check_finite(tensors, "its")
    if "d2t" not in tensors:
        return
    ids = tensors["d2t"].long() + torch.arange(Vd)
    if ids[0] < 0 or ids[-1] >= V or bool((ids[1:] <= ids[:-1]).any()):
        what = f"distinct tokens of the vocabulary 0..{V - 1}, ascending"
        raise ValueError(f"d2t must map to {what}, by offsets (id - index); it maps to {ids[0]}..{ids[-1]}")
    tensors["d2t"], tensors["t2d"] = ids - torch.arange(Vd), torch.isin(torch.arange(V), ids)


def check_finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """NonFiniteWeights that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            raise NonFiniteWeights(f"{whose} {name} has {bad} values that are not finite")


# Writing


def is_used(path: Path) -> bool:
    """Whether something is there, other than an empty folder."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def save_drafter(
    folder: str | Path, draft: PEagleDraft, state: Mapping[str, Tensor] | None = None, extra: Mapping[str, str] = {}
) -> None:
    """Write a drafter's folder as vLLM loads it, whole or not at all, in place of an earlier drafter's. ValueError: the
    folder holds something else. NonFiniteWeights, OSError: see `fill_drafter`.

    state: its whole weights, where they are sharded. extra: further files' texts, by name.
    """
    folder, weights = Path(folder), draft.state_dict() if state is None else state
    if is_used(folder) and not ((folder / "config.json").is_file() and "ptd_token_id" in read_config(folder)):
        raise ValueError(f"{folder} is something other than a drafter, which would be replaced: give another folder")
    write_folder(folder, lambda new: fill_drafter(new, draft.config, weights, extra))


def fill_drafter(path: Path, config: PEagleDraftConfig, state: Mapping[str, Tensor], extra: Mapping[str, str]) -> None:
    """Write `model.safetensors`, `config.json` and the texts of `extra`, by file, into a folder. NonFiniteWeights: a weight
    is not finite. OSError: a file cannot be written.
    """
    check_finite(state, "the drafter's")
    config.dtype = state["fc.weight"].dtype
    for name, text in {"config.json": config.to_json_string(), **extra}.items():
        (path / name).write_text(text, encoding="utf-8")
    save_tensors(path / "model.safetensors", state)
