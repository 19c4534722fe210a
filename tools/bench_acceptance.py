#!/usr/bin/env python
"""What a drafter's choices are worth: one change each to a recipe, trained for the same time, measured on the same texts.

    python tools/fetch_smollm2.py
    python tools/bench_acceptance.py train.mixed_precision=bf16 --out runs/acceptance --json acceptance.json

The target runs once for each packing (peagle-train cache). Each case then trains for as many steps as fit into the minutes,
by the pace of a few steps timed beforehand. --jobs cases run at a time, when they are timed too, each on --threads threads;
the recipe itself runs alone, on all of these. All drafters, checkpoints included, are measured by one run of peagle-train
evaluate: greedy, K = 5, held-out modules of the standard library, repetition left out. Stopped, it resumes: what has been
trained in --out is not trained again.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import at_least_one, format_table, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TIMED_STEPS = 30
CURVE = 1000
"""Steps from one point of the recipe's curve over training to the next."""
CASES: dict[str, list[str]] = {
    "base": [],
    "untrained": ["train.max_steps=1", "train.learning_rate=1e-30"],
    "1 layer": ["draft.num_layers=1"],
    "4 layers": ["draft.num_layers=4"],
    "embeddings frozen": ["draft.train_embeddings=false"],
    "K = 8 in training": ["cod.num_depths=8"],
    "rows of 128": ["data.max_length=128", "train.batch_size=8"],
    "one epoch of 1 layer": ["draft.num_layers=1", "train.max_steps=null", "train.epochs=1"],
    "the recipe": [f"train.save_steps={CURVE}"],
}
"""What is changed; those of a fixed length are not timed."""
FIXED = ("untrained", "one epoch of 1 layer", "the recipe")
ALONE = "the recipe"


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        from peagle_train.config import load_recipe

        self.options, self.out = options, Path(options.out).absolute()
        self.recipe = str(Path(options.recipe).absolute())
        # for its mistakes, before anything is written
        self.trusted = load_recipe(self.recipe, options.overrides).target.trust_remote_code
        self.out.mkdir(parents=True, exist_ok=True)
        names = ("overrides", "recipe", "minutes", "threads", "jobs")
        given = {name: getattr(options, name) for name in names}
        given |= {"recipe": Path(self.recipe).read_text(), "cases": CASES}
        file = self.out / "settings.json"
        if file.exists() and json.loads(file.read_text()) != given:
            raise ValueError(f"{self.out} was begun with other settings ({', '.join(names)}): give another --out")
        write_json(file, given)

    def run(self, log: Path, *command: str, alone: bool = True) -> None:
        """A command whose output goes to a file; RunStopped if it fails. `alone`: on the threads of all jobs."""
        from peagle_train.files import RunStopped

        threads = self.options.threads * (self.options.jobs if alone else 1)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
        with log.open("w") as file:
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=ROOT)
        if done.returncode:
            last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
            raise RunStopped(f"peagle-train failed: {last} (see {log})")

    def folder(self, name: str) -> Path:
        return self.out / name.replace(" = ", "").replace(" ", "_")

    def cache(self, name: str) -> str:
        """The override that names the features of a case's packing, which are made if they are not there."""
        packing = [change for change in CASES[name] if change.startswith("data.")]
        folder = self.folder(f"features of {name}" if packing else "features")
        if not (folder / "done").exists():
            tool = ["-m", "peagle_train", "cache", self.recipe, "--out", str(folder)]
            self.run(folder.with_suffix(".log"), *tool, *self.options.overrides, *packing)
            (folder / "done").touch()
        return f"target.cache={folder}"

    def train(self, name: str, *overrides: str, alone: bool = False) -> dict[str, Any]:
        """Train a run to its end; returns its run.json."""
        folder = self.folder(name)
        marker = folder / "run.json"
        if not marker.exists() or json.loads(marker.read_text())["state"] != "finished":
            print(f"{name}: training", file=sys.stderr, flush=True)
            recipe = [self.recipe, "train.save_steps=null", "train.eval_steps=null"]
            recipe += [f"output.dir={folder}", *self.options.overrides, *overrides]
            if any(folder.glob("checkpoint-*")):
                recipe.append("--resume")
            elif folder.exists():  # stopped before its first checkpoint
                shutil.rmtree(folder)
            self.run(folder.with_name(folder.name + ".log"), "-m", "peagle_train", *recipe, alone=alone)
        return json.loads(marker.read_text())

    def steps(self, name: str) -> int:
        """Optimizer steps that fit into the minutes, by the pace of a few."""
        changes = [*CASES[name], f"train.max_steps={TIMED_STEPS}", "train.log_steps=1", "data.max_eval_rows=1"]
        self.train(f"timed {name}", self.cache(name), *changes)
        lines = [json.loads(line) for line in (self.folder(f"timed {name}") / "metrics.jsonl").open()]
        seconds = [line["seconds"] for line in lines if line["kind"] == "train"]
        pace = statistics.median(b - a for a, b in pairwise(seconds[4:]))
        return max(1, round(60 * self.options.minutes / pace))

    def case(self, name: str) -> None:
        """Train one."""
        length = [] if name in FIXED else [f"train.max_steps={self.steps(name)}"]
        self.train(name, self.cache(name), *CASES[name], *length, alone=name == ALONE)

    def train_all(self, names: list[str]) -> None:
        """The recipe, then the others, `jobs` at a time; after one that fails none begins, and its error is raised."""
        for name in names:
            self.cache(name)  # before two jobs want the same features
        if ALONE in names:
            self.case(ALONE)
        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            for future in as_completed([pool.submit(self.case, name) for name in names if name != ALONE]):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def evaluate(self, folders: list[Path]) -> dict[str, Any]:
        """The report of peagle-train evaluate over all of them; the first decodes."""
        report, o = self.out / "evaluate.json", self.options
        command = ["-m", "peagle_train", "evaluate", str(folders[0]), "--prompts", "stdlib", "--limit", str(o.limit)]
        command += ["--max-tokens", str(o.max_tokens), "--k", "5", "--json", str(report)]
        command += ["--trust-remote-code"] if self.trusted else []
        command += ["--compare", *map(str, folders[1:])] if folders[1:] else []
        self.run(self.out / "evaluate.log", *command)
        return json.loads(report.read_text())


def summary(folders: dict[str, Path], report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each drafter, at K = 5. A checkpoint's seconds are its share of the run's steps."""
    rows: list[dict[str, Any]] = []
    for index, (name, folder) in enumerate(folders.items()):
        trained = json.loads((folder.parent / "run.json").read_text())
        steps = trained["steps"] if folder.name == trained["drafter"] else int(folder.name.rpartition("-")[2])
        figures = report["figures"][index]["stdlib"]
        measured = figures["by_k"][-1]
        row = {
            "name": name,
            "changes": CASES.get(name),
            "steps": steps,
            "by_k": [at_k["accepted_length"] for at_k in figures["by_k"]],
            "train_seconds": trained["train_seconds"] * steps / trained["steps"],
            "accepted_length": measured["accepted_length"],
            "interval": measured["interval"],
            "accepted_by_position": measured["accepted_by_position"],
            "with_repetition": measured["with_repetition"]["accepted_length"],
            "prompts": figures["turns"],
            "modules": figures["prompts"],
            "tokens": figures["tokens"],
            "repeated_tokens": figures["repeated_tokens"],
        }
        if index == 0:
            row["texts"] = report["checks"]["texts"]
            row["replays_that_differ"] = report["checks"]["replays_that_differ"]
        else:
            less = report["differences"][index - 1]["by_data_set"]["stdlib"][-1]
            # the report says the first less this one
            row["difference"] = -less["difference"]
            row["difference_interval"] = [-bound for bound in reversed(less["interval"])]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = [row["name"], str(row["steps"]), f"{row['train_seconds'] / 60:.1f}", f"{row['accepted_length']:.3f}"]
        line += [" to ".join(f"{bound:.3f}" for bound in row["interval"])]
        line += [f"{row['difference']:+.3f}" if "difference" in row else ""]
        lines.append([*line, " to ".join(f"{bound:+.3f}" for bound in row.get("difference_interval", []))])
    return format_table(["", "steps", "minutes", "accepted", "95 %", "less the first", "95 %"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="what replaces the recipe's in every case; comes first",
    )
    add("--out", required=True, metavar="DIR", help="runs, features and logs")
    add("--recipe", default=str(ROOT / "recipes" / "smollm2_cpu.yaml"))
    add("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    add("--minutes", type=float, default=15.0, help="of training (15); the recipe and the epoch take what they take")
    add("--jobs", type=at_least_one, default=1, help="cases at a time (1)")
    add("--threads", type=at_least_one, default=1, help="of each case (1)")
    add("--limit", type=at_least_one, default=40, help="prompts (40)")
    add("--max-tokens", type=at_least_one, default=64, help="of each answer (64)")
    add("--json", metavar="FILE", help="write the results here")
    options = parser.parse_args()
    if options.limit < 2:
        parser.error("--limit is 1; an interval needs 2 prompts or more")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes:g}; give more than 0")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json {options.json} lies in a folder that does not exist")
    from peagle_train.files import run_tool

    return run_tool("bench_acceptance.py", lambda: run(options), "; the same command resumes")


def run(options: argparse.Namespace) -> None:
    """Train and measure every case that is asked for, and its checkpoints."""
    bench, folders, names = Bench(options), dict[str, Path](), list(dict.fromkeys(options.only))
    bench.train_all(names)
    for name in names:
        folders[name] = bench.folder(name) / "final"
        for step in range(CURVE, 10**6 if name == ALONE else 0, CURVE):  # not those that a stop left
            checkpoint = bench.folder(name) / f"checkpoint-{step}"
            if checkpoint.is_dir():
                folders[f"{name}, {checkpoint.name}"] = checkpoint
    rows = summary(folders, bench.evaluate(list(folders.values())))
    print(table(rows))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    sys.exit(main())
