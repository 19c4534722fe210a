"""From a recipe to a finished run: what happens once, before and after the loop, and the arithmetic that is printed."""

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train import distributed
from peagle_train.config import Recipe, with_segments
from peagle_train.core.attention import uses_flex
from peagle_train.data.chat import read_template
from peagle_train.data.training_data import encoder_of, load_training_data
from peagle_train.data.vocab import choose_most_frequent
from peagle_train.memory import memory_explained, resolve_segments, sizes_of, this_device
from peagle_train.serving.drafter_io import check_finite
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
    read_template(recipe.data.chat_template)  # a wrong path is told now, not after the target is loaded
    project_dir, precision = recipe.output.dir if log_with else None, recipe.train.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_dir=project_dir)
    distributed.check_device(accelerator.device)
    distributed.check_launch(accelerator.num_processes)
    asked = distributed.check_sharding(recipe.train.sharding) or recipe.target.shard
    if asked and accelerator.num_processes == 1:
        logger.warning("FSDP2 or target.shard was asked for, but there is a single process: nothing is sharded")
    if uses_flex(accelerator.device) and recipe.train.mixed_precision == "no":
        logger.warning("train.mixed_precision is no: on CUDA attention is an order of magnitude slower than in bf16")
    say = print if accelerator.is_main_process else (lambda *_: None)

    target = load_target(recipe, accelerator)
    begun = recipe
    if checkpoint:  # what the drafter is like is in the checkpoint: what it started from may be gone, or another by now
        started_from = checkpoint.state["recipe"]["draft"]["init_from"] and str(checkpoint.folder)
        begun = replace(recipe, draft=replace(recipe.draft, init_from=started_from))
    start, shaped = read_start(begun, target)
    distributed.wait_for_all()  # so that all ranks find the mistakes that all of them make at the same time
    encoder = encoder_of(shaped, target.vocab_size)

    data = load_training_data(encoder, say)
    target.reach = shaped.draft.reach
    target.check_rows(data)

    if start:
        draft_ids = start.draft_token_ids
    else:
        always = always_drafted(encoder.tokenizer, target, encoder.mask_token_id, recipe.data)
        draft_ids = choose_most_frequent(data.counts_V, shaped.draft.draft_vocab_size or target.vocab_size, always)
    share = int(data.counts_V[draft_ids].sum()) / int(data.counts_V.sum())
    say(f"draft vocabulary: {draft_ids.numel()} of {target.vocab_size} tokens, {share:.2%} of the supervised ones")
    draft = make_draft(shaped, target, encoder.mask_token_id, draft_ids, start.config if start else None)
    if start and checkpoint is None:
        copy_start(start, draft, say)
    check_finite(draft.state_dict(), "the new drafter's")  # those of the target are its own, too

    S, line = resolve_segments(sizes_of(recipe, target, draft.config, this_device()))
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


def arithmetic(trainer: Trainer) -> str:
    """The run's sizes, derived from the recipe and the data."""
    collator, sampler, train = trainer.collator, trainer.sampler, trainer.recipe.train
    trained = sum(p.numel() for p in trainer.trained)
    frozen = sum(p.numel() for p in trainer.draft.parameters()) - trained
    mode = train.segment_mode if collator.num_segments > 1 else "flat"
    return f"""\
segments: {collator.num_segments} of at most {collator.capacity} elements ({collator.boundaries}, {mode})
steps: {trainer.num_steps} of {sampler.global_batch_size} sequences ({sampler.world_size} processes x {train.batch_size} x \
{train.gradient_accumulation_steps}), {sampler.steps_per_epoch} an epoch
parameters: {trained:,} trained, {frozen:,} frozen ({train.dtype}, autocast {train.mixed_precision}); target in \
{str(trainer.runner.head_rows.dtype)[6:]}, layers {trainer.target.layer_ids}, on {trainer.device} with \
{torch.get_num_threads()} threads"""
