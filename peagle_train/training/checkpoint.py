"""A run's output folder: its marker, its checkpoints, and what may differ when a run resumes from one.

    run.json                             whose folder this is, and how far the run came
    checkpoint-<step>/
        config.json, model.safetensors   the drafter as vLLM loads it, in the dtype it is trained in
        optimizer.state                  AdamW's exp_avg, exp_avg_sq and step, as KIND.PARAMETER
        rng.state                        torch's global generators, by rank
        state.json                       step, position in the data, best, fingerprints, versions, recipe
        recipe.yaml                      the resolved recipe, for people
        manifest.json                    size and sha256 of all of the above

A folder gets its name once everything in it is on disk, so a checkpoint with a manifest is whole unless it was damaged.
Nothing is ever unpickled. The main process alone writes; every rank reads.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import accelerate
import torch
import transformers
from torch import Tensor

import peagle_train
from peagle_train.config import Data, Recipe
from peagle_train.files import remove_tree, sha256_of, told, try_removing, write_bytes, write_folder

logger = logging.getLogger(__name__)

MARKER, MANIFEST = "run.json", "manifest.json"
FORMAT = 2
REQUIRED = {"model.safetensors", "optimizer.state", "rng.state", "state.json"}
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a JSON file of any content as one of ours may raise."""


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate, "peagle_train": peagle_train}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}


def tensor_fingerprint(tensor: Tensor) -> str:
    """sha256 of dtype, shape and the first 64 rows."""
    sample = tensor[:64].detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{tensor.dtype},{tuple(tensor.shape)}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The output folder


def check_output(folder: Path) -> None:
    """ValueError if the output folder holds another run or anything else, OSError if it cannot be read."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output.dir {folder} is a file; give a folder")
    # A checkpoint is a run too, even if its marker is gone.
    if (folder / MARKER).exists() or any(folder.glob(f"checkpoint-*/{MANIFEST}")):
        raise ValueError(
            f"output.dir {folder} already holds a run; resume it (--resume), give another folder, or remove it first"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output.dir {folder} is not empty and holds no run; give another folder")


def lock_output(folder: Path, kind: int = fcntl.LOCK_EX) -> IO[str]:
    """Keep other processes out of the folder until the returned file is closed or this process ends.

    Raises:
        ValueError: another process trains into the folder.
    """
    file = (folder / ".lock").open("a+" if kind == fcntl.LOCK_EX else "r")
    try:
        # POSIX's, not flock (nor the package filelock): loader processes inherit a flock, and keep it for seconds after
        # their run was killed.
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output.dir {folder} is in use: another process is training there") from None
    except OSError as error:
        logger.warning("output.dir %s cannot be locked (%s): make sure that only one run writes there", folder, error)
    return file


def check_not_in_use(folder: Path) -> None:
    """ValueError if another process trains into the folder. Changes nothing."""
    if (folder / ".lock").exists():
        # Shared, so that the ranks of one launch do not take each other for another run.
        with suppress(OSError):  # of another user, perhaps: a run that writes there will meet it
            lock_output(folder, fcntl.LOCK_SH).close()


def read_marker(folder: Path) -> dict[str, Any]:
    """An output folder's `run.json`; {} if it is missing or not what a run writes. ValueError if it cannot be read."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        if marker["state"] != "started":
            describe_summary(marker, folder)  # has all that is read from it
        return marker
    except (FileNotFoundError, NotADirectoryError, *BROKEN):
        return {}
    except OSError as error:
        raise ValueError(told(error)) from None


def read_summary(folder: Path) -> str:
    """Where a finished run's drafter is and how good it is; ValueError if there is no finished run."""
    summary = read_marker(folder)
    if not summary:
        raise ValueError(f"{folder} holds no run: its {MARKER} is missing, or is not what a run writes")
    if summary["state"] != "finished":
        raise ValueError(f"{folder} holds a run that has not finished")
    return describe_summary(summary, folder)


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    """The marker of a finished or stopped run in words."""
    if summary["state"] == "stopped":
        return (
            f"stopped by {summary['signal']} at step {summary['steps']:d}, saved as {folder / summary['checkpoint']}: the"
            " same command with --resume continues from there"
        )
    text = f"drafter: {folder / summary['drafter']} ({summary['steps']:d} steps in {summary['train_seconds']:.0f} s)"
    before, after, best = summary["before"], summary["after"], summary["best"]
    if after:
        text += (
            f"\nheld-out expected accepted length: {before['expected_accepted_length']:.3f} before,"
            f" {after['expected_accepted_length']:.3f} after training (loss {before['loss']:.3f} -> {after['loss']:.3f})"
        )
    if best and best["folder"] == "best":
        length = best["expected_accepted_length"]
        text += f"\nthe best was at step {best['step']:d} ({length:.3f}): {folder / 'best'}"
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
    """`fill` a folder and make it checkpoint-<step> once it is on disk.

    Raises:
        OSError: it could not be written; nothing of it is left, and other checkpoints are unchanged.
    """

    def fill_and_list(folder: Path) -> None:
        fill(folder)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        # Without a newline at its end: a manifest that is cut anywhere is no JSON any more.
        (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2))

    path = output / f"checkpoint-{step}"
    write_folder(path, fill_and_list)
    try_removing(output / f"set-aside-{step}", _remove)  # of the run before this one was resumed
    return path


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


class DamagedCheckpoint(ValueError):
    """A checkpoint's files do not match its manifest."""


def verify_checkpoint(folder: Path) -> None:
    """DamagedCheckpoint unless every file of the manifest has its size and sha256; ValueError for another version's."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        form, step, files = manifest["format"], manifest["step"], dict(manifest["files"])
        for name, described in files.items() if form == FORMAT else ():
            path = folder / name
            if _describe(path) != described:
                raise ValueError
        path = folder / MANIFEST
        if form == FORMAT and not files.keys() >= REQUIRED:
            raise ValueError
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except BROKEN:
        raise DamagedCheckpoint(f"{path} is not what was written") from None
    if form != FORMAT:
        raise ValueError(
            f"{path} has format {form}, this version of peagle_train reads {FORMAT}: resume with the version that wrote it"
        )
    if step != step_of(folder):
        raise DamagedCheckpoint(f"{path} is of step {step}, not of the folder's name")


def prune(output: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and those of every `keep_every`-th step."""
    for path in [] if keep_last is None else list_checkpoints(output)[: keep_last - 1 : -1]:
        if keep_every is None or step_of(path) % keep_every:
            try_removing(path, _remove)


def set_aside_later(output: Path, step: int) -> list[int]:
    """Rename checkpoints after `step`, which a run that resumes there makes again: they must not be found."""
    later = sorted(s for path in output.iterdir() if (s := step_of(path)) > step)
    for s in later:
        _remove(output / f"set-aside-{s}")
        os.rename(output / f"checkpoint-{s}", output / f"set-aside-{s}")
    return later


def remove_set_aside(output: Path) -> None:
    for path in output.glob("set-aside-*"):
        try_removing(path, _remove)


def clean_up(output: Path) -> None:
    """Remove what a killed run left half-written or half-removed, and put a replaced folder's old content back."""
    for path in output.glob(".*"):
        if path.suffix in (".partial", ".deleted") and not path.is_file():
            try_removing(path)
    for name in ("best", "final"):
        old = output / f".{name}.old"
        if os.path.lexists(old) and not os.path.lexists(output / name):
            os.rename(old, output / name)
        else:
            try_removing(old)


def _remove(path: Path) -> None:
    """Remove a folder or a link to one. If that is killed half-way, no reader sees the rest, and `clean_up` removes it."""
    if os.path.lexists(path):
        gone = path.with_name(f".{path.name}.deleted")
        remove_tree(gone)
        os.rename(path, gone)
        remove_tree(gone)


def has_best(output: Path, step: int) -> bool:
    """Whether best/, or the one that a killed run was replacing, is of this step."""
    for file in (output / "best" / "best.json", output / ".best.old" / "best.json"):
        try:
            return json.loads(file.read_bytes())["step"] == step
        except (OSError, *BROKEN):  # missing, damaged
            continue
    return False


def keep_lines(path: Path, count: int) -> tuple[int, int]:
    """Cut a file of lines to its first `count`, whatever is in them: (lines dropped, lines missing)."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n")][:count]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept), count - len(kept)


# Resuming

EFFECTS = {
    "changes no number": {
        "target.check", "target.trust_remote_code", "output.dir", "train.log_steps", "train.eval_steps",
        "train.save_steps", "train.keep_last", "train.keep_every", "train.max_bad_steps", "train.profile_steps",
        "draft.init_from", "train.probe", "train.memory_margin",
    },
    # by the order of sums; a step's sequences are compared on their own
    "same data and draws, but no longer equal bit for bit": {
        "cod.num_segments", "cod.boundaries", "train.segment_mode", "train.loss_chunk_rows",
        "train.activation_checkpointing", "train.offload_features", "train.compile", "train.compile_backend",
        "train.compile_mode", "train.batch_size", "train.gradient_accumulation_steps", "train.sharding",
        "target.attn_implementation", "target.chunk_tokens", "target.cache", "target.cache_dtype", "target.device_map",
        "target.shard",
    },
    "see the schedule below": {"train.epochs", "train.max_steps"},
    "accepted, as the target's config and weights came out the same": {"target.path"},
    "accepted, as the draft vocabulary came out the same": {"draft.draft_vocab_size", "draft.vocab_from"},
    "accepted, as the data came out the same": {f"data.{field.name}" for field in fields(Data)} - {"data.max_length"},
}  # fmt: skip
"""Keys that may change when a run resumes, by what that does."""


@dataclass
class Checkpoint:
    """A verified checkpoint to resume from."""

    folder: Path
    step: int
    state: dict[str, Any]
    """Its state.json."""
    notes: list[str]
    """What the user should know: changes of the recipe, checkpoints that were skipped."""

    def keep_segments(self, recipe: Recipe) -> Recipe:
        """The recipe with the checkpoint's number of segments in place of auto: another number rounds sums differently."""
        if recipe.cod.num_segments != "auto":
            return recipe
        return replace(recipe, cod=replace(recipe.cod, num_segments=self.state["recipe"]["cod"]["num_segments"]))

    def keep_drafter(self, recipe: Recipe) -> Recipe:
        """The recipe with this checkpoint in place of the drafter that the run took its weights, shape or vocabulary from.

        All of that is in the checkpoint; the other drafter may be gone by now. A new `draft.vocab_from` stays: it is read,
        and must give the same vocabulary.
        """
        draft, old, folder = recipe.draft, self.state["recipe"]["draft"], str(self.folder)
        if draft.init_from or old["init_from"]:
            draft = replace(draft, init_from=folder)
        if draft.vocab_from and draft.vocab_from == old["vocab_from"]:
            draft = replace(draft, vocab_from=folder)
        return replace(recipe, draft=draft)


def open_resume(recipe: Recipe, given: str) -> Checkpoint | str:
    """The checkpoint to resume from, or what to print because the run has finished. Changes nothing.

    Args:
        recipe: the new recipe. given: "" for the newest checkpoint in output.dir, or a checkpoint's folder.

    Raises:
        ValueError: there is nothing to resume from, it is damaged, or the recipe differs where it must not.
        OSError: a folder cannot be read.
    """
    output, chosen = Path(recipe.output.dir), Path(given).expanduser()
    is_named = given != "" and chosen.resolve() != output.resolve()
    marker, complete, notes = read_marker(output), list_checkpoints(output), []
    if not marker:
        if not is_named and not complete:
            raise ValueError(f"--resume: output.dir {output} holds no run: start one without --resume")
        notes.append(f"{output / MARKER} is missing or broken, and is rewritten")
    if marker.get("state") == "finished" and not is_named:
        drafter = output / marker["drafter"]
        if (drafter / "model.safetensors").is_file():
            text = f"{output} holds a finished run: nothing to do\n{describe_summary(marker, output)}"
            if complete:
                text += f"\nto train for more steps than {marker['steps']}: --resume {complete[0]}"
            return text
        notes.append(f"the run had finished, but {drafter} is gone")
    if is_named:
        folder = _named(chosen, output, complete)
    else:
        newest = step_of(complete[0]) if complete else -1
        later = [path for path in sorted(output.iterdir()) if step_of(path) > newest]
        notes += [f"{path} has no {MANIFEST}, so it is not a complete checkpoint: skipped" for path in later]
        if not complete:
            raise ValueError(
                f"--resume: output.dir {output} holds a run without a complete checkpoint"
                + "".join(f" ({note})" for note in notes)
                + ": remove it and start over (train.save_steps makes checkpoints)"
            )
        folder = complete[0]
    try:
        verify_checkpoint(folder)
    except DamagedCheckpoint as error:
        before = [path for path in complete if step_of(path) < step_of(folder)]
        raise DamagedCheckpoint(f"{error}: {folder.name} is damaged; {_first_sound(before)}") from None
    state = json.loads((folder / "state.json").read_bytes())
    notes += compare_recipes(state["recipe"], asdict(recipe), folder.name)
    return Checkpoint(folder, state["step"], state, notes)


def _named(folder: Path, output: Path, complete: list[Path]) -> Path:
    """The folder of `--resume FOLDER`, in the output folder."""
    if not folder.is_dir() or step_of(folder) < 0:
        names = ", ".join(map(str, complete)) or "none"
        raise ValueError(f"--resume {folder}: give a folder named checkpoint-<step>; there are: {names}")
    if folder.resolve() != (output / folder.name).resolve():  # either may be a link, to a bigger disk
        raise ValueError(
            f"--resume {folder} is not in output.dir {output}: set output.dir={folder.parent}, or move the folder there"
        )
    return output / folder.name


def _first_sound(checkpoints: list[Path]) -> str:
    for path in checkpoints:
        try:
            verify_checkpoint(path)
        except ValueError:
            continue
        return f"the one before it is sound: resume with --resume {path}"
    return "no sound one is left before it: start over in a new folder"


def compare_recipes(old: dict[str, Any], new: dict[str, Any], name: str) -> list[str]:
    """A line for every setting that differs; ValueError, naming all of them, for those that must not."""
    lines, refused = [], []
    for section, values in new.items():
        for leaf, value in values.items():
            key = f"{section}.{leaf}"
            before = old.get(section, {}).get(leaf, value)  # a setting that the checkpoint's version did not have
            change = f"{key} {json.dumps(before)} -> {json.dumps(value)}"
            effect = next((effect for effect, keys in EFFECTS.items() if key in keys), None)
            if key == "cod.num_segments" and value == "auto":
                lines.append(f"{key} auto stays {before}")
            elif before != value and effect:
                lines.append(f"{change}: {effect}")
            elif before != value:
                refused.append(change)
    if refused:
        raise ValueError(
            f"--resume: {name} was trained with other settings: {', '.join(refused)}: give the old ones, or start a new"
            " run in another output.dir"
        )
    return lines


def compare_state(state: dict[str, Any], must_match: dict[str, Any], num_steps: int, name: str) -> None:
    """ValueError unless data, draft vocabulary and target are the checkpoint's, and its step is one of the run's."""
    for what, old in state["must_match"].items():
        if old != must_match[what]:
            was, now = (
                f"{v[0]} ({v[1][:12]})" if isinstance(v, list) else str(v)[:12] for v in (old, must_match[what])
            )
            raise ValueError(
                f"--resume: {what}: {was} in {name}, {now} now: give the same data, target and number of processes, or"
                " start a new run in another output.dir"
            )
    if num_steps < state["step"]:
        raise ValueError(
            f"--resume: {name} is after the {num_steps} steps that the recipe asks for: raise train.max_steps or"
            " train.epochs, or resume from an earlier one"
        )


def compare_surroundings(state: dict[str, Any], num_steps: int, rate: float, world_size: int) -> list[str]:
    """A line for each of schedule, processes and versions that is no longer the checkpoint's. `rate`: the next step's."""
    notes, old = [], state["learning_rates"][0]
    if num_steps != state["num_steps"]:
        change = f"steps {state['num_steps']} -> {num_steps}: at step {state['step']} the learning rate"
        jump = (
            f"jumps from {old:.3e} to {rate:.3e}, as the schedule is now that of {num_steps} steps: the result is not that"
            " of a run which had this many from its start"
        )
        notes.append(f"{change} stays {rate:.3e}" if old == rate else f"{change} {jump}")
    if world_size != state["world_size"]:
        change = f"processes {state['world_size']} -> {world_size}"
        notes.append(f"{change}: same data and draws, but no longer equal bit for bit")
    for name, version in versions().items():
        if (was := state["versions"].get(name)) != version:
            notes.append(f"{name} {was} -> {version}: perhaps no longer equal bit for bit")
    return notes
