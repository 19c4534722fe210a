"""Has a folder what a P-EAGLE drafter must have: names, shapes, dtypes, ids in range? Everything found, in one table.

`tests/test_vllm.py` holds it to vLLM itself, by folders that both take and broken ones that both refuse.
"""

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig, mask_tokens_in
from peagle_train.core.rope import rope_mistake, yarn_too_short
from peagle_train.data.vocab import t2d_mask
from peagle_train.files import NonFiniteWeights
from peagle_train.serving.formats import (
    EAGLE3,
    format_of,
    layer_config,
    layer_ids_of,
    mask_token_of,
    misread,
    other_kind,
    parse_config,
    unsupported,
    whole_model,
    wrong_types,
)

# ---- drafter_tensors
# A drafter's tensors: their names, their shapes, and the vocabulary mapping, whoever wrote them.
#
# V: the target's vocabulary, Vd: the draft vocabulary, T: the target's hidden size.

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


# ---- drafter_files
# Reading a drafter's folder, ours or another's: either format, one file or shards, never pickle.
#
# Vd: the draft vocabulary.

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


# ---- check_drafter
# Has a folder what a P-EAGLE drafter must have: names, shapes, dtypes, ids in range? Everything found, in one table.
#
# `tests/test_vllm.py` holds it to vLLM itself, by folders that both take and broken ones that both refuse.

Level = Literal["ok", "warn", "BAD", "????"]
"""????: of a drafter of another kind than this project's, which cannot be judged here."""
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
"""Names under which vLLM's method eagle3 finds a drafter of this kind."""


class Finding(NamedTuple):
    """One row of the table."""

    level: Level
    what: str
    detail: str


def is_loadable(findings: list[Finding]) -> bool:
    return not is_bad(findings) and is_judged(findings)


def is_bad(findings: list[Finding]) -> bool:
    return any(finding.level == "BAD" for finding in findings)


def is_judged(findings: list[Finding]) -> bool:
    return all(finding.level != "????" for finding in findings)


def table(findings: list[Finding]) -> str:
    """The findings as lines, the bad ones repeated in the last."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{level:4}  {what:{width}}  {detail}" for level, what, detail in findings]
    bad, warned = (sum(f.level == level for f in findings) for level in ("BAD", "warn"))
    verdict = "NOT loadable as it is" if bad else "loadable"
    if not bad and not is_judged(findings):
        verdict = "not judged, a drafter of another kind than this project's, which engines may load"
    return "\n".join([*lines, f"{verdict}: {bad} errors, {warned} warnings"])


def check_folder(folder: str | Path, target: dict[str, Any] | None = None) -> list[Finding]:
    """Everything about a drafter's folder that an engine reads.

    Args:
        target: the target's config.json, to compare with; None skips that.
    """
    folder = Path(folder)
    try:
        raw = read_config(folder)
        layer_config(raw)
    except ValueError as error:
        return [Finding("BAD", "config.json", str(error))]
    whole = whole_model(raw)
    if whole and _lacks_fc(folder):
        return [Finding("BAD", "config.json", f"{whole}: a whole language model, no drafter")]
    findings = _check_config(raw)
    config = None
    try:
        config = parse_config(raw)
        if config.ptd_token_id is not None:
            config.check_trainable()
    except ValueError as error:
        if not unsupported(raw):  # else they are rows already
            findings.append(Finding("BAD", "config.json", str(error)))
            config = None
    if config is not None and not rope_mistake(config.rope_parameters or {}):
        short = yarn_too_short(config.rope_parameters or {}, config.max_position_embeddings)
        findings += [Finding("warn", "max positions", short)] if short else []
    findings += _check_weights(folder, raw, config)
    if target is not None and config is not None:
        findings += _check_target(config, raw, target)
    return findings


def _check_config(raw: dict[str, Any]) -> list[Finding]:
    kind, layers = format_of(raw), layer_config(raw)
    num_layers = layers.get("num_hidden_layers")
    found = [Finding("ok", "format", kind + ("" if num_layers is None else f", {num_layers} layers"))]
    wrong = wrong_types(raw)
    others = [] if wrong else other_kind(raw)
    unlike: Level = "????" if others else "BAD"
    found += [Finding("BAD", "config.json", problem) for problem in wrong]
    found += [Finding("????", "kind", difference) for difference in others]
    found += [Finding(unlike, "config.json", problem) for problem in ([] if wrong else misread(raw))]
    if kind == EAGLE3:
        given = raw.get("architectures") or [None]
        name = given[0] if isinstance(given, list) else given
        is_known = name in ARCHITECTURES
        hint = "" if is_known else f": vLLM looks a drafter of this kind up as {ARCHITECTURES[0]}"
        found.append(Finding("ok" if is_known else unlike, "architectures", f"{name}{hint}"))
        if raw.get("model_type") is None:
            found.append(Finding(unlike, "model_type", "none: transformers must read it as llama"))
    else:
        found += _check_speculators(raw)
    try:
        token = mask_token_of(raw)
    except ValueError as error:
        found.append(Finding("BAD", "mask token", str(error)))
    else:
        found.append(_check_mask_token(raw, token, layers.get("vocab_size")))
    ids = layer_ids_of(raw)
    found.append(Finding("ok", "feature layers", "(2, n // 2, n - 3), vLLM's default" if ids is None else str(ids)))
    found.append(Finding("ok", "max positions", str(layers.get("max_position_embeddings"))))
    return found


def _check_mask_token(raw: dict[str, Any], token: int | None, vocab_size: Any) -> Finding:
    if token is None:
        return Finding("warn", "mask token", "none: an EAGLE-3 drafter, one token a pass; parallel_drafting needs one")
    if not isinstance(vocab_size, int) or not 0 <= token < vocab_size:
        return Finding("BAD", "mask token", f"{token} lies outside of the vocabulary of {vocab_size}")
    if format_of(raw) == EAGLE3 and not ("mask_token_id" in raw and {"pard_token", "ptd_token_id"} & raw.keys()):
        names = ", ".join(mask_tokens_in(raw))
        others = "older vLLM knows pard_token and ptd_token_id only, NeMo mask_token_id only"
        return Finding("warn", "mask token", f"{token}, as {names} alone: {others}")
    return Finding("ok", "mask token", str(token))


def _check_speculators(raw: dict[str, Any]) -> list[Finding]:
    try:
        settings = raw["speculators_config"]
        tokens = settings["proposal_methods"][0]["speculative_tokens"]
        target = settings["verifier"]["name_or_path"]
    except (KeyError, IndexError, TypeError) as error:
        return [Finding("BAD", "speculators_config", f"not as vLLM reads it: {type(error).__name__} {error}")]
    good = type(tokens) is int and tokens >= 1
    found = [Finding("ok" if good else "BAD", "speculative tokens", str(tokens))]
    if not target:
        found.append(Finding("warn", "verifier", "none: `vllm serve` does not know which target this is for"))
    else:
        found.append(Finding("ok", "verifier", str(target)))
    return found


def _check_weights(folder: Path, raw: dict[str, Any], config: PEagleDraftConfig | None) -> list[Finding]:
    try:
        stored = read_tensors(folder)
        files = weight_files(folder)
    except ValueError as error:
        return [Finding("BAD", "weights", str(error))]
    found = []
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files)
    if stray:
        found.append(Finding("BAD", stray[0], "is no part of the drafter, but vLLM reads every .safetensors here"))
    try:
        if config is None:
            level: Level = "????" if not wrong_types(raw) and other_kind(raw) else "BAD"
            return [*found, Finding(level, "weights", "shapes not checked: config.json does not say what they must be")]
        check_layers(config, {standard_name(name): tensor for name, tensor in stored.items()})
        shapes = expected_shapes(config)
    except ValueError as error:
        return [*found, Finding("BAD", "weights", str(error))]
    tables = {name: stored.pop(name) for name in list(stored) if is_rotary_table(standard_name(name))}
    found += [Finding("ok", name, "a rotary table, which is not read") for name in tables]
    names = {standard_name(name) for name in stored}
    for name, tensor in stored.items():
        found.append(_check_tensor(name, tensor, shapes))
    twice = [name for name, count in Counter(map(standard_name, stored)).items() if count > 1]
    found += [Finding("BAD", name, "two tensors have this name, or names that are read as it") for name in twice]
    pruned = "d2t" in shapes
    is_parallel = config.ptd_token_id is not None or "mask_hidden" in names
    for name in sorted(shapes.keys() - names):
        found.append(_missing(name, shapes[name], pruned, is_parallel))
    if config.ptd_token_id is None and "mask_hidden" in names:
        found.append(Finding("BAD", "mask token", "none, though there is a mask_hidden"))
    return found + _check_mapping(stored, config)


def _lacks_fc(folder: Path) -> bool:
    """Whether there are weights that join no features, as a drafter's do."""
    try:
        return all(standard_name(name) != "fc.weight" for name in tensor_names(folder))
    except ValueError:
        return False


def _check_tensor(name: str, tensor: Tensor, shapes: dict[str, tuple[int, ...]]) -> Finding:
    standard, kind = standard_name(name), str(tensor.dtype).removeprefix("torch.")
    shown = f"{kind} {list(tensor.shape)}"
    if standard in ("d2t", "t2d") and standard not in shapes:
        why = "the vocabulary is the full one (draft_vocab_size is vocab_size)"
        if standard == "t2d":
            return Finding("warn", name, f"{shown}: {why}, so it says nothing")
        return Finding("BAD", name, f"{shown}: {why}, for which vLLM has no such tensor")
    if standard not in shapes:
        return Finding("BAD", name, f"{shown}: no tensor of such a drafter")
    if standard != name and not name.startswith("midlayer."):
        return Finding("BAD", name, f"{shown}: vLLM would look for model.{name}; tools/import.py renames it")
    wanted = shapes[standard]
    flat = standard == "mask_hidden" and tensor.numel() == wanted[-1]
    if tuple(tensor.shape) != wanted and not flat:
        return Finding("BAD", name, f"{shown}, but config.json makes it {list(wanted)}")
    if standard in ("d2t", "t2d"):
        usual = torch.int64 if standard == "d2t" else torch.bool
        return Finding("ok" if tensor.dtype == usual else "warn", name, shown + _unless(tensor.dtype == usual, usual))
    if not tensor.is_floating_point():
        return Finding("BAD", name, f"{shown}: weights must be floating point")
    if bad := count_non_finite(tensor):
        return Finding("BAD", name, f"{shown}: {bad} values that are not finite")
    if standard == "mask_hidden" and not bool(tensor.any()):
        return Finding("warn", name, f"{shown}: all zero, so it was never trained")
    return Finding("ok", name, shown)


def _missing(name: str, shape: tuple[int, ...], pruned: bool, is_parallel: bool) -> Finding:
    if name == "lm_head.weight" and pruned:
        return Finding("BAD", name, f"missing {list(shape)}: the target's head does not fit a pruned vocabulary")
    if name == "mask_hidden" and not is_parallel:
        return Finding("warn", name, f"missing {list(shape)}: parallel_drafting needs it, tools/import.py starts one")
    if name in MAY_LACK and name != "mask_hidden":
        return Finding("warn", name, f"missing {list(shape)}: engines take the target's")
    if name == "t2d":
        return Finding("ok", name, f"missing {list(shape)}: d2t says as much")
    return Finding("BAD", name, f"missing {list(shape)}")


def _check_mapping(stored: dict[str, Tensor], config: PEagleDraftConfig) -> list[Finding]:
    tensors = {standard_name(name): tensor for name, tensor in stored.items()}
    if config.draft_vocab_size == config.vocab_size:
        return [Finding("ok", "vocabulary", f"all {config.vocab_size} tokens")]
    if "d2t" not in tensors or tensors["d2t"].shape != (config.draft_vocab_size,):
        return []
    try:
        ids = check_vocab(tensors["d2t"], tensors.get("t2d"), config.vocab_size)
    except ValueError as error:
        return [Finding("BAD", "vocabulary", str(error))]
    counted = f"{ids.numel()} of {config.vocab_size} tokens, {int(ids.min())} to {int(ids.max())}"
    if bool((ids[1:] < ids[:-1]).any()):
        return [Finding("warn", "vocabulary", f"{counted}, not ascending: t2d alone cannot tell the order")]
    return [Finding("ok", "vocabulary", counted)]


def _check_target(config: PEagleDraftConfig, raw: dict[str, Any], target: dict[str, Any]) -> list[Finding]:
    text = target.get("text_config") if isinstance(target.get("text_config"), dict) else target
    assert text is not None
    found = []
    for ours, theirs, name in (
        (config.vocab_size, text.get("vocab_size"), "vocab_size"),
        (config.target_hidden_size, text.get("hidden_size"), "hidden_size"),
    ):
        good = ours == theirs
        detail = f"{theirs}" + ("" if good else f", but the drafter was made for {ours}")
        found.append(Finding("ok" if good else "BAD", f"target's {name}", detail))
    layers, ids = text.get("num_hidden_layers"), layer_ids_of(raw)
    if isinstance(layers, int) and ids is not None and max(ids) >= layers:
        found.append(Finding("BAD", "target's layers", f"{layers}, but the drafter reads the inputs of {ids}"))
    positions = text.get("max_position_embeddings")
    if isinstance(positions, int) and config.max_position_embeddings < positions:
        detail = f"{positions}, the drafter's are {config.max_position_embeddings}: longer contexts are not drafted for"
        found.append(Finding("warn", "target's positions", detail))
    return found


def _unless(good: bool, usual: torch.dtype) -> str:
    return "" if good else f"; {str(usual).removeprefix('torch.')} is usual"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; OSError where it cannot be written."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
