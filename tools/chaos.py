"""Kill, starve and damage a tiny run again and again, resume it each time, and compare it with an undisturbed run.

    python tools/chaos.py --kills 50 --json tools/results/chaos.json

Every life of the run ends in one of these ways, in an order drawn from --seed:
    moment       SIGKILL after a random time                 accumulating  SIGKILL between two micro-batches
    file         SIGKILL with half a file of a save written   rename        SIGKILL before a checkpoint gets its name
    prune        SIGKILL before old ones are removed          removal       SIGKILL while an old one is removed
    metrics      SIGKILL with half a line written             worker        SIGKILL of a loader process
    term, int    SIGTERM, SIGINT to the whole group           full          no space in the middle of a save (on a small
                 of processes, as schedulers and terminals                  tmpfs, where one may be mounted)
                 send them
    damage       a file of the newest checkpoint is truncated or a bit of it flipped: it has to be refused, and the one
                 that is offered instead is used
The target, the data and the recipe are made on the spot. Lives are forked from this process, which has imported torch (that
takes seconds); --exec starts each as a new process.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SURROUNDINGS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")

DEADLY = ("moment", "accumulating", "file", "rename", "prune", "removal", "metrics")
STOPPED = {"term": signal.SIGTERM, "int": signal.SIGINT}
WAYS = (*DEADLY, *STOPPED, "worker", "full", "damage")
STEPS = 60
COMPARED = [f"{folder}/model.safetensors" for folder in ("final", "best", f"checkpoint-{STEPS - 2}", "checkpoint-20")]
COMPARED += ["final/config.json", f"checkpoint-{STEPS - 2}/optimizer.state"]
TIMES = (
    "tokens_per_second",
    "supervised_tokens_per_second",
    "peak_memory_bytes",
    "loader_wait_share",
    "seconds",
    "seconds_left",
)


def make_inputs(folder: Path) -> None:
    """A random target, rows of random ids and a recipe with everything that a resume has to put back."""
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=256, **shape)).save_pretrained(
        folder / "target"
    )
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for length in (9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 29, 8):
            ids = [rng.randrange(60) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "loss_mask": [0] + [1] * (length - 1)}) + "\n")
    recipe = {
        "target": {"path": str(folder / "target"), "dtype": "float32"},
        "data": {
            "sources": [str(folder / "rows.jsonl")],
            "max_length": 32,
            "eval_fraction": 0.3,
            "num_workers": 1,
            "pack": False,
        },
        "draft": {"num_layers": 1, "draft_vocab_size": 40, "mask_token_id": 60},
        "cod": {"num_depths": 4, "num_segments": 2},
        "train": {
            "max_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.3,  # wild, so that the best drafter is neither the first nor the last
            "log_steps": 1,
            "eval_steps": 7,
            "save_steps": 2,
            "keep_last": 3,
            "keep_every": 20,
        },
        "output": {"dir": "given as an override"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


# ---- a life: the trainer, with a death built in


def live(way: str, count: int, arguments: list[str]) -> int:
    """The command line's main, in this process, until it ends or `way` happens for the `count`-th time."""
    import torch

    torch.set_num_threads(1)
    arrange_death(way, count)
    from peagle_train.__main__ import main

    return main(arguments)


def arrange_death(way: str, count: int) -> None:
    """Have this process end in `way`, at its `count`-th occasion; ways that come from outside arrange nothing."""
    import peagle_train.serving.drafter_io as drafter_io
    import peagle_train.training.checkpoint as run_checkpoint
    import peagle_train.training.trainer as trainer
    from peagle_train.training.metrics import Reporter
    from peagle_train.training.step import BatchRunner

    left = [count]

    def is_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save = drafter_io.save_tensors

    def save_by(instead: Any) -> None:
        drafter_io.save_tensors = trainer.save_tensors = instead

    if way == "accumulating":
        run = BatchRunner.run

        def run_or_die(self: Any, batch: Any, plan: Any, scale: Any, **more: Any) -> Any:
            stats = run(self, batch, plan, scale, **more)
            if scale is not None and is_time():
                die()
            return stats

        BatchRunner.run = run_or_die  # type: ignore[method-assign]
    elif way == "file":

        def save_half(path: Path, tensors: Any) -> None:
            save(path, tensors)
            if is_time():
                os.truncate(path, path.stat().st_size // 2)
                die()

        save_by(save_half)
    elif way == "rename":
        replace = os.replace

        def die_instead(source: Any, destination: Any) -> None:
            if Path(destination).name.startswith("checkpoint-") and is_time():
                die()
            replace(source, destination)

        os.replace = die_instead
    elif way == "prune":

        def die_before(*_: Any) -> None:
            if is_time():
                die()

        run_checkpoint.prune = die_before  # type: ignore[assignment]
    elif way == "removal":
        rmtree = shutil.rmtree

        def remove_half(path: Any, *args: Any, **kwargs: Any) -> None:
            if Path(path).name.endswith(".deleted") and Path(path).exists() and is_time():
                next(Path(path).iterdir()).unlink()
                die()
            rmtree(path, *args, **kwargs)

        shutil.rmtree = remove_half  # type: ignore[assignment]
    elif way == "metrics":
        record = Reporter.record

        def record_half(self: Any, kind: str, line: str, **values: Any) -> None:
            record(self, kind, line, **values)
            if is_time():
                os.truncate(self.path, self.path.stat().st_size - 5)
                die()

        Reporter.record = record_half  # type: ignore[method-assign]
    elif way == "full":

        def save_without_space(path: Path, tensors: Any) -> None:
            if is_time():
                fill_disk(path.parent.parent.parent)
            save(path, tensors)

        save_by(save_without_space)
    elif way in ("term", "int", "worker"):
        os.setpgrp()
        from peagle_train.training.trainer import Trainer

        step = Trainer.take_step

        def step_and_signal(self: Any, batches: Any) -> Any:
            result = step(self, batches)
            if is_time():
                if way in STOPPED:
                    os.killpg(os.getpgrp(), STOPPED[way])
                else:
                    import multiprocessing

                    for worker in multiprocessing.active_children():
                        assert worker.pid is not None
                        os.kill(worker.pid, signal.SIGKILL)
            return result

        Trainer.take_step = step_and_signal  # type: ignore[method-assign]


def fill_disk(folder: Path) -> None:
    """Leave a few KiB: of the file system, where it is one of our own, else of every file that this process writes."""
    if not folder.is_mount():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - 8192)


# ---- the supervisor


class Chaos:
    """One session: rounds of lives of one run, each round compared with the undisturbed run when it comes to its end."""

    def __init__(self, folder: Path, kills: int, seed: int, new_processes: bool) -> None:
        self.folder, self.wanted, self.new_processes = folder, kills, new_processes
        self.rng = random.Random(seed)
        self.output, self.log = folder / "out" / "run", folder / "log"
        self.tally = dict.fromkeys(("kills", "corruptions", "resumes", "rounds", "starts_over"), 0)
        self.by_way = dict.fromkeys(WAYS, 0)
        self.equal = True
        self.output.parent.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.output.parent)]
        self.is_mounted = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0

    def run(self) -> dict[str, Any]:
        self.in_child(lambda: make_inputs(self.folder))
        undisturbed = self.folder / "undisturbed"
        started = time.perf_counter()
        code = self.end("none", 0, [f"output.dir={undisturbed}"])
        if code:
            raise SystemExit(f"the undisturbed run ended with {code}: {self.said()}")
        assert all((undisturbed / name).is_file() for name in COMPARED), "nothing there to compare with"
        self.whole = time.perf_counter() - started
        while self.tally["kills"] < self.wanted:
            self.round()
            self.tally["rounds"] += 1
            self.equal = self.equal and same(self.output, undisturbed)
            shutil.rmtree(self.output)
        disk = "tmpfs" if self.is_mounted else "RLIMIT_FSIZE"
        return {**self.tally, "equal": self.equal, "ways": self.by_way, "disk": disk}

    def close(self) -> None:
        if self.is_mounted:
            # lazily: loader processes of a life that was killed see so within seconds, and have files open until then
            subprocess.run(["umount", "--lazy", str(self.output.parent)], check=True)

    def round(self) -> None:
        """A run from its start to its end, through as many lives as it takes."""
        arguments: list[str] = []
        ways: list[str] = []
        while True:
            is_enough = self.tally["kills"] >= self.wanted
            ways = ways or self.rng.sample(WAYS, len(WAYS))
            way = "none" if is_enough else ways.pop()
            if way == "damage":
                offered = self.damage(arguments)
                if offered is not None:
                    arguments = offered
                    continue
                ways.insert(0, "damage")  # later: there is nothing yet that could be offered instead
                way = ways.pop() if len(ways) > 1 else "term"
            code = self.end(way, self.rng.randint(1, 6), [f"output.dir={self.output}", *arguments])
            if code == -signal.SIGKILL:
                self.tally["kills"] += 1
            self.by_way[way] = self.by_way.get(way, 0) + 1
            if code == 0 and (self.output / "final").exists():
                return
            expected = {"worker": 1, "full": 1, "term": 0, "int": 0}.get(way, -signal.SIGKILL)
            is_one_line = code != 1 or len([x for x in self.said().splitlines() if "error" in x.lower()]) == 1
            if code != expected or not is_one_line:
                raise SystemExit(f"a life that should end as '{way}' ended with {code}: {self.said()}")
            self.tally["kills"] += way == "worker"  # of the loader process
            (self.output.parent / "filler").unlink(missing_ok=True)
            arguments = self.go_on()

    def go_on(self) -> list[str]:
        """Arguments of the next life."""
        if not any(self.output.glob("checkpoint-*")):
            shutil.rmtree(self.output, ignore_errors=True)
            self.tally["starts_over"] += 1
            return []
        self.tally["resumes"] += 1
        return ["--resume"]

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
        arguments = [str(self.folder / "recipe.yaml"), *arguments]
        with self.log.open("w") as log:
            if self.new_processes:
                content = json.dumps([way, count, arguments])
                command = [sys.executable, __file__, "--life", content]
                pid = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT).pid
            else:
                pid = fork(lambda: live(way, count, arguments), log.fileno())
            if way == "moment":
                time.sleep(self.rng.uniform(0.2, 0.6) * self.whole)
                os.kill(pid, signal.SIGKILL)  # not yet waited for, so it is still this life's
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def in_child(self, function: Any) -> None:
        """This process itself must run nothing of torch: what it forks would inherit its threads' locks."""
        with self.log.open("w") as log:
            code = os.waitstatus_to_exitcode(os.waitpid(fork(function, log.fileno()), 0)[1])
        if code:
            raise SystemExit(f"could not be made: {self.said()}")

    def said(self) -> str:
        return self.log.read_text()[-2000:]


def fork(function: Any, output: int) -> int:
    """Call a function in a child that writes to `output`; the child's process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = function() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        import multiprocessing

        for worker in multiprocessing.active_children():  # os._exit leaves them
            worker.kill()
        os._exit(code)


def same(ours: Path, undisturbed: Path) -> bool:
    """Whether weights, the last checkpoint's moments and all logged numbers but times are equal, bit for bit."""
    for name in COMPARED:
        contents = [(run / name).read_bytes() if (run / name).exists() else None for run in (ours, undisturbed)]
        if contents[0] != contents[1]:
            print(f"{name} differs (there: {[content is not None for content in contents]})", file=sys.stderr)
            return False
    if metrics(ours) != metrics(undisturbed):
        print("metrics.jsonl differs", file=sys.stderr)
        return False
    return True


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill a tiny run N times, resume it, compare it with an undisturbed one.",
        epilog="example: python tools/chaos.py --kills 50 --json chaos.json",
    )
    parser.add_argument("--kills", type=int, default=50, help="stop after N processes were killed (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of deaths (0)")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--exec", action="store_true", help="start every life as a new process, imports included")
    parser.add_argument("--life", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        try:
            way, count, arguments = json.loads(options.life)
        except (ValueError, TypeError):
            parser.error(
                f"--life is {options.life!r}; this tool gives it to itself: a way to die, how often, arguments"
            )
        os.environ.update(SURROUNDINGS)
        return live(way, count, arguments)
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; it must be at least 1")

    os.environ.update(SURROUNDINGS)
    import peagle_train.training.build  # noqa: F401  (what every life would import)
    from peagle_train.files import write_json
    from peagle_train.training.checkpoint import versions

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peagle-chaos-") as folder:
        chaos = Chaos(Path(folder), options.kills, options.seed, options.exec)
        try:
            result = chaos.run()
        finally:
            chaos.close()
    result |= {
        "seed": options.seed,
        "processes": "started" if options.exec else "forked",
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
