"""From a recipe to a whole folder of features: what tools/cache_features.py does."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from peagle_train.data.packing import PackedRows
from peagle_train.data.training_data import load_training_data
from peagle_train.locks import alone_in
from peagle_train.recipe import Recipe
from peagle_train.schema import as_override
from peagle_train.target.cache_writer import CacheWriter, Compute, PlannedShard, Row, make_index, plan_shards
from peagle_train.target.feature_cache import fingerprint
from peagle_train.target.frozen import FrozenTarget
from peagle_train.target.speculators_files import DOCUMENTS, SpeculatorsFiles
from peagle_train.training.build import choose_mask_token, load_tokenizer, make_collator
from peagle_train.training.distributed import check_device, check_device_map, check_launch
from peagle_train.training.peers import from_all


class Rows:
    """The rows of several sets, one after the other."""

    def __init__(self, *parts: PackedRows) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Row:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("behind the last row")


def write_cache(recipe: Recipe, out: str | None, shard_mib: int = 512, speculators: str | None = None) -> str:
    """Fill `out` and return the lines that say how to train from it, on the main process.

    Args:
        shard_mib: size of a file. speculators: take what lies in this folder, see `SpeculatorsFiles`, instead of
            running the target over the recipe's rows.

    Raises:
        ValueError: for a user's mistake.
    """
    if out is None:
        raise ValueError("no folder given: --out DIR (or target.cache in the recipe)")
    out = os.path.expanduser(out)  # of --out=~/x the shell leaves it to us
    if shard_mib < 1:
        raise ValueError(f"--shard-mib is {shard_mib}; it must be at least 1")
    accelerator = Accelerator()
    check_device(accelerator.device)
    check_launch(accelerator.num_processes)
    say: Any = print if accelerator.is_main_process else (lambda *_: None)
    target = load_target(recipe, accelerator)
    dtype = target.head_weight().dtype
    stored = dtype if recipe.target.cache_dtype == "auto" else getattr(torch, recipe.target.cache_dtype)

    files: SpeculatorsFiles | None = None
    if speculators is None:
        tokenizer = load_tokenizer(recipe)
        mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)
        data = load_training_data(recipe, tokenizer, target.vocab_size, mask_token_id, say)
        rows: Any = Rows(data.train_rows, data.eval_rows)
        compute = online(recipe, target)
    else:
        rows = files = SpeculatorsFiles(os.path.expanduser(speculators), target, recipe.data.max_length)
        compute = files.compute

    per_token = 4 * target.hidden_size * stored.itemsize
    shards = plan_shards(rows, max(1, shard_mib * 2**20 // per_token))
    index = make_index(
        shards,
        target=fingerprint(recipe.target.path),
        layer_ids=target.layer_ids,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        eos_token_ids=target.eos_token_ids(),
        dtype=str(stored)[6:],
        computed_in=str(dtype)[6:],
        max_length=recipe.data.max_length,
        # What speculators left was computed by neither.
        chunk_tokens=target.chunk_tokens if files is None else None,
        attn_implementation=target.attn_implementation if files is None else None,
        source="recipe" if files is None else "speculators",
    )
    writer = CacheWriter(Path(out), index, shards, accelerator.process_index, accelerator.num_processes)
    with ExitStack() as held:
        fill(writer, target, rows, compute, say, held if accelerator.is_main_process else None)
        if files is not None and accelerator.is_main_process:
            files.write_documents(Path(out))
    accelerator.end_training()
    if not accelerator.is_main_process:
        return ""
    overrides = [as_override("target.cache", out)]
    if files is not None:
        overrides.append(as_override("data.sources", [str(Path(out) / DOCUMENTS)]))
    return f"train from it: python -m peagle_train RECIPE {' '.join(overrides)}\n"


def load_target(recipe: Recipe, accelerator: Accelerator) -> FrozenTarget:
    """The recipe's target, checked, never from a cache."""
    settings = recipe.target
    check_device_map(settings.device_map, accelerator.num_processes)
    if settings.shard:
        raise ValueError(
            "target.shard is true, but here every process gives other rows to a target of its own: set it to false"
            " (target.device_map spreads the target of a single process)"
        )
    target = FrozenTarget.load(
        settings.path,
        dtype=settings.dtype,
        device=accelerator.device,
        layer_ids=settings.layer_ids,
        chunk_tokens=settings.chunk_tokens,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        device_map=settings.device_map,
    )
    if settings.check:
        target.check()
    return target


def online(recipe: Recipe, target: FrozenTarget) -> Compute:
    """A row's features as a training step with one row a batch computes them: the same padding, so the same bits."""
    collator = make_collator(recipe, seed=0)

    def compute(row: Row) -> tuple[Tensor, Tensor]:
        batch = collator([row])
        features, last_hidden = target.features(batch["input_ids"], batch["position_ids"])
        return features[0].cpu(), last_hidden[0].cpu()

    return compute


def fill(
    writer: CacheWriter, target: FrozenTarget, rows: Any, compute: Compute, say: Any, held: ExitStack | None
) -> None:
    """Claim the folder, write head and shards; a failure of one process stops all.

    Args:
        held: of the main process: keeps the folder's lock, for all processes of this run; others have None.
    """
    head = target.head_weight()
    failure = ""
    if held is not None:
        try:
            held.enter_context(alone_in(writer.folder, "writing features"))
            say(f"cache: {writer.claim(2 * head.numel() * head.element_size())}")
            writer.write_head(target.head_weight, target.embedding_rows)
        except ValueError as error:
            failure = str(error)
    stop_together(failure)
    started, done = time.perf_counter(), [0]

    def report(tokens: int) -> None:
        done[0] += tokens
        seconds = time.perf_counter() - started
        say(f"cache: {done[0]} of {_own_tokens(writer)} tokens, {done[0] / seconds:.0f} tokens/s")

    try:
        writer.write_shards(rows.__getitem__, compute, report)
    except ValueError as error:
        failure = str(error)
    stop_together(failure)


def _own_tokens(writer: CacheWriter) -> int:
    own: list[PlannedShard] = list(writer.shards)[writer.rank :: writer.world_size]
    return sum(shard.tokens for shard in own)


def stop_together(failure: str) -> None:
    """ValueError on every process if one of them failed; waits for all, however long the last one still computes."""
    for first in filter(None, from_all(failure)):
        raise ValueError(first)
