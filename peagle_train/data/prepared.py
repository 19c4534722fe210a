"""Prepared rows on disk: what is in such a folder, whether it fits a recipe, and reading it without a copy in memory.

begun.json                     what it is made from; the first file that is written
sources-00000.safetensors ...  documents: see `document_table.Shard`; also eval_sources-...
sources-00000.json ...         after each of them: its sum, and where reading stood behind it
train.safetensors              rows: see `PackedRows.layout`, and counts_V
held_out.safetensors           rows
index.json                     the sums of all files and the reports; the last file that is written
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from peagle_train.data.chat import ChatEncoder
from peagle_train.data.document_table import DocumentTable
from peagle_train.data.messages import CHAT_KEYS
from peagle_train.data.packing import PackedRows, PackReport
from peagle_train.data.readers import clip
from peagle_train.data.sources import SourceReport
from peagle_train.data.training_data import TrainingData
from peagle_train.recipe import Recipe

INDEX, BEGUN = "index.json", "begun.json"
TRAIN, HELD_OUT = "train.safetensors", "held_out.safetensors"
FORMAT = 2
"""Raised whenever the same recipe and files give other bytes."""
_DATA_KEYS = (
    "sources extensions exclude eval_sources eval_fraction max_documents max_characters max_length pack"
    " template_kwargs on_rewrite"
).split()
"""Of the recipe's data section, what decides about the rows. (max_bad_rows only decides whether there are any.)"""
_AGAIN = "run tools/prepare_data.py again"


def settings_of(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> dict[str, Any]:
    """All that decides about the rows but the files that are read, by the name that a user knows it by."""
    settings = {
        "the format of prepared data": FORMAT,
        **{f"data.{key}": getattr(recipe.data, key) for key in _DATA_KEYS},
        "the target's vocabulary": vocab_size,
        "draft.mask_token_id": mask_token_id,
        "the target's tokenizer": tokenizer_fingerprint(tokenizer),
        "the chat template": _chat_fingerprint(recipe, tokenizer),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read_back


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of all that decides how a text is tokenized; None without a tokenizer."""
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described.update(padding=None, truncation=None)  # how it was last called, not what it is
    else:
        described = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _chat_fingerprint(recipe: Recipe, tokenizer: Any) -> str | None:
    try:
        return ChatEncoder.from_recipe(recipe.data, tokenizer).fingerprint
    except ValueError:  # no tokenizer that works: an error where there is a chat to encode, and only there
        return None


def file_sum(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def first_difference(made_with: dict[str, Any], wanted: dict[str, Any], has_chats: bool = True) -> str | None:
    """The first setting that differs, with both values; None if there is none. Chat templates count where chats are."""
    for key in {**wanted, **made_with}:
        ours, theirs = wanted.get(key), made_with.get(key)
        if ours != theirs and (has_chats or key != "the chat template"):
            return f"was made with {key} {clip(json.dumps(theirs))}, while it is {clip(json.dumps(ours))} now"
    return None


def open_prepared(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> TrainingData:
    """The rows in the recipe's data.prepared; the same as if they were made now, but mapped from their files.

    Raises:
        ValueError: one line, for a folder that is not finished, was made for other settings, or whose files are not as
            they were written.
    """
    assert recipe.data.prepared is not None
    return open_folder(
        Path(recipe.data.prepared),
        settings_of(recipe, tokenizer, vocab_size, mask_token_id),
        recipe.data.max_bad_rows,
    )


def open_folder(folder: Path, settings: dict[str, Any], max_bad_rows: int) -> TrainingData:
    """`open_prepared` of any folder."""
    index = read_index(folder)
    reports = {role: SourceReport(**report) for role, report in index["source_reports"].items()}
    has_chats = any(form in CHAT_KEYS for report in reports.values() for form in report.forms)
    difference = first_difference(index["settings"], settings, has_chats)
    if difference is not None:
        raise ValueError(f"data.prepared {folder} {difference}: change that, or {_AGAIN} with another --out")
    for report in reports.values():
        if sum(report.bad_rows.values()) > max_bad_rows:
            raise ValueError(
                f"data.prepared {folder} left out {report.describe_bad()}: data.max_bad_rows allows {max_bad_rows}"
            )
    # The processes of one machine share out the reading; one that fails ends the launch of all.
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for number, (name, written) in enumerate(index["files"].items()):
        check_file(folder / name, written, with_sum=number % size == rank)
    shards = {role: [folder / name for name in names] for role, names in index["shards"].items()}
    tables = {role: DocumentTable.open(paths) for role, paths in shards.items()}
    train = load_file(folder / TRAIN)
    return TrainingData(
        PackedRows.at(tables["sources"].store, train),
        PackedRows.at(tables.get("eval_sources", tables["sources"]).store, load_file(folder / HELD_OUT)),
        train["counts_V"],
        PackReport(**index["report"]),
        PackReport(**index["eval_report"]),
        index["in_both"],
        reports,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished folder; ValueError for any other."""
    if not folder.is_dir():
        raise ValueError(f"data.prepared {folder} is no folder; tools/prepare_data.py makes it")
    if not (folder / INDEX).exists():
        is_begun = (folder / BEGUN).exists()
        state = f"is not finished: {_AGAIN}, it goes on where it stopped" if is_begun else "holds no prepared data"
        raise ValueError(f"data.prepared {folder} {state}")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        claimed = index.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"data.prepared {folder}: {INDEX} cannot be read ({type(error).__name__}): {_AGAIN}") from None
    if claimed != index_sum(index):
        raise ValueError(f"data.prepared {folder}: {INDEX} is not as it was written: {_AGAIN} with another --out")
    return index


def index_sum(index: dict[str, Any]) -> str:
    """sha256 of the index without this sum."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def check_file(path: Path, written: dict[str, Any], with_sum: bool) -> None:
    """ValueError unless the file has the size (and the sum) that it was written with."""
    if not path.exists():
        raise ValueError(f"data.prepared {path.parent}: {path.name} is missing: {_AGAIN} with another --out")
    size = path.stat().st_size
    if size != written["bytes"]:
        raise ValueError(
            f"data.prepared {path.parent}: {path.name} has {size} bytes, but was written with {written['bytes']}:"
            f" {_AGAIN} with another --out"
        )
    if with_sum and file_sum(path) != written:
        raise ValueError(
            f"data.prepared {path.parent}: {path.name} is not as it was written (sha256): {_AGAIN} with another --out"
        )
