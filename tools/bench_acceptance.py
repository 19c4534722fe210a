#!/usr/bin/env python
"""What a drafter's choices are worth: one change each to a recipe, trained for the same time, measured on the same texts.

    python tools/fetch_smollm2.py
    python tools/bench_acceptance.py train.mixed_precision=bf16 --out runs/acceptance --json acceptance.json

The target runs once (peagle-train cache). Each case then trains for as many steps as fit into the minutes, by the
pace of a few steps timed beforehand; `rows of 128`, whose rows are other ones, has the target run along, which is not
counted. --jobs cases run at a time, when they are timed too, each on --threads threads; the recipe itself runs alone, on
all of these. All drafters, checkpoints included, are measured by one run of peagle-train evaluate: greedy, K = 5, held-out
modules of the standard library, repetition left out. Stopped, it resumes: what is in --out is not done again.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
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
        # For its mistakes, before anything is written.
        self.trusted = load_recipe(self.recipe, options.overrides).target.trust_remote_code
        self.out.mkdir(parents=True, exist_ok=True)
        self.check_settings()
        file = self.out / "steps.json"
        self.known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
        self.lock = threading.Lock()

    def check_settings(self) -> None:
        """ValueError where --out holds what was trained under other settings."""
        names = ("overrides", "recipe", "minutes", "threads", "jobs")
        given = {name: getattr(self.options, name) for name in names} | {"recipe": Path(self.recipe).read_text()}
        given["cases"] = CASES
        file = self.out / "settings.json"
        if file.exists() and json.loads(file.read_text()) != given:
            raise ValueError(f"{self.out} was begun with other settings ({', '.join(names)}): give another --out")
        write_json(file, given)

    def run(self, log: Path, *command: str, alone: bool = True) -> None:
        """A command whose output goes to a file; RuntimeError if it fails. `alone`: on the threads of all jobs."""
        threads = self.options.threads * (self.options.jobs if alone else 1)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
        with log.open("w") as file:
            done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=ROOT)
        if done.returncode:
            last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
            raise RuntimeError(f"{Path(command[0]).name} {command[1]} failed: {last} (see {log})")

    def cache(self, name: str, *overrides: str) -> str:
        """A folder of features for the recipe with these overrides; a finished one is taken as it is."""
        folder = self.out / name
        if not (folder / "done").exists():
            tool = ["-m", "peagle_train", "cache", self.recipe, "--out", str(folder)]
            changes = [*self.options.overrides, *overrides]
            self.run(self.out / f"{name}.log", *tool, *changes, alone=name == "features")
            (folder / "done").touch()
        return f"target.cache={folder}"

    def train(self, name: str, *overrides: str) -> Path:
        """A run's folder, once it is finished."""
        folder = self.folder(name)
        if not self.is_finished(folder):
            print(f"{name}: training", file=sys.stderr, flush=True)
            log = folder.with_name(folder.name + ".log")
            recipe = [self.recipe, "train.save_steps=null", "train.eval_steps=null"]
            recipe += [f"output.dir={folder}", *self.options.overrides, *overrides]
            if any(folder.glob("checkpoint-*")):
                recipe.append("--resume")
            else:  # stopped before its first checkpoint
                self.remove(folder)
            self.run(log, "-m", "peagle_train", *recipe, alone=name == ALONE)
            if not self.is_finished(folder):  # told to stop, it saves and ends well
                raise RuntimeError(f"{name} was stopped; the same command resumes (see {log})")
        return folder

    def is_finished(self, folder: Path) -> bool:
        marker = folder / "run.json"
        return marker.is_file() and json.loads(marker.read_text())["state"] == "finished"

    def remove(self, folder: Path) -> None:
        from peagle_train.training.checkpoint import check_not_in_use

        if folder.exists():
            check_not_in_use(folder)
            shutil.rmtree(folder)

    def folder(self, name: str) -> Path:
        return self.out / name.replace(" = ", "").replace(" ", "_")

    def rows(self, name: str) -> list[str]:
        """Where a case's features come from: the shared folder, or the target where its rows are others."""
        if any(change.startswith("data.") for change in CASES[name]):
            return []
        return [self.cache("features")]

    def steps(self, name: str) -> int:
        """Optimizer steps that fit into the minutes, by the pace of a few that read features from disk."""
        if name not in self.known:
            few = [*CASES[name], "data.max_eval_rows=1"]
            rows = self.rows(name)
            if not rows:
                few.append("data.max_documents=12")
                rows = [self.cache(f"features of a few, {name}", *few)]
            timed = f"timed {name}"
            if not self.is_finished(self.folder(timed)):
                self.remove(self.folder(timed))  # a pace is taken in one go
            self.train(timed, *rows, *few, f"train.max_steps={TIMED_STEPS}", "train.log_steps=1")
            lines = [json.loads(line) for line in (self.folder(timed) / "metrics.jsonl").open()]
            seconds = [line["seconds"] for line in lines if line["kind"] == "train"]
            pace = statistics.median(b - a for a, b in pairwise(seconds[4:]))
            with self.lock:
                self.known[name] = max(1, round(60 * self.options.minutes / pace))
                write_json(self.out / "steps.json", self.known)
        return self.known[name]

    def case(self, name: str) -> None:
        """Train one."""
        length = [] if name in FIXED else [f"train.max_steps={self.steps(name)}"]
        self.train(name, *self.rows(name), *CASES[name], *length)

    def train_all(self, names: list[str]) -> None:
        """The recipe, then the others, the long ones first, `jobs` at a time."""
        for name in names:
            self.rows(name)  # before two jobs want the same features
        self.at_once(self.case, [name for name in names if name == ALONE])
        others = [name for name in names if name != ALONE]
        others.sort(key=lambda name: (name not in FIXED, not any(change.startswith("data.") for change in CASES[name])))
        self.at_once(self.steps, [name for name in others if name not in FIXED])
        self.at_once(self.case, others)

    def at_once(self, work: Callable[[str], object], names: list[str]) -> None:
        """`jobs` at a time; after one that fails none begins, and its error is raised.

        In threads, even if it is one: Ctrl-C then leaves the trainers, which get it too, the time to save.
        """
        ended = threading.Event()

        def guarded(name: str) -> None:
            if not ended.is_set():
                try:
                    work(name)
                except BaseException:
                    ended.set()
                    raise

        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            for future in as_completed([pool.submit(guarded, name) for name in names]):
                future.result()
        finally:
            ended.set()
            pool.shutdown()

    def evaluate(self, folders: dict[str, Path]) -> dict[str, Any]:
        """peagle-train evaluate over all of them; the first decodes. What was measured of the same is taken as it is."""
        report, first = self.out / "evaluate.json", next(iter(folders.values()))
        o = self.options
        trained = max((folder / "model.safetensors").stat().st_mtime for folder in folders.values())
        if report.exists() and report.stat().st_mtime > trained:
            with suppress(ValueError, KeyError, TypeError):  # not one of these reports, or half of one
                known = json.loads(report.read_text())
                asked = (known["settings"]["limit"], known["settings"]["max_tokens"], known["drafters"])
                if asked == (o.limit, o.max_tokens, [str(folder) for folder in folders.values()]):
                    return known
        command = ["-m", "peagle_train", "evaluate", str(first), "--prompts", "stdlib", "--limit", str(o.limit)]
        command += ["--trust-remote-code"] if self.trusted else []
        command += ["--cuts", "2", "--max-tokens", str(o.max_tokens), "--k", "5", "--max-k", "5", "--json", str(report)]
        others = [str(folder) for folder in list(folders.values())[1:]]
        self.run(self.out / "evaluate.log", *command, *(["--compare", *others] if others else []))
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
            "expected_on_held_out_rows": measured["expected_in_training"],
            "expected_on_these_texts": measured["expected_from_teacher_forcing"],
            "teacher_forced_accuracy": figures["teacher_forced_accuracy"],
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
            row["replays_that_differ"] = len(report["checks"]["replays_that_differ"])
        else:
            by_k = report["differences"][index - 1]["by_data_set"]["stdlib"]
            # the report says the first less this one
            row["difference"] = -by_k[-1]["difference"]
            row["difference_interval"] = [-bound for bound in reversed(by_k[-1]["interval"])]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "",
        "steps",
        "minutes",
        "accepted",
        "95 %",
        "less the first",
        "95 %",
        "estimate: these texts",
        "held-out rows",
    ]
    lines = []
    for row in rows:
        line = [row["name"], str(row["steps"]), f"{row['train_seconds'] / 60:.1f}", f"{row['accepted_length']:.3f}"]
        line.append(" to ".join(f"{bound:.3f}" for bound in row["interval"]))
        if "difference" in row:
            line.append(f"{row['difference']:+.3f}")
            line.append(" to ".join(f"{bound:+.3f}" for bound in row["difference_interval"]))
        else:
            line += ["", ""]
        held_out = row["expected_on_held_out_rows"]
        lines.append([*line, f"{row['expected_on_these_texts']:.3f}", "" if held_out is None else f"{held_out:.3f}"])
    return format_table(header, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="first of all: what replaces the recipe's, in every case",
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


def run(options: argparse.Namespace) -> int:
    try:
        rows = measure(Bench(options))
    except RuntimeError as error:
        print(f"bench_acceptance.py: error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if options.json:
        write_json(options.json, rows)
    return 0


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Train and measure every case that is asked for, and its checkpoints."""
    names = list(dict.fromkeys(bench.options.only))
    bench.train_all(names)
    folders: dict[str, Path] = {}
    for name in names:
        folders[name] = bench.folder(name) / "final"
        for step in range(CURVE, 10**6 if name == ALONE else 0, CURVE):  # not those that a stop left
            checkpoint = bench.folder(name) / f"checkpoint-{step}"
            if checkpoint.is_dir():
                folders[f"{name}, {checkpoint.name}"] = checkpoint
    return summary(folders, bench.evaluate(folders))


if __name__ == "__main__":
    sys.exit(main())
