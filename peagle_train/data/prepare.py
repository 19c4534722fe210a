"""Preparation: a recipe's documents tokenized once, by all cores, into a folder that training maps into memory.

The folder is whole or not there:
    sources-ids.bin, sources-mask.bin   tokens of all documents, see `TokenStore`; also eval_sources-...
    train.safetensors                   where the sequences' tokens are, see `PackedRows`, and counts_V
    held_out.safetensors                the same of the held-out sequences
    index.json                          the settings it was made with, the sums of the files and its own, the reports
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from peagle_train.config import Recipe
from peagle_train.data.chat import ChatEncoder, read_template
from peagle_train.data.documents import SourceReport, TokenStore, find_all
from peagle_train.data.encode import EncodedBatch, Encoder, RawExample, clip
from peagle_train.data.messages import CHAT_KEYS
from peagle_train.data.packing import PackedRows, PackReport, TrainingData, make_data
from peagle_train.data.vocab import choose_mask_token, load_tokenizer, target_vocab_size
from peagle_train.files import alone_in, checksum, sha256_of, write_folder, write_json

INDEX, TRAIN, HELD_OUT = "index.json", "train.safetensors", "held_out.safetensors"
FORMAT = 4
"""Raised whenever the same recipe and files give other bytes."""
_WINDOW = 4
"""Batches in flight for each worker."""
_DATA_KEYS = (
    "sources extensions exclude eval_sources eval_fraction max_documents max_characters max_length pack"
    " template_kwargs on_rewrite"
).split()
"""Of the recipe's data section, what decides the sequences. (max_bad_rows only decides whether there are any.)"""


def prepare_recipe(
    recipe: Recipe, folder: Path, *, num_workers: int = 1, say: Callable[[str], object] = print
) -> TrainingData:
    """Make the folder that `data.prepared` may name; returns what training will read. A finished one is only checked.

    Of the target only its tokenizer and config are read. `num_workers`: processes that tokenize; 1: this one.

    Raises:
        ValueError: one line, for a user's mistake, for a folder of something else, and for sources that have changed.
    """
    vocab_size = target_vocab_size(recipe)
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.trust_remote_code)
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, vocab_size)
    data = recipe.data
    read_template(data.chat_template)  # before anything is made
    settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
    found = find_all(data)
    names = {role: [(file.name, file.format, file.size) for file in files.files] for role, files in found.items()}
    listing = checksum(names)
    if (folder / INDEX).exists():
        say(f"{folder} is finished: checking it (saved and named data sets are compared by their names only)")
        whole = open_prepared(folder, settings, data.max_bad_rows)
        if read_index(folder)["files of the sources"] != listing:
            raise ValueError(
                f"--out {folder} was made of other files: their names or sizes changed; give another folder"
            )
        return whole

    def encode(batches: Iterable[list[RawExample]]) -> Iterator[EncodedBatch]:
        arguments = data, tokenizer, vocab_size, mask_token_id
        encoded = (
            Encoder(*arguments).encode(batches) if num_workers == 1 else _by_workers(num_workers, arguments, batches)
        )
        with tqdm(unit=" examples", unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 60.0) as bar:
            for batch in encoded:
                yield batch
                bar.update(len(batch.raws))

    def fill(partial: Path) -> None:
        made = make_data(data, found, encode, vocab_size, partial)
        save_file({**made.train_rows.layout, "counts_V": made.counts_V.numpy()}, partial / TRAIN)
        save_file(made.eval_rows.layout, partial / HELD_OUT)
        index = {
            "settings": settings,
            "files of the sources": listing,
            "files": {path.name: _sum_of(path) for path in sorted(partial.iterdir())},
            "source_reports": {role: vars(report) for role, report in made.source_reports.items()},
            "report": asdict(made.report),
            "eval_report": asdict(made.eval_report),
            "in_both": made.in_both,
        }
        write_json(partial / INDEX, {**index, "sha256": checksum(index)})

    with alone_in(folder, "preparing"):
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no prepared data; give another folder")
        try:
            write_folder(folder, fill)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--out {folder} cannot be written: {error}") from None
    return open_prepared(folder, settings, data.max_bad_rows)


def _by_workers(
    num_workers: int, arguments: tuple[Any, ...], batches: Iterable[list[RawExample]]
) -> Iterator[EncodedBatch]:
    """`Encoder.encode` by other processes, a bounded number of batches in flight."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizers' threads in whatever state they are
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=arguments)
    window: deque[tuple[list[RawExample], Future[EncodedBatch]]] = deque()

    def first() -> EncodedBatch:
        raws, future = window.popleft()
        return replace(future.result(), raws=raws)

    try:
        for raws in batches:
            window.append((raws, pool.submit(_work, raws)))
            if len(window) > _WINDOW * num_workers:
                yield first()
        while window:
            yield first()
    except BrokenProcessPool:
        raise ValueError("a worker process ended (out of memory?): start again, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder
"""A worker's."""


def _start_worker(*arguments: Any) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(*arguments)


def _end_with_parent() -> None:
    """A parent that is killed would leave its workers waiting forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(raws: list[RawExample]) -> EncodedBatch:
    return replace(_encoder(raws), raws=[])  # the main process has them


def settings_of(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> dict[str, Any]:
    """All that decides the sequences besides the files that are read, by the name that a user knows it by."""
    try:
        chat_template = ChatEncoder.from_recipe(recipe.data, tokenizer).fingerprint
    except ValueError:  # no tokenizer that works: an error where there is a chat to encode, and only there
        chat_template = None
    settings = {
        "the format of prepared data": FORMAT,
        **{f"data.{key}": getattr(recipe.data, key) for key in _DATA_KEYS},
        "the target's vocabulary": vocab_size,
        "draft.mask_token_id": mask_token_id,
        "the target's tokenizer": _tokenizer_sum(tokenizer),
        "the chat template": chat_template,
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read_back


def _tokenizer_sum(tokenizer: Any) -> str | None:
    """sha256 of all that decides how a text is tokenized; None without a tokenizer."""
    if tokenizer is None:
        return None
    if not getattr(tokenizer, "is_fast", False):
        return checksum({"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()})
    # Padding and truncation are how it was last called, not what it is.
    return checksum({**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None})


def open_prepared(folder: Path, settings: dict[str, Any], max_bad_rows: int) -> TrainingData:
    """The sequences of a prepared folder; the same as if they were made now, but mapped from their files.

    Raises:
        ValueError: one line, for a folder that is not finished, was made for other settings, or whose files were changed.
    """
    index = read_index(folder)
    for key, now in settings.items():
        then = index["settings"].get(key)
        is_used = key != "the chat template" or any(
            form in CHAT_KEYS for report in index["source_reports"].values() for form in report["forms"]
        )
        if now != then and is_used:
            raise ValueError(
                f"data.prepared {folder} was made with {key} {clip(json.dumps(then))}, while it is {clip(json.dumps(now))}"
                " now: change that, or prepare it again in another folder"
            )
    reports = {role: SourceReport(**report) for role, report in index["source_reports"].items()}
    for report in reports.values():
        report.check_bad(max_bad_rows, f"data.prepared {folder} skipped ")
    reads = int(os.environ.get("LOCAL_RANK", "0")) == 0  # one process of a machine is enough: if it fails, all end
    for name, written in index["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != written["bytes"] or (reads and _sum_of(path) != written):
            what = "is missing" if size is None else "was changed"
            raise ValueError(f"data.prepared {folder}: {name} {what}: remove the folder and prepare it again")
    stores = {role: TokenStore.open(folder / role) for role in reports}
    train = load_file(folder / TRAIN)
    counts_V = torch.from_numpy(train.pop("counts_V"))
    return TrainingData(
        PackedRows(stores["sources"], train),
        PackedRows(stores.get("eval_sources", stores["sources"]), load_file(folder / HELD_OUT)),
        counts_V,
        PackReport(**index["report"]),
        PackReport(**index["eval_report"]),
        index["in_both"],
        reports,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished folder; ValueError for any other."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index.pop("sha256") != checksum(index):
            raise ValueError("it was changed")
        return index
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"data.prepared {folder} holds no prepared data; peagle-train prepare makes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"data.prepared {folder}: {INDEX} cannot be read ({type(error).__name__}): remove the folder and prepare it"
            " again"
        ) from None


def _sum_of(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its sha256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
