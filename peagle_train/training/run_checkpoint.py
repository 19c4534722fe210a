"""A trainer to a checkpoint and back: what is saved, what must be the same when a run goes on, what is undone.

Every rank calls these functions; the main process alone touches files.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peagle_train.durable import write_bytes, write_json, write_text
from peagle_train.recipe import dump_recipe
from peagle_train.serving.drafter_tensors import check_finite
from peagle_train.training.checkpoint import (
    MARKER,
    claim_output,
    fill_drafter,
    lock_output,
    save_tensors,
)
from peagle_train.training.checkpoint_files import (
    checkpoint_path,
    clean_up,
    list_checkpoints,
    prune,
    set_aside_later,
    write_checkpoint,
)
from peagle_train.training.peers import from_main
from peagle_train.training.resume import Checkpoint
from peagle_train.training.run_state import (
    collect_rng,
    fingerprint,
    load_tensors,
    schedule_at,
    set_rng,
    set_schedule,
    versions,
)
from peagle_train.training.sharded import full_moments, full_weights, load_full_moments, load_full_weights

if TYPE_CHECKING:
    from peagle_train.training.trainer import Trainer


def save_checkpoint(trainer: "Trainer") -> Path:
    """checkpoint-<step>, and older ones removed as the recipe says; nothing if that one is there already."""
    path = checkpoint_path(trainer.folder, trainer.step)
    if trainer.saved_step == trainer.step:
        return path
    accelerator, train = trainer.accelerator, trainer.recipe.train
    weights = full_weights(trainer.draft)
    moments = full_moments(trainer.draft, trainer.optimizer)
    generators = collect_rng(accelerator.process_index, accelerator.num_processes)
    state = _state(trainer)

    def fill(folder: Path) -> None:
        fill_drafter(folder, trainer.draft.config, weights, {"recipe.yaml": dump_recipe(trainer.recipe)})
        save_tensors(folder / "optimizer.state", moments)
        save_tensors(folder / "rng.state", generators)
        # Not strict JSON where a loss on held-out rows is nan, but read back as it was.
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def write() -> None:
        trainer.reporter.sync()  # a checkpoint's lines are on disk before it is
        write_checkpoint(trainer.folder, trainer.step, fill)
        prune(trainer.folder, train.keep_last, train.keep_every)

    trainer.on_main(f"{path} could not be saved", write)
    trainer.saved_step = trainer.step
    return path


def _state(trainer: "Trainer") -> dict[str, Any]:
    epoch, step_in_epoch = divmod(trainer.step, trainer.sampler.steps_per_epoch)
    return {
        "step": trainer.step,
        "num_steps": trainer.num_steps,
        "position": {"epoch": epoch, "step_in_epoch": step_in_epoch},
        "learning_rates": schedule_at(trainer.scheduler, trainer.step),
        "bad_steps_in_a_row": trainer.guard.in_a_row,
        "train_seconds": trainer.seconds(),
        "before": trainer.before,
        "best": trainer.best,
        "lines": {"metrics.jsonl": trainer.reporter.lines, "bad_rows.jsonl": trainer.guard.lines},
        "must_match": _must_match(trainer),
        "world_size": trainer.accelerator.num_processes,
        "versions": versions(),
        "recipe": asdict(trainer.recipe),
    }


def _must_match(trainer: "Trainer") -> dict[str, Any]:
    """What a run that goes on must find as it was, by the words for it."""
    return {
        "rows to train on": [len(trainer.train_rows), trainer.train_rows.fingerprint()],
        "held-out rows": [len(trainer.evaluator.rows), trainer.evaluator.rows.fingerprint()],
        "rows of a step": trainer.sampler.global_batch_size,
        "draft vocabulary": fingerprint(trainer.draft.draft_token_ids.reshape(1, -1)),
        "target's config and weights": trainer.target_fingerprint,
        "target's head": [str(trainer.runner.head_rows.dtype)[6:], fingerprint(trainer.runner.head_rows)],
    }


def restore(trainer: "Trainer", checkpoint: Checkpoint) -> list[str]:
    """Make a new trainer the one that was saved. Changes no file; returns what the user should know.

    Raises:
        ValueError: data, draft vocabulary, target or rows of a step are not those of the checkpoint.
    """
    state, notes = checkpoint.state, list(checkpoint.notes)
    trainer.sampler.check_global_batch_size(state["must_match"]["rows of a step"])
    now = json.loads(json.dumps(_must_match(trainer)))
    for what in now.keys() - state["must_match"].keys():
        notes.append(f"{what}: {checkpoint.folder.name}, of an older version, does not record this: not compared")
    for what, value in state["must_match"].items():
        if now[what] != value:
            was, found = (f"{v[0]} ({v[1][:12]})" if isinstance(v, list) else str(v)[:12] for v in (value, now[what]))
            raise ValueError(
                f"--resume: {what}: {was} in {checkpoint.folder.name}, {found} now: give the same data, target and"
                " number of processes, or start a new run in another output.dir"
            )
    if trainer.num_steps < checkpoint.step:
        raise ValueError(
            f"--resume: {checkpoint.folder.name} is behind the {trainer.num_steps} steps that the recipe asks for: raise"
            " train.max_steps or train.epochs, or resume from an earlier one"
        )
    main = trainer.accelerator.is_main_process
    weights, moments = (
        load_tensors(checkpoint.folder / name) if main else {} for name in ("model.safetensors", "optimizer.state")
    )
    check_finite(weights, f"--resume: {checkpoint.folder}'s")
    if trainer.draft.d2t is None:  # older versions wrote the mappings of the full vocabulary, too
        weights = {name: tensor for name, tensor in weights.items() if name not in ("d2t", "t2d")}
    load_full_weights(trainer.draft, weights)
    load_full_moments(trainer.draft, trainer.optimizer, moments)
    set_schedule(trainer.scheduler, checkpoint.step)
    set_rng(load_tensors(checkpoint.folder / "rng.state"), trainer.accelerator.process_index)
    rates = schedule_at(trainer.scheduler, checkpoint.step)
    if trainer.num_steps != state["num_steps"]:
        change = f"steps {state['num_steps']} -> {trainer.num_steps}: at step {checkpoint.step} the learning rate"
        old, new = state["learning_rates"][0], rates[0]
        notes.append(
            f"{change} stays {new:.3e}"
            if old == new
            else f"{change} jumps from {old:.3e} to {new:.3e}, as the schedule is now that of {trainer.num_steps} steps:"
            " the result is not that of a run which had so many from its start"
        )
    if trainer.accelerator.num_processes != state["world_size"]:
        was, now_n = state["world_size"], trainer.accelerator.num_processes
        notes.append(f"processes {was} -> {now_n}: same rows and draws, but no longer equal bit for bit")
    for name, version in versions().items():
        was = state["versions"].get(name)
        if was != version:
            notes.append(f"{name} {was} -> {version}: no longer equal bit for bit, perhaps")
    trainer.step = trainer.saved_step = trainer.sampler.start_step = checkpoint.step
    trainer.before, trainer.best = state["before"], state["best"]
    trainer.seconds_before = state["train_seconds"]
    trainer.guard.in_a_row = state["bad_steps_in_a_row"]
    trainer.resumed = checkpoint
    if trainer.best and trainer.best.get("folder") == "best" and _best_on_disk(trainer.folder) != trainer.best["step"]:
        notes.append(
            f"best/ holds a later step than {checkpoint.step}: the drafter of step {trainer.best['step']}, the best so far,"
            " is gone; the next better one takes its place"
        )
        trainer.best = {**trainer.best, "folder": None}
    return notes


def _best_on_disk(output: Path) -> int | None:
    for name in ("best", ".best.old"):
        if (output / name).is_dir():
            try:
                return json.loads((output / name / "best.json").read_text(encoding="utf-8"))["step"]
            except (OSError, ValueError, KeyError):
                return None
    return None


def take_up_output(trainer: "Trainer") -> Any:
    """Make a new output folder the run's, or put one back to where its checkpoint was made; the main process gets its lock.

    Raises:
        ValueError: on every rank, if the folder cannot be used.
    """
    failure, lock = "", None
    if trainer.accelerator.is_main_process:
        try:
            if trainer.resumed is None:
                claim_output(trainer.folder)
            lock = lock_output(trainer.folder)
            if trainer.resumed is not None:
                _put_back(trainer, trainer.resumed)
            write_text(trainer.folder / "recipe.yaml", dump_recipe(trainer.recipe))
        except ValueError as error:
            failure = str(error)
        except OSError as error:
            failure = f"output.dir {trainer.folder} cannot be written: {error}"
    failure = from_main(failure)
    if failure:
        raise ValueError(failure)
    return lock


def _put_back(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Undo what an output folder got behind the checkpoint, and say what that is."""
    folder, say = trainer.folder, trainer.reporter.say
    clean_up(folder)
    later = set_aside_later(folder, checkpoint.step)
    if later:
        names = ", ".join(map(str, later))
        say(f"resume: checkpoints of later steps ({names}) are set aside, until these steps are done again")
    for name, counter in (("metrics.jsonl", trainer.reporter), ("bad_rows.jsonl", trainer.guard)):
        wanted = checkpoint.state["lines"][name]
        dropped, missing = keep_lines(folder / name, wanted)
        counter.lines = wanted - missing  # those of this file, which is cut back to them
        if dropped:
            say(f"resume: {name}: {dropped} lines behind step {checkpoint.step} dropped")
        if missing:
            say(f"resume: {name}: {missing} lines that were there at step {checkpoint.step} are missing")
    write_json(folder / MARKER, {"state": "started"})
    say(f"resume: going on behind step {checkpoint.step}, from {checkpoint.folder}")


def keep_lines(path: Path, count: int) -> tuple[int, int]:
    """Cut a file of lines to its first `count`, whatever is in them.

    Returns:
        How many lines (one may be half) were dropped, how many are missing.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole_lines = [line for line in lines if line.endswith(b"\n")]
    if len(lines) > count or len(lines) > len(whole_lines):
        write_bytes(path, b"".join(whole_lines[:count]))  # as they are: a damaged line is no reason not to go on
    return len(lines) - len(whole_lines[:count]), max(0, count - len(whole_lines))


def last_checkpoint(output: Path) -> str:
    """Words on where a run that had to stop goes on."""
    newest = next(iter(list_checkpoints(output)), None)
    if newest is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {newest}: the same command with --resume goes on from there"
