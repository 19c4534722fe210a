"""From a run's checkpoint to a folder that an engine serves: config, weights, tokenizer, model card. All or nothing."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import YamlError, parse_sources, read_yaml
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.files import make_readable, sync
from peagle_train.serving.drafter_io import (
    WEIGHTS,
    DrafterFiles,
    Finding,
    check_folder,
    is_loadable,
    read_drafter,
    save_tensors,
)
from peagle_train.serving.formats import (
    EAGLE3,
    FORMATS,
    SPECULATORS,
    format_of,
    layer_ids_of,
    speculative_tokens_of,
    speculators_config,
)

# ---- model_card
# The README.md of an exported drafter: what it drafts for, how it was trained, how good it is, how to serve it.
#
# Says only what the run's files say; what is not known is left out.

UNKNOWN_LICENCE = "unknown"


@dataclass
class RunFacts:
    """What a run's folder says of one of its drafters."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """recipe.yaml, sections by name; empty if there is none."""
    step: int | None = None
    evaluation: dict[str, Any] | None = None
    """The held-out evaluation of this step, from metrics.jsonl."""

    def get(self, section: str, key: str) -> Any:
        values = self.recipe.get(section)
        return values.get(key) if isinstance(values, dict) else None


def read_run(folder: Path) -> RunFacts:
    """Facts from the files beside and above a drafter's folder; whatever is missing or unreadable is left out."""
    facts = RunFacts()
    for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if path.is_file():
            try:
                recipe = read_yaml(path)
            except YamlError:
                continue
            facts.recipe = recipe if isinstance(recipe, dict) else {}
            break
    kind, _, number = folder.name.partition("-")
    if kind == "checkpoint" and number.isdecimal():
        facts.step = int(number)
    else:
        name, key = ("best.json", "step") if kind == "best" else ("run.json", "steps")
        step = _read_json(folder.parent / name).get(key)
        facts.step = step if isinstance(step, int) else None
    facts.evaluation = _evaluation(folder.parent / "metrics.jsonl", facts.step)
    return facts


def model_card(
    config: PEagleDraftConfig,
    format: str,
    facts: RunFacts,
    *,
    target: str | None,
    speculative_tokens: int | None,
    licence: str | None,
    measured: dict[str, Any] | None = None,
) -> str:
    """The card's text.

    Args:
        target: the target's hub name or folder.
        speculative_tokens: K to serve with.
        measured: what `tools/evaluate.py --json` wrote of this drafter.
    """
    lines = ["---", f"license: {licence or UNKNOWN_LICENCE}"]
    if target and re.fullmatch(r"[\w.-]+/[\w.-]+", target):  # a hub's name; a folder is none
        lines.append(f"base_model: {target}")
    lines += ["tags: [speculative-decoding, eagle3, p-eagle, vllm]", "---", ""]
    lines += [f"# P-EAGLE drafter for {target or 'a target that its files do not name'}", ""]
    lines += [
        "Drafts all K tokens in one forward pass (arXiv:2602.01469). Trained with peagle_train.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(config, facts, target, speculative_tokens)),
        "",
        "## Measured",
        "",
        *_measured(facts, measured),
        "",
        "## Serving",
        "",
        *_serving(format, target, speculative_tokens),
        "",
        "The target must run in vLLM with EAGLE-3 support, with the very weights that the drafter was trained on.",
        "",
        "## Licence",
        "",
    ]
    start = "Embeddings and head start as the target's own unless a recipe says otherwise, so its licence may hold too."
    lines.append(f"{licence or 'Not set'}. {start}")
    return "\n".join(lines) + "\n"


def _rows(config: PEagleDraftConfig, facts: RunFacts, target: str | None, tokens: int | None) -> list[tuple[str, Any]]:
    ids = layer_ids_of({"eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids})
    rows: list[tuple[str, Any]] = [
        ("target", target),
        ("feature layers (inputs of)", ids or "2, n // 2, n - 3"),
        ("layers, hidden size", f"{config.num_hidden_layers}, {config.hidden_size}"),
        ("draft vocabulary", f"{config.draft_vocab_size} of {config.vocab_size} tokens"),
        ("mask token", config.ptd_token_id),
        ("positions", config.max_position_embeddings),
        ("K to serve with", tokens),
        ("K in training", facts.get("cod", "num_depths")),
        ("r, its floor", _pair(facts, "cod", "down_sample_ratio", "down_sample_ratio_min")),
        ("data", _sources(facts.get("data", "sources"))),
        ("row length", facts.get("data", "max_length")),
        ("steps", facts.step),
        ("learning rate", facts.get("train", "learning_rate")),
        ("started from", facts.get("draft", "init_from")),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _pair(facts: RunFacts, section: str, *keys: str) -> str | None:
    values = [facts.get(section, key) for key in keys]
    return None if None in values else ", ".join(map(str, values))


def _sources(sources: Any) -> str | None:
    """The recipe's sources, files without the folders of the machine that they lay on; None for what is none."""
    try:
        specs = parse_sources(sources)
    except (ValueError, TypeError, AttributeError):
        return None
    names = [
        Path(s.path).name or s.path if s.path else f"{s.datasets} ({s.name})" if s.name else s.datasets for s in specs
    ]
    return ", ".join(map(str, names))


def _measured(facts: RunFacts, measured: dict[str, Any] | None) -> list[str]:
    lines = []
    for name, by_k in _acceptance(measured or {}).items():
        lines.append(f"- {name}: accepted length " + ", ".join(f"{value:.2f} at K = {k}" for k, value in by_k))
    if facts.evaluation:
        length, loss = (facts.evaluation[key] for key in ("expected_accepted_length", "loss"))
        where = f"at step {facts.step}, held-out rows of the training data"
        lines.append(f"- {where}: expected accepted length {length:.3f} (teacher-forced), loss {loss:.3f}")
    return lines or ["Nothing yet."]


def _acceptance(report: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Accepted length by data set and K from an evaluation's report; empty if it has none."""
    found: dict[str, list[tuple[int, float]]] = {}
    try:
        for name, figures in report["figures"][0].items():
            rows = [(int(row["k"]), row["accepted_length"]) for row in figures["by_k"]]
            found[name] = [(k, float(length)) for k, length in rows if length is not None]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return {}
    return {name: rows for name, rows in found.items() if rows}


def _serving(format: str, target: str | None, tokens: int | None) -> list[str]:
    if format != EAGLE3:
        return ["```bash", "vllm serve THIS_FOLDER", "```"]
    settings = {
        "method": "eagle3",
        "model": "THIS_FOLDER",
        "num_speculative_tokens": tokens or "K",
        "parallel_drafting": True,
    }
    return [
        "```bash",
        f"vllm serve {target or 'TARGET'} --speculative-config \\",
        f"    '{json.dumps(settings)}'",
        "```",
    ]


def read_report(path: Path) -> dict[str, Any]:
    """An evaluation's JSON; ValueError unless it holds accepted lengths."""
    report = _read_json(path)
    if not _acceptance(report):
        raise ValueError(f"{path} holds no accepted lengths; give what `tools/evaluate.py --json FILE` wrote")
    return report


def find_report(folder: Path) -> dict[str, Any] | None:
    """An evaluation's `acceptance.json` in a drafter's folder or the one above, if this drafter is what it is about."""
    for path in (folder / "acceptance.json", folder.parent / "acceptance.json"):
        report = _read_json(path)
        named = report.get("drafters")
        if (
            _acceptance(report)
            and isinstance(named, list)
            and named
            and Path(str(named[0])).resolve() == folder.resolve()
        ):
            return report
    return None


def _evaluation(path: Path, step: int | None) -> dict[str, Any] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was cut off
            continue
        if (
            isinstance(record, dict)
            and record.get("kind") == "eval"
            and step is not None
            and record.get("step") == step
        ):
            if all(isinstance(record.get(key), float) for key in ("expected_accepted_length", "loss")):
                found = record
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- export
# From a run's checkpoint to a folder that an engine serves: config, weights, tokenizer, model card. All or nothing.

TOKENIZER_FILES: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


@dataclass
class Export:
    """What was written, and what is to be said about it."""

    folder: Path
    findings: list[Finding]
    """Of the check of what was written."""
    notes: list[str] = field(default_factory=list)


def find_drafter(folder: Path) -> Path:
    """The drafter in a checkpoint's or a run's folder (its `final/`); ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a drafter's, or a run's")
    if (folder / "config.json").exists():
        return folder
    if (folder / "final" / "config.json").exists():
        return folder / "final"
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    choice = f"; give one of its {', '.join(inside)}" if inside else ""
    raise ValueError(f"{folder} is no drafter's folder (no config.json){choice}")


def export_drafter(
    checkpoint: Path,
    out: Path,
    format: str,
    *,
    target: Path | None = None,
    target_name: str | None = None,
    speculative_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    licence: str | None = None,
    measured: Path | None = None,
) -> Export:
    """Write a drafter's folder as engines load it.

    Args:
        checkpoint: a drafter's folder in either format, or a run's (its `final/`).
        out: a folder that does not exist yet, or an empty one.
        target: the target's folder; None is the recipe's.
        target_name: how the files name the target, such as a hub name; None is the folder.
        speculative_tokens: K to serve with; None is the training's.
        dtype: of the weights; None keeps the checkpoint's.
        licence: the card's licence field.
        measured: an evaluation's JSON for the card; None is an `acceptance.json` about this folder, in it or beside it.

    Raises:
        ValueError: one line, for what no engine would load; nothing is written then.
    """
    assert format in FORMATS
    check_new(out)
    folder = find_drafter(checkpoint)
    files = read_drafter(folder)
    facts, notes = read_run(folder), list(files.notes)
    if folder != checkpoint:
        notes.append(f"exported from {folder}")
    lacking = files.missing + (["a mask token"] if files.config.ptd_token_id is None else [])
    if lacking:
        raise ValueError(f"{folder} lacks {', '.join(lacking)}: complete it with tools/import.py first")
    files.config.check_trainable()
    target = find_target(target, facts, notes)
    tokens = _speculative_tokens(files, facts, speculative_tokens)
    if format == SPECULATORS and tokens is None:
        raise ValueError(f"{folder} does not say for how many tokens it was trained: give --num-speculative-tokens")
    name = target_name or _known_target(files, facts, target)
    if format == SPECULATORS and name is None:
        raise ValueError(f"{folder} does not say which target it drafts for: give --target DIR or --target-name NAME")
    if name is not None and Path(name).is_absolute():
        notes.append(f"the files name the target by its folder, {name}: --target-name gives it another")
    report = read_report(measured) if measured else find_report(folder)
    about = (report or {}).get("drafters")
    if measured and isinstance(about, list) and about and Path(str(about[0])).resolve() != folder.resolve():
        notes.append(f"{measured} is about {about[0]}: right only if that is the same drafter")
    target_config = read_target_config(target) if target else None
    tensors = {n: t.to(dtype or t.dtype) if t.is_floating_point() else t for n, t in files.tensors.items()}
    files.config.dtype = tensors["fc.weight"].dtype
    config_text = _config_text(files.config, format, tokens, name, target_config)
    card = model_card(
        files.config,
        format,
        facts,
        target=name,
        speculative_tokens=tokens,
        licence=licence,
        measured=report,
    )
    result: list[Finding] = []

    def fill(temporary: Path) -> None:
        write_drafter(temporary, config_text, tensors)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for file in TOKENIZER_FILES:
            if target is not None and (target / file).is_file():
                shutil.copyfile(target / file, temporary / file)
        result.extend(check_folder(temporary, target_config))
        bad = [f"{finding.what}: {finding.detail}" for finding in result if finding.level == "BAD"]
        if not is_loadable(result):
            raise ValueError(f"vLLM would not load {folder} as it was trained: {'; '.join(bad)}")

    write_new_folder(out, fill)
    if target is not None and not any((out / file).exists() for file in TOKENIZER_FILES):
        notes.append(f"{target} has no tokenizer files, so none were copied")
    return Export(out, result, notes)


def find_target(given: Path | None, facts: RunFacts, notes: list[str]) -> Path | None:
    """The target's folder; ValueError if one was given and is none. A recipe's that is not on this machine is noted."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise ValueError(f"--target {given} is no model's folder (no config.json)")
        return given
    path = facts.get("target", "path")
    if isinstance(path, str) and (Path(path) / "config.json").is_file():
        notes.append(f"the target is {path}, as the recipe beside the drafter says")
        return Path(path)
    where = f"the target {path} is not on this machine" if path else "no target is known"
    notes.append(f"{where}: no tokenizer files were copied, and nothing was compared with it (--target DIR)")
    return None


def _speculative_tokens(files: DrafterFiles, facts: RunFacts, given: int | None) -> int | None:
    trained = facts.get("cod", "num_depths")
    trained = trained if isinstance(trained, int) else None
    if given is not None and trained is not None and given > trained:
        raise ValueError(
            f"--num-speculative-tokens is {given}, but the drafter was trained for {trained}: give at most that"
        )
    if given is not None and given < 1:
        raise ValueError(f"--num-speculative-tokens is {given}; give at least 1")
    return given or trained or speculative_tokens_of(files.raw)


def _known_target(files: DrafterFiles, facts: RunFacts, target: Path | None) -> str | None:
    if target is not None:
        return str(target)
    named = facts.get("target", "path")
    if named is None and format_of(files.raw) == SPECULATORS:
        settings = files.raw.get("speculators_config")
        verifier = settings.get("verifier") if isinstance(settings, dict) else None
        named = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return named if isinstance(named, str) else None


def _config_text(
    config: PEagleDraftConfig, format: str, tokens: int | None, target: str | None, target_config: dict[str, Any] | None
) -> str:
    if format == EAGLE3:
        return config.to_json_string()
    assert tokens is not None
    architectures = (target_config or {}).get("architectures") or []
    content = speculators_config(config, tokens, target, architectures)
    content["dtype"] = str(config.dtype).removeprefix("torch.")
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def read_target_config(target: Path) -> dict[str, Any]:
    """The target's config.json; ValueError if it cannot be read."""
    try:
        content = json.loads((target / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the target's {target / 'config.json'} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"the target's {target / 'config.json'} is no mapping")
    return content


def write_drafter(folder: Path, config_text: str, tensors: dict[str, Tensor]) -> None:
    """config.json and model.safetensors into a folder that is there; OSError where they cannot be written."""
    (folder / "config.json").write_text(config_text, encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors)


def check_new(path: Path) -> None:
    """ValueError unless a folder may be put in this place."""
    if path.is_dir() and not any(path.iterdir()) and not path.is_symlink():
        return
    if os.path.lexists(path):
        raise ValueError(f"--out {path} is there already and not an empty folder; give another")


def write_new_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder beside `path`, sync it, and rename it to `path`, which is new or empty."""
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from error
    try:
        fill(temporary)
        for item in [*temporary.iterdir(), temporary]:
            make_readable(item)  # another user may serve it
            sync(item)
        os.rename(temporary, path)  # fails on a folder that came to hold something meanwhile
        sync(path.parent)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
