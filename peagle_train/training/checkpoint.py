"""A trainer to a checkpoint and back: what is saved, what must be the same when a run goes on, what is undone.

Every rank calls these functions; the main process alone touches files.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from peagle_train.config import Recipe, dump_recipe
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.distributed import from_main, full_moments, full_weights, load_full_moments, load_full_weights
from peagle_train.files import (
    DamagedCheckpoint,
    remove_tree,
    try_removing,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)
from peagle_train.serving.drafter_io import check_finite, save_tensors

if TYPE_CHECKING:
    from peagle_train.training.trainer import Trainer


# ---- checkpoint
# Folders on disk that are either whole or not there: written beside their place, synced, renamed.

logger = logging.getLogger(__name__)

MARKER = "run.json"
"""In the output folder: whose folder it is, and how far the run came."""


def save_drafter(path: Path, config: PEagleDraftConfig, state: dict[str, Tensor], extra: dict[str, str]) -> None:
    """`model.safetensors` and `config.json` as vLLM loads them, and further text files by name."""
    write_folder(path, lambda folder: fill_drafter(folder, config, state, extra))


def fill_drafter(folder: Path, config: PEagleDraftConfig, state: dict[str, Tensor], extra: dict[str, str]) -> None:
    """What `save_drafter` writes, into a folder that is there.

    Raises:
        NonFiniteWeights: a weight is not finite. OSError: it cannot be written.
    """
    check_finite(state, "the drafter's")
    config.dtype = state["fc.weight"].dtype
    config.to_json_file(folder / "config.json")
    save_tensors(folder / "model.safetensors", state)
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")


def check_output(folder: Path) -> None:
    """ValueError if the output folder holds another run or anything else, or cannot be read. Changes nothing."""
    try:
        _check_output(folder)
    except OSError as error:
        raise ValueError(f"output.dir {folder} cannot be read: {error.strerror}; give another folder") from None


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output.dir {folder} is a file; give a folder")
    # A checkpoint is a run too, whatever became of its marker.
    if (folder / MARKER).exists() or any(folder.glob("checkpoint-*/manifest.json")):
        raise ValueError(
            f"output.dir {folder} already holds a run; go on with it (--resume), give another folder, or remove it first"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output.dir {folder} is not empty and holds no run; give another folder")


def read_marker(folder: Path) -> dict[str, Any]:
    """An output folder's `run.json`; {} where it is missing or not what a run writes. ValueError if it cannot be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker if _is_marker(marker) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{folder / MARKER} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_marker(marker: Any) -> bool:
    """Whether it has all that is read from it; else False, or an error of its types."""
    if marker["state"] == "stopped":
        return all(isinstance(marker[key], str) for key in ("signal", "checkpoint")) and isinstance(
            marker["steps"], int
        )
    if marker["state"] != "finished":
        return marker["state"] == "started"
    best, numbers = marker.get("best"), [marker["train_seconds"], marker.get("epochs", 1)]
    if marker["after"]:
        numbers += [marker[when][key] for when in ("before", "after") for key in ("expected_accepted_length", "loss")]
    if best:
        numbers += [best["step"], best["expected_accepted_length"]]
        best.get("folder")
    is_sized = isinstance(marker["drafter"], str) and isinstance(marker["steps"], int)
    return is_sized and all(isinstance(number, int | float) for number in numbers)


def claim_output(folder: Path) -> None:
    """Make the output folder this run's; ValueError if it holds anything."""
    check_output(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, {"state": "started"})
    except OSError as error:
        raise ValueError(f"output.dir {folder} cannot be written: {error.strerror}") from error


def lock_output(folder: Path) -> Any:
    """An open file that keeps other processes out of the folder until it is closed, or this process dies.

    Raises:
        ValueError: another process trains into the folder.
    """
    file = (folder / ".lock").open("w")
    try:
        # POSIX's, not flock: loader processes inherit that one, and would hold it for seconds behind a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output.dir {folder} is in use: another process is training there") from None
    except OSError as error:  # a file system without locks
        logger.warning("output.dir %s cannot be locked (%s): take care that one run writes there", folder, error)
    return file


def check_not_in_use(folder: Path) -> None:
    """ValueError if another process trains into the folder: it must be told so, not to remove it. Changes nothing."""
    try:
        with (folder / ".lock").open() as file:
            # Shared, so that the ranks of one launch do not take each other for another run.
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"output.dir {folder} is in use: another process is training there") from None
    except OSError:  # no folder, no lock, or a file system without locks: `lock_output` says so
        pass


# ---- checkpoint_files
# Checkpoints on disk: which there are, whether they are whole, which to keep.
#
#     checkpoint-<step>/
#         config.json, model.safetensors   the drafter as vLLM loads it, in the dtype that it is trained in
#         optimizer.state                  AdamW's exp_avg, exp_avg_sq and step, by parameter name
#         rng.state                        torch's generators, by rank
#         state.json                       step, position in the data, scheduler, best, fingerprints, versions, recipe
#         recipe.yaml                      the resolved recipe, for people
#         manifest.json                    size and sha256 of all of the above
#
# A folder gets its name when everything in it is on disk, so that what is found is whole unless somebody damaged it;
# no other
# file says which one is the newest. Nothing here is ever unpickled.

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SET_ASIDE = re.compile(r"set-aside-([0-9]+)")
_LEFT_OVER = re.compile(r"\.(checkpoint-[0-9]+|best|final)\.(partial|deleted)")


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints (those with a manifest), the newest step first; their content is not looked at.

    Raises:
        ValueError: the output folder cannot be read.
    """
    try:
        found = {step: path for path in output.iterdir() if (step := step_of(path)) is not None}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"output.dir {output} cannot be read: {error.strerror}") from None
    return [found[step] for step in sorted(found, reverse=True) if _has_manifest(found[step])]


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:  # it may not be looked into: not passed over in silence, `verify_checkpoint` says why
        return True


def write_checkpoint(output: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """`fill` a folder and make it checkpoint-<step> once it is on disk.

    Raises:
        OSError: it could not be written; nothing of it is left, and other checkpoints are as they were.
    """

    def fill_and_list(folder: Path) -> None:
        fill(folder)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_bytes(_dump(_signed({"format": FORMAT, "step": step, "files": files})))

    path = checkpoint_path(output, step)
    write_folder(path, fill_and_list)
    try_removing(output / f"set-aside-{step}", _remove)
    return path


def verify_checkpoint(folder: Path) -> None:
    """DamagedCheckpoint unless every file of the manifest has its size and its sha256."""
    manifest = _read_manifest(folder)
    for name, described in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise DamagedCheckpoint(f"{path} is missing")
            size = path.stat().st_size
            if size != described["size"]:  # told without reading it
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {described['size']}")
            if _describe(path) != described:
                raise DamagedCheckpoint(f"{path} is not what was written (its sha256 differs)")
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    damaged = DamagedCheckpoint(f"{path} is not what was written")
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(manifest, dict) or not {"format", "step", "files"} <= manifest.keys():
        raise damaged
    # Compared byte for byte with what we would have written, so that every edit of it is seen, and not taken for one of
    # the files that it lists.
    if _dump(_signed(manifest)) != content:
        raise damaged
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
    if manifest["step"] != step_of(folder):
        raise DamagedCheckpoint(f"{path} is of step {manifest['step']}, not of the folder's name")
    plain = all(name == Path(name).name and set(d) == {"size", "sha256"} for name, d in manifest["files"].items())
    if not plain or not {"model.safetensors", "optimizer.state", "state.json"} <= set(manifest["files"]):
        raise damaged
    return manifest


def prune(output: Path, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Remove all but the newest `keep_last` checkpoints and those of every `keep_every`-th step; returns whose."""
    removed = []
    for path in [] if keep_last is None else list_checkpoints(output)[: keep_last - 1 : -1]:
        step = step_of(path)
        assert step is not None
        if (keep_every is None or step % keep_every) and try_removing(path, _remove):
            removed.append(step)
    return removed


def set_aside_later(output: Path, step: int) -> list[int]:
    """Rename checkpoints behind `step`, which a run that goes on from there will make again: they must not be found.

    Each is removed when the run has saved that step again, and all of them at its end.
    """
    moved = []
    for path in sorted(output.iterdir()):
        later = step_of(path)
        if later is not None and later > step:
            _remove(output / f"set-aside-{later}")
            os.rename(path, output / f"set-aside-{later}")
            moved.append(later)
    return sorted(moved)


def remove_set_aside(output: Path) -> None:
    for path in output.iterdir():
        if _SET_ASIDE.fullmatch(path.name):
            try_removing(path, _remove)


def clean_up(output: Path) -> None:
    """Remove what a killed run has left half-written or half-removed, and put a replaced folder's old content back."""
    for path in output.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            try_removing(path)
    for name in ("best", "final"):
        old = output / f".{name}.old"
        if os.path.lexists(old) and not os.path.lexists(output / name):
            os.rename(old, output / name)
        else:
            try_removing(old)


def _remove(path: Path) -> None:
    """Remove a folder (or a link to one); killed half-way, what is left has a name that nobody looks for."""
    if path.is_symlink():
        remove_tree(path)
    elif path.is_dir():
        gone = path.with_name(f".{path.name.replace('set-aside', 'checkpoint')}.deleted")
        remove_tree(gone)
        os.rename(path, gone)
        remove_tree(gone)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _signed(manifest: dict[str, Any]) -> dict[str, Any]:
    unsigned = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**unsigned, "sha256": hashlib.sha256(_dump(unsigned)).hexdigest()}


def _dump(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


# ---- run_state
# What a run is made of beside its files, its weights and its optimizer (`sharded.py`): schedule and generators as plain
# tensors and JSON, and back.
#
# `collect_rng` is collective: every rank calls it, the main process writes what it returns.


def load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


# ---- schedule


def schedule_at(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> list[float]:
    """Each parameter group's learning rate in the step behind `step`."""
    factors = scheduler.lr_lambdas  # type: ignore[attr-defined]
    return [base * factor(step) for base, factor in zip(scheduler.base_lrs, factors, strict=True)]


def set_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> None:
    """Put the schedule behind `step` steps, as if it had gone there."""
    rates = schedule_at(scheduler, step)
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, list(rates)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


# ---- generators

# Nothing of a run draws from the global generators; they are kept for what a target's own code may do with them.


def collect_rng(rank: int, world_size: int) -> dict[str, Tensor]:
    """Every rank's global generators, uint8 (Python's int64), as `<cpu | cuda | python>.<rank>`."""
    own = {"cpu": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    all_ranks: list[Any] = [own]
    if world_size > 1:
        all_ranks = [None] * world_size
        dist.all_gather_object(all_ranks, own)
    return {f"{kind}.{r}": state for r, states in enumerate(all_ranks) for kind, state in states.items()}


def set_rng(tensors: Mapping[str, Tensor], rank: int) -> None:
    """This rank's generators, where the checkpoint has them."""
    if f"cpu.{rank}" in tensors:
        torch.set_rng_state(tensors[f"cpu.{rank}"].clone())
    if f"python.{rank}" in tensors:
        version, _, gauss = random.getstate()
        random.setstate((version, tuple(tensors[f"python.{rank}"].tolist()), gauss))
    if f"cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"cuda.{rank}"].clone())


# ---- what must be the same when a run goes on


def versions() -> dict[str, str]:
    import accelerate
    import transformers

    import peagle_train

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "peagle_train": peagle_train.__version__,
    }


def fingerprint(tensor: Tensor) -> str:
    """sha256 of dtype, shape and up to 64 first rows."""
    sample = tensor[:64].detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{tensor.dtype},{tuple(tensor.shape)}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- resume
# Where a run goes on: the checkpoint, whether it is whole, and what may differ between its recipe and the new one.

SAME_NUMBERS = {
    "target.check", "target.trust_remote_code", "output.dir", "train.log_steps", "train.eval_steps",
    "train.save_steps", "train.keep_last", "train.keep_every", "train.max_bad_steps", "train.profile_steps",
    "draft.init_from", "train.probe", "train.memory_margin",
}  # fmt: skip
"""Keys that change no number of the training."""
ROUNDING = {
    "cod.num_segments", "cod.boundaries", "train.segment_mode", "train.loss_chunk_rows", "train.activation_checkpointing",
    "train.offload_features", "train.compile", "train.compile_backend", "train.compile_mode", "train.batch_size",
    "train.gradient_accumulation_steps", "train.sharding", "target.attn_implementation", "target.chunk_tokens",
    "target.cache", "target.cache_dtype", "target.device_map", "target.shard",
}  # fmt: skip
"""Keys that change the order of sums; the rows of a step are compared on their own."""
STEPS = {"train.epochs", "train.max_steps"}
"""Keys that stretch the learning-rate schedule."""
BY_CONTENT = {
    "target.path": "target's config and weights",
    "draft.draft_vocab_size": "draft vocabulary",
    "draft.vocab_from": "draft vocabulary",
}
"""Keys that count by what they lead to, compared by its fingerprint; so do those of the data section (the rows)."""
DATA_THAT_SHAPES = {"data.max_length"}
"""But not these."""


@dataclass
class Checkpoint:
    """A verified checkpoint to go on from."""

    folder: Path
    step: int
    state: dict[str, Any]
    """Its state.json."""
    notes: list[str]
    """What to tell the user: changes of the recipe, other versions, checkpoints that were passed over."""


def open_resume(recipe: Recipe, given: str) -> Checkpoint | str:
    """The checkpoint to go on from, or what to say because the run has finished. Changes nothing.

    Args:
        recipe: the new recipe. given: "" for the newest checkpoint in output.dir, or a checkpoint's folder.

    Raises:
        ValueError: there is nothing to go on from, it is damaged, or the recipe differs where it must not.
    """
    output = Path(recipe.output.dir)
    chosen = Path(given).expanduser() if given else None
    if chosen is not None and chosen.resolve() == output.resolve():
        chosen = None
    marker, notes = _read_marker(output), []
    if not marker:
        if chosen is None and not list_checkpoints(output):
            raise ValueError(f"--resume: output.dir {output} holds no run: start one without --resume")
        notes.append(f"{output / MARKER} is missing or broken, and is written anew")
    if marker.get("state") == "finished" and chosen is None:
        drafter = output / marker.get("drafter", "final")
        if (drafter / "model.safetensors").is_file():
            return _nothing_to_do(recipe, output, marker)
        notes.append(f"the run had finished, but {drafter} is gone")
    folder = _newest(output, notes) if chosen is None else _named(chosen, output)
    try:
        verify_checkpoint(folder)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            f"{error}: {folder.name} is damaged and is not used; {_offer(output, folder)}"
        ) from None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    notes += compare_recipes(state["recipe"], asdict(recipe), folder.name)
    step = step_of(folder)
    assert step is not None and step == state["step"]
    return Checkpoint(folder, step, state, notes)


def keep_segments(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the checkpoint's number of segments in place of auto: other sums are rounded otherwise."""
    if recipe.cod.num_segments != "auto":
        return recipe
    return replace(recipe, cod=replace(recipe.cod, num_segments=checkpoint.state["recipe"]["cod"]["num_segments"]))


def keep_drafter(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with the checkpoint in place of the drafter that a run took its weights, shape or vocabulary from.

    All of that is in the checkpoint; the other drafter may be gone by now. A `draft.vocab_from` that is a new one stays: it
    is read, and must come out the same.
    """
    draft, old = recipe.draft, checkpoint.state["recipe"]["draft"]
    folder = str(checkpoint.folder)
    if draft.init_from or old.get("init_from"):
        draft = replace(draft, init_from=folder)
    if draft.vocab_from and draft.vocab_from == old.get("vocab_from"):
        draft = replace(draft, vocab_from=folder)
    return replace(recipe, draft=draft)


def _read_marker(output: Path) -> dict[str, Any]:
    """run.json, or {} where it is missing or broken: a complete checkpoint is enough to go on."""
    try:
        return read_marker(output)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None


def _nothing_to_do(recipe: Recipe, output: Path, marker: dict[str, Any]) -> str:
    said = f"{output} holds a finished run: nothing to do\n{describe_summary(marker, output)}"
    if _wants_more(recipe, marker):
        newest = next(iter(list_checkpoints(output)), None)
        where = f"--resume {newest}" if newest else "a new run (it has left no checkpoint)"
        said += f"\nto train for more steps, as the recipe has it now: {where}"
    return said


def _wants_more(recipe: Recipe, marker: dict[str, Any]) -> bool:
    """Whether a finished run's recipe now asks for more steps than it had."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps > marker.get("steps", 0)
    if marker.get("max_steps") is not None:
        return True  # it ended there; how many steps the epochs are is not known before the data are
    return recipe.train.epochs > marker.get("epochs", recipe.train.epochs)


def _newest(output: Path, notes: list[str]) -> Path:
    complete = list_checkpoints(output)
    newest_step = step_of(complete[0]) if complete else -1
    assert newest_step is not None
    for path in sorted(output.iterdir()):
        step = step_of(path)
        if step is not None and step > newest_step:
            notes.append(f"{path} has no {MANIFEST}, so it is not a complete checkpoint: passed over")
    if not complete:
        passed = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"--resume: output.dir {output} holds a run without a complete checkpoint{passed}: remove it"
            " and start again (train.save_steps says how often a checkpoint is made)"
        )
    return complete[0]


def _named(folder: Path, output: Path) -> Path:
    if not folder.is_dir() or step_of(folder) is None:
        names = ", ".join(str(path) for path in list_checkpoints(output)) or "none"
        raise ValueError(f"--resume {folder}: give a folder named checkpoint-<step>; there are: {names}")
    if folder.resolve() != (output / folder.name).resolve():  # either may be a link, to a bigger disk
        raise ValueError(
            f"--resume {folder} is not in output.dir {output}: set output.dir={folder.parent}, or move the folder there"
        )
    return output / folder.name


def _offer(output: Path, damaged: Path) -> str:
    """Words that name the newest sound checkpoint before a damaged one."""
    for path in list_checkpoints(output):
        if (step_of(path) or 0) < (step_of(damaged) or 0):
            try:
                verify_checkpoint(path)
            except DamagedCheckpoint:
                continue
            return f"the one before it is sound: go on from there with --resume {path}"
    return "no sound one is left before it: start again in a new folder"


def compare_recipes(old: dict[str, Any], new: dict[str, Any], name: str) -> list[str]:
    """A line for every setting that differs; ValueError, naming all of them, for those that must not."""
    lines, refused = [], []
    for section, values in new.items():
        for leaf, value in values.items():
            key = f"{section}.{leaf}"
            before = old.get(section, {}).get(leaf, value)  # a setting that the checkpoint's version did not have
            if before == value:
                continue
            if key == "cod.num_segments" and value == "auto":
                lines.append(f"{key} auto stays {before}")
                continue
            change = f"{key} {json.dumps(before)} -> {json.dumps(value)}"
            if key in SAME_NUMBERS:
                lines.append(f"{change}: changes no number")
            elif key in ROUNDING:
                lines.append(f"{change}: same rows and draws, but no longer equal bit for bit")
            elif key in STEPS:
                lines.append(f"{change}: see the schedule below")
            elif key in BY_CONTENT or (section == "data" and key not in DATA_THAT_SHAPES):
                lines.append(f"{change}: accepted, as the {BY_CONTENT.get(key, 'rows')} came out the same")
            else:
                refused.append(change)
    if refused:
        raise ValueError(
            f"--resume: {name} was trained with other settings: {', '.join(refused)}: give the old ones, or start a new"
            " run in another output.dir"
        )
    return lines


# ---- run_checkpoint
# A trainer to a checkpoint and back: what is saved, what must be the same when a run goes on, what is undone.
#
# Every rank calls these functions; the main process alone touches files.


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


def read_summary(folder: Path) -> str:
    """Where a finished run's drafter is and how good it is; ValueError if there is no finished run."""
    summary = read_marker(folder)
    if not summary:
        raise ValueError(f"{folder} holds no run: its {MARKER} is missing, or is not what a run writes")
    if summary["state"] != "finished":
        raise ValueError(f"{folder} holds a run that has not finished")
    return describe_summary(summary, folder)


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    if summary["state"] == "stopped":
        where = folder / summary["checkpoint"]
        return (
            f"stopped by {summary['signal']} at step {summary['steps']}, saved as {where}: the same command with --resume"
            " continues from there"
        )
    lines = [f"drafter: {folder / summary['drafter']} ({summary['steps']} steps in {summary['train_seconds']:.0f} s)"]
    before, after, best = summary["before"], summary["after"], summary.get("best")
    if after:
        lines.append(
            f"held-out expected accepted length: {before['expected_accepted_length']:.3f} before,"
            f" {after['expected_accepted_length']:.3f} after training (loss {before['loss']:.3f} -> {after['loss']:.3f})"
        )
    if best and best.get("folder") == "best":
        lines.append(f"the best was at step {best['step']} ({best['expected_accepted_length']:.3f}): {folder / 'best'}")
    return "\n".join(lines)
