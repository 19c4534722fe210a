"""From a run's checkpoint to a folder that an engine serves: config, weights, tokenizer, model card. All or nothing."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch import Tensor

from peagle_train.config import parse_sources, read_yaml
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.files import one_line, write_folder
from peagle_train.serving.check import Finding, check_folder, is_loadable
from peagle_train.serving.drafter_io import fill_drafter, read_config, read_drafter
from peagle_train.serving.formats import EAGLE3, SPECULATORS, speculative_tokens_of, speculators_config, target_name_of

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model"
    " chat_template.jinja"
).split()

CARD = """---
{{ card_data }}
---

# P-EAGLE drafter for {{ target or "a target that its files do not name" }}

Drafts all K tokens in one forward pass (arXiv:2602.01469). Trained with peagle_train.

| | |
|---|---|
{{ rows }}

## Measured

{{ measured }}

## Serving

```bash
{{ command }}
```

The target must run in vLLM with EAGLE-3 support, with exactly the weights that the drafter was trained on.

## Licence

{{ licence or "Not set" }}. Embeddings and head start as the target's own unless a recipe says otherwise, so its licence may
apply too.
"""


class Export(NamedTuple):
    """What was written: the folder, the findings of its check, and what a user should know."""

    folder: Path
    findings: list[Finding]
    notes: list[str]


class RunFacts(NamedTuple):
    """What the files of a run say about one of its drafters; empty where there are none."""

    recipe: dict[str, Any]  # recipe.yaml's values by `section.key`
    step: int | None
    evaluation: dict[str, Any] | None  # the held-out evaluation at this step, from metrics.jsonl


def read_run(folder: Path) -> RunFacts:
    """Facts from the files in a drafter's folder and its run's; whatever is missing or unreadable is skipped."""
    run, sections, evaluation = folder.parent, _read(folder / "recipe.yaml"), None
    recipe = {f"{name}.{k}": v for name, keys in sections.items() if isinstance(keys, dict) for k, v in keys.items()}
    steps = {"best": _read(run / "best.json").get("step"), "final": _read(run / "run.json").get("steps")}
    match, metrics = re.fullmatch(r"checkpoint-(\d+)", folder.name), run / "metrics.jsonl"
    step = int(match[1]) if match else steps.get(folder.name)
    for line in metrics.read_text(encoding="utf-8").splitlines() if step and metrics.is_file() else []:
        # the last line of a run that was killed may be cut
        if '"eval"' in line and line.endswith("}") and (record := json.loads(line)).get("step") == step:
            evaluation = record if record.get("kind") == "eval" else evaluation
    return RunFacts(recipe, step, evaluation)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a .yaml or JSON file; empty if it is missing or none."""
    try:
        content: Any = read_yaml(path) if path.suffix == ".yaml" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    measured: Path | None = None,
) -> Export:
    """Write a drafter's folder as engines load it; the command's --help says what is what.

    ValueError: one line, for what no engine would load; nothing is written then.
    """
    check_new(out)
    folder = find_drafter(checkpoint)
    files = read_drafter(folder)
    files.check_whole()
    facts, notes = read_run(folder), list(files.notes)
    if folder != checkpoint:
        notes.append(f"exported from {folder}")
    path, trained = facts.recipe.get("target.path"), facts.recipe.get("cod.num_depths")
    if target is None and path is not None and Path(path).is_dir():
        target = Path(path)
        notes.append(f"the target is {path}, as the recipe beside the drafter says")
    elif target is None:
        where = f"the target {path} is not on this machine" if path else "no target is known"
        notes.append(f"{where}: no tokenizer files were copied, and nothing was compared with it (--target DIR)")
    if speculative_tokens is not None and not 1 <= speculative_tokens <= (trained or speculative_tokens):
        allowed = f"1 to {trained or 'K of its training'}"
        raise ValueError(f"--num-speculative-tokens is {speculative_tokens}; give {allowed}")
    tokens = speculative_tokens or trained or speculative_tokens_of(files.raw)
    named = target_name or target or path or target_name_of(files.raw)
    name = None if named is None else str(named)
    if format == SPECULATORS and (tokens is None or name is None):
        what = "give --target DIR or --target-name NAME" if name is None else "give --num-speculative-tokens K"
        raise ValueError(f"{folder} does not say for which target, or how many tokens, it was trained: {what}")
    target_config = read_config(target) if target else None
    tensors, config = files.tensors, files.config
    if dtype:
        floats = {n: t.to(getattr(torch, dtype)) for n, t in tensors.items() if t.is_floating_point()}
        tensors = {**tensors, **floats}
    config.dtype = tensors["fc.weight"].dtype
    texts = {"README.md": _card(config, format, facts, name, tokens, licence, _lengths(measured))}
    if format == SPECULATORS:
        assert tokens is not None
        architectures = (target_config or {}).get("architectures") or []
        found = target_name or (target and str(target.absolute())) or name  # engines run elsewhere
        content = speculators_config(config, tokens, found, architectures)
        texts["config.json"] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    copied = [target / file for file in TOKENIZER_FILES if (target / file).is_file()] if target else []
    return Export(out, _write(out, config, tensors, texts, copied, target_config), notes)


def check_new(path: Path) -> None:
    """ValueError unless a folder may be put in this place."""
    is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty:
        raise ValueError(f"--out {path} is there already and not an empty folder; give another")


def push_to_hub(folder: Path, name: str, public: bool = False) -> str:
    """Upload an exported folder to the hub as the model `name`, made if it does not exist; returns its address.

    ValueError, one line: it is not uploaded, also where the model exists and is public without `public`.
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


def import_drafter(source: Path, out: Path) -> Export:
    """Write another's P-EAGLE drafter, of either format and any of the known names, in this project's.

    ValueError: one line; nothing is written then.
    """
    check_new(out)
    files = read_drafter(source)
    files.check_whole()
    return Export(out, _write(out, files.config, files.tensors, {}, [], None), files.notes)


def _write(
    out: Path, config: Any, tensors: dict[str, Tensor], texts: dict[str, str], copied: list[Path], target: Any
) -> list[Finding]:
    """Write a drafter's new folder, check it (against the `target`'s config.json), and put it in its place; returns the
    check's findings. ValueError: an engine would not load it, or it cannot be written; `out` is unchanged then.
    """
    findings: list[Finding] = []

    def fill(temporary: Path) -> None:
        fill_drafter(temporary, config, tensors, texts)
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        findings.extend(check_folder(temporary, target))
        if not is_loadable(findings):
            bad = "; ".join(f"{f.what}: {f.detail}" for f in findings if f.level == "BAD")
            raise ValueError(f"vLLM would not load the drafter as it was trained: {bad}")

    try:
        write_folder(out, fill)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return findings


# The model card


def _card(
    config: PEagleDraftConfig,
    form: str,
    run: RunFacts,
    target: str | None,
    K: int | None,
    licence: str | None,
    lengths: Any,
) -> str:
    """The README.md. It says only what the run's files say."""
    told = {
        "K in training": "cod.num_depths",
        "longest sequence": "data.max_length",
        "learning rate": "train.learning_rate",
        "started from": "draft.init_from",
    }
    ratio, floor = (run.recipe.get(f"cod.down_sample_ratio{end}") for end in ("", "_min"))
    sources = parse_sources(run.recipe.get("data.sources") or [])  # files without their machine's folders
    rows = {
        "target": target,
        "layers, draft vocabulary": f"{config.num_hidden_layers}, {config.draft_vocab_size} of {config.vocab_size} tokens",
        "K to serve with": K,
        **{name: run.recipe.get(key) for name, key in told.items()},
        "r, its floor": None if ratio is None else f"{ratio}, {floor}",
        "data": ", ".join(Path(s.path).name if s.path else str(s.datasets) for s in sources) or None,
        "steps": run.step,
    }
    if run.evaluation:
        length, loss = run.evaluation["expected_accepted_length"], run.evaluation["loss"]
        what = f"at step {run.step}, held-out examples of the training data"
        lengths.append(f"- {what}: expected accepted length {length:.3f} (teacher-forced), loss {loss:.3f}")
    command = "vllm serve THIS_FOLDER"
    if form == EAGLE3:
        served = {"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": K or "K"}
        settings = json.dumps({**served, "parallel_drafting": True})
        command = f"vllm serve {target or 'TARGET'} --speculative-config \\\n    '{settings}'"
    base = target if re.fullmatch(r"[\w.-]+/[\w.-]+", target or "") else None  # a hub name
    tags = ["speculative-decoding", "eagle3", "p-eagle", "vllm"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    about = ModelCardData(license=licence or "unknown", base_model=base, tags=tags)
    texts = {"target": target, "rows": table, "measured": "\n".join(lengths) or "Nothing yet.", "command": command}
    return str(ModelCard.from_template(about, template_str=CARD, licence=licence, **texts))


def _lengths(measured: Path | None) -> list[str]:
    """The card's lines of what `peagle-train evaluate --json` wrote; none for None."""
    lines = []
    try:
        for name, figures in json.loads(measured.read_text())["figures"][0].items() if measured else ():
            by_k = [row for row in figures["by_k"] if row["accepted_length"]]
            lengths = ", ".join(f"{row['accepted_length']:.2f} at K = {row['k']}" for row in by_k)
            lines.append(f"- {name}: accepted length {lengths}")
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{measured} has no accepted lengths; give what `evaluate --json FILE` wrote") from None
    return lines
