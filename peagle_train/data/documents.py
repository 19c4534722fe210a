"""Documents: what the sources of a recipe hold, each once, and the count of everything that is left out."""

import fnmatch
import glob
import gzip
import json
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from peagle_train.config import HUB, SourceSpec, parse_sources
from peagle_train.data.chat import ChatEncoder
from peagle_train.data.encode import FORMS, EncodedBatch, EncodedRow, RawRow, RejectedRow, RowEncoder

# ---- files
# Which files the sources of a recipe name, in an order that is the same on every machine.

STDLIB = "stdlib"
"""The source that stands for the modules of the running Python's own library."""
TEXT_EXTENSIONS = (".py", ".txt", ".md")
ROW_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""Files of rows by their extension; any other file is text."""
_SAVED = ("state.json", "dataset_dict.json")
"""A folder with one of these was written by `datasets.save_to_disk`."""

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a data set that is read as one."""

    path: str
    """Where it is, in the user's own words."""
    name: str
    """`source/path/below/it`: the same on every machine."""
    format: str = "text"
    """text, jsonl, json, parquet, arrow, saved (a folder of `datasets.save_to_disk`) or hub (a name)."""
    source: int = 0
    """Which of the sources names it."""
    split: str | None = None
    """Of a saved data set or one of the hub."""
    config: str | None = None
    """Of one of the hub."""
    streaming: bool = False
    """Whether one of the hub is read without a copy on disk."""
    size: int = 0
    """Bytes; 0 where they are not known."""


@dataclass
class FoundFiles:
    """What the sources name, and what of it is left out."""

    files: list[SourceFile] = field(default_factory=list)
    """Sources in the order given; within one, by the path below it."""
    excluded: int = 0
    """Files that an exclude pattern matches."""
    other: int = 0
    """Files of folders and globs with another extension."""
    linked_folders: int = 0
    """Symbolic links to folders, which are not entered."""


def find_files(
    sources: Sequence[str | SourceSpec], extensions: Sequence[str] = TEXT_EXTENSIONS, exclude: Sequence[str] = ()
) -> FoundFiles:
    """Resolve files, folders, globs, `stdlib`, saved data sets and names of data sets.

    Folders are searched, at any depth, for `extensions` (or for those of the source's own format). Files and globs may
    also name text and row files of any extension that is known. `exclude` holds fnmatch patterns on the path below the
    source, with or without the source's own name in front.

    Raises:
        ValueError: a source that names nothing to read.
    """
    if isinstance(sources, str) or len(sources) == 0:
        raise ValueError(f"data sources are {sources!r}; give a non-empty list of files, folders, globs or {STDLIB}")
    found = FoundFiles()
    for number, source in enumerate(sources):
        spec = parse_sources([source])[0] if isinstance(source, str) else source
        before = (len(found.files), found.excluded, found.other)
        wanted = tuple(extensions) if spec.format in ("auto", "text") else (f".{spec.format}",)
        _add_source(found, number, spec, wanted, exclude)
        if len(found.files) == before[0]:
            raise ValueError(
                f"data source {spec.describe()} has no file to read: {found.excluded - before[1]} are excluded and"
                f" {found.other - before[2]} are not {' '.join(wanted)}: change data.exclude or data.extensions"
                + (" (what ends in .gz is not read: unpack it)" if spec.describe().endswith(".gz") else "")
            )
    return found


def _add_source(
    found: FoundFiles, number: int, spec: SourceSpec, extensions: tuple[str, ...], exclude: Sequence[str]
) -> None:
    as_rows: dict[str, Any] = {"source": number, "split": spec.split, "config": spec.name, "streaming": spec.streaming}
    if spec.path is None:
        found.files.append(SourceFile(str(spec.datasets), spec.describe(), "hub", **as_rows))
        return
    source, path = spec.path, os.path.expanduser(spec.path)
    if os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
        if spec.name is not None:
            raise ValueError(f"data source {source} is a saved data set, which has no name to choose: leave out name")
        found.files.append(SourceFile(path, os.path.basename(os.path.abspath(path)), "saved", **as_rows))
        return
    if spec.split is not None or spec.name is not None:
        raise ValueError(f"data source {source} is no data set with splits and names: leave out split and name")
    explicit = (*extensions, *TEXT_EXTENSIONS, *ROW_FORMATS) if spec.format == "auto" else ("",)
    if source == STDLIB:
        root, prefix, extensions = sysconfig.get_paths()["stdlib"], STDLIB, (".py",)
        below = list(_walk(root, found, _NOT_LIBRARY))
    elif os.path.isdir(path):
        root, prefix = path, os.path.basename(os.path.abspath(path))
        below = list(_walk(root, found))
    elif os.path.isfile(path):
        root, prefix, extensions = os.path.dirname(path), "", explicit
        below = [os.path.basename(path)]
    elif glob.has_magic(path):
        root, extensions = _fixed_part(path), explicit
        prefix = os.path.basename(os.path.abspath(root))
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        below = [os.path.relpath(match, root or os.curdir).replace(os.sep, "/") for match in matches]
        if not below:
            raise ValueError(f"data source {source} matches no file")
    else:
        raise ValueError(
            f"data source {source} does not exist; give a file, a folder, a glob, {STDLIB} or {HUB}NAME (a data set)"
        )
    for item in sorted(below):
        name = f"{prefix}/{item}" if prefix else item
        if not item.endswith(extensions):
            found.other += 1
        elif any(fnmatch.fnmatchcase(text, pattern) for text in (item, name) for pattern in exclude):
            found.excluded += 1
        else:
            full = os.path.join(root, item)
            kind = ROW_FORMATS.get(os.path.splitext(item)[1], "text") if spec.format == "auto" else spec.format
            size = os.path.getsize(full) if os.path.exists(full) else 0  # a broken link is told when it is read
            found.files.append(SourceFile(full, name, kind, number, size=size))


def _walk(root: str, found: FoundFiles, skipped: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths below `root` of all files in it, with forward slashes; folders named in `skipped` do not count."""

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found.linked_folders += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _fixed_part(pattern: str) -> str:
    """The folder in front of a glob's first wildcard."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


# ---- tables
# Rows of parquet and Arrow files, of saved data sets and of data sets by name, through Hugging Face's `datasets`.

_ROWS_AT_ONCE = 256


def table_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Each row as a mapping of plain values, in order, a few hundred of them in memory at a time.

    Raises:
        ValueError: one line, for what cannot be opened or read.
    """
    try:
        for batch in _open(file).iter(batch_size=_ROWS_AT_ONCE):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except Exception as error:  # pyarrow, datasets and the hub's client each raise types of their own
        lines = str(error).split("\n")
        raise ValueError(
            f"cannot read {file.path} ({file.format}): {type(error).__name__}: {lines[0][:300]}"
        ) from error


def _open(file: SourceFile) -> Any:
    import datasets  # seconds, and only where a recipe names a table
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    split = file.split or "train"
    if file.format in ("parquet", "arrow"):
        # Streaming reads the file itself; without it `datasets` would first copy it to its cache.
        pattern = glob.escape(file.path)  # which the name would otherwise be taken for
        # Given a size, it does not take that of the first row group, which is 0 in a parquet file without rows.
        size = {"batch_size": _ROWS_AT_ONCE} if file.format == "parquet" else {}
        return datasets.load_dataset(file.format, data_files=pattern, split="train", streaming=True, **size)
    if file.format == "saved":
        saved = datasets.load_from_disk(file.path).with_format(None)  # it may have been saved as arrays or tensors
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has no split {split}, only {', '.join(saved)}")
            return saved[split]
        if file.split is not None:
            raise ValueError("it has no splits: leave out split")
        return saved
    return datasets.load_dataset(file.path, file.config, split=split, streaming=file.streaming)


# ---- readers
# Raw rows from files and data sets, in order: a line, a text or a mapping each. What is in them is looked at elsewhere.

_BATCH_CHARACTERS = 1_000_000
_BATCH_ROWS = 256


def read_rows(files: Sequence[SourceFile]) -> Iterator[RawRow]:
    """Every row in the order of the files; empty lines are none.

    Raises:
        ValueError: one line, for what cannot be read at all.
    """
    readers = {"text": _read_text, "jsonl": _read_lines, "json": _read_json}
    for index, file in enumerate(files):
        yield from readers.get(file.format, _read_table)(index, file)


def batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in groups that are worth tokenizing at once. The groups depend on the rows alone."""
    batch: list[RawRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 1 + len(row.content) if isinstance(row.content, bytes) else _BATCH_CHARACTERS // _BATCH_ROWS
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_text(index: int, file: SourceFile) -> Iterator[RawRow]:
    yield RawRow(index, file.source, _printable(file.path), file.name, b"".join(_lines(file)), "text")


def _read_lines(index: int, file: SourceFile) -> Iterator[RawRow]:
    path = _printable(file.path)
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield RawRow(
                index, file.source, f"{path}, line {number}", f"{file.name}:{number}", line.rstrip(b"\r\n"), "line"
            )


def _read_json(index: int, file: SourceFile) -> Iterator[RawRow]:
    """A .json file is lines of JSON, as .jsonl is, or one list of rows (then it is read whole)."""
    first = next((line.strip().removeprefix(b"\xef\xbb\xbf")[:1] for line in _lines(file) if line.strip()), b"")
    if first != b"[":
        yield from _read_lines(index, file)
        return
    content = b"".join(_lines(file))
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # one bad row, which is told where rows are parsed
        yield RawRow(index, file.source, _printable(file.path), file.name, content, "line")
        return
    for number, row in enumerate(rows, start=1):
        yield RawRow(index, file.source, f"{_printable(file.path)}, row {number}", f"{file.name}:{number}", row, "line")


def _read_table(index: int, file: SourceFile) -> Iterator[RawRow]:
    # Imported only here: it takes a second, and most runs read no table.

    for number, row in enumerate(table_rows(file), start=1):
        yield RawRow(
            index, file.source, f"{_printable(file.path)}, row {number}", f"{file.name}:{number}", row, "table"
        )


def _lines(file: SourceFile) -> Iterator[bytes]:
    opener: Any = gzip.open if file.path.endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            yield from stream
    except (OSError, EOFError) as error:  # gzip raises both on what is no gzip or is cut
        raise ValueError(f"cannot read {file.path}: {getattr(error, 'strerror', None) or error}") from None


def _printable(path: str) -> str:
    """The path with escapes for what is not UTF-8 in it."""
    return path.encode("utf-8", "backslashreplace").decode()


# ---- document_table
# Documents side by side in a few flat tensors, in memory or mapped from files: millions of them cost no objects.
#
# Shapes: n tokens and D documents, of one shard or of all of them.

Shard = dict[str, Tensor]
"""input_ids int32 [n], loss_mask uint8 [n]; and of each document: lengths int32 [D], sources int32 [D] (which source of
the recipe it is from), keys uint8 [D, 32] (sha256 of its ids and mask)."""


def make_shard(rows: Sequence[EncodedRow], sources: Sequence[int]) -> Shard:
    """The rows side by side, in their order."""
    keys = np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, 32)
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)])),
        "loss_mask": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *(row.loss_mask for row in rows)])),
        "lengths": torch.tensor([row.input_ids.size for row in rows], dtype=torch.int32),
        "sources": torch.tensor(sources, dtype=torch.int32),
        "keys": torch.from_numpy(keys.copy()),
    }


class TokenStore:
    """Token ids and loss masks of all documents, one behind the other, in shards that no document crosses.

    Read from files, they are mapped into memory, and a copy of the store that goes to another process maps them again.
    """

    def __init__(self, shards: Iterable[tuple[Tensor, Tensor]], paths: Sequence[Path] = ()) -> None:
        """`shards`: (ids int32 [n], mask uint8 [n]) of each; `paths`: the files that they are in, if they are in any."""
        self.shards, self.paths = list(shards), list(paths)
        self.starts = [0]
        for ids, _ in self.shards:
            self.starts.append(self.starts[-1] + ids.numel())

    def piece(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """(ids int32, mask uint8), [length] each, of the tokens from `start` on; without a copy."""
        shard = bisect_right(self.starts, start) - 1
        first = start - self.starts[shard]
        ids, mask = self.shards[shard]
        assert first + length <= ids.numel(), "a piece crosses the end of its shard"
        return ids[first : first + length], mask[first : first + length]

    def __reduce__(self) -> Any:
        if self.paths:
            return _open_store, (self.paths,)
        return TokenStore, (self.shards,)


def _open_store(paths: Sequence[Path]) -> TokenStore:
    return DocumentTable.open(paths).store


@dataclass(frozen=True)
class DocumentTable:
    """Documents in order: what is known of each, and where its tokens are."""

    store: TokenStore
    """The tokens."""
    starts_D: np.ndarray
    """int64: a document's first token in the store."""
    lengths_D: np.ndarray
    """int64, each >= 1."""
    sources_D: np.ndarray
    """int32: which source of the recipe."""
    keys_D32: np.ndarray
    """uint8: sha256 of ids and mask."""

    @classmethod
    def of(cls, shards: Sequence[Shard], paths: Sequence[Path] = ()) -> "DocumentTable":
        """The documents of all shards."""

        def column(name: str, empty: Tensor) -> np.ndarray:
            return torch.cat([empty, *(shard[name] for shard in shards)]).numpy()

        lengths_D = column("lengths", torch.zeros(0, dtype=torch.int32)).astype(np.int64)
        return cls(
            TokenStore([(shard["input_ids"], shard["loss_mask"]) for shard in shards], paths),
            np.concatenate([np.zeros(1, np.int64), lengths_D.cumsum()])[:-1],
            lengths_D,
            column("sources", torch.zeros(0, dtype=torch.int32)),
            column("keys", torch.zeros((0, 32), dtype=torch.uint8)),
        )

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "DocumentTable":
        """Those of shards in files; the tokens are mapped, not read."""
        shards = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                shards.append({name: file.get_tensor(name) for name in file.keys()})
        return cls.of(shards, paths)

    def __len__(self) -> int:
        return len(self.lengths_D)


# ---- sources
# Documents: what the sources of a recipe hold, each once, and the count of everything that is left out.

MAX_IGNORED_KEYS = 20
"""So many are told; rows whose keys are data of their own would have as many as there are rows."""


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids that belong together, and which of them are learned from."""

    input_ids: Tensor
    """int64 [n], n >= 1."""
    loss_mask: Tensor
    """uint8 [n], 0 or 1: 1 on the assistant's tokens."""
    name: str
    """Where it comes from, without any machine's paths."""
    key: str
    """sha256 of ids and mask, in hex: the same on every machine."""


@dataclass
class SourceReport:
    """What was read, and what was not."""

    files: int = 0
    """Files found."""
    documents: int = 0
    """Documents kept."""
    tokens: int = 0
    """Tokens of the documents kept."""
    supervised: int = 0
    """Drafter rows with a loss: tokens with mask 1, without the first of each document."""
    unsupervised: int = 0
    """Documents kept that have no such row."""
    empty: int = 0
    """Documents dropped because they have no token."""
    duplicates: int = 0
    """Documents dropped because an earlier one is equal."""
    excluded: int = 0
    """Files left out by an exclude pattern."""
    other_files: int = 0
    """Files of folders and globs left out because of their extension."""
    linked_folders: int = 0
    """Symbolic links to folders, which are not entered."""
    forms: dict[str, int] = field(default_factory=dict)
    """Documents kept, by the form of their row; `file` is a whole text file."""
    chat_counts: dict[str, int] = field(default_factory=dict)
    """What chats had that was not learned, left out or peculiar; duplicates are counted too."""
    several_forms: int = 0
    """Rows that had the keys of several forms, and were read as the first of them."""
    bad_rows: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be trained on, by reason."""
    first_bad: dict[str, str] = field(default_factory=dict)
    """File, line and fault of the first row of each reason."""
    ignored_keys: list[str] = field(default_factory=list)
    """Keys of rows that mean nothing here: the first MAX_IGNORED_KEYS, and one more if there are more."""
    stopped: bool = False
    """Whether max_documents left out documents; how many is not known without reading them."""
    unread_files: int = 0
    """Files that give no document because of max_documents."""

    def describe(self) -> str:
        """One line: what was kept, then every count of what was not."""
        left_out = {
            "empty documents": self.empty,
            "duplicate documents": self.duplicates,
            "excluded files": self.excluded,
            "files of other types": self.other_files,
            "linked folders": self.linked_folders,
        }
        text = f"{self.documents} documents of {self.files} files"
        if set(self.forms) - {"file"}:
            text += f" ({', '.join(f'{count} {form}' for form, count in self.forms.items())})"
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        text += "".join(f", {count} {what} left out" for what, count in left_out.items() if count)
        if self.bad_rows:
            text += f", {self.describe_bad()} left out"
        text += "".join(f", {count} {what}" for what, count in sorted(self.chat_counts.items()))
        if self.several_forms:
            text += f", {self.several_forms} rows of several forms read as the first of {', '.join(FORMS)}"
        if self.stopped:
            text += f", stopped at max_documents with {self.unread_files} files unread"
        if self.unsupervised:
            text += f", {self.unsupervised} documents without a supervised row"
        if not self.ignored_keys:
            return text
        more = " and others" if len(self.ignored_keys) > MAX_IGNORED_KEYS else ""
        return text + f", keys ignored: {', '.join(self.ignored_keys[:MAX_IGNORED_KEYS])}{more}"

    def describe_bad(self) -> str:
        """The bad rows, by reason, with the place of the first of each."""
        counts = [f"{count} {reason} (first: {self.first_bad[reason]})" for reason, count in self.bad_rows.items()]
        return f"{sum(self.bad_rows.values())} bad rows: {'; '.join(counts)}"


class Intake:
    """Takes encoded rows in their order, keeps each document once, and counts the others.

    Args:
        report: counted on in place; that of an earlier part goes on where it ended.
        max_documents: stop behind so many documents.
        max_bad_rows: leave out so many bad rows; one more is a ValueError.
        keys: of the documents of earlier parts.
    """

    def __init__(
        self, report: SourceReport, max_documents: int | None, max_bad_rows: int, keys: Iterable[bytes] = ()
    ) -> None:
        self.report, self.max_documents, self.max_bad_rows = report, max_documents, max_bad_rows
        self.keys = set(keys)
        self.last_file = -1

    def take(self, raws: Sequence[RawRow], batch: EncodedBatch) -> Iterator[EncodedRow]:
        """The documents of the batch to keep, in order. Read no further once `report.stopped` is set.

        Raises:
            ValueError: more bad rows than allowed; one line with the file and line of the row, or the count by reason.
        """
        report = self.report
        for what, count in batch.chat_counts.items():
            report.chat_counts[what] = report.chat_counts.get(what, 0) + count
        report.several_forms += batch.several_forms
        new_keys = [key for key in batch.ignored_keys if key not in report.ignored_keys]
        report.ignored_keys = sorted(report.ignored_keys + new_keys[: MAX_IGNORED_KEYS + 1 - len(report.ignored_keys)])
        for raw, row in zip(raws, batch.rows, strict=True):
            if row is None:
                report.empty += 1
            elif isinstance(row, RejectedRow):
                self._count_bad(row)
            elif row.key in self.keys:
                report.duplicates += 1
            elif len(self.keys) == self.max_documents:
                report.stopped, report.unread_files = True, report.files - self.last_file - 1
                return
            else:
                self.keys.add(row.key)
                self.last_file = raw.file_index
                report.documents += 1
                report.forms[row.form] = report.forms.get(row.form, 0) + 1
                report.tokens += row.input_ids.size
                supervised = int(row.loss_mask[1:].sum())
                report.supervised += supervised
                report.unsupervised += supervised == 0
                yield row

    def finish(self) -> None:
        """ValueError if there is nothing to learn from."""
        report = self.report
        if not report.documents:
            bad = f", {report.describe_bad()}" if report.bad_rows else ""
            raise ValueError(
                f"the data sources hold no token: {report.files} files, {report.empty} empty documents{bad}"
            )
        if report.supervised == 0:
            raise ValueError(
                f"nothing to learn from: none of {report.documents} documents has loss_mask 1 behind its start"
            )

    def _count_bad(self, row: RejectedRow) -> None:
        report = self.report
        report.bad_rows[row.reason] = report.bad_rows.get(row.reason, 0) + 1
        report.first_bad.setdefault(row.reason, row.where)
        if self.max_bad_rows == 0:
            raise ValueError(
                f"{row.where}: {row.detail} (bad row: {row.reason}; data.max_bad_rows is 0: raise it to leave"
                " such rows out)"
            )
        self.check_bad()

    def check_bad(self) -> None:
        """ValueError if there are more bad rows than allowed."""
        if sum(self.report.bad_rows.values()) > self.max_bad_rows:
            raise ValueError(f"{self.report.describe_bad()}: data.max_bad_rows allows {self.max_bad_rows}")


def new_report(found: FoundFiles) -> SourceReport:
    """The count of what was found, before any of it is read."""
    return SourceReport(
        files=len(found.files),
        excluded=found.excluded,
        other_files=found.other,
        linked_folders=found.linked_folders,
    )


def read_documents(
    found: FoundFiles, encode: Callable[[Sequence[RawRow]], EncodedBatch], intake: Intake
) -> tuple[DocumentTable, list[str]]:
    """All documents of the files, in memory, and the name of each. Raises ValueError as `Intake` does."""
    shards: list[Shard] = []
    names: list[str] = []
    for raws in batches(read_rows(found.files)):
        kept = list(intake.take(raws, encode(raws)))
        shards.append(make_shard(kept, [raws[row.raw_index].source for row in kept]))
        names += [raws[row.raw_index].name for row in kept]
        if intake.report.stopped:
            break
    intake.finish()
    return DocumentTable.of([_joined(shards)]), names


def _joined(shards: Sequence[Shard]) -> Shard:
    """One shard of all of them."""
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]} if shards else make_shard([], [])


def load_documents(
    sources: Sequence[str | SourceSpec],
    *,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None = None,
    extensions: Sequence[str] = TEXT_EXTENSIONS,
    exclude: Sequence[str] = (),
    max_documents: int | None = None,
    max_bad_rows: int = 0,
    max_characters: int | None = None,
    make_chat: Callable[[], ChatEncoder] | None = None,
) -> tuple[list[Document], SourceReport]:
    """Read, tokenize and check every document that the sources name, as objects: for tools, and for few documents.

    A text file is a document with every token but the first supervised, without bos and eos; what looks like
    a special token in it stays text. Rows have one of the forms of row_encoder.py. Equal documents are kept once.

    Args:
        sources: see `find_files`, as are `extensions` and `exclude`.
        tokenizer, vocab_size, mask_token_id, max_characters, make_chat: see `RowEncoder`.
        max_documents: stop behind so many documents.
        max_bad_rows: leave out so many rows that cannot be trained on.

    Raises:
        ValueError: one line with file and line number.
    """
    found = find_files(sources, extensions, exclude)
    intake = Intake(new_report(found), max_documents, max_bad_rows)
    encode = RowEncoder(tokenizer, vocab_size, mask_token_id, max_characters, make_chat)
    table, names = read_documents(found, encode, intake)
    documents = []
    for name, start, length, key in zip(
        names, table.starts_D.tolist(), table.lengths_D.tolist(), table.keys_D32, strict=True
    ):
        ids, mask = table.store.piece(start, length)
        documents.append(Document(ids.long(), mask, name, key.tobytes().hex()))
    return documents, intake.report
