"""A run's output folder: its marker, its checkpoints, and what may differ when a run resumes from one.

    run.json                             whose folder this is, and how far the run came
    checkpoint-<step>/
        config.json, model.safetensors   the drafter as vLLM loads it, in the dtype it is trained in
        optimizer.state                  AdamW's exp_avg, exp_avg_sq and step, Muon's momentum_buffer, as
                                         KIND.PARAMETER
        state.json                       step, position in the data, best, fingerprints, versions, recipe
        recipe.yaml                      the resolved recipe, for people
        manifest.json                    size and sha256 of all of the above

A folder gets its name once everything in it is on disk, so a checkpoint with a manifest is whole unless it was damaged.
Nothing is ever unpickled. The main process alone writes; every rank reads.
"""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, NamedTuple, get_type_hints

import accelerate
import torch
import transformers
from torch import Tensor

import peagle_train
from peagle_train.config import GONE, Data, Recipe, load_recipe
from peagle_train.files import lock, remove_tree, sha256_of, try_removing, write_bytes, write_folder

logger = logging.getLogger(__name__)

MARKER, MANIFEST = "run.json", "manifest.json"
FORMAT = 2
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "peagle_train": peagle_train}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}


def vocabulary_fingerprint(ids: Tensor) -> str:
    """sha256 of a draft vocabulary's dtype, length and ids, as checkpoints have had it: of one row, (1, N)."""
    return hashlib.sha256(f"{ids.dtype},(1, {ids.numel()})".encode() + ids.cpu().numpy().tobytes()).hexdigest()


# The output folder


def check_output(folder: Path) -> None:
    """ValueError unless a new run can have the output folder, OSError if it cannot be read."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"output.dir {folder} cannot be made or written: {there} is no folder that you can write to")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output.dir {folder} is not empty: resume the run in it (--resume), or give another folder")


def lock_output(folder: Path, command: int = os.F_TLOCK) -> IO[str]:
    """Keep other processes out of the folder until the returned file is closed, or only test (F_TEST) whether one is in it;
    ValueError if one is.
    """
    file = (folder / ".lock").open("a+")
    # POSIX's, not flock: loader processes inherit a flock, and keep it for seconds after their run was killed.
    lock(file.fileno(), f"output.dir {folder}", "training", command)
    return file


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    """The marker of a finished or stopped run in words."""
    if summary["state"] == "stopped":
        where, how = folder / summary["checkpoint"], "the same command with --resume continues from there"
        return f"stopped at step {summary['steps']}, saved as {where}: {how}"
    text = f"drafter: {folder / summary['drafter']} ({summary['steps']} steps in {summary['train_seconds']:.0f} s)"
    before, after, best, length = summary["before"], summary["after"], summary["best"], "expected_accepted_length"
    if after:
        text += f"\nheld-out expected accepted length: {before[length]:.3f} before, {after[length]:.3f} after training"
        text += f" (loss {before['loss']:.3f} -> {after['loss']:.3f})"
    if best and best["folder"] == "best":
        text += f"\nthe best was at step {best['step']} ({best[length]:.3f}): {folder / 'best'}"
    return text


def last_checkpoint(output: Path) -> str:
    """Where a run that had to stop resumes, in words."""
    for newest in list_checkpoints(output):
        return f"the last checkpoint is {newest}: the same command with --resume continues from there"
    return "there is no checkpoint yet"


# Checkpoints on disk


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 if it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints (those with a manifest), the newest step first; their content is not looked at."""
    found = [p for p in output.glob("checkpoint-*") if step_of(p) >= 0 and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of, reverse=True)


def write_checkpoint(output: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """`fill` a folder and make it checkpoint-<step> once it is on disk. OSError: nothing is left of it, others stay."""

    def fill_and_list(folder: Path) -> None:
        fill(folder)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        # Without a newline at its end: a manifest that is cut anywhere is no JSON any more.
        (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2))

    path = output / f"checkpoint-{step}"
    write_folder(path, fill_and_list)
    return path


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def verify_checkpoint(folder: Path) -> None:
    """ValueError unless the manifest is of this format and step, and every file has its size and sha256."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = dict(manifest["files"])
        is_ours = manifest["format"] == FORMAT and manifest["step"] == step_of(folder)
        is_ours = is_ours and all(_describe(path := folder / name) == files[name] for name in files)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # of a manifest of any content
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is damaged, missing, or not of format {FORMAT}, which this version reads")


def prune(output: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and those of every `keep_every`-th step."""
    for path in [] if keep_last is None else list_checkpoints(output)[: keep_last - 1 : -1]:
        if keep_every is None or step_of(path) % keep_every:
            try_removing(path, _remove)


def remove_later(output: Path, step: int) -> list[int]:
    """Remove checkpoints after `step`, which a run that resumes there makes again: they must not be found."""
    later = [path for path in list_checkpoints(output) if step_of(path) > step]
    for path in later:
        _remove(path)
    return sorted(map(step_of, later))


def clean_up(output: Path) -> None:
    """Remove what a killed run left half-written, half-removed or half-replaced: a run that resumes writes it again."""
    for path in output.glob(".*"):
        if path.suffix in (".partial", ".deleted", ".old") and path.is_dir():
            try_removing(path)


def _remove(path: Path) -> None:
    """Remove a folder or a link to one. If that is killed half-way, no reader sees the rest, and `clean_up` removes it."""
    gone = path.with_name(f".{path.name}.deleted")
    remove_tree(gone)
    os.rename(path, gone)
    remove_tree(gone)


def keep_lines(path: Path, count: int) -> int:
    """Cut a file of lines to its first `count`, whatever is in them; returns how many there are."""
    lines = path.read_bytes().splitlines(keepends=True)[:count] if path.exists() else []
    write_bytes(path, b"".join(lines))
    return len(lines)


# Resuming

MAY_CHANGE = [f"data.{field.name}" for field in fields(Data) if field.name != "max_length"]
MAY_CHANGE += """
    target.check target.trust_remote_code target.server_patience target.prefetch_gib target.ring_dir draft.init_from
    output.dir train.log_steps train.log_with train.eval_steps train.save_steps train.keep_last train.keep_every
    train.max_bad_steps train.profile_steps train.probe train.memory_margin

    cod.num_segments cod.boundaries train.segment_mode train.loss_chunk_rows train.activation_checkpointing
    train.offload_features train.compile train.compile_backend train.batch_size train.sharding
    train.gradient_accumulation_steps target.attn_implementation target.chunk_tokens target.cache target.cache_dtype
    target.shard target.server

    train.epochs train.max_steps target.path
""".split()
"""Keys that may change when a run resumes: those that change no number, those that round sums differently, and (data's and
the last) those of which `Trainer.restore` looks at what is made of them."""


class Checkpoint(NamedTuple):
    """A verified checkpoint to resume from."""

    folder: Path
    state: dict[str, Any]  # its state.json


def open_resume(recipe: Recipe, given: str) -> Checkpoint | str:
    """The checkpoint to resume from, or what to print because the run has finished. Changes nothing that a run wrote.

    `given`: "" or output.dir for the newest checkpoint there, or a checkpoint's folder. ValueError: there is
    nothing to resume from, it is damaged, in use or after the last step, or the recipe differs where it must not. OSError:
    a folder cannot be read.
    """
    output, chosen = Path(recipe.output.dir), Path(given).expanduser()
    finished, complete = "", list_checkpoints(output)
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # or damaged: a complete checkpoint is enough
        marker = json.loads((output / MARKER).read_bytes())
        if (output / marker["drafter"] / "model.safetensors").is_file():  # which a finished run's alone has
            finished = describe_summary(marker, output)
    names = ", ".join(map(str, complete))
    if given and chosen.resolve() != output.resolve():
        folder = output / chosen.name
        if folder not in complete or chosen.resolve() != folder.resolve():  # either may be a link, to a bigger disk
            there, elsewhere = f"of output.dir {output} (there: {names or 'none'})", f"output.dir={chosen.parent}"
            raise ValueError(f"--resume {chosen}: give a checkpoint-<step> {there}; for one elsewhere, set {elsewhere}")
    elif finished:
        check_recipe(asdict(load_recipe(output / marker["drafter"] / "recipe.yaml")), asdict(recipe), str(output))
        more = f"\nto train for more steps: --resume CHECKPOINT (there: {names})" if names else ""
        return f"{output} holds a finished run: nothing to do\n{finished}{more}"
    elif not complete:
        remedy = "start the run without --resume, in a new folder (train.save_steps makes checkpoints)"
        raise ValueError(f"--resume: output.dir {output} holds no complete checkpoint: {remedy}")
    else:
        folder = complete[0]
    # By every rank, before any of them loads the target: a test alone, so that they do not keep each other out.
    lock_output(output, os.F_TEST).close()
    try:
        verify_checkpoint(folder)
    except ValueError as error:
        before = complete[complete.index(folder) + 1 :]
        way_out = f"resume with --resume {before[0]}" if before else "start over in a new folder"
        raise ValueError(f"--resume: {error}: {way_out}") from None
    state = json.loads((folder / "state.json").read_bytes())
    check_recipe(state["recipe"], asdict(recipe), folder.name)
    if recipe.train.max_steps is not None:  # else the data say how many, and are not read yet
        check_steps(folder, recipe.train.max_steps)
    return Checkpoint(folder, state)


def check_steps(folder: Path, num_steps: int) -> None:
    """ValueError if a checkpoint is after the run's last step."""
    if num_steps < step_of(folder):
        what = f"{folder.name} is after the {num_steps} steps that the recipe asks for"
        raise ValueError(f"--resume: {what}: raise train.max_steps or train.epochs, or resume from an earlier one")


def check_recipe(old: dict[str, Any], new: dict[str, Any], name: str) -> None:
    """ValueError, naming all of them, for settings that differ where they must not."""
    refused, sections = list[str](), get_type_hints(Recipe)
    for section, values in new.items():
        for leaf, value in values.items():
            # A setting that the checkpoint's version did not have was, in effect, its default.
            before = old.get(section, {}).get(leaf, getattr(sections[section], leaf, value))
            if f"{section}.{leaf}" not in MAY_CHANGE and before != value:
                refused.append(f"{section}.{leaf} {json.dumps(before)} -> {json.dumps(value)}")
        for leaf, before in old.get(section, {}).items():
            gone = GONE.get(f"{section}.{leaf}")
            if gone and before not in gone[0]:
                refused.append(f"{section}.{leaf} {json.dumps(before)}, which is gone")
    if refused:
        what = f"{name} was trained with other settings: {', '.join(refused)}"
        raise ValueError(f"--resume: {what}: give the old ones, or start a new run in another output.dir")
