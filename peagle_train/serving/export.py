"""From a run's checkpoint to a folder that an engine serves: config, weights, model card. All or nothing."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from peagle_train.config import read_yaml
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.files import one_line, write_folder
from peagle_train.serving.check import Finding, check_folder, is_loadable
from peagle_train.serving.drafter_io import fill_drafter, read_config, read_drafter
from peagle_train.serving.formats import EAGLE3, SPECULATORS, speculative_tokens_of, speculators_config, target_name_of

SETTINGS = (
    "cod.num_depths cod.down_sample_ratio cod.down_sample_ratio_min data.max_length train.learning_rate draft.init_from"
).split()
"""Of the recipe, what the card has beside its data."""

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


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of the recipe.yaml in a drafter's folder, by `section.key`; empty if it has none."""
    path = folder / "recipe.yaml"
    found = read_yaml(path) if path.is_file() else None
    sections = found.items() if isinstance(found, dict) else ()
    return {f"{name}.{k}": v for name, values in sections if isinstance(values, dict) for k, v in values.items()}


def find_drafter(folder: Path) -> Path:
    """The drafter in a checkpoint's or a run's folder (its `final/`); ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a drafter's, or a run's")
    for found in (folder, folder / "final"):
        if (found / "config.json").exists():
            return found
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} is a run without a drafter yet: let it end, or end it with --resume")
    raise ValueError(f"{folder} is no drafter's folder (no config.json); give a drafter's folder, or a run's")


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
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not is_empty:
        raise ValueError(f"--out {out} is there already and not an empty folder; give another")
    folder = find_drafter(checkpoint)
    files = read_drafter(folder)
    files.check_whole()
    trained_by, notes = read_settings(folder), list[str]()
    path, trained = trained_by.get("target.path"), trained_by.get("cod.num_depths")
    if target is None and path is not None and Path(path).is_dir():
        target = Path(path)
        notes.append(f"the target is {path}, as the recipe beside the drafter says")
    elif target is None:
        where = f"the target {path} is not on this machine" if path else "no target is known"
        notes.append(f"{where}: nothing was compared with it (peagle-train check FOLDER --target DIR does)")
    if speculative_tokens is not None and not 1 <= speculative_tokens <= (trained or speculative_tokens):
        most = trained or "its training's K"
        raise ValueError(f"--num-speculative-tokens is {speculative_tokens}; give 1 to {most}")
    tokens = speculative_tokens or trained or speculative_tokens_of(files.raw)
    # Engines run elsewhere.
    name = target_name or (str(target.absolute()) if target else path or target_name_of(files.raw))
    if format == SPECULATORS and (tokens is None or name is None):
        what = "give --target DIR or --target-name NAME" if name is None else "give --num-speculative-tokens K"
        raise ValueError(f"{folder} does not say for which target, or how many tokens, it was trained: {what}")
    target_config = read_config(target) if target else None
    tensors, config = files.tensors, files.config
    if dtype:
        tensors = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in tensors.items()}
    config.dtype = tensors["fc.weight"].dtype
    texts = {"README.md": _card(config, format, trained_by, name, tokens, licence)}
    if format == SPECULATORS:
        assert tokens is not None
        architectures = (target_config or {}).get("architectures") or []
        content = speculators_config(config, tokens, name, architectures)
        texts["config.json"] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    findings: list[Finding] = []

    def fill(temporary: Path) -> None:
        fill_drafter(temporary, config, tensors, texts)
        findings.extend(check_folder(temporary, target_config))
        if not is_loadable(findings):
            bad = "; ".join(f"{f.what}: {f.detail}" for f in findings if f.level == "BAD")
            raise ValueError(f"vLLM would not load the drafter as it was trained: {bad}")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
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


def _card(
    config: PEagleDraftConfig, form: str, recipe: dict[str, Any], target: str | None, K: int | None, licence: str | None
) -> str:
    """The README.md. It says only what the drafter's files say."""
    sources = [s if isinstance(s, dict) else {"path": s} for s in recipe.get("data.sources") or []]
    rows = {
        "target": target,
        "layers, draft vocabulary": f"{config.num_hidden_layers}, {config.draft_vocab_size} of {config.vocab_size} tokens",
        "K to serve with": K,
        **{key: recipe.get(key) for key in SETTINGS},
        # Files without their machine's folders.
        "data": ", ".join(Path(s["path"]).name if "path" in s else str(s.get("datasets")) for s in sources) or None,
    }
    command = "vllm serve THIS_FOLDER"
    if form == EAGLE3:
        served = {"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": K or "K"}
        settings = json.dumps({**served, "parallel_drafting": True})
        command = f"vllm serve {target or 'TARGET'} --speculative-config \\\n    '{settings}'"
    base = target if re.fullmatch(r"[\w.-]+/[\w.-]+", target or "") else None  # a hub name
    tags = ["speculative-decoding", "eagle3", "p-eagle", "vllm"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    about = ModelCardData(license=licence or "unknown", base_model=base, tags=tags)
    texts = {"target": target, "rows": table, "command": command}
    return str(ModelCard.from_template(about, template_str=CARD, licence=licence, **texts))
