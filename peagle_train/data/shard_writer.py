"""Writes documents into shards, each with a record of where reading stood behind it; goes on behind the last of them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from peagle_train.data.document_table import DocumentTable, make_shard
from peagle_train.data.files import FoundFiles
from peagle_train.data.prepared import file_sum
from peagle_train.data.readers import RawRow, batches, read_rows
from peagle_train.data.row_encoder import EncodedBatch, EncodedRow
from peagle_train.data.sources import Intake, SourceReport, new_report
from peagle_train.data.training_data import Say
from peagle_train.durable import partial_path, put
from peagle_train.recipe import Recipe

Encoded = Iterator[tuple[list[RawRow], EncodedBatch]]
"""Batches of rows with what became of them, in order."""

_RECORD = {"file", "batches", "content", "last_file", "is_last", "report"}


class ShardWriter:
    """Writes the shards of `sources` or of `eval_sources`, from the first that is not there yet.

    Raises:
        ValueError: one line, also where a file cannot be written (a full disk).
    """

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

    def run(self, encoded: Callable[[Iterator[list[RawRow]]], Encoded]) -> list[Path]:
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
                        if progress.bar.disable:  # no terminal: lines instead of a bar
                            self.say(f"{self.role}: {len(self.paths)} shards, {report.documents} documents")
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
            try:
                record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                is_whole = record.keys() == _RECORD and file_sum(path) == record["file"]
                SourceReport(**record["report"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                is_whole = False
            if not is_whole:
                self.say(f"{path.name} is not as it was written: it is made again, with all behind it")
                break
            last = record
            self.paths.append(path)
        kept = {path.stem for path in self.paths}
        for path in self.folder.glob(f"{self.role}-*"):
            if path.stem not in kept:
                path.unlink()
        return last

    def _write_shard(
        self, rows: list[EncodedRow], sources: list[int], num_batches: int, content_sum: str, is_last: bool
    ) -> None:
        path = self._path(len(self.paths))
        write_tensors(path, make_shard(rows, sources))
        record = {
            "file": file_sum(path),
            "batches": num_batches,
            "content": content_sum,
            "last_file": self.intake.last_file,
            "is_last": is_last,
            "report": asdict(self.intake.report),
        }
        write_json(path.with_suffix(".json"), record)
        self.paths.append(path)


def _add_content(hasher: Any, raws: list[RawRow]) -> None:
    for raw in raws:
        is_bytes = isinstance(raw.content, bytes)
        content = raw.content if is_bytes else json.dumps(raw.content, sort_keys=True, default=str).encode()
        hasher.update(f"{raw.name}\n{len(content)}\n".encode(errors="surrogateescape") + content)


class _Progress:
    """A bar over the bytes of the files where all are known, else a count of rows."""

    def __init__(self, role: str, files: FoundFiles) -> None:
        sizes = [file.size for file in files.files]
        self.by_bytes = all(sizes)
        self.before = [0, *accumulate(sizes)]
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


# ---- files that are whole or not there


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _write(path, lambda partial: save_file(tensors, partial))


def write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    partial = partial_path(path)
    try:
        fill(partial)
        put(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(
            f"{path} cannot be written: {reason}; the files that are finished are kept: make room, or see to it that the"
            " folder may be written, and run the same line again"
        ) from None
