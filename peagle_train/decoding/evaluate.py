"""`peagle-train evaluate` behind its arguments: load, measure, write the report."""

import json
import logging
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peagle_train.config import Recipe, load_recipe
from peagle_train.data.documents import STDLIB
from peagle_train.decoding import vllm
from peagle_train.decoding.generate import end_tokens
from peagle_train.decoding.measure import (
    Case,
    Measurement,
    Settings,
    checks,
    compare,
    describe_table,
    details,
    load_cases,
    run_figures,
    show_interval,
    summarize,
)
from peagle_train.distributed import check_device
from peagle_train.files import one_line, partial_path
from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import find_drafter, read_run
from peagle_train.serving.formats import speculative_tokens_of
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.checkpoint import MARKER, write_json

logger = logging.getLogger(__name__)


def run(options: Namespace, folder: Path) -> tuple[str, bool]:
    """Measure as the command line says; returns the report for a person, and whether every greedy text is right.

    Raises:
        ValueError: for a user's mistake.
    """
    for name, least in (("max_tokens", 1), ("limit", 1), ("k", 1), ("max_k", 1), ("prompt_tokens", 1), ("cuts", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature is {options.temperature}; give 0 (greedy) or more")
    for name in ("cuts", "prompt_tokens"):
        if STDLIB not in options.prompts and getattr(options, name) is not None:
            given = f"--{name.replace('_', '-')} is {getattr(options, name)}"
            raise ValueError(f"{given}, which is for the prompts {STDLIB} alone: leave it out")
    if options.likeliest_drafts and not options.temperature:
        raise ValueError("--likeliest-drafts is for --temperature above 0; greedy decoding always takes them")
    if options.engine:
        vllm.check_vllm(options.temperature, options.dtype, options.base_url, options.speed)
    elif options.base_url or options.speed:
        raise ValueError("--base-url and --speed are for --engine vllm alone: give it, or leave them out")
    if options.json:
        _check_writable(Path(options.json))
    folders = [find_drafter(Path(given)) for given in (folder, *options.compare)]
    folder = folders[0]
    recipe = _recipe(folder)
    path = options.target or (recipe.target.path if recipe else None)
    if path is None:
        raise ValueError(f"{folder} has no recipe.yaml that names its target: give --target DIR")
    if not Path(path).is_dir():
        raise ValueError(f"target {path} is no folder: give --target DIR")
    device = _device(options.device)
    drafts = [load_drafter(f) for f in folders]
    if STDLIB in options.prompts:
        for other in folders[1:]:
            _check_same_split(recipe, other)
    server = vllm.Server(options.base_url) if options.base_url else None
    if server is not None:
        served = len(server.counters()) - 1
        if options.k not in (None, served):
            raise ValueError(f"--k is {options.k}, but the server at {options.base_url} drafts {served}: leave it out")
        options.k = served
    largest = [options.max_k or _num_depths(f) or max(8, options.k or 0) for f in folders]
    settings = Settings(
        num_slots=options.k or min(5, largest[0]),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        sample_drafts=not options.likeliest_drafts,
        seed=options.seed,
    )
    largest[0] = max(largest[0], settings.num_slots)
    trusted = options.trust_remote_code  # never the recipe's word: whoever made the drafter wrote that
    if recipe and recipe.target.trust_remote_code and not trusted:
        logger.warning("%s's recipe trusts code of %s: give --trust-remote-code if you do, too", folder, path)
    tokenizer = _tokenizer(path, trusted)
    # before the target, which may take minutes to load
    cases, notes = _cases(options, recipe, tokenizer, drafts[0].config.vocab_size)
    if not sys.stderr.isatty():
        disable_progress_bar()
    if not options.target:
        print(f"target: {path}, as the recipe beside {folder} says", file=sys.stderr, flush=True)
    target = FrozenTarget.load(
        path,
        dtype=options.dtype,
        device=device,
        layer_ids=drafts[0].config.eagle_aux_hidden_state_layer_ids,
        trust_remote_code=trusted,
    )
    target.check()
    dtype = target.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    for draft in drafts:  # as engines run it
        draft.to(dtype)  # type: ignore[arg-type]
        draft.rotary_emb = draft.make_rotary(draft.config)  # whose table stays float32
    measurement = Measurement(target, list(zip(drafts, largest)), settings, tokenizer=tokenizer, eos=end_tokens(target))
    results = measurement(cases, say=lambda line: print(line, file=sys.stderr, flush=True))
    if not results:
        raise ValueError(f"no prompt was left to measure on: {measurement.left_out}")
    report: dict[str, Any] = {
        "drafters": [str(f) for f in folders],
        "target": str(path),
        "dtype": str(dtype)[6:],
        "settings": vars(settings) | {"prompts": options.prompts, "limit": options.limit, "plain": options.plain},
        "prompts": notes,
        "left_out": measurement.left_out,
        "figures": [summarize(results, i, options.seed, _trained(f)) for i, f in enumerate(folders)],
        "decoding": run_figures(results, options.seed),
        "checks": checks(results),
        "differences": [
            {"other": str(f), "by_data_set": compare(results, options.seed, i)} for i, f in enumerate(folders[1:], 1)
        ],
        "turns": details(results),
    }
    if options.engine:
        eos = measurement.eos
        del measurement, target, drafts  # vLLM needs the memory
        torch.cuda.empty_cache()
        positions = max(len(r.prompt) for r in results) + settings.max_tokens + 2 * settings.num_slots
        arguments = (settings.num_slots, report["dtype"], positions, options.speed, trusted)
        engine = server or vllm.LocalEngine(path, folder, *arguments)
        plain = vllm.LocalEngine(path, None, *arguments) if options.speed else None
        report["vllm"] = vllm.measure(engine, plain, results, settings.max_tokens, eos, report["dtype"], options.seed)
    if options.json:
        write_json(Path(options.json), report)
    is_right = not report["checks"]["texts"]["bug"]
    if "vllm" in report and report["dtype"] == "float32":
        is_right &= not report["vllm"]["prompts"]["other"]
    return describe(report), is_right


def _device(given: str | None) -> torch.device:
    """The device to measure on; ValueError for one that is not here."""
    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(torch.device(name))
        torch.zeros(1, device=name).item()
    except Exception as error:  # whatever a device's runtime raises
        reason = one_line(error, 200)
        raise ValueError(
            f"--device {name} cannot be used ({type(error).__name__}: {reason}): give cpu, or leave it out"
        ) from None
    return torch.device(name)


def _check_writable(path: Path) -> None:
    """ValueError unless --json can be written: better now than when everything has been measured."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder; give a file's name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path} lies in a folder that does not exist")
    partial = partial_path(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error.strerror}") from None


def describe(report: dict[str, Any]) -> str:
    """The report for a person."""
    s = report["settings"]
    how = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
    if s["temperature"] and not s["sample_drafts"]:
        how += ", likeliest drafts"
    lines = [*report["prompts"]]
    lines += [f"left out: {count} ({reason})" for reason, count in report["left_out"].items()]
    lines.append(f"target {report['target']} in {report['dtype']}, {how}, {s['max_tokens']} tokens, batch 1")
    for folder, figures in zip(report["drafters"], report["figures"]):
        lines += [f"drafter {folder}:", describe_table(figures)]
        for name, values in figures.items():
            share = values["repeated_tokens"] / max(1, values["tokens"])
            lines.append(
                f"{name}: {values['prompts']} prompts, {values['tokens']} tokens, {share:.1%} of them repetition"
            )
    for name, figures in report["decoding"].items():
        length = "-" if figures["accepted_length"] is None else f"{figures['accepted_length']:.3f}"
        lines.append(f"decoded with K = {figures['k']}, {name}: {length} ({show_interval(figures['interval'])})")
    found = report["checks"]
    texts = found["texts"]
    if not texts["none"]:
        lines.append(
            f"texts: {texts['same']} are the target's own, {texts['tie']} part from it at a tie of logits,"
            f" {texts['bug']} are wrong; {len(found['replays_that_differ'])} replays differ from their decoding"
        )
        lines += [f"  {_where(d)}: {d['verdict']} at token {d['at']}{_gap(d)}" for d in found["differences"]]
    if "vllm" in report:
        lines.append(vllm.describe_vllm(report["vllm"]))
    for found in report["differences"]:
        lines.append(f"{report['drafters'][0]} less {found['other']}:")
        for name, rows in found["by_data_set"].items():
            for row in rows:
                difference = "-" if row["difference"] is None else f"{row['difference']:+.3f}"
                lines.append(f"  {name}, K = {row['k']}: {difference} ({show_interval(row['interval'])})")
    return "\n".join(lines)


def _where(found: dict[str, Any]) -> str:
    return f"{found['data_set']} {found['id']}" + (f", turn {found['turn'] + 1}" if found["turn"] else "")


def _gap(found: dict[str, Any]) -> str:
    return f" (gap {found['gap']:.2g}, tolerance {found['tolerance']:.2g})" if "gap" in found else ""


def _cases(options: Namespace, recipe: Recipe | None, tokenizer: Any, vocab_size: int) -> tuple[list[Case], list[str]]:
    cases: list[Case] = []
    notes: list[str] = []
    for name in options.prompts:
        more, said = load_cases(
            name,
            tokenizer,
            limit=options.limit,
            plain=options.plain,
            seed=options.seed,
            recipe=recipe,
            prompt_tokens=options.prompt_tokens or 256,
            vocab_size=vocab_size,
            cuts=options.cuts or 1,
        )
        if more and more[0].data_set in {case.data_set for case in cases}:
            raise ValueError(
                f"two of --prompts are called {more[0].data_set}: give files of different names, each once"
            )
        cases += more
        notes += said
    return cases, notes


def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The target's, or None; whoever needs one says so."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s has no usable tokenizer (%s)", path, str(error).splitlines()[0][:200])
        return None


def _recipe(folder: Path) -> Recipe | None:
    """The recipe beside a drafter, or of its run; None if there is none."""
    for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if path.is_file():
            return load_recipe(str(path), [])
    return None


def _check_same_split(recipe: Recipe | None, other: Path) -> None:
    """ValueError if the other drafter may have learned from what the first one's recipe holds out."""
    fractions = [r.data.eval_fraction if r and not r.data.eval_sources else 0.0 for r in (recipe, _recipe(other))]
    if fractions[1] < fractions[0]:
        raise ValueError(
            f"--prompts stdlib: {other} had data.eval_fraction {fractions[1]}, the first drafter {fractions[0]}, so it"
            " may have learned from these prompts: give the one of the smallest fraction first"
        )


def _num_depths(folder: Path) -> int | None:
    """The K that it was trained for, or, of an export, is to be served with; None if nothing says so."""
    recipe = _recipe(folder)
    return recipe.cod.num_depths if recipe else speculative_tokens_of(read_config(folder))


def _trained(folder: Path) -> list[float]:
    """The accuracy by depth that the run's evaluation at its step found of this drafter; empty if there was none."""
    try:
        if folder.name == "best" or folder.name.startswith("checkpoint-"):
            found = read_run(folder).evaluation
        else:
            summary = json.loads((folder.parent / MARKER).read_text(encoding="utf-8"))
            found = summary["after"] if summary.get("drafter") == folder.name else None
        return [float(share) for share in found["accuracy"]] if found else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
