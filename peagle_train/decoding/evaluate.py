"""`peagle-train evaluate` without its arguments: load, measure, write the report."""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peagle_train.config import Recipe, load_recipe
from peagle_train.data.documents import STDLIB
from peagle_train.data.vocab import load_tokenizer
from peagle_train.decoding import vllm
from peagle_train.decoding.measure import (
    Measurement,
    Settings,
    checks,
    compare,
    load_cases,
    run_figures,
    summarize,
)
from peagle_train.distributed import check_device
from peagle_train.files import one_line, partial_path, write_json
from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import find_drafter, read_run
from peagle_train.serving.formats import speculative_tokens_of
from peagle_train.target_model.frozen import FrozenTarget

logger = logging.getLogger(__name__)


def run(options: Namespace) -> tuple[str, bool]:
    """Measure as the command line says; returns the report for a person, and whether every greedy text is right.

    Raises:
        ValueError: for a user's mistake.
    """
    check_options(options)
    folders = [find_drafter(folder) for folder in (options.checkpoint, *options.compare)]
    folder, recipes = folders[0], [_recipe(f) for f in folders]
    recipe = recipes[0]
    path = options.target or (recipe.target.path if recipe else None)
    if path is None or not Path(path).is_dir():
        named = (
            f"{folder} has no recipe.yaml that names its target" if path is None else f"target {path} is not a folder"
        )
        raise ValueError(f"{named}: give --target DIR")
    device = _device(options.device)
    drafts = [load_drafter(f) for f in folders]
    if STDLIB in options.prompts:
        check_same_split(folders, recipes)
    server = vllm.Server(options.base_url) if options.base_url else None
    if server is not None:
        served = len(server.counters()) - 1
        if options.k not in (None, served):
            raise ValueError(f"--k is {options.k}, but the server at {options.base_url} drafts {served}: leave it out")
        options.k = served
    largest = [options.max_k or num_depths(f, r) or max(8, options.k or 0) for f, r in zip(folders, recipes)]
    settings = Settings(
        num_slots=options.k or min(5, largest[0]),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        sample_drafts=not options.likeliest_drafts,
        seed=options.seed,
    )
    largest[0] = max(largest[0], settings.num_slots)
    trusted = options.trust_remote_code  # never because a recipe says so: the drafter's author wrote that
    if recipe and recipe.target.trust_remote_code and not trusted:
        logger.warning("%s's recipe trusts code of %s: give --trust-remote-code if you do, too", folder, path)
    # before the target, which may take minutes to load
    tokenizer = load_tokenizer(path, trusted)
    found = [
        load_cases(
            name,
            tokenizer,
            limit=options.limit,
            plain=options.plain,
            seed=options.seed,
            recipe=recipe,
            prompt_tokens=options.prompt_tokens or 256,
            vocab_size=drafts[0].config.vocab_size,
            cuts=options.cuts or 1,
        )
        for name in options.prompts
    ]
    names = [cases[0].data_set for cases, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two of --prompts are called {twice[0]}: give files of different names, each once")
    if not options.target:
        print(f"target: {path}, as the recipe beside {folder} says", file=sys.stderr, flush=True)
    layer_ids = drafts[0].config.eagle_aux_hidden_state_layer_ids
    target = FrozenTarget.load(path, dtype=options.dtype, device=device, layer_ids=layer_ids, trust_remote_code=trusted)
    target.check()
    eos = target.eos_token_ids()
    measurement = Measurement(target, list(zip(drafts, largest)), settings, tokenizer=tokenizer, eos=eos)
    results = measurement(
        [case for cases, _ in found for case in cases], say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    if not results:
        raise ValueError(f"no prompt was left to measure on: {measurement.left_out}")
    evaluations = [read_run(f).evaluation or {} for f in folders]
    report: dict[str, Any] = {
        "drafters": [str(f) for f in folders],
        "target": str(path),
        "dtype": str(drafts[0].dtype)[6:],
        "settings": vars(settings) | {"prompts": options.prompts, "limit": options.limit, "plain": options.plain},
        "prompts": [note for _, note in found],
        "left_out": measurement.left_out,
        "figures": [summarize(results, i, options.seed, e.get("accuracy", [])) for i, e in enumerate(evaluations)],
        "decoding": run_figures(results, options.seed),
        "checks": checks(results),
        "differences": [
            {"other": str(f), "by_data_set": compare(results, options.seed, i)} for i, f in enumerate(folders[1:], 1)
        ],
        "turns": [{k: v for k, v in asdict(r).items() if k not in ("leads", "draft_leads")} for r in results],
    }
    if options.engine:
        del measurement, target, drafts  # vLLM needs the memory
        torch.cuda.empty_cache()
        positions = max(len(r.prompt) for r in results) + settings.max_tokens + 2 * settings.num_slots
        arguments = (settings.num_slots, report["dtype"], positions, options.speed, trusted)
        engine = server or vllm.LocalEngine(path, folder, *arguments)
        plain = vllm.LocalEngine(path, None, *arguments) if options.speed else None
        report["vllm"] = vllm.measure(engine, plain, results, settings.max_tokens, eos, report["dtype"], options.seed)
    if options.json:
        write_json(options.json, report)
    is_right = not report["checks"]["texts"]["bug"]
    if "vllm" in report and report["dtype"] == "float32":
        is_right &= not report["vllm"]["prompts"]["other"]
    return describe(report), is_right


def check_options(options: Namespace) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    if STDLIB not in options.prompts and (options.cuts or options.prompt_tokens):
        raise ValueError(f"--cuts and --prompt-tokens are for the prompts {STDLIB} alone: leave them out")
    if options.likeliest_drafts and not options.temperature:
        raise ValueError("--likeliest-drafts is for --temperature above 0; greedy decoding always takes them")
    if options.engine:
        vllm.check_vllm(options.temperature, options.dtype, options.base_url, options.speed)
    elif options.base_url or options.speed:
        raise ValueError("--base-url and --speed are for --engine vllm alone: give it, or leave them out")
    if options.json:
        if options.json.is_dir() or not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json} is a folder or lies in none; give a file's name")
        partial_path(options.json).touch()  # an OSError now, not when everything has been measured
        partial_path(options.json).unlink()


def _device(given: str | None) -> torch.device:
    """The device to measure on; ValueError for one that is not here."""
    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(torch.device(name))
        torch.zeros(1, device=name).item()
    except Exception as error:  # whatever a device's runtime raises
        reason = one_line(error, 200)
        raise ValueError(f"--device {name} cannot be used ({reason}): give cpu, or leave it out") from None
    return torch.device(name)


def _recipe(folder: Path) -> Recipe | None:
    """The recipe beside a drafter, or of its run; None if there is none."""
    found = [path for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if path.is_file()]
    return load_recipe(found[0]) if found else None


def check_same_split(folders: Sequence[Path], recipes: Sequence[Recipe | None]) -> None:
    """ValueError if another drafter may have learned from what the first one's recipe holds out."""
    fractions = [r.data.eval_fraction if r and not r.data.eval_sources else 0.0 for r in recipes]
    for folder, fraction in zip(folders, fractions):
        if fraction < fractions[0]:
            raise ValueError(
                f"--prompts stdlib: {folder} had data.eval_fraction {fraction}, the first drafter {fractions[0]}, so it"
                " may have learned from these prompts: give the one of the smallest fraction first"
            )


def num_depths(folder: Path, recipe: Recipe | None) -> int | None:
    """The K that a drafter was trained for, or, of an export, is to be served with; None if nothing says so."""
    return recipe.cod.num_depths if recipe else speculative_tokens_of(read_config(folder))


# The report for a person


def describe(report: dict[str, Any]) -> str:
    """What was measured, in lines and one table a drafter."""
    s = report["settings"]
    how = f"temperature {s['temperature']:g}" if s["temperature"] else "greedy"
    if s["temperature"] and not s["sample_drafts"]:
        how += ", likeliest drafts"
    lines = [*report["prompts"]]
    lines += [f"left out: {count} ({reason})" for reason, count in report["left_out"].items()]
    lines.append(f"target {report['target']} in {report['dtype']}, {how}, {s['max_tokens']} tokens, batch 1")
    for folder, figures in zip(report["drafters"], report["figures"]):
        lines += [f"drafter {folder}:", describe_table(figures)]
    for name, figures in report["figures"][0].items():
        share = figures["repeated_tokens"] / max(1, figures["tokens"])
        ran = report["decoding"][name]
        lines.append(
            f"{name}: {figures['prompts']} prompts, {figures['tokens']} tokens, {share:.1%} of them repetition; decoded"
            f" with K = {ran['k']}: {_number(ran['accepted_length'], 3)} ({_interval(ran['interval'])})"
        )
    found = report["checks"]
    texts = found["texts"]
    if not texts["none"]:
        lines.append(
            f"texts: {texts['same']} are the target's own, {texts['tie']} part from it at a tie of logits,"
            f" {texts['bug']} are wrong; {len(found['replays_that_differ'])} replays differ from their decoding"
        )
        for d in found["differences"]:
            gap = f" (gap {d['gap']:.2g}, tolerance {d['tolerance']:.2g})" if "gap" in d else ""
            lines.append(f"  {d['data_set']} {d['id']}, turn {d['turn'] + 1}: {d['verdict']} at token {d['at']}{gap}")
    if "vllm" in report:
        lines.append(vllm.describe_vllm(report["vllm"]))
    for found in report["differences"]:
        lines.append(f"{report['drafters'][0]} less {found['other']}:")
        for name, rows in found["by_data_set"].items():
            for row in rows:
                difference = "-" if row["difference"] is None else f"{row['difference']:+.3f}"
                lines.append(f"  {name}, K = {row['k']}: {difference} ({_interval(row['interval'])})")
    return "\n".join(lines)


def describe_table(summary: dict[str, Any]) -> str:
    """A line per data set and K."""
    header = ["data set", "K", "accepted length", "95 %", "teacher-forced", "in training", "in loops", "with loops"]
    table = [[*header, "tokens/pass", "accepted by position"]]
    for name, figures in summary.items():
        for row in figures["by_k"]:
            loops = [row[key]["accepted_length"] for key in ("in_repetition", "with_repetition")]
            table.append(
                [name, str(row["k"]), _number(row["accepted_length"], 3), _interval(row["interval"])]
                + [_number(row[f"expected_{key}"], 3) for key in ("from_teacher_forcing", "in_training")]
                + [_number(value) for value in (*loops, row["tokens_per_target_pass"])]
                + [" ".join(_number(share) for share in row["accepted_by_position"])]
            )
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
