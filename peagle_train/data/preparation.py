"""Preparation: a recipe's documents tokenized once, by all cores, into files that training maps into memory.

Documents go into shards in the order in which they are read, so the files are the same for any number of workers. A
shard is written whole, and behind it a record of where reading stood: started again after a kill at any moment, shards
with a record are kept (their sums are checked, and that the sources still begin with what they hold), and the rest is
made, to the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator
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
from peagle_train.data.readers import RawRow, clip
from peagle_train.data.shard_writer import Encoded, ShardWriter, write_json, write_tensors
from peagle_train.data.training_data import Say, TrainingData, assemble, find_all, make_encoder
from peagle_train.durable import PARTIAL
from peagle_train.locks import alone_in
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
    found = find_all(recipe.data)
    begun = {"settings": settings, "shard_tokens": shard_tokens, "files": _listing(found)}
    if (folder / INDEX).exists():
        _compare(folder, begun)
        unseen = [file.name for files in found.values() for file in files.files if file.format in ("saved", "hub")]
        but = f", but that of {', '.join(map(clip, unseen))} was not looked at" if unseen else ""
        say(f"{folder} is finished, and the sources have the names and sizes that it was made of{but}: checking it")
        return open_folder(folder, settings, recipe.data.max_bad_rows)
    with alone_in(folder, "preparing"):
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


def _begin(folder: Path, begun: dict[str, Any]) -> None:
    """Make the folder this preparation's, or check that it is; leftovers of a kill are removed."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()
    if not (folder / BEGUN).exists():
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no preparation; give another folder")
        write_json(folder / BEGUN, begun)
        return
    _compare(folder, begun)


def _compare(folder: Path, begun: dict[str, Any]) -> None:
    """ValueError unless the folder was begun so."""
    there = _read_begun(folder)
    there = {**there["settings"], "--shard-tokens": there["shard_tokens"], "files of the sources": there["files"]}
    flat = {**begun["settings"], "--shard-tokens": begun["shard_tokens"], "files of the sources": begun["files"]}
    difference = first_difference(there, json.loads(json.dumps(flat)))
    if difference is not None:
        raise ValueError(f"--out {folder} {difference}: change that, give another folder, or remove this one")


def _read_begun(folder: Path) -> dict[str, Any]:
    """What the preparation in the folder was begun with; ValueError where that cannot be told."""
    why = "is not as it was written"
    try:
        there = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
        if (
            isinstance(there, dict)
            and isinstance(there.get("settings"), dict)
            and {"shard_tokens", "files"} <= there.keys()
        ):
            return there
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"--out {folder}: {folder / BEGUN} {why}: give another folder, or remove this one")


def _listing(found: dict[str, FoundFiles]) -> str:
    """sha256 of the names and sizes of all files."""
    names = {role: [(file.name, file.format, file.size) for file in files.files] for role, files in found.items()}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
