"""`peagle-train evaluate` without its arguments: load, measure, write the report."""

import logging
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peagle_train.data.documents import STDLIB
from peagle_train.data.vocab import load_tokenizer
from peagle_train.decoding import vllm
from peagle_train.decoding.measure import Case, compare, load_cases, measure, stdlib_cases, summarize
from peagle_train.distributed import check_device
from peagle_train.files import aligned, one_line, write_json
from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import find_drafter, recipe_beside
from peagle_train.serving.formats import speculative_tokens_of
from peagle_train.target_model.frozen import FrozenTarget

logger = logging.getLogger(__name__)


def run(options: Namespace) -> tuple[str, bool]:
    """Measure as the command line says; returns the report for a person, and whether every greedy text is right."""
    if options.prompt_tokens and STDLIB not in options.prompts:
        raise ValueError(f"--prompt-tokens is for the prompts {STDLIB} alone: leave it out")
    if options.engine:
        vllm.check_vllm(options.temperature, options.dtype)
    if options.json:
        options.json.open("a").close()  # an OSError now, not when everything has been measured
    folders = [find_drafter(folder) for folder in (options.checkpoint, *options.compare)]
    folder, recipe = folders[0], recipe_beside(folders[0])
    path = options.target or (recipe.target.path if recipe else None)
    if path is None or not Path(path).is_dir():
        wrong = f"target {path} is not a folder" if path else f"{folder} has no recipe.yaml that names its target"
        raise ValueError(f"{wrong}: give --target DIR")
    trusted = options.trust_remote_code  # never because a recipe says so: the drafter's author wrote that
    if recipe and recipe.target.trust_remote_code and not trusted:
        logger.warning("%s's recipe trusts code of %s: give --trust-remote-code if you do, too", folder, path)
    device = _device(options.device)
    drafts = [load_drafter(f) for f in folders]
    trained = recipe.cod.num_depths if recipe else speculative_tokens_of(read_config(folder))
    K, seed = options.k or trained or 8, options.seed
    # before the target, which may take minutes to load
    tokenizer = load_tokenizer(path, trusted)
    if tokenizer is None:
        raise ValueError(f"prompts need the target's tokenizer, and {path} has none")
    cases, notes = list[Case](), list[str]()
    for name in options.prompts:
        if name == STDLIB:
            check_held_out(folders)
            how = (drafts[0].config.vocab_size, options.limit, options.prompt_tokens or 256, seed)
            found, note = stdlib_cases(recipe, tokenizer, *how)
        else:
            found, note = load_cases(name, tokenizer, options.limit)
        if (again := found[0].data_set) in {case.data_set for case in cases}:
            raise ValueError(f"two of --prompts are called {again}: give files of different names, each once")
        cases += found
        notes.append(note)
    layer_ids = drafts[0].config.eagle_aux_hidden_state_layer_ids
    target = FrozenTarget.load(path, dtype=options.dtype, device=device, layer_ids=layer_ids, trust_remote_code=trusted)
    target.check()
    eos = target.eos_token_ids()
    settings = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": seed}
    results, left_out = measure(target, drafts, cases, K, **settings, tokenizer=tokenizer, eos=eos)
    if not results:
        raise ValueError(f"no prompt was left to measure on: {left_out}")
    dtype, others = str(drafts[0].dtype)[6:], [*enumerate(folders)][1:]
    report: dict[str, Any] = {
        "drafters": [str(f) for f in folders],
        "target": str(path),
        "dtype": dtype,
        "settings": {"k": K, **settings, "prompts": options.prompts, "limit": options.limit},
        "prompts": notes,
        "left_out": left_out,
        "figures": [summarize(results, i, seed) for i in range(len(folders))],
        "differences": [{"other": str(f), "by_data_set": compare(results, seed, i)} for i, f in others],
        "turns": [asdict(r) for r in results],
    }
    is_right = all(r.check["verdict"] != "bug" for r in results)
    if options.engine:
        del target, drafts  # vLLM needs the memory
        torch.cuda.empty_cache()
        positions = max(len(r.prompt) for r in results) + options.max_tokens + 2 * K
        engine = vllm.Engine(path, folder, K, dtype, positions, trusted)
        report["vllm"] = vllm.measure(engine, results, options.max_tokens, eos)
        is_right &= dtype != "float32" or not report["vllm"]["texts_that_differ"]
    if options.json:
        write_json(options.json, report)
    return describe(report), is_right


def _device(given: str | None) -> torch.device:
    """The device to measure on; ValueError for one that is not here."""
    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(torch.device(name))
        torch.zeros(1, device=name)
    except Exception as error:  # whatever a device's runtime raises
        reason = one_line(error, 200)
        raise ValueError(f"--device {name} cannot be used ({reason}): give cpu, or leave it out") from None
    return torch.device(name)


def check_held_out(folders: list[Path]) -> None:
    """ValueError if another drafter may have learned from what the first one's recipe holds out."""
    recipes = [recipe_beside(folder) for folder in folders]
    fractions = [r.data.eval_fraction if r and not r.data.eval_sources else 0.0 for r in recipes]
    if min(fractions) < fractions[0]:
        had = f"a drafter of --compare had data.eval_fraction {min(fractions)}, the first {fractions[0]}"
        raise ValueError(f"--prompts stdlib: {had}: it may have learned from these prompts; begin with it")


# The report for a person


LEGEND = """accepted length: tokens a pass of the target yields, its own included; loops (text that only repeats) left out
95 %: interval over prompts; by position: share of the drafts whose slot 1, 2, ... was accepted"""


def describe(report: dict[str, Any]) -> str:
    """What was measured: one table, its legend, and whether the texts are right."""
    s, verdicts = report["settings"], [turn["check"]["verdict"] for turn in report["turns"]]
    how = f"temperature {s['temperature']:g}" if s["temperature"] else "greedy"
    lines = [*report["prompts"]]
    lines += [f"left out: {count} ({reason})" for reason, count in report["left_out"].items()]
    lines.append(f"target {report['target']} in {report['dtype']}, {how}, at most {s['max_tokens']} tokens, batch 1")
    for folder, figures in zip(report["drafters"], report["figures"]):
        lines += ["", f"drafter {folder}", describe_table(figures)]
    lines += ["", LEGEND]
    for found in report["differences"]:
        lines.append(f"{report['drafters'][0]} less {found['other']}:")
        for name, row in ((name, row) for name, by_k in found["by_data_set"].items() for row in by_k):
            difference, interval = _number(row["difference"], "+.3f"), _interval(row["interval"])
            lines.append(f"  {name}, K = {row['k']}: {difference} ({interval})")
    if not s["temperature"]:
        lines.append(f"texts: {verdicts.count('same')} of {len(verdicts)} equal the target's own, token for token")
        if ties := verdicts.count("tie"):
            why = f"its two best logits tie within {report['dtype']}'s rounding, which is normal"
            lines[-1] += f"; {ties} first differ where {why}"
        for turn in report["turns"]:
            if turn["check"]["verdict"] == "bug":
                where = f"{turn['data_set']} {turn['id']}, turn {turn['turn'] + 1}, token {turn['check']['at']}"
                lines.append(f"  WRONG, and no tie: {where}")
    if "vllm" in report:
        lines += vllm.describe_vllm(report["vllm"])
    return "\n".join(lines)


def describe_table(summary: dict[str, Any]) -> str:
    """A line per data set and K."""
    table = [["data set", "in loops", "K", "accepted length", "95 %", "by position"]]
    for name, figures in summary.items():
        loops = f"{figures['repeated_tokens'] / max(1, figures['tokens']):.0%}"
        for row in figures["by_k"]:
            shares = " ".join(_number(share, ".2f") for share in row["accepted_by_position"])
            length, interval = _number(row["accepted_length"], ".3f"), _interval(row["interval"])
            table.append([name, loops, str(row["k"]), length, interval, shares])
    return aligned(table)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
