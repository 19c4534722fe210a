"""From a recipe to a finished run: what happens once, before and after the loop, and the arithmetic that is printed."""

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from peagle_train import distributed
from peagle_train.config import Recipe, with_segments
from peagle_train.core.attention import uses_flex
from peagle_train.core.draft import PEagleDraft
from peagle_train.data.training_data import encoder_of, load_training_data
from peagle_train.data.vocab import choose_most_frequent
from peagle_train.memory import memory_explained, resolve_segments, sizes_of, this_device
from peagle_train.serving.drafter_io import DrafterFiles, check_finite
from peagle_train.serving.start import always_drafted, copy_start, make_draft, read_start
from peagle_train.target_model.cache import StoredTarget
from peagle_train.target_model.frozen import FrozenTarget, TargetBase
from peagle_train.target_model.server import ServedTarget
from peagle_train.training.checkpoint import check_output, describe_summary, open_resume
from peagle_train.training.metrics import check_tracker
from peagle_train.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str | None = None) -> str:
    """Run a recipe; returns lines on where the drafter is and how good it is. `resume`: None for a new run, else as in
    `open_resume`. ValueError: for a user's mistake, before any training.
    """
    with memory_explained(recipe, lambda: "out of memory before the first step"):
        return _train(recipe, resume)


def _train(recipe: Recipe, resume: str | None) -> str:
    checkpoint, output = None, Path(recipe.output.dir)
    if resume is None:
        check_output(output)
    else:
        found = open_resume(recipe, resume)
        if isinstance(found, str):
            return found if os.environ.get("RANK", "0") == "0" else ""
        checkpoint = found
        if recipe.cod.num_segments == "auto":  # another number rounds sums differently
            recipe = with_segments(recipe, found.state["recipe"]["cod"]["num_segments"])
    if log_with := recipe.train.log_with:
        check_tracker(log_with)
    project_dir, precision = recipe.output.dir if log_with else None, recipe.train.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_dir=project_dir)
    distributed.check_device(accelerator.device)
    distributed.check_launch(accelerator.num_processes)
    distributed.check_sharding(recipe.train.sharding)
    if uses_flex(accelerator.device) and recipe.train.mixed_precision == "no":
        logger.warning("train.mixed_precision is no: on CUDA attention is an order of magnitude slower than in bf16")
    say = print if accelerator.is_main_process else (lambda *_: None)

    target = load_target(recipe, accelerator)
    begun = recipe
    if checkpoint and recipe.draft.init_from:  # which may be gone, or another by now
        begun = replace(recipe, draft=replace(recipe.draft, init_from=str(checkpoint.folder)))
    start, shaped = read_start(begun, target)
    distributed.wait_for_all()  # so that all ranks find the mistakes that all of them make at the same time
    encoder = encoder_of(shaped, target.vocab_size)

    data = load_training_data(encoder, say)
    target.reach = shaped.draft.reach
    target.check_rows(data)

    draft = _draft(shaped, target, encoder.tokenizer, encoder.mask_token_id, data.counts_V, start, say)
    if start and checkpoint is None:
        copy_start(start, draft, target, say)
    check_finite(draft.state_dict(), "the new drafter's")  # those of the target are its own, too

    S, line = resolve_segments(sizes_of(recipe, target, draft.config, this_device(accelerator.device)))
    recipe = with_segments(recipe, S)
    say(line)
    trainer = Trainer(recipe, accelerator, target, draft, data)
    say(arithmetic(trainer))
    if checkpoint:
        trainer.restore(checkpoint)
    summary = trainer.run()
    accelerator.end_training()
    return describe_summary(summary, output) if accelerator.is_main_process else ""


def load_target(recipe: Recipe, accelerator: Accelerator) -> TargetBase:
    """The recipe's target, checked."""
    settings, device = recipe.target, accelerator.device
    if settings.cache:
        return StoredTarget(settings, device)
    if settings.server:
        return ServedTarget(settings, device, recipe.data.max_length)
    sharded = settings.shard and accelerator.num_processes > 1
    if sharded:
        distributed.world_mesh(device.type)
    # A sharded target is whole on the host while it is loaded: let that be one at a time.
    with distributed.one_at_a_time() if sharded else nullcontext():
        target = FrozenTarget.from_recipe(settings, device, sharded)
    if settings.check:
        target.check()
    return target


def _draft(  # type: ignore[no-untyped-def]
    recipe: Recipe, target: TargetBase, tokenizer, mask_token_id: int, counts_V: Tensor, start: DrafterFiles | None, say
) -> PEagleDraft:
    """A new drafter, of another one's shape if it starts from one; its vocabulary by frequency, or that one's."""
    always = always_drafted(tokenizer, target, mask_token_id, recipe.data)
    if start:
        draft_ids = start.draft_token_ids
    else:
        draft_ids = choose_most_frequent(counts_V, recipe.draft.draft_vocab_size or target.vocab_size, always)
    share = int(counts_V[draft_ids].sum()) / int(counts_V.sum())
    say(f"draft vocabulary: {draft_ids.numel()} of {target.vocab_size} tokens, {share:.2%} of the supervised ones")
    sized = replace(recipe, draft=replace(recipe.draft, draft_vocab_size=draft_ids.numel()))
    return make_draft(sized, target, mask_token_id, draft_ids, start.config if start else None)


def arithmetic(trainer: Trainer) -> str:
    """The run's sizes, derived from the recipe and the data."""
    collator, train = trainer.collator, trainer.recipe.train
    parameters = list(trainer.draft.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    processes = trainer.accelerator.num_processes
    settings, block = trainer.recipe.target, trainer.sampler.block_steps
    once = f"; features once for {settings.reuse} passes, {block} steps at a time" if settings.reuse > 1 else ""
    mode = train.segment_mode if collator.num_segments > 1 else "flat"
    return f"""\
segments: {collator.num_segments} of at most {collator.capacity} elements ({collator.boundaries}, {mode})
steps: {trainer.num_steps} of {trainer.sampler.global_batch_size} sequences ({processes} processes x {train.batch_size} x \
{train.gradient_accumulation_steps}), {trainer.sampler.steps_per_epoch} an epoch{once}
parameters: {trained:,} trained, {frozen:,} frozen ({train.dtype}, autocast {train.mixed_precision}); target in \
{str(trainer.runner.head_rows.dtype)[6:]}, layers {trainer.target.layer_ids}, on {trainer.device} with \
{torch.get_num_threads()} threads"""
