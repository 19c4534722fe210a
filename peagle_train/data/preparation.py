"""Preparation: a recipe's documents tokenized once, by all cores, into files that training maps into memory.

Documents go into shards in the order in which they are read, so the files are the same for any number of workers. A
shard is written whole, and behind it a record of where reading stood: started again after a kill at any moment, shards
with a record are kept (their sums are checked, and that the sources still begin with what they hold), and the rest is
made, to the same bytes.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peagle_train.data.chat_template import check_template
from peagle_train.data.document_table import DocumentTable
from peagle_train.data.encoder_pool import encoded_by_workers
from peagle_train.data.files import FoundFiles
from peagle_train.data.prepared import (
    BEGUN,
    HELD_OUT,
    INDEX,
    TRAIN,
    file_sum,
    first_difference,
    index_sum,
    open_folder,
    settings_of,
)
from peagle_train.data.readers import RawRow
from peagle_train.data.shard_writer import Encoded, ShardWriter, write_json, write_tensors
from peagle_train.data.training_data import Say, TrainingData, assemble, find_all, make_encoder
from peagle_train.durable import PARTIAL
from peagle_train.recipe import Recipe

SHARD_TOKENS = 16 * 2**20
"""A shard is closed when it holds so many: 80 MB."""


def prepare(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None,
    *,
    num_workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    say: Say = print,
) -> TrainingData:
    """Make the folder that `data.prepared` may name, or finish one that was begun; returns what training will read.

    Args:
        tokenizer, vocab_size, mask_token_id: see `load_training_data`; workers load the recipe's tokenizer themselves.
        num_workers: processes that tokenize; 1: this one.

    Raises:
        ValueError: one line, for a user's mistake, for a folder of something else, and for sources that have changed.
    """
    check_template(recipe.data.chat_template)  # before the folder is begun with it
    settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
    if (folder / INDEX).exists():
        say(f"{folder} is finished: checking it")
        return open_folder(folder, settings, recipe.data.max_bad_rows)
    found = find_all(recipe.data)
    begun = {"settings": settings, "shard_tokens": shard_tokens, "files": _listing(found)}
    with _alone_in(folder):
        _begin(folder, begun)
        return _fill(recipe, folder, tokenizer, vocab_size, mask_token_id, num_workers, found, begun, say)


def _fill(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None,
    num_workers: int,
    found: dict[str, FoundFiles],
    begun: dict[str, Any],
    say: Say,
) -> TrainingData:
    """Shards, then rows, then the index."""

    def encoded(rows: Iterator[list[RawRow]]) -> Encoded:
        if num_workers == 1:
            encoder = make_encoder(recipe, tokenizer, vocab_size, mask_token_id)
            return ((raws, encoder(raws)) for raws in rows)
        return encoded_by_workers(rows, num_workers, (recipe, vocab_size, mask_token_id))

    shards, reports = {}, {}
    for role, found_files in found.items():
        writer = ShardWriter(folder, role, found_files, recipe, begun["shard_tokens"], say)
        shards[role] = writer.run(encoded)
        reports[role] = writer.intake.report
    say("packing")
    made = assemble(recipe.data, {role: DocumentTable.open(paths) for role, paths in shards.items()}, vocab_size)
    made = replace(made, source_reports=reports)
    write_tensors(folder / TRAIN, {**made.train_rows.layout(), "counts_V": made.counts_V})
    write_tensors(folder / HELD_OUT, made.eval_rows.layout())
    files = [path.name for paths in shards.values() for path in paths] + [TRAIN, HELD_OUT]
    index = {
        "settings": begun["settings"],
        "shards": {role: [path.name for path in paths] for role, paths in shards.items()},
        "files": {name: file_sum(folder / name) for name in files},
        "source_reports": {role: asdict(report) for role, report in reports.items()},
        "report": asdict(made.report),
        "eval_report": asdict(made.eval_report),
        "in_both": made.in_both,
    }
    index = json.loads(json.dumps(index))
    write_json(folder / INDEX, {**index, "sha256": index_sum(index)})
    return made


def prepare_recipe(
    recipe: Recipe, folder: Path, *, num_workers: int = 1, shard_tokens: int = SHARD_TOKENS, say: Say = print
) -> TrainingData:
    """`prepare` with the recipe's own tokenizer, without loading its target."""
    from transformers import AutoConfig

    from peagle_train.training.build import choose_mask_token, load_tokenizer

    tokenizer = load_tokenizer(recipe)
    try:
        config = AutoConfig.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        ).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"target.path {recipe.target.path} has no config that can be read: {reason}") from None
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, config.vocab_size)
    return prepare(
        recipe,
        folder,
        tokenizer,
        config.vocab_size,
        mask_token_id,
        num_workers=num_workers,
        shard_tokens=shard_tokens,
        say=say,
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and let no other process prepare in it meanwhile. A kill lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"--out {folder}: another process is preparing there; wait, or give another folder") from None
    finally:
        os.close(handle)


def _begin(folder: Path, begun: dict[str, Any]) -> None:
    """Make the folder this preparation's, or check that it is; leftovers of a kill are removed."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()
    if not (folder / BEGUN).exists():
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no preparation; give another folder")
        write_json(folder / BEGUN, begun)
        return
    there = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
    flat = {**begun["settings"], "--shard-tokens": begun["shard_tokens"], "files of the sources": begun["files"]}
    flat_there = {**there["settings"], "--shard-tokens": there["shard_tokens"], "files of the sources": there["files"]}
    difference = first_difference(flat_there, json.loads(json.dumps(flat)))
    if difference is not None:
        raise ValueError(f"--out {folder} {difference}: change that, give another folder, or remove this one")


def _listing(found: dict[str, FoundFiles]) -> str:
    """sha256 of the names and sizes of all files."""
    names = {role: [(file.name, file.format, file.size) for file in files.files] for role, files in found.items()}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
