"""Kill, starve and damage a tiny run again and again, resume it each time, and compare it with an undisturbed run.

    python tools/chaos.py --kills 50 --json tools/results/chaos.json

Every life of the run ends in one of these ways, in an order drawn from --seed:
    moment       SIGKILL after a random time                 accumulating  SIGKILL between two micro-batches
    file         SIGKILL with half a file of a save written   rename        SIGKILL before a checkpoint gets its name
    prune        SIGKILL before old ones are removed          removal       SIGKILL while an old one is removed
    metrics      SIGKILL with half a line written             worker        SIGKILL of a loader process
    term, int    SIGTERM, SIGINT to the whole group of        full          no space in the middle of a save
                 processes, as schedulers and terminals do
    damage       a file of the newest checkpoint is truncated or a bit of it flipped: it has to be refused, and the one
                 that is offered instead is used
The target, the data and the recipe are made on the spot. Lives are forked from this process, which has imported torch.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SURROUNDINGS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")

STOPPED = {"term": signal.SIGTERM, "int": signal.SIGINT}
WAYS = ("moment", "accumulating", "file", "rename", "prune", "removal", "metrics", *STOPPED, "worker", "full", "damage")
STEPS = 60
COMPARED = [f"{folder}/model.safetensors" for folder in ("final", "best", f"checkpoint-{STEPS - 2}", "checkpoint-20")]
COMPARED += ["final/config.json", f"checkpoint-{STEPS - 2}/optimizer.state"]
TIMES = {"tokens_per_second", "peak_memory_bytes", "loader_wait_share", "seconds", "seconds_left"}


def make_inputs(folder: Path) -> None:
    """A random target, rows of random ids and a recipe with everything that a resume has to put back."""
    from tests.tiny import make_target, write_recipe, write_rows

    rows = write_rows(folder / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 29, 8])
    train = {"dtype": "float32", "max_steps": STEPS, "gradient_accumulation_steps": 2}
    train |= {"learning_rate": 0.3}  # wild, so that the best drafter is neither the first nor the last
    sections = {
        "target": {"dtype": "float32"},
        "data": {"eval_fraction": 0.3, "num_workers": 1, "pack": False},
        "draft": {"num_layers": 1},
        "train": {**train, "log_steps": 1, "eval_steps": 7, "save_steps": 2, "keep_last": 3, "keep_every": 20},
    }
    write_recipe(folder, make_target(folder / "target"), rows, folder / "given as an override", **sections)


# A life: the trainer, with a death built in


def live(way: str, count: int, arguments: list[str]) -> int:
    """The command line's main, in this process, until it ends or `way` happens for the `count`-th time."""
    import torch

    torch.set_num_threads(1)
    arrange_death(way, count)
    from peagle_train.__main__ import main

    return main(arguments)


def arrange_death(way: str, count: int) -> None:
    """Have this process end in `way`, at its `count`-th occasion; ways that come from outside arrange nothing."""
    import peagle_train.training.checkpoint as checkpoint
    import peagle_train.training.trainer as trainer
    from peagle_train.serving import drafter_io
    from peagle_train.training.metrics import Reporter
    from peagle_train.training.step import BatchRunner

    left = [count]

    def wrap(owner: Any, name: str, die: Callable[..., Any], before: bool = False) -> None:
        """At the occasion, call `die` with the arguments of the owner's function, after (or before) that function."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                die(*args, **kwargs)
            result = original(*args, **kwargs)
            if not before:
                die(*args, **kwargs)
            return result

        setattr(owner, name, wrapped)

    def is_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    def kill(*_: Any, **__: Any) -> None:
        if is_time():
            os.kill(os.getpid(), signal.SIGKILL)

    def truncate_and_kill(path: Path, length: Callable[[int], int]) -> None:
        if is_time():
            os.truncate(path, length(path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    save = drafter_io.save_tensors

    def save_without_space(path: Path, tensors: Any) -> None:
        if is_time():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            try:
                save(path, tensors)
            finally:  # the log is a file, too
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def remove_half(path: Any, *_: Any, **__: Any) -> None:
        if Path(path).name.endswith(".deleted") and Path(path).exists() and is_time():
            next(Path(path).iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def send(*_: Any) -> None:
        if is_time() and way in STOPPED:
            os.killpg(os.getpgrp(), STOPPED[way])
        elif left[0] == 0:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)

    if way == "accumulating":
        wrap(BatchRunner, "run", lambda _, batch, plan, scale, **more: kill() if scale is not None else None)
    elif way == "rename":
        wrap(os, "replace", lambda _, to: kill() if Path(to).name.startswith("checkpoint-") else None, before=True)
    elif way == "prune":
        wrap(checkpoint, "prune", kill, before=True)
    elif way == "removal":
        wrap(shutil, "rmtree", remove_half, before=True)
    elif way == "metrics":
        wrap(Reporter, "record", lambda self, *_, **__: truncate_and_kill(self.path, lambda size: size - 5))
    elif way in ("file", "full"):
        for module in (drafter_io, trainer):
            if way == "full":
                wrap(module, "save_tensors", save_without_space, before=True)
            else:
                wrap(module, "save_tensors", lambda path, _: truncate_and_kill(path, lambda size: size // 2))
    elif way in ("term", "int", "worker"):
        os.setpgrp()
        wrap(trainer.Trainer, "take_step", send)


# The supervisor


class Chaos:
    """One session: rounds of lives of one run, each round compared with the undisturbed run when it comes to its end."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.wanted, self.rng = folder, kills, random.Random(seed)
        self.output, self.log = folder / "run", folder / "log"
        self.tally = dict.fromkeys(("kills", "corruptions", "resumes", "rounds", "starts_over"), 0)
        self.by_way = dict.fromkeys(WAYS, 0)

    def run(self) -> dict[str, Any]:
        self.fork(lambda: make_inputs(self.folder))
        undisturbed, equal = self.folder / "undisturbed", True
        started = time.perf_counter()
        if code := self.end("none", 0, [f"output.dir={undisturbed}"]):
            raise SystemExit(f"the undisturbed run ended with {code}: {self.said()}")
        assert all((undisturbed / name).is_file() for name in COMPARED), "nothing there to compare with"
        self.whole = time.perf_counter() - started
        while self.tally["kills"] < self.wanted:
            self.round()
            self.tally["rounds"] += 1
            equal = equal and same(self.output, undisturbed)
            shutil.rmtree(self.output)
        return {**self.tally, "equal": equal, "ways": self.by_way}

    def round(self) -> None:
        """A run from its start to its end, through as many lives as it takes."""
        arguments: list[str] = []
        ways: list[str] = []
        while True:
            ways = ways or self.rng.sample(WAYS, len(WAYS))
            way = "none" if self.tally["kills"] >= self.wanted else ways.pop()
            if way == "damage":
                offered = self.damage(arguments)
                if offered is not None:
                    arguments = offered
                    continue
                ways.insert(0, "damage")  # later: there is nothing yet that could be offered instead
                way = ways.pop() if len(ways) > 1 else "term"
            code = self.end(way, self.rng.randint(1, 6), [f"output.dir={self.output}", *arguments])
            self.by_way[way] = self.by_way.get(way, 0) + 1
            self.tally["kills"] += code == -signal.SIGKILL
            if code == 0 and (self.output / "final").exists():
                return
            expected = {"worker": 70, "full": 1, "term": 0, "int": 0}.get(way, -signal.SIGKILL)
            is_one_line = way != "full" or len([x for x in self.said().splitlines() if "error" in x.lower()]) == 1
            if code != expected or not is_one_line:
                raise SystemExit(f"a life that should end as '{way}' ended with {code}: {self.said()}")
            self.tally["kills"] += way == "worker"  # of the loader process
            arguments = ["--resume"] if any(self.output.glob("checkpoint-*")) else []
            self.tally["resumes" if arguments else "starts_over"] += 1
            if not arguments:
                shutil.rmtree(self.output, ignore_errors=True)

    def damage(self, arguments: list[str]) -> list[str] | None:
        """Spoil the newest checkpoint, see that it is refused, and take what is offered; None if there is no other."""
        newest = sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        if len(newest) < 2 or arguments != ["--resume"]:
            return None
        path = self.rng.choice(sorted(newest[-1].iterdir()))
        content = bytearray(path.read_bytes())
        at = self.rng.randrange(len(content))
        if self.rng.random() < 0.5:
            del content[at:]
        else:
            content[at] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        code = self.end("none", 0, [f"output.dir={self.output}", "--resume"])
        offered = re.search(r"resume with --resume (\S+)", self.said())
        if code != 2 or (path.name not in self.said() and path.name != "manifest.json") or offered is None:
            raise SystemExit(f"a damaged {path} ended with {code}: {self.said()}")
        self.tally["corruptions"] += 1
        self.by_way["damage"] += 1
        return ["--resume", offered[1]]

    def end(self, way: str, count: int, arguments: list[str]) -> int:
        """Start a life and wait for its end: its exit code, or minus the signal that killed it."""
        after = self.rng.uniform(0.2, 0.6) * self.whole if way == "moment" else None
        return self.fork(lambda: live(way, count, [str(self.folder / "recipe.yaml"), *arguments]), after)

    def fork(self, function: Callable[[], int | None], kill_after: float | None = None) -> int:
        """Call a function in a child: this process itself must run nothing of torch, whose threads a child would lack."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(pid, signal.SIGKILL)  # not yet waited for, so it is still this life's
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            for worker in multiprocessing.active_children():  # os._exit leaves them
                worker.kill()
            os._exit(code)

    def said(self) -> str:
        return self.log.read_text()[-2000:]


def same(ours: Path, undisturbed: Path) -> bool:
    """Whether weights, the last checkpoint's moments and all logged numbers but times are equal, bit for bit."""
    for name in COMPARED:
        if not (ours / name).exists() or (ours / name).read_bytes() != (undisturbed / name).read_bytes():
            print(f"{name} differs", file=sys.stderr)
            return False
    if metrics(ours) != metrics(undisturbed):
        print("metrics.jsonl differs", file=sys.stderr)
        return False
    return True


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="stop after N processes were killed (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of deaths (0)")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; it must be at least 1")

    os.environ.update(SURROUNDINGS)
    import peagle_train.training.build  # noqa: F401  (what every life would import)
    from tools.measure import where_and_when, write_json

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peagle-chaos-") as folder:
        result = Chaos(Path(folder), options.kills, options.seed).run()
    result |= {"seed": options.seed, "seconds": round(time.perf_counter() - started, 1), **where_and_when()}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
