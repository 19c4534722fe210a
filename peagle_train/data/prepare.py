"""Preparation: a recipe's documents tokenized once, by all cores, into a folder that training maps into memory.

The folder is whole or not there:
    sources-00000.safetensors ...  documents, see `document_table.Shard`; also eval_sources-...
    train.safetensors              where the rows' tokens are, see `PackedRows.layout`, and counts_V
    held_out.safetensors           the same of the held-out rows
    index.json                     the settings it was made with, the sums of the files and its own, the reports
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from peagle_train.config import Recipe
from peagle_train.data.chat import ChatEncoder, check_template
from peagle_train.data.documents import (
    DocumentTable,
    FoundFiles,
    Intake,
    SourceReport,
    batches,
    make_shard,
    new_report,
    read_rows,
)
from peagle_train.data.encode import EncodedBatch, EncodedRow, RawRow, RowEncoder, clip
from peagle_train.data.messages import CHAT_KEYS
from peagle_train.data.packing import PackedRows, PackReport
from peagle_train.data.training_data import Say, TrainingData, assemble, find_all, make_encoder
from peagle_train.files import alone_in, write_folder, write_json

SHARD_TOKENS = 16 * 2**20
"""A shard is closed when it holds this many tokens (80 MB): more than one is never held in memory."""
INDEX, TRAIN, HELD_OUT = "index.json", "train.safetensors", "held_out.safetensors"
FORMAT = 3
"""Raised whenever the same recipe and files give other bytes."""
_WINDOW = 4
"""Batches in flight for each worker."""
_DATA_KEYS = (
    "sources extensions exclude eval_sources eval_fraction max_documents max_characters max_length pack"
    " template_kwargs on_rewrite"
).split()
"""Of the recipe's data section, what decides about the rows. (max_bad_rows only decides whether there are any.)"""

Encoded = Iterator[tuple[list[RawRow], EncodedBatch]]
"""Batches of rows with what became of them, in order."""


# ---- making the folder


def prepare_recipe(recipe: Recipe, folder: Path, *, num_workers: int = 1, say: Say = print) -> TrainingData:
    """`prepare` with the recipe's own tokenizer, without loading its target."""
    from transformers import AutoConfig

    from peagle_train.data.training_data import choose_mask_token, load_tokenizer

    tokenizer = load_tokenizer(recipe)
    try:
        config = AutoConfig.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        ).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"target.path {recipe.target.path} has no config that can be read: {reason}") from None
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, config.vocab_size)
    return prepare(recipe, folder, tokenizer, config.vocab_size, mask_token_id, num_workers=num_workers, say=say)


def prepare(
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None,
    *,
    num_workers: int = 1,
    say: Say = print,
) -> TrainingData:
    """Make the folder that `data.prepared` may name; returns what training will read. A finished one is only checked.

    Args:
        tokenizer, vocab_size, mask_token_id: see `load_training_data`.
        num_workers: processes that tokenize; 1: this one.

    Raises:
        ValueError: one line, for a user's mistake, for a folder of something else, and for sources that have changed.
    """
    check_template(recipe.data.chat_template)  # before anything is made
    settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
    found = find_all(recipe.data)
    if (folder / INDEX).exists():
        _check_made_with(folder, {**settings, "files of the sources": _listing(found)})
        unseen = [file.name for files in found.values() for file in files.files if file.format in ("saved", "hub")]
        but = f", but that of {', '.join(map(clip, unseen))} was not looked at" if unseen else ""
        say(f"{folder} is finished, and the sources have the names and sizes that it was made of{but}: checking it")
        return open_folder(folder, settings, recipe.data.max_bad_rows)
    with alone_in(folder, "preparing"):
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no prepared data; give another folder")

        def fill(partial: Path) -> None:
            reports = {}
            tables = {}
            for role, files in found.items():
                reports[role] = report = new_report(files)
                batches_of = _encoded(recipe, tokenizer, vocab_size, mask_token_id, files, num_workers)
                intake = Intake(report, recipe.data.max_documents, recipe.data.max_bad_rows)
                tables[role] = DocumentTable.open(_write_shards(partial, role, batches_of, intake, say))
            say("packing")
            made = replace(assemble(recipe.data, tables, vocab_size), source_reports=reports)
            save_file({**made.train_rows.layout(), "counts_V": made.counts_V}, partial / TRAIN)
            save_file(made.eval_rows.layout(), partial / HELD_OUT)
            index = {
                "settings": settings,
                "files of the sources": _listing(found),
                "shards": {role: sorted(p.name for p in partial.glob(f"{role}-*")) for role in found},
                "files": {path.name: file_sum(path) for path in sorted(partial.iterdir())},
                "source_reports": {role: asdict(report) for role, report in reports.items()},
                "report": asdict(made.report),
                "eval_report": asdict(made.eval_report),
                "in_both": made.in_both,
            }
            write_json(partial / INDEX, {**index, "sha256": _sum(index)})

        try:
            write_folder(folder, fill)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(f"--out {folder} cannot be written: {reason}") from None
    return open_folder(folder, settings, recipe.data.max_bad_rows)


def _write_shards(folder: Path, role: str, encoded: Encoded, intake: Intake, say: Say) -> list[Path]:
    """Documents into files of about SHARD_TOKENS each; their paths, at least one."""
    paths: list[Path] = []
    rows: list[EncodedRow] = []
    sources: list[int] = []
    report = intake.report

    def write() -> None:
        paths.append(folder / f"{role}-{len(paths):05}.safetensors")
        save_file(make_shard(rows, sources), paths[-1])
        rows.clear()
        sources.clear()

    tokens_written = 0
    with tqdm(unit=" rows", desc=role, unit_scale=True, disable=None) as bar:
        for raws, batch in encoded:
            kept = list(intake.take(raws, batch))
            rows += kept
            sources += [raws[row.raw_index].source for row in kept]
            bar.update(len(raws))
            bar.set_postfix(documents=report.documents, tokens=f"{report.tokens:.2e}", refresh=False)
            if report.stopped:
                break
            if report.tokens - tokens_written >= SHARD_TOKENS:
                write()
                tokens_written = report.tokens
                if bar.disable:  # no terminal: lines instead of a bar
                    say(f"{role}: {len(paths)} shards, {report.documents} documents")
    write()
    intake.finish()
    return paths


def _encoded(
    recipe: Recipe,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None,
    files: FoundFiles,
    num_workers: int,
) -> Encoded:
    """The files' rows in batches, encoded here or by processes of their own, a bounded number of batches in flight."""
    arguments = recipe, tokenizer, vocab_size, mask_token_id
    if num_workers == 1:
        encode = make_encoder(*arguments)
        yield from ((raws, encode(raws)) for raws in batches(read_rows(files.files)))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizers' threads in whatever state they are
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=arguments)
    window: deque[tuple[list[RawRow], Future[EncodedBatch]]] = deque()
    try:
        for raws in batches(read_rows(files.files)):
            window.append((raws, pool.submit(_work, raws)))
            if len(window) > _WINDOW * num_workers:
                first, future = window.popleft()
                yield first, future.result()
        for first, future in window:
            yield first, future.result()
    except BrokenProcessPool:
        raise ValueError("a worker process ended (out of memory?): start again, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encode_here: RowEncoder


def _start_worker(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> None:
    global _encode_here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encode_here = make_encoder(recipe, tokenizer, vocab_size, mask_token_id)


def _end_with(parent: Any) -> None:
    """A parent that is killed would leave its workers waiting forever."""
    parent.join()
    os._exit(1)


def _work(raws: list[RawRow]) -> EncodedBatch:
    return _encode_here(raws)


def _listing(found: dict[str, FoundFiles]) -> str:
    """sha256 of the names and sizes of all files."""
    names = {role: [(file.name, file.format, file.size) for file in files.files] for role, files in found.items()}
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _check_made_with(folder: Path, wanted: dict[str, Any]) -> None:
    """ValueError unless a finished folder was made with these settings, of files of these names and sizes."""
    index = read_index(folder)
    made_with = {**index["settings"], "files of the sources": index["files of the sources"]}
    difference = first_difference(made_with, wanted)
    if difference is not None:
        raise ValueError(f"--out {folder} {difference}: change that, give another folder, or remove this one")


# ---- what a folder was made with


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


def first_difference(made_with: dict[str, Any], wanted: dict[str, Any], has_chats: bool = True) -> str | None:
    """The first setting that differs, with both values; None if there is none. Chat templates count where chats are."""
    for key in {**wanted, **made_with}:
        ours, theirs = wanted.get(key), made_with.get(key)
        if ours != theirs and (has_chats or key != "the chat template"):
            return f"was made with {key} {clip(json.dumps(theirs))}, while it is {clip(json.dumps(ours))} now"
    return None


# ---- reading the folder


def open_prepared(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> TrainingData:
    """The rows in the recipe's data.prepared; the same as if they were made now, but mapped from their files.

    Raises:
        ValueError: one line, for a folder that is not finished, was made for other settings, or whose files are not as
            they were written.
    """
    assert recipe.data.prepared is not None
    settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
    return open_folder(Path(recipe.data.prepared), settings, recipe.data.max_bad_rows)


def open_folder(folder: Path, settings: dict[str, Any], max_bad_rows: int) -> TrainingData:
    """`open_prepared` of any folder."""
    index = read_index(folder)
    reports = {role: SourceReport(**report) for role, report in index["source_reports"].items()}
    has_chats = any(form in CHAT_KEYS for report in reports.values() for form in report.forms)
    difference = first_difference(index["settings"], settings, has_chats)
    if difference is not None:
        raise ValueError(f"data.prepared {folder} {difference}: change that, or run tools/prepare_data.py again")
    for report in reports.values():
        if sum(report.bad_rows.values()) > max_bad_rows:
            raise ValueError(
                f"data.prepared {folder} left out {report.describe_bad()}: data.max_bad_rows allows {max_bad_rows}"
            )
    # The processes of one machine share out the reading; one that fails ends the launch of all.
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for number, (name, written) in enumerate(index["files"].items()):
        path = folder / name
        found = {"bytes": path.stat().st_size} if path.exists() else None
        if found == {"bytes": written["bytes"]} and number % size == rank:
            found = file_sum(path)
        if (
            found is None
            or found["bytes"] != written["bytes"]
            or found.get("sha256", written["sha256"]) != written["sha256"]
        ):
            what = "is missing" if found is None else "is not as it was written"
            raise ValueError(
                f"data.prepared {folder}: {name} {what}: remove the folder and run tools/prepare_data.py again"
            )
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
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index.pop("sha256") != _sum(index):
            raise ValueError("not as it was written")
        return index
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"data.prepared {folder} holds no prepared data; tools/prepare_data.py makes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"data.prepared {folder}: {INDEX} cannot be read ({type(error).__name__}): remove the folder and run"
            " tools/prepare_data.py again"
        ) from None


def _sum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def file_sum(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its sha256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
