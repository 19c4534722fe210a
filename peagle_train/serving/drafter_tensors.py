"""A drafter's tensors: their names, their shapes, and the vocabulary mapping, whoever wrote them.

V: the target's vocabulary, Vd: the draft vocabulary, T: the target's hidden size.
"""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.data.vocab import t2d_mask
from peagle_train.errors import NonFiniteWeights

MAY_LACK = ("mask_hidden", "embed_tokens.weight", "lm_head.weight")
"""What an EAGLE-3 drafter may come without: the first is P-EAGLE's, the others are then the target's."""
_TABLE = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_TARGETS = re.compile(r"verifier_(norm|lm_head)\.weight")
"""What speculators saves of the target along; no drafter needs it."""


def is_rotary_table(name: str) -> bool:
    """Whether a tensor of this standard name holds rotary frequencies, which no reader takes."""
    return bool(_TABLE.fullmatch(name))


def standard_name(name: str) -> str:
    """This project's (and vLLM's) name of a tensor."""
    name = name.removeprefix("model.")
    if name.startswith("midlayer."):
        name = "layers.0." + name.removeprefix("midlayer.")
    return "d2t" if name == "draft_id_to_target_id" else name


def standard_names(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under this project's names, and what was done; ValueError where two tensors get the same name."""
    tensors: dict[str, Tensor] = {}
    renamed, dropped = 0, []
    for name, tensor in stored.items():
        standard = standard_name(name)
        if is_rotary_table(standard) or _TARGETS.fullmatch(standard):
            dropped.append(name)
            continue
        if standard in tensors:
            raise ValueError(f"two of its tensors are {standard}: {name} is one of them")
        renamed += standard != name
        tensors[standard] = tensor
    notes = [f"{renamed} tensors renamed (model. or midlayer. in front)"] if renamed else []
    return tensors, notes + ([f"not read: {', '.join(sorted(dropped))}"] if dropped else [])


def check_layers(config: PEagleDraftConfig, tensors: dict[str, Tensor]) -> None:
    """ValueError unless config.json and the weights have the same number of layers."""
    found = {int(m[1]) for m in (re.match(r"layers\.(\d+)\.", name) for name in tensors) if m}
    if len(found) != config.num_hidden_layers or max(found, default=-1) != config.num_hidden_layers - 1:
        listed = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, but the weights have layers {listed}")


def expected_shapes(config: PEagleDraftConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole drafter's tensors; d2t and t2d of a pruned vocabulary only."""
    shaped = copy.copy(config)
    if shaped.ptd_token_id is None:  # an EAGLE-3 drafter's, whose shapes are the same
        shaped.ptd_token_id = 0
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in PEagleDraft(shaped).state_dict().items()}


def fit_tensors(config: PEagleDraftConfig, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Bring `tensors` to what a PEagleDraft of this config holds, in place.

    Returns:
        (what an EAGLE-3 drafter may lack and this one does, what was filled in or changed).

    Raises:
        ValueError: a missing, misshapen or unknown tensor, or one that is not finite, by name; a broken vocabulary mapping.
    """
    notes: list[str] = []
    if "mask_hidden" in tensors:  # [1, 3T] and [3T] are around too; engines flatten it
        tensors["mask_hidden"] = tensors["mask_hidden"].reshape(1, 1, -1)
    assert config.draft_vocab_size is not None
    shapes = expected_shapes(config)
    pruned = "d2t" in shapes
    known = {**shapes, "d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    lost = sorted(shapes.keys() - tensors.keys() - {*MAY_LACK, "t2d"})
    if lost:
        raise ValueError(f"{lost[0]} {list(shapes[lost[0]])} is missing" + _and_more(lost))
    unknown = sorted(tensors.keys() - known.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is no tensor of such a drafter" + _and_more(unknown))
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != known[name]:
            raise ValueError(f"{name} is {list(tensor.shape)}; config.json makes it {list(known[name])}")
        if name not in ("d2t", "t2d") and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; weights must be floating point")
    check_finite(tensors, "its")
    stored = {name: tensors.pop(name) for name in ("d2t", "t2d") if name in tensors}
    full = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
    ids = check_vocab(stored.get("d2t", full), stored.get("t2d"), config.vocab_size)
    order = ids.argsort()
    if bool((ids[1:] < ids[:-1]).any()):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        notes.append("the draft vocabulary was brought into ascending order, lm_head with it")
    if pruned:
        tensors["d2t"], tensors["t2d"] = ids[order] - torch.arange(len(ids)), t2d_mask(ids, config.vocab_size)
        if "t2d" not in stored:
            notes.append("t2d was filled in from d2t")
    elif stored:
        notes.append(f"{' and '.join(stored)} dropped: the vocabulary is the full one")
    return [name for name in MAY_LACK if name not in tensors], notes


def check_finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """NonFiniteWeights that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (bad := count_non_finite(tensor)):
            raise NonFiniteWeights(f"{whose} {name} has {bad} values that are not finite")


def count_non_finite(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum())


def check_vocab(d2t: Tensor, t2d: Tensor | None, vocab_size: int) -> Tensor:
    """int64 [Vd], the target's ids of the draft vocabulary in the file's order; ValueError where d2t or t2d are wrong."""
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise ValueError(f"d2t is {d2t.dtype}; it must be int64, what to add to a draft id")
    ids = d2t.long() + torch.arange(d2t.numel())
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    hint = ""
    if d2t.numel() > 1 and bool((d2t[1:] > d2t[:-1]).all()) and 0 <= int(d2t[0]) and int(d2t[-1]) < vocab_size:
        hint = " (it looks like the ids themselves; offsets are wanted: id - row)"
    if outside.numel():
        raise ValueError(f"d2t maps to token {int(outside[0])}, outside of the vocabulary 0..{vocab_size - 1}{hint}")
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"d2t maps two draft tokens to the same token{hint}")
    if t2d is not None:
        if t2d.shape != (vocab_size,):
            raise ValueError(f"t2d is {list(t2d.shape)}; config.json makes it [{vocab_size}]")
        listed = t2d_mask(ids, vocab_size)
        if not torch.equal(listed, t2d.bool()):
            odd = int((listed != t2d.bool()).nonzero()[0])
            raise ValueError(f"t2d and d2t disagree about token {odd}")
    return ids


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
