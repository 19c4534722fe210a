"""Ranks that are forked from one process, which imports everything once, and go through lists of jobs together.

python tests/ranks_run.py GROUPS.json

A group is [number of ranks, jobs]. A job is ["run", RECIPE, override or option ...], ["sharded", RECIPE, TARGET_FOLDER ...]
(sharded_run.py), or, as the last one, ["cache", RECIPE, FOLDER] or ["main", WHERE, RECIPE, override ...]: the command line,
with "data" that fails on rank 1, or a "server" that both lose. Prints for each group the exit code of the first rank that
failed (else 0), and what all of them wrote to stderr.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from peagle_train.__main__ import main as command_line
from peagle_train.config import Recipe, load_recipe
from peagle_train.data.encode import Encoder
from peagle_train.data.packing import PackedRows
from peagle_train.data.training_data import load_training_data
from peagle_train.distributed import check_launch
from peagle_train.serving.start import make_draft
from peagle_train.target_model.cache import write_cache
from peagle_train.target_model.frozen import TargetLost
from peagle_train.training.build import load_target
from peagle_train.training.checkpoint import Checkpoint, open_resume
from peagle_train.training.step import Batch
from peagle_train.training.trainer import Trainer
from tests.helpers import free_port


def make_trainer(recipe: Recipe, accelerator: Accelerator) -> Trainer:
    target = load_target(recipe, accelerator)
    mask_token_id, draft_vocab_size = recipe.draft.mask_token_id, recipe.draft.draft_vocab_size
    assert mask_token_id is not None and draft_vocab_size is not None
    data = load_training_data(Encoder(recipe.data, None, target.vocab_size, mask_token_id), say=lambda _: None)
    draft = make_draft(recipe, target, mask_token_id, torch.arange(draft_vocab_size))
    return Trainer(recipe, accelerator, target, draft, data)


def run(recipe_path: str, *arguments: str) -> None:
    """A whole run; `--stop`: a signal to the last rank stops it after its first step, `--resume`: it goes on from there."""
    recipe = load_recipe(recipe_path, [argument for argument in arguments if not argument.startswith("--")])
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=recipe.train.mixed_precision)
    trainer = make_trainer(recipe, accelerator)
    if "--resume" in arguments:
        checkpoint = open_resume(recipe, "")
        assert isinstance(checkpoint, Checkpoint), checkpoint
        trainer.restore(checkpoint)
    accumulate, stops = trainer.accumulate, "--stop" in arguments

    def signalled(batches: list[Batch]) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(batches)

    if stops and accelerator.process_index == accelerator.num_processes - 1:
        trainer.accumulate = signalled  # type: ignore[method-assign]
    assert trainer.run()["state"] == ("stopped" if stops else "finished")  # on every rank


def failing_command_line(where: str, *arguments: str) -> int:
    read, calls = PackedRows.__getitem__, []

    def read_or_fail(rows: PackedRows, index: Any) -> Any:
        calls.append(index)
        if len(calls) >= 4:
            raise OSError("the disk is gone") if where == "data" else TargetLost("the server is gone")
        return read(rows, index)

    if where == "server" or (where == "data" and os.environ["RANK"] == "1"):
        PackedRows.__getitem__ = read_or_fail  # type: ignore[method-assign]
    return command_line(list(arguments))


def work(rank: int, jobs: list[list[str]], stderr: int) -> None:
    from tests import sharded_run

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.dup2(stderr, 2)
    if jobs[0][0] == "main":
        sys.exit(failing_command_line(*jobs[0][1:]))
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    for kind, *arguments in jobs:
        if kind == "run":
            run(*arguments)
        elif kind == "cache":
            write_cache(load_recipe(arguments[0]), arguments[1], shard_mib=0.02)  # its end is that of the ranks
            return
        else:
            sharded_run.run(*arguments)
    accelerator.end_training()


def go_through(processes: int, jobs: list[list[str]]) -> tuple[int, str]:
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(free_port())}
    os.environ.update(shared, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    code = 0
    with tempfile.TemporaryFile("w+") as said:
        try:
            start_processes(work, (jobs, said.fileno()), processes, start_method="fork")
        except ProcessExitedException as error:  # the others got a SIGTERM, as from torchrun
            code = error.exit_code
        said.seek(0)
        return code, said.read()


if __name__ == "__main__":
    torch.compile(torch.neg, backend="aot_eager")(torch.zeros(1))  # imports what a first compilation imports, once
    print(json.dumps([go_through(*group) for group in json.loads(Path(sys.argv[1]).read_text())]))
