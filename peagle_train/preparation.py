"""Preparation: a recipe's documents tokenized once, by all cores, into files that training maps into memory.

Documents go into shards in the order in which they are read, so the files are the same for any number of workers. A
shard is written whole, and behind it a record of where reading stood: started again after a kill at any moment, shards
with a record are kept (their sums are checked, and that the sources still begin with what they hold), and the rest is
made, to the same bytes.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from peagle_train.document_table import DocumentTable, make_shard
from peagle_train.files import FoundFiles
from peagle_train.prepared import (
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
from peagle_train.readers import RawRow, batches, read_rows
from peagle_train.recipe import Recipe
from peagle_train.row_encoder import EncodedBatch, EncodedRow, RowEncoder
from peagle_train.sources import Intake, SourceReport, new_report
from peagle_train.training_data import Say, TrainingData, assemble, find_all, make_encoder

SHARD_TOKENS = 16 * 2**20
"""A shard is closed when it holds so many: 80 MB."""
_PARTIAL = ".partial"
_WINDOW = 4
"""Batches under way for each worker."""


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
    settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
    if (folder / INDEX).exists():
        say(f"{folder} is finished: checking it")
        return open_folder(folder, settings, recipe.data.max_bad_rows)
    found = find_all(recipe.data)
    _begin(folder, {"settings": settings, "shard_tokens": shard_tokens, "files": _listing(found)})

    def encoded(rows: Iterator[list[RawRow]]) -> Iterator[tuple[list[RawRow], EncodedBatch]]:
        if num_workers == 1:
            encoder = make_encoder(recipe, tokenizer, vocab_size, mask_token_id)
            return ((raws, encoder(raws)) for raws in rows)
        return _encoded_by_workers(rows, num_workers, (recipe, vocab_size, mask_token_id))

    shards, reports = {}, {}
    for role, found_files in found.items():
        writer = _RoleWriter(folder, role, found_files, recipe, shard_tokens, say)
        shards[role] = writer.run(encoded)
        reports[role] = writer.intake.report
    say("packing")
    made = assemble(recipe.data, {role: DocumentTable.open(paths) for role, paths in shards.items()}, vocab_size)
    made = replace(made, source_reports=reports)
    _write_tensors(folder / TRAIN, {**made.train_rows.layout(), "counts_V": made.counts_V})
    _write_tensors(folder / HELD_OUT, made.eval_rows.layout())
    files = [path.name for paths in shards.values() for path in paths] + [TRAIN, HELD_OUT]
    index = {
        "settings": settings,
        "shards": {role: [path.name for path in paths] for role, paths in shards.items()},
        "files": {name: file_sum(folder / name) for name in files},
        "source_reports": {role: asdict(report) for role, report in reports.items()},
        "report": asdict(made.report),
        "eval_report": asdict(made.eval_report),
        "in_both": made.in_both,
    }
    index = json.loads(json.dumps(index))
    _write_json(folder / INDEX, {**index, "sha256": index_sum(index)})
    return made


def prepare_recipe(
    recipe: Recipe, folder: Path, *, num_workers: int = 1, shard_tokens: int = SHARD_TOKENS, say: Say = print
) -> TrainingData:
    """`prepare` with the recipe's own tokenizer, without loading its target."""
    from transformers import AutoConfig

    from peagle_train.build import choose_mask_token, load_tokenizer

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from None
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink()
    if not (folder / BEGUN).exists():
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no preparation; give another folder")
        _write_json(folder / BEGUN, begun)
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


class _RoleWriter:
    """Writes the shards of `sources` or of `eval_sources`, from the first that is not there yet."""

    def __init__(self, folder: Path, role: str, files: FoundFiles, recipe: Recipe, shard_tokens: int, say: Say) -> None:
        self.folder, self.role, self.files, self.shard_tokens, self.say = folder, role, files, shard_tokens, say
        self.paths: list[Path] = []
        last = self._keep_finished()
        self.num_batches: int = last["batches"] if last else 0
        self.content_sum: str = last["content"] if last else ""
        self.is_complete = bool(last and last["is_last"])
        self.intake = Intake(
            SourceReport(**last["report"]) if last else new_report(files),
            recipe.data.max_documents,
            recipe.data.max_bad_rows,
            (key.tobytes() for key in DocumentTable.open(self.paths).keys_D32),
        )
        if last:
            self.intake.last_file = last["last_file"]
            self.intake.check_bad()
            say(f"{role}: {len(self.paths)} finished shards, {self.intake.report.documents} documents, are kept")

    def run(
        self, encoded: Callable[[Iterator[list[RawRow]]], Iterator[tuple[list[RawRow], EncodedBatch]]]
    ) -> list[Path]:
        """Write what is missing; the paths of all shards. `encoded` encodes batches, in their order."""
        report, rows, sources, tokens = self.intake.report, [], [], 0
        hasher, seen = hashlib.sha256(), 0

        def unread() -> Iterator[list[RawRow]]:
            nonlocal seen
            for raws in batches(read_rows(self.files.files)):
                seen += 1
                if seen > self.num_batches:
                    yield raws
                    continue
                _add_content(hasher, raws)  # written already
                if seen == self.num_batches and hasher.hexdigest() != self.content_sum:
                    raise ValueError(
                        f"the {self.role} are not what {self.folder} was begun with: give another --out, or remove it"
                    )

        if not self.is_complete:
            with _Progress(self.role, self.files) as progress:
                stream = encoded(unread())
                num_batches = self.num_batches
                for raws, batch in stream:
                    kept: list[EncodedRow] = list(self.intake.take(raws, batch))
                    rows += kept
                    sources += [raws[row.raw_index].source for row in kept]
                    tokens += sum(row.input_ids.size for row in kept)
                    num_batches += 1
                    _add_content(hasher, raws)
                    progress.show(raws, report)
                    if report.stopped:
                        break
                    if tokens >= self.shard_tokens:
                        self._write_shard(rows, sources, num_batches, hasher.hexdigest(), is_last=False)
                        rows, sources, tokens = [], [], 0
                if seen < self.num_batches:
                    raise ValueError(
                        f"the {self.role} are less than what {self.folder} was begun with: give another --out, or remove it"
                    )
                self._write_shard(rows, sources, num_batches, hasher.hexdigest(), is_last=True)
        self.intake.finish()
        return self.paths

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.role}-{number:05}.safetensors"

    def _keep_finished(self) -> dict[str, Any] | None:
        """The record of the last shard in a row that is as it was written."""
        last = None
        while (path := self._path(len(self.paths))).with_suffix(".json").exists():
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if not path.exists() or file_sum(path) != record["file"]:
                self.say(f"{path.name} is not as it was written: it is made again, with all behind it")
                break
            last = record
            self.paths.append(path)
        for number in range(len(self.paths), len(self.paths) + 100_000):
            leftovers = [self._path(number).with_suffix(".json"), self._path(number)]
            if not any(path.exists() for path in leftovers):
                break
            for path in leftovers:
                path.unlink(missing_ok=True)
        return last

    def _write_shard(
        self, rows: list[EncodedRow], sources: list[int], num_batches: int, content_sum: str, is_last: bool
    ) -> None:
        path = self._path(len(self.paths))
        _write_tensors(path, make_shard(rows, sources))
        record = {
            "file": file_sum(path),
            "batches": num_batches,
            "content": content_sum,
            "last_file": self.intake.last_file,
            "is_last": is_last,
            "report": asdict(self.intake.report),
        }
        _write_json(path.with_suffix(".json"), record)
        self.paths.append(path)


def _add_content(hasher: Any, raws: list[RawRow]) -> None:
    for raw in raws:
        is_bytes = isinstance(raw.content, bytes)
        content = raw.content if is_bytes else json.dumps(raw.content, sort_keys=True, default=str).encode()
        hasher.update(f"{raw.name}\n{len(content)}\n".encode() + content)


class _Progress:
    """A bar over the bytes of the files where all are known, else a count of rows."""

    def __init__(self, role: str, files: FoundFiles) -> None:
        sizes = [file.size for file in files.files]
        self.by_bytes = all(sizes)
        self.before = [sum(sizes[:i]) for i in range(len(sizes))] if len(sizes) < 10_000 else []
        self.by_bytes = self.by_bytes and bool(self.before)
        self.file, self.inside = -1, 0
        total = sum(sizes) if self.by_bytes else None
        self.bar = tqdm(total=total, unit="B" if self.by_bytes else " rows", unit_scale=True, desc=role, disable=None)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, raws: list[RawRow], report: SourceReport) -> None:
        if self.by_bytes:
            for raw in raws:
                if raw.file_index != self.file:
                    self.file, self.inside = raw.file_index, 0
                self.inside += len(raw.content) if isinstance(raw.content, bytes) else 0
            self.bar.update(self.before[self.file] + self.inside - self.bar.n)
        else:
            self.bar.update(len(raws))
        self.bar.set_postfix(documents=report.documents, tokens=f"{report.tokens:.2e}", refresh=False)


# ---- worker processes


def _encoded_by_workers(
    rows: Iterator[list[RawRow]], num_workers: int, initial: tuple[Any, ...]
) -> Iterator[tuple[list[RawRow], EncodedBatch]]:
    """Batches in their order, encoded by processes of their own; a bounded number is under way."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizers' threads in whatever state they are
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=initial)
    window: deque[tuple[list[RawRow], Future[EncodedBatch]]] = deque()
    try:
        for raws in rows:
            window.append((raws, pool.submit(_work, raws)))
            if len(window) > _WINDOW * num_workers:
                first, future = window.popleft()
                yield first, future.result()
        for first, future in window:
            yield first, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process ended (out of memory?): start again, with fewer --workers; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: RowEncoder


def _start_worker(recipe: Recipe, vocab_size: int, mask_token_id: int | None) -> None:
    from peagle_train.build import load_tokenizer

    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encoder = make_encoder(recipe, load_tokenizer(recipe), vocab_size, mask_token_id)


def _end_with(parent: Any) -> None:
    """A parent that is killed leaves its workers waiting for ever."""
    parent.join()
    os._exit(1)


def _work(raws: list[RawRow]) -> EncodedBatch:
    return _encoder(raws)


# ---- files that are whole or not there


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _write(path, lambda partial: save_file(tensors, partial))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    fill(partial)
    for synced in (partial, None):
        if synced is None:
            os.replace(partial, path)
        handle = os.open(synced or path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
