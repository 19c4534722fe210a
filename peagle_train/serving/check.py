"""Whether an engine would load a drafter's folder, and read what was trained: a table of findings.

What `read_drafter` refuses is bad; added is where vLLM reads differently. `tests/test_vllm.py` holds it to vLLM itself.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from peagle_train.files import aligned
from peagle_train.serving import formats
from peagle_train.serving.drafter_io import read_drafter

Level = Literal["ok", "warn", "BAD"]
SERVED = {
    "llama": ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"),
    "qwen3": ("Eagle3Qwen3ForCausalLM", "Qwen3ForCausalLM"),
}
"""By layer type, the architectures under which vLLM's method eagle3 finds a drafter of this kind; the first is written."""


class Finding(NamedTuple):
    """One line of the check's table."""

    level: Level
    what: str
    detail: str


def is_loadable(findings: list[Finding]) -> bool:
    return all(finding.level != "BAD" for finding in findings)


def table(findings: list[Finding]) -> str:
    """The findings as lines, then a verdict."""
    bad, warned = (sum(f.level == level for f in findings) for level in ("BAD", "warn"))
    return f"{aligned(findings)}\n{'NOT loadable as it is' if bad else 'loadable'}: {bad} errors, {warned} warnings"


def check_folder(folder: str | Path, target: dict[str, Any] | None = None) -> list[Finding]:
    """Whether an engine would load a drafter's folder as it was trained; `target`: its config.json, to compare with."""
    try:
        files = read_drafter(folder)
    except ValueError as error:
        return [Finding("BAD", "drafter", str(error))]
    raw, config = files.raw, files.config
    found: list[Finding] = []

    def find(level: Level | bool, what: str, detail: object) -> None:
        found.append(Finding(level if isinstance(level, str) else "ok" if level else "BAD", what, str(detail)))

    form, dtype = formats.format_of(raw), files.tensors["fc.weight"].dtype
    find("ok", "format", f"{form}, {config.num_hidden_layers} {config.layer_type} layers, {dtype}")
    find("ok", "vocabulary", f"{config.draft_vocab_size} of {config.vocab_size} tokens")
    if form == formats.EAGLE3:
        given, names = raw.get("architectures"), SERVED[config.layer_type]
        known = isinstance(given, list) and given[:1] and given[0] in names
        find(bool(known), "architectures", given if known else f"{given}; vLLM looks for {names[0]}")
        find(raw.get("model_type") is not None, "model_type", f"{config.layer_type}, as transformers must read it")
    else:
        tokens, verifier = formats.speculative_tokens_of(raw), formats.target_name_of(raw)
        find(tokens is not None, "speculative tokens", tokens)
        find(verifier is not None, "verifier", verifier or "none: `vllm serve DIR` does not know the target")
    token, has_mask = config.ptd_token_id, "mask_hidden" not in files.missing
    if token is None and not has_mask:
        find("warn", "mask token", "none, and no mask_hidden: an EAGLE-3 drafter, one token a pass")
    else:
        find(token is not None and has_mask, "mask token", f"{token}, {'with' if has_mask else 'without'} mask_hidden")
    if has_mask and not bool(files.tensors["mask_hidden"].any()):
        find("warn", "mask_hidden", "all zero, so it was never trained")
    for name in files.missing:
        if name == "lm_head.weight" and config.draft_vocab_size != config.vocab_size:
            find("BAD", name, "missing: the target's head does not fit a pruned vocabulary")
        elif name != "mask_hidden":
            find("warn", name, "missing: engines take the target's")
    for name in files.stored:
        if name.startswith("model.") or name == "draft_id_to_target_id":
            find("BAD", name, f"vLLM would look for model.{name}; peagle-train import renames it")
        elif name.startswith("verifier_"):
            find("BAD", name, "vLLM knows no such tensor; peagle-train import leaves it out")
    ids = formats.layer_ids_of(raw)
    count, hint = formats.feature_layers_of(raw), ""
    if count != config.num_aux_hidden_states:
        hint = f": vLLM's drafter takes {count} unless num_aux_hidden_states is among the layers' keys, as in an export"
    find(not hint, "feature layers", f"{'(2, n // 2, n - 3)' if ids is None else ids}{hint}")
    if config.fc_norm and not formats.layers_of(raw).get("fc_norm"):
        find("BAD", "fc_norm", "vLLM looks for it in transformer_layer_config, where export puts it")
    if target is not None:
        text_config = target.get("text_config")
        theirs = text_config if isinstance(text_config, dict) else target
        for mine, key in ((config.vocab_size, "vocab_size"), (config.target_hidden_size, "hidden_size")):
            find(mine == theirs.get(key), f"target's {key}", f"{theirs.get(key)}, the drafter was made for {mine}")
        layers, positions = theirs.get("num_hidden_layers"), theirs.get("max_position_embeddings")
        reads = ids or ([2, layers // 2, layers - 3] if isinstance(layers, int) else [])  # vLLM's default
        if not isinstance(layers, int) or max(reads) >= layers or reads != sorted({*reads}):
            find("BAD", "target's layers", f"{layers}, but the drafter reads the inputs of {reads}")
        if isinstance(positions, int) and config.max_position_embeddings < positions:
            find("warn", "target's positions", f"{positions}: contexts beyond the drafter's are not drafted for")
    return found
