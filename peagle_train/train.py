"""From a recipe to a finished run: what happens once, before and after the loop, and the arithmetic that is printed."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train.build import always_drafted, choose_mask_token, load_tokenizer, make_draft
from peagle_train.cached_target import CachedTarget
from peagle_train.checkpoint import check_output
from peagle_train.data import PackReport
from peagle_train.distributed import check_launch
from peagle_train.recipe import Recipe
from peagle_train.resume import Checkpoint, open_resume
from peagle_train.run_checkpoint import restore
from peagle_train.summary import describe_summary
from peagle_train.target import FrozenTarget
from peagle_train.trainer import Trainer
from peagle_train.training_data import load_training_data
from peagle_train.vocab import choose_most_frequent, coverage
from peagle_train.vocab_from import read_draft_vocab

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str | None = None) -> str:
    """Run a recipe; returns the lines that say where the drafter is and how good it is.

    Args:
        recipe: the settings. resume: None for a new run, else as in `open_resume`.

    Raises:
        ValueError: for a user's mistake, before any training.
    """
    checkpoint: Checkpoint | None = None
    if resume is None:
        check_output(Path(recipe.output.dir))
    else:
        found = open_resume(recipe, resume)
        if isinstance(found, str):
            return found if os.environ.get("RANK", "0") == "0" else ""
        checkpoint = found
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision)
    check_launch(accelerator.num_processes)
    say = print if accelerator.is_main_process else (lambda *_: None)

    load = CachedTarget.opener(recipe.target) if recipe.target.cache else FrozenTarget.load
    target = load(
        recipe.target.path,
        dtype=recipe.target.dtype,
        device=accelerator.device,
        layer_ids=recipe.target.layer_ids,
        chunk_tokens=recipe.target.chunk_tokens,
        attn_implementation=recipe.target.attn_implementation,
        trust_remote_code=recipe.target.trust_remote_code,
    )
    if recipe.target.check:
        target.check()
    tokenizer = load_tokenizer(recipe)
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)

    data = load_training_data(recipe, tokenizer, target.vocab_size, mask_token_id, say)
    if isinstance(target, CachedTarget):
        data = target.attach(data)

    always = always_drafted(tokenizer, target, mask_token_id)
    if recipe.draft.vocab_from:
        draft_ids = read_draft_vocab(recipe.draft, target, tokenizer, always)
    else:
        draft_ids = choose_most_frequent(data.counts_V, recipe.draft.draft_vocab_size or target.vocab_size, always)
    share = coverage(draft_ids, data.counts_V)
    say(f"draft vocabulary: {draft_ids.numel()} of {target.vocab_size} tokens, {share:.2%} of the supervised ones")
    shape = replace(recipe, draft=replace(recipe.draft, draft_vocab_size=draft_ids.numel()))
    draft = make_draft(shape, target, mask_token_id, draft_ids)

    trainer = Trainer(recipe, accelerator, target, draft, data.train_rows, data.eval_rows)
    say(arithmetic(trainer, data.report))
    for note in restore(trainer, checkpoint) if checkpoint else []:
        say(f"resume: {note}")
    summary = trainer.run()
    accelerator.end_training()
    return describe_summary(summary, Path(recipe.output.dir)) if accelerator.is_main_process else ""


def arithmetic(trainer: Trainer, report: PackReport) -> str:
    """The run's sizes, derived from the recipe and the data."""
    collator, recipe = trainer.collator, trainer.recipe
    sample = min(8, len(trainer.train_rows))
    drawn = collator([trainer.train_rows[0, i] for i in range(sample)])["depth"]
    elements = float((drawn >= 0).sum()) / sample
    slots = collator.capacity * collator.num_segments
    parameters = list(trainer.draft.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trained
    rows_per_step = trainer.sampler.global_batch_size
    return "\n".join(
        [
            f"rows: {report.rows} of {recipe.data.max_length} tokens, {report.fill:.1%} filled",
            f"supervised: {report.supervised / max(1, report.tokens):.1%} of the tokens",
            f"elements: {elements:.0f} a row on average of {slots} slots ({1 - elements / slots:.1%} padding)",
            f"segments: {collator.num_segments} of at most {collator.capacity} elements ({collator.boundaries},"
            f" {recipe.train.segment_mode if collator.num_segments > 1 else 'flat'})",
            f"steps: {trainer.num_steps} of {rows_per_step} rows ({trainer.accelerator.num_processes} processes x"
            f" {recipe.train.batch_size} x {recipe.train.gradient_accumulation_steps}), {trainer.sampler.steps_per_epoch}"
            " an epoch",
            f"parameters: {trained:,} trained, {frozen:,} frozen ({recipe.train.dtype}, autocast"
            f" {recipe.train.mixed_precision}); target in {str(trainer.runner.head_rows.dtype)[6:]}, layers"
            f" {trainer.target.layer_ids}, on {trainer.device} with {torch.get_num_threads()} threads",
        ]
    )
