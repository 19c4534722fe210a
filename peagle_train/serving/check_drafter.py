"""Has a folder what a P-EAGLE drafter must have: names, shapes, dtypes, ids in range? Everything found, in one table.

`tests/test_vllm.py` holds it to vLLM itself, by folders that both take and broken ones that both refuse.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from peagle_train.core.draft_config import PEagleDraftConfig, mask_tokens_in
from peagle_train.core.rope import rope_mistake, yarn_too_short
from peagle_train.serving.draft_formats import (
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
from peagle_train.serving.drafter_files import read_config, read_tensors, tensor_names, weight_files
from peagle_train.serving.drafter_tensors import (
    MAY_LACK,
    check_layers,
    check_vocab,
    count_non_finite,
    expected_shapes,
    is_rotary_table,
    standard_name,
)

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
