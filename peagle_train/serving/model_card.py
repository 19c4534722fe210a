"""The README.md of an exported drafter: what it drafts for, how it was trained, how good it is, how to serve it.

Says only what the run's files say; what is not known is left out.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.data.source_spec import parse_sources
from peagle_train.serving.draft_formats import EAGLE3, layer_ids_of
from peagle_train.strict_yaml import YamlError, read_yaml

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
