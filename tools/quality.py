#!/usr/bin/env python
"""What a choice is worth: one change to a recipe, real accepted length on texts of held-out modules, a line in a ledger.

    python tools/fetch_smollm2.py
    python tools/quality.py base --steps 75 --seed 0
    python tools/quality.py muon --steps 75 --seed 0 train.optimizer=muon
    python tools/quality.py --table

The first call writes the texts: the target's greedy continuations of standard-library modules, cut at seeded places.
They are of modules that a recipe with data.eval_fraction = DEV_FRACTION holds out and the recipe does not: its own are for
the final table (peagle-train evaluate). The target runs once for each data section (peagle-train prepare and cache). A
drafter is trained by `python -m peagle_train` and measured by `replay` (float32, greedy, K = 5, repetition left out), which
needs no decoding. Settings are compared at equal CPU time, which other work on the machine changes less than minutes (the
same steps took up to a quarter more): choose --steps by what the lines before say a step takes. Without --ledger, the line
goes to the repository's own.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import at_least_one, where_and_when

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from peagle_train.files import run_tool  # noqa: E402

LEDGER = ROOT / "tools" / "results" / "quality.jsonl"
DEV_FRACTION = 0.12
SAMPLE = ["data.sources=[{path: stdlib, weight: 0.09}]", f"data.eval_fraction={DEV_FRACTION}", "data.max_eval_rows=1"]
"""Every drafter learns from the same eleventh of the modules: features of all of them take hours without bfloat16."""
K, PROMPT, ANSWER, PIECES = 5, 256, 64, 200


def write_texts(path: Path, recipe_path: str) -> None:
    """Texts and the target's features of them: a list of the fields of `Decoded`, and `name`, the module."""
    import torch

    from peagle_train.config import load_recipe
    from peagle_train.data.vocab import load_tokenizer
    from peagle_train.decoding.generate import greedy_tokens
    from peagle_train.decoding.measure import stdlib_cases
    from peagle_train.files import partial_path, put
    from peagle_train.target_model.frozen import FrozenTarget

    recipe = load_recipe(recipe_path)
    target = FrozenTarget.load(recipe.target.path, dtype="float32")
    tokenizer, texts = load_tokenizer(recipe.target.path, False), list[dict[str, Any]]()
    held_out = (target.vocab_size, None, PROMPT, 0)
    final = {case.group for case in stdlib_cases([recipe], tokenizer, *held_out)[0]}
    wider = replace(recipe, data=replace(recipe.data, eval_fraction=DEV_FRACTION))
    cases, _ = stdlib_cases([wider], tokenizer, target.vocab_size, PIECES, PROMPT, 0)
    for case in cases:
        if case.group in final:
            continue
        prompt = case.prompt_ids([], tokenizer)
        tokens = greedy_tokens(target, prompt, ANSWER, target.eos_token_ids())
        ids_1n = torch.tensor([prompt + tokens[:-1]])
        features_1nF, _ = target.features(ids_1n, torch.arange(ids_1n.shape[1])[None])
        texts.append({"name": case.group, "prompt": prompt, "tokens": tokens, "features": features_1nF[0]})
    torch.save(texts, partial_path(path))
    put(partial_path(path), path)


def measure(folder: Path, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The drafter's accepted length on the texts: where passes begin (real), and over all anchors (less noise)."""
    import torch

    from peagle_train import PEagleDraft
    from peagle_train.decoding.generate import Decoded
    from peagle_train.decoding.measure import accepted_slots, count, repeats, replay

    draft = PEagleDraft.from_pretrained(folder).eval()
    modules: dict[str, list[int]] = {}
    for text in texts:
        prompt, tokens = text["prompt"], text["tokens"]
        is_again = repeats(prompt, tokens)[1:]
        accepted = accepted_slots(draft, Decoded(prompt, tokens, features=text["features"]), K)
        passes = count(replay(accepted, K, len(tokens)), K, is_again)
        fresh = [n for n, again in zip(accepted, is_again) if not again]
        counts = [*passes, len(fresh), len(fresh) + sum(fresh)]
        modules[text["name"]] = [a + b for a, b in zip(modules.get(text["name"], [0] * len(counts)), counts)]
    passes, tokens, *slots, anchors, everywhere = torch.tensor(list(modules.values())).sum(0).tolist()
    return {
        "accepted_length": round(tokens / passes, 4),
        "at_all_anchors": round(everywhere / anchors, 4),
        "accepted_by_position": [round(n / passes, 4) for n in slots],
        "modules": {name: [n[0], n[1], *n[-2:]] for name, n in modules.items()},
    }


def child(out: Path, log: str, threads: int, *command: str) -> float:
    """Run peagle-train, its output in a log; returns its CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (out / f"{log}.log").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "peagle_train", *command], stdout=file, stderr=file, env=environment, cwd=ROOT
        )
    if done.returncode:
        sys.exit(f"quality.py: error: peagle-train failed: see {out / log}.log")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare what is not there, train, measure; returns the ledger's line."""
    import torch

    from peagle_train.config import load_recipe

    out, recipe, threads = Path(options.out).absolute(), str(Path(options.recipe).absolute()), options.threads
    out.mkdir(parents=True, exist_ok=True)
    given = load_recipe(recipe)
    used = hashlib.sha256(repr((given.target, given.data, DEV_FRACTION)).encode()).hexdigest()[:8]
    texts_path = out / f"texts-{used}.pt"
    if not texts_path.exists():
        write_texts(texts_path, recipe)
    texts = torch.load(texts_path)
    data = [*SAMPLE, *(change for change in options.overrides if change.startswith("data."))]
    key = hashlib.sha256(json.dumps([used, *data]).encode()).hexdigest()[:8]
    prepared, features = out / f"data-{key}", out / f"features-{key}"
    if not (prepared / "index.json").exists():
        child(out, prepared.name, threads, "prepare", recipe, "--out", str(prepared), *data)
    data.append(f"data.prepared={prepared}")
    if not (features / "done").exists():
        child(out, features.name, threads, "cache", recipe, "--out", str(features), *data)
        (features / "done").touch()
    name = f"{options.name.replace(' ', '_')}-{options.steps}-{options.seed}"
    length = [f"train.max_steps={options.steps}", "train.eval_steps=null", "train.save_steps=null"]
    fixed = [f"target.cache={features}", f"output.dir={out / name}", f"train.seed={options.seed}", *length]
    seconds = child(out, name, threads, recipe, *data, *fixed, *options.overrides)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True, cwd=ROOT).strip()
    words = hashlib.sha256(json.dumps([[t["prompt"], t["tokens"]] for t in texts]).encode()).hexdigest()[:8]
    line = {"name": options.name, "changes": options.overrides, "seed": options.seed, "steps": options.steps}
    line |= {"cpu_seconds": round(seconds), "threads": threads, "commit": commit, "texts": words}
    return line | measure(out / name / "final", texts) | where_and_when()


def table(lines: Sequence[dict[str, Any]], base: str) -> str:
    """Markdown, a row for each setting: its seeds summed, less the base's on the same texts, with a 95 % interval over
    modules.
    """
    import torch

    from peagle_train.decoding.measure import ratio_interval

    first = next((line for line in lines if line["name"] == base), None)
    if first is None:
        sys.exit(f"quality.py: error: no run is named {base}: {', '.join(sorted({line['name'] for line in lines}))}")
    settings: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["texts"] == first["texts"]:
            settings.setdefault(line["name"], []).append(line)
    sums_nC = {
        name: torch.tensor([[line["modules"][m] for m in first["modules"]] for line in own]).sum(0)
        for name, own in settings.items()
    }
    rows = []
    for name, own in settings.items():
        row = [name, str(len(own)), *(f"{sum(x[key] for x in own) / len(own):.0f}" for key in ("steps", "cpu_seconds"))]
        for column in (0, 2):
            (passes, tokens), less = (sums_nC[s][:, column : column + 2].T.tolist() for s in (name, base))
            value = sum(tokens) / sum(passes)
            low, high = ratio_interval(tokens, passes, less=(less[1], less[0])) or (math.nan, math.nan)
            gain = f"{value - sum(less[1]) / sum(less[0]):+.3f}"
            row += [f"{value:.3f}", *([gain, f"{low:+.3f} to {high:+.3f}"] if name != base else ["", ""])]
        rows.append(row)
    head = ["", "seeds", "steps", "CPU s", "accepted", "gain", "95 %", "at all anchors", "gain", "95 %"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", help="of the setting, in the ledger")
    add("overrides", nargs="*", metavar="section.key=value", help="what it changes")
    add("--steps", type=at_least_one, help="optimizer steps")
    add("--seed", type=int, default=0)
    add("--threads", type=at_least_one, default=1, help="of torch (1)")
    add("--recipe", default=str(ROOT / "tools" / "quality.yaml"))
    add("--out", default="runs/quality", metavar="DIR", help="texts, features, runs and logs (runs/quality)")
    add("--ledger", default=str(LEDGER), metavar="FILE")
    add("--table", nargs="?", const="base", metavar="NAME", help="print the ledger, compared with NAME (base)")
    options = parser.parse_intermixed_args()
    ledger = Path(options.ledger)
    if options.table:
        print(table([json.loads(line) for line in ledger.open()], options.table))
        return 0
    if not (options.name and options.steps):
        parser.error("give a name and --steps, or --table")
    line = run(options)
    with ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = ("name", "steps", "cpu_seconds", "accepted_length", "at_all_anchors", "accepted_by_position")
    print({key: line[key] for key in shown})
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("quality", main))
