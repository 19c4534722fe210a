"""Drafters' folders for engines: would one load it, and making one that it does (config, weights, model card)."""

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from peagle_train.config import Recipe, RecipeError, load_recipe, read_yaml
from peagle_train.core.draft_config import ARCHITECTURES
from peagle_train.files import aligned, one_line, write_folder
from peagle_train.serving import formats
from peagle_train.serving.drafter_io import fill_drafter, is_used, read_config, read_drafter
from peagle_train.target_model.loading import stored_tensors

# Check: what `read_drafter` refuses is bad; added is where vLLM reads differently (tests/test_vllm.py asks vLLM itself).

Level = Literal["ok", "warn", "BAD"]


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
    shape = f"{config.num_hidden_layers} {config.layer_type} layers"
    find("ok", "format", f"{form}, {shape}, {dtype}, {config.draft_vocab_size} of {config.vocab_size} tokens")
    if form == formats.EAGLE3:
        given, names = (raw.get("architectures") or ["none"])[0], ARCHITECTURES[config.layer_type]
        find(given in names, "architectures", given if given in names else f"{given}; vLLM looks for {names[0]}")
        find(raw.get("model_type") is not None, "model_type", f"{config.layer_type}, as transformers must read it")
    else:
        tokens, verifier = formats.served_as(raw)
        find(tokens is not None, "speculative tokens", tokens)
        find(verifier is not None, "verifier", verifier or "none: `vllm serve DIR` does not know the target")
    token, has_mask = config.ptd_token_id, "mask_hidden" not in files.missing
    if token is None and not has_mask:
        find("warn", "mask token", "none, and no mask_hidden: an EAGLE-3 drafter, one token a pass")
    else:
        find(token is not None and has_mask, "mask token", f"{token}, {'with' if has_mask else 'without'} mask_hidden")
    for name in files.missing:
        if name == "lm_head.weight" and config.draft_vocab_size != config.vocab_size:
            find("BAD", name, "missing: the target's head does not fit a pruned vocabulary")
        elif name != "mask_hidden":
            find("warn", name, "missing: engines take the target's")
    for name in stored_tensors(files.folder):
        if re.match(r"model\.|draft_id_to_target_id|verifier_", name):
            find("BAD", name, "vLLM knows no such tensor; peagle-train import renames it, or leaves it out")
    ids = formats.layer_ids_of(raw)
    count, hint = formats.feature_layers_of(raw), ""
    if count != config.num_aux_hidden_states:
        hint = f": vLLM's drafter takes {count} unless num_aux_hidden_states is among the layers' keys, as in an export"
    find(not hint, "feature layers", f"{'(2, n // 2, n - 3)' if ids is None else ids}{hint}")
    if config.fc_norm and not formats.layers_of(raw).get("fc_norm"):
        find("BAD", "fc_norm", "vLLM looks for it in transformer_layer_config, where export puts it")
    if target is not None:
        theirs = target.get("text_config", target)
        for mine, key in ((config.vocab_size, "vocab_size"), (config.target_hidden_size, "hidden_size")):
            find(mine == theirs.get(key), f"target's {key}", f"{theirs.get(key)}, the drafter was made for {mine}")
        layers, positions = theirs.get("num_hidden_layers", 0), theirs.get("max_position_embeddings", 0)
        reads = ids or [2, layers // 2, layers - 3]  # vLLM's default
        if max(reads) >= layers or reads != sorted({*reads}):
            find("BAD", "target's layers", f"{layers}, but the drafter reads the inputs of {reads}")
        if config.max_position_embeddings < positions:
            find("warn", "target's positions", f"{positions}: contexts beyond the drafter's are not drafted for")
    return found


# Export


def recipe_beside(folder: Path) -> Recipe | None:
    """The recipe.yaml in a drafter's folder; None if it has none. RecipeError, with its path, for one of other keys."""
    path = folder / "recipe.yaml"
    try:
        return load_recipe(path) if path.is_file() else None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of the recipe.yaml in a drafter's folder, by `section.key`, those of keys that are gone, too; {} if it has
    none.
    """
    path = folder / "recipe.yaml"
    found = read_yaml(path) if path.is_file() else None
    sections = found.items() if isinstance(found, dict) else ()
    return {f"{name}.{key}": x for name, each in sections if isinstance(each, dict) for key, x in each.items()}


def find_drafter(folder: Path) -> Path:
    """The drafter's folder: that of a run is its `final/`. ValueError: the run has none yet."""
    found = [path for path in (folder, folder / "final") if (path / "config.json").exists()]
    if not found and (folder / "run.json").exists():
        raise ValueError(f"{folder} is a run without a drafter yet: let it end, or give one of its checkpoints")
    return found[0] if found else folder


def export_drafter(
    checkpoint: Path,
    out: Path,
    format: str,
    speculative_tokens: int | None = None,
    dtype: str | None = None,
    *,
    target: Path | None = None,
    target_name: str | None = None,
    licence: str | None = None,
) -> list[str]:
    """Write a drafter's folder as engines load it; returns what a user should know. The command's --help says what is what.

    ValueError: one line, for what no engine would load; nothing is written then.
    """
    if is_used(out):
        raise ValueError(f"--out {out} is there already and not an empty folder; give another")
    folder = find_drafter(checkpoint)
    files = read_drafter(folder)
    files.check_whole()
    settings, notes = read_settings(folder), list[str]()
    path, trained = settings.get("target.path"), settings.get("cod.num_depths")
    if target is None and path is not None and Path(path).is_dir():
        target = Path(path)
        notes.append(f"the target is {path}, as the recipe beside the drafter says")
    elif target is None:
        what = "no target is known on this machine: nothing was compared with one"
        notes.append(f"{what} (peagle-train check FOLDER --target DIR does)")
    if trained and (speculative_tokens or 0) > trained:
        raise ValueError(f"--num-speculative-tokens is {speculative_tokens}; give at most the training's {trained}")
    served_k, served_name = formats.served_as(files.raw)
    tokens = speculative_tokens or trained or served_k
    name = target_name or (str(target.absolute()) if target else path or served_name)  # engines run elsewhere
    target_config = read_config(target) if target else None
    tensors, config = files.tensors, files.config
    if dtype:
        tensors = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in tensors.items()}
    config.dtype = tensors["fc.weight"].dtype
    texts = {"README.md": _card(format, settings, name, tokens, licence)}
    if format == formats.SPECULATORS:
        if tokens is None or name is None:
            what = "give --target DIR or --target-name NAME" if name is None else "give --num-speculative-tokens K"
            raise ValueError(f"{folder} does not say for which target, or how many tokens, it was trained: {what}")
        architectures = (target_config or {}).get("architectures") or []
        content = formats.speculators_config(config, tokens, name, architectures)
        texts["config.json"] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    findings: list[Finding] = []

    def fill(temporary: Path) -> None:
        fill_drafter(temporary, config, tensors, texts)
        findings.extend(check_folder(temporary, target_config))
        if not is_loadable(findings):
            bad = "; ".join(f"{f.what}: {f.detail}" for f in findings if f.level == "BAD")
            raise ValueError(f"vLLM would not load the drafter as it was trained: {bad}")

    write_folder(out, fill)
    return notes + [f"{f.what}: {f.detail}" for f in findings if f.level == "warn"]


def push_to_hub(folder: Path, name: str, public: bool = False) -> str:
    """Upload an exported folder to the hub as the model `name`, made if it does not exist; returns its address. ValueError:
    it is not uploaded, also where the model exists and is public without `public`.
    """
    api = HfApi()
    try:
        name = api.create_repo(name, private=not public, exist_ok=True).repo_id
        if not public and not api.model_info(name).private:
            raise ValueError("it exists and is public; give --public, or another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="P-EAGLE drafter of peagle_train")
    except Exception as error:  # the hub's client and its transport each raise types of their own
        raise ValueError(f"{folder} is exported, but not uploaded to {name}: {one_line(error, 300)}") from error
    return f"{api.endpoint}/{name}"


# The model card

CARD = """---
{{ card_data }}
---

# P-EAGLE drafter for {{ target or "a target that its files do not name" }}

Drafts all K tokens in one forward pass (arXiv:2602.01469). Written by peagle_train.

| | |
|---|---|
{{ rows }}

## Serving

```bash
{{ command }}
```

The target must run in vLLM with EAGLE-3 support, with exactly the weights that the drafter was trained on.

## Licence

{{ licence or "Not set" }}. Embeddings and head start as the target's own unless a recipe says otherwise, so its licence may
apply too.
"""


def _card(form: str, settings: dict[str, Any], target: str | None, K: int | None, licence: str | None) -> str:
    """The README.md. It says only what the drafter's files say."""
    sources = [s if isinstance(s, dict) else {"path": s} for s in settings.get("data.sources", [])]
    depths = "num_depths", "down_sample_ratio", "down_sample_ratio_min"
    rows = {
        "target": target,
        "K to serve with": K,
        **{f"cod.{key}": settings.get(f"cod.{key}") for key in depths},
        **{key: settings.get(key) for key in ("data.max_length", "train.learning_rate", "draft.init_from")},
        # Files without their machine's folders.
        "data": ", ".join(Path(s["path"]).name if "path" in s else str(s.get("datasets")) for s in sources) or None,
    }
    command = "vllm serve THIS_FOLDER"
    if form == formats.EAGLE3:
        served = {"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": K or "K"}
        drafting = json.dumps({**served, "parallel_drafting": True})
        command = f"vllm serve {target or 'TARGET'} --speculative-config \\\n    '{drafting}'"
    base = target if re.fullmatch(r"[\w.-]+/[\w.-]+", target or "") else None  # a hub name
    tags = ["speculative-decoding", "eagle3", "p-eagle", "vllm"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    about = ModelCardData(license=licence or "unknown", base_model=base, tags=tags)
    texts = {"target": target, "rows": table, "command": command}
    return str(ModelCard.from_template(about, template_str=CARD, licence=licence, **texts))
