"""Ranks that are forked from one process, which imports everything once, and go through a list of jobs together.

python tests/ranks_run.py N JOBS.json

A job is ["run", RECIPE, override or option ...], ["gradients", FOLDER] (fsdp_run.py), or ["sharded", RECIPE, TARGET_FOLDER
...] (sharded_run.py), or ["cache", RECIPE, FOLDER, override ...], which is the last one.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train.config import Recipe, load_recipe
from peagle_train.data.packing import PackedRows
from peagle_train.distributed import check_launch
from peagle_train.serving.start import make_draft
from peagle_train.target_model.cache_writer import write_cache
from peagle_train.training.build import load_target
from peagle_train.training.checkpoint import Checkpoint, open_resume
from peagle_train.training.step import Batch, Gradients
from peagle_train.training.trainer import Trainer
from tests.documents import load_documents, pack_documents


def make_trainer(recipe: Recipe, accelerator: Accelerator) -> Trainer:
    target = load_target(recipe, accelerator)

    def rows(sources: list[str]) -> PackedRows:
        documents, _ = load_documents(sources, tokenizer=None, vocab_size=target.vocab_size)
        return pack_documents(documents, recipe.data.max_length, recipe.data.pack)[0]

    mask_token_id, draft_vocab_size = recipe.draft.mask_token_id, recipe.draft.draft_vocab_size
    assert mask_token_id is not None and draft_vocab_size is not None
    draft = make_draft(recipe, target, mask_token_id, torch.arange(draft_vocab_size))
    held_out = (
        rows(recipe.data.eval_sources) if recipe.data.eval_sources else pack_documents([], recipe.data.max_length)[0]
    )
    return Trainer(recipe, accelerator, target, draft, rows(recipe.data.sources), held_out)


def run(accelerator: Accelerator, recipe_path: str, *arguments: str) -> None:
    """A whole run; a signal to the last rank stops it after `--stop-after=STEP`, and `--resume` resumes it."""
    options = [argument for argument in arguments if argument.startswith("--")]
    recipe = load_recipe(recipe_path, [argument for argument in arguments if argument not in options])
    checkpoint = open_resume(recipe, "") if "--resume" in options else None
    trainer = make_trainer(recipe, accelerator)
    if checkpoint is not None:
        assert isinstance(checkpoint, Checkpoint), checkpoint
        trainer.restore(checkpoint)
    for option in options:
        if option.startswith("--stop-after=") and accelerator.process_index == accelerator.num_processes - 1:
            stop_after(trainer, int(option.partition("=")[2]))
    summary = trainer.run()
    assert summary.get("signal") == ("SIGTERM" if summary["state"] == "stopped" else None)  # on every rank


def stop_after(trainer: Trainer, step: int) -> None:
    accumulate = trainer.accumulate

    def signalled(batches: list[Batch]) -> Gradients:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(batches)

    trainer.accumulate = signalled  # type: ignore[method-assign]


def cache(recipe_path: str, folder: str, *refused: str) -> None:
    """Features on disk: with these overrides every rank is told that the folder holds others; without them it is filled."""
    try:
        write_cache(load_recipe(recipe_path, refused), folder, shard_mib=0.02)
    except ValueError as error:
        assert "holds the cache of another target" in str(error)
    else:
        raise AssertionError("nothing was refused")
    write_cache(load_recipe(recipe_path), folder, shard_mib=0.02)


def work(jobs: list[list[str]]) -> None:
    from tests import fsdp_run, sharded_run

    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    for kind, *arguments in jobs:
        if kind == "run":
            run(accelerator, *arguments)
        elif kind == "cache":
            return cache(*arguments)  # its end is that of the ranks
        else:
            {"gradients": fsdp_run.run, "sharded": sharded_run.run}[kind](*arguments)
    accelerator.end_training()


def main() -> int:
    processes, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(shared, ACCELERATE_USE_CPU="true")
    pids = set()
    for rank in range(int(processes)):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                work(jobs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.add(pid)
    failed = False
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        failed |= status != 0
        for other in pids if status else ():
            os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
