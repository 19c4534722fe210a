"""Where a run goes on: the checkpoint, whether it is whole, and what may differ between its recipe and the new one."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peagle_train.errors import DamagedCheckpoint
from peagle_train.recipe import Recipe
from peagle_train.training.checkpoint import MARKER, read_marker
from peagle_train.training.checkpoint_files import MANIFEST, list_checkpoints, step_of, verify_checkpoint
from peagle_train.training.metrics import describe_summary

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
