"""From a recipe to a finished run: what happens once, before and after the loop, and the arithmetic that is printed."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from peagle_train import peers
from peagle_train.build import always_drafted, choose_mask_token, load_tokenizer, make_draft
from peagle_train.checkpoint import check_output
from peagle_train.data import PackedRows, PackReport, pack_documents, split_train_eval
from peagle_train.distributed import check_launch
from peagle_train.recipe import Recipe
from peagle_train.sharded import check_sharding, world_mesh
from peagle_train.sources import Document, load_documents
from peagle_train.summary import describe_summary
from peagle_train.target import FrozenTarget
from peagle_train.trainer import Trainer
from peagle_train.vocab import choose_draft_vocab, count_supervised, coverage

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> str:
    """Run a recipe; returns the lines that say where the drafter is and how good it is.

    Raises:
        ValueError: for a user's mistake, before any training.
    """
    check_output(Path(recipe.output.dir))
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision)
    check_launch(accelerator.num_processes)
    peers.connect()
    check_sharding(
        recipe.train.sharding, accelerator.distributed_type
    )  # before the target is loaded: mistakes come first
    say = print if accelerator.is_main_process else (lambda *_: None)

    target = load_target(recipe, accelerator)
    if recipe.target.check:
        target.check()
    tokenizer = load_tokenizer(recipe)
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)

    train_documents, eval_documents = _documents(recipe, tokenizer, target, mask_token_id, say)
    train_rows, report = pack_documents(train_documents, recipe.data.max_length, recipe.data.pack)
    say(f"train: {report.describe()}")
    eval_rows = PackedRows([], [])
    if eval_documents:
        eval_rows, eval_report = pack_documents(eval_documents, recipe.data.max_length, recipe.data.pack)
        used = eval_rows.limit(recipe.data.max_eval_rows)
        say(f"held out: {eval_report.describe()}" + (f"; {len(used)} rows used" if len(used) < len(eval_rows) else ""))
        eval_rows = used
    if report.supervised == 0:
        raise ValueError("the data has nothing supervised: no document has a token with loss_mask 1 behind its first")

    draft_size = recipe.draft.draft_vocab_size or target.vocab_size
    always = always_drafted(tokenizer, target, mask_token_id)
    draft_ids = choose_draft_vocab(train_documents, target.vocab_size, draft_size, always)
    share = coverage(draft_ids, count_supervised(train_documents, target.vocab_size))
    say(f"draft vocabulary: {draft_size} of {target.vocab_size} tokens, {share:.2%} of the supervised ones")
    draft = make_draft(recipe, target, mask_token_id, draft_ids)

    trainer = Trainer(recipe, accelerator, target, draft, train_rows, eval_rows)
    say(arithmetic(trainer, report))
    summary = trainer.run()
    accelerator.end_training()
    return describe_summary(summary, Path(recipe.output.dir)) if accelerator.is_main_process else ""


def load_target(recipe: Recipe, accelerator: Accelerator) -> FrozenTarget:
    """The recipe's target, where and how it says."""
    settings, several = recipe.target, accelerator.num_processes > 1
    if settings.device_map and several:
        raise ValueError(
            f"target.device_map is {settings.device_map} and there are {accelerator.num_processes} processes: it spreads"
            " the target over the devices that one process sees; start a single one, or use target.shard"
        )
    if settings.shard and not several:
        logger.warning("target.shard is true, but there is a single process: the target stays whole")
    sharded = settings.shard and several
    if sharded:
        world_mesh(accelerator.device.type)
    # A sharded target is whole on the host while it is loaded: let that be one at a time.
    with peers.one_at_a_time() if sharded else nullcontext():
        return FrozenTarget.load(
            settings.path,
            dtype=settings.dtype,
            device=accelerator.device,
            layer_ids=settings.layer_ids,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            device_map=settings.device_map,
            shard=sharded,
        )


def _documents(recipe, tokenizer, target, mask_token_id, say) -> tuple[list[Document], list[Document]]:  # type: ignore[no-untyped-def]
    def load(sources: list[str]) -> list[Document]:
        documents, report = load_documents(
            sources,
            tokenizer=tokenizer,
            vocab_size=target.vocab_size,
            mask_token_id=mask_token_id,
            extensions=recipe.data.extensions,
            exclude=recipe.data.exclude,
            max_documents=recipe.data.max_documents,
        )
        say(f"data: {report.describe()}")
        return documents

    if not recipe.data.eval_sources:
        train_documents, eval_documents = split_train_eval(load(recipe.data.sources), recipe.data.eval_fraction)
        if not train_documents:
            raise ValueError("data.eval_fraction leaves no document to train on: lower it, or give more data")
        return train_documents, eval_documents
    eval_documents = load(recipe.data.eval_sources)
    held_out = {document.key for document in eval_documents}
    everything = load(recipe.data.sources)
    kept = [document for document in everything if document.key not in held_out]
    if len(kept) < len(everything):
        say(
            f"data: {len(everything) - len(kept)} documents of data.sources are in data.eval_sources too: not trained on"
        )
    if not kept:
        raise ValueError("every document of data.sources is in data.eval_sources too: nothing is left to train on")
    return kept, eval_documents


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
