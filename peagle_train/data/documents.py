"""Documents: what the sources of a recipe hold, each once, and a count of everything that is left out.

Files are found in an order that is the same on every machine, examples are read from them in order, and the tokens of all
documents lie side by side in two flat arrays, in memory or mapped from files: millions of them cost no objects.
"""

import fnmatch
import glob
import gzip
import io
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peagle_train.config import HUB, Data, SourceSpec, parse_sources
from peagle_train.data.chat import ChatEncoder
from peagle_train.data.encode import EncodedBatch, EncodedExample, Encoder, RawExample
from peagle_train.data.messages import BadRow
from peagle_train.files import one_line

STDLIB = "stdlib"
"""The source that stands for the modules of the running Python's own library."""
TEXT_EXTENSIONS = (".py", ".txt", ".md")
EXAMPLE_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""Files of examples by their extension; any other file is one text."""
MAX_IGNORED_KEYS = 20
"""At most this many are reported; examples whose keys are data would have as many as there are examples."""
_SAVED = ("state.json", "dataset_dict.json")
"""A folder with one of these was written by `datasets.save_to_disk`."""
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_BATCH_CHARACTERS, _BATCH_EXAMPLES = 1_000_000, 256

# Which files the sources name.


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a data set that is read like one."""

    path: str
    """Where it is, in the user's own words."""
    name: str
    """`source/path/below/it`: the same on every machine."""
    format: str = "text"
    """text, jsonl, json, parquet, arrow, saved (a folder of `datasets.save_to_disk`) or hub (a name)."""
    source: int = 0
    """Which of the sources names it."""
    spec: SourceSpec | None = None
    """That source: split, name and streaming of a data set."""
    size: int = 0
    """Bytes; 0 where they are not known."""


@dataclass
class FoundFiles:
    """What the sources name."""

    files: list[SourceFile] = field(default_factory=list)
    """Sources in the order given; within one, by the path below it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are not read, by reason."""


def find_files(
    sources: Sequence[str | SourceSpec], extensions: Sequence[str] = TEXT_EXTENSIONS, exclude: Sequence[str] = ()
) -> FoundFiles:
    """Resolve files, folders, globs, `stdlib`, saved data sets and names of data sets.

    Folders are searched, at any depth, for `extensions` (or for those of the source's own format). Files and globs may
    also name text and example files of any known extension. `exclude` holds fnmatch patterns on the path below the
    source, with or without the source's own name before it.

    Raises:
        ValueError: a source that names nothing to read.
    """
    if isinstance(sources, str) or len(sources) == 0:
        raise ValueError(f"data sources are {sources!r}; give a non-empty list of files, folders, globs or {STDLIB}")
    found = FoundFiles()
    for number, source in enumerate(sources):
        spec = parse_sources([source])[0] if isinstance(source, str) else source
        new = FoundFiles()
        wanted = tuple(extensions) if spec.format in ("auto", "text") else (f".{spec.format}",)
        _add_source(new, number, spec, wanted, exclude)
        if not new.files:
            counts = ", ".join(f"{count} {what}" for what, count in new.left_out.items()) or "none at all"
            raise ValueError(
                f"data source {spec.describe()} has no file to read ({counts}): change data.exclude or data.extensions,"
                f" {' '.join(wanted)}"
                + (" (what ends in .gz is not read: unpack it)" if spec.describe().endswith(".gz") else "")
            )
        found.files += new.files
        found.left_out += new.left_out
    return found


def find_all(data: Data) -> dict[str, FoundFiles]:
    """The files of each role in the order in which they are read: `eval_sources`, if there are any, and `sources`."""
    roles = {"eval_sources": data.eval_sources, "sources": data.sources}
    return {
        role: find_files(parse_sources(items, f"data.{role}"), data.extensions, data.exclude)
        for role, items in roles.items()
        if items
    }


def _add_source(
    found: FoundFiles, number: int, spec: SourceSpec, extensions: tuple[str, ...], exclude: Sequence[str]
) -> None:
    if spec.path is None:
        found.files.append(SourceFile(str(spec.datasets), spec.describe(), "hub", number, spec))
        return
    source, path = spec.path, os.path.expanduser(spec.path)
    base = os.path.basename(os.path.abspath(path))
    is_saved = any(os.path.isfile(os.path.join(path, name)) for name in _SAVED)
    if spec.name is not None or (spec.split is not None and not is_saved):
        raise ValueError(f"data source {source} is no data set with splits and names: leave out split and name")
    if is_saved:
        found.files.append(SourceFile(path, base, "saved", number, spec))
        return
    explicit = (*extensions, *TEXT_EXTENSIONS, *EXAMPLE_FORMATS) if spec.format == "auto" else ("",)
    if source == STDLIB:
        root, prefix, extensions = sysconfig.get_paths()["stdlib"], STDLIB, (".py",)
        below = list(_walk(root, found, _NOT_LIBRARY))
    elif os.path.isdir(path):
        root, prefix = path, base
        below = list(_walk(root, found))
    elif os.path.isfile(path):
        root, prefix, extensions = os.path.dirname(path), "", explicit
        below = [base]
    elif glob.has_magic(path):
        root, extensions = path, explicit
        while glob.has_magic(root):
            root = os.path.dirname(root)
        prefix = os.path.basename(os.path.abspath(root))
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        below = [os.path.relpath(match, root or os.curdir) for match in matches]
    else:
        raise ValueError(
            f"data source {source} does not exist; give a file, a folder, a glob, {STDLIB} or {HUB}NAME (a data set)"
        )
    for item in sorted(item.replace(os.sep, "/") for item in below):
        name = f"{prefix}/{item}" if prefix else item
        if not item.endswith(extensions):
            found.left_out["files of other types"] += 1
        elif any(fnmatch.fnmatchcase(text, pattern) for text in (item, name) for pattern in exclude):
            found.left_out["excluded files"] += 1
        else:
            full = os.path.join(root, item)
            kind = EXAMPLE_FORMATS.get(os.path.splitext(item)[1], "text") if spec.format == "auto" else spec.format
            size = os.path.getsize(full) if os.path.exists(full) else 0  # a broken link is an error when it is read
            found.files.append(SourceFile(full, name, kind, number, spec, size))


def _walk(root: str, found: FoundFiles, skipped: Sequence[str] = ()) -> Iterator[str]:
    """Paths below `root` of all files in it, except in folders named in `skipped`; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found.left_out["linked folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)


# What is in them: examples, in order.


def read_examples(files: Sequence[SourceFile]) -> Iterator[RawExample]:
    """Every example in the order of the files; empty lines are none.

    Raises:
        ValueError: one line, for a file that cannot be read at all.
    """
    for index, file in enumerate(files):
        path = file.path.encode("utf-8", "backslashreplace").decode()
        if file.format == "text":
            yield RawExample(index, file.source, path, file.name, b"".join(_lines(file)), "text")
            continue
        contents: Iterable[Any]
        if file.format == "jsonl" or (file.format == "json" and not _is_list(file)):
            unit, kind, contents = "line", "line", _lines(file)
        elif file.format == "json":
            unit, kind, contents = "row", "line", _list_items(file)
        else:
            unit, kind, contents = "row", "table", _table_rows(file)
        for number, content in enumerate(contents, start=1):
            if not isinstance(content, bytes) or content.strip():
                where, name = f"{path}, {unit} {number}", f"{file.name}:{number}"
                yield RawExample(index, file.source, where, name, content, kind)


def in_batches(examples: Iterable[RawExample]) -> Iterator[list[RawExample]]:
    """Groups that are worth tokenizing at once. They depend on the examples alone."""
    batch: list[RawExample] = []
    size = 0
    for example in examples:
        batch.append(example)
        is_bytes = isinstance(example.content, bytes)
        size += 1 + len(example.content) if is_bytes else _BATCH_CHARACTERS // _BATCH_EXAMPLES
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _lines(file: SourceFile) -> Iterator[bytes]:
    opener: Any = gzip.open if file.path.endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            yield from stream
    except (OSError, EOFError) as error:  # gzip raises both on what is no gzip or is cut
        raise ValueError(f"cannot read {file.path}: {getattr(error, 'strerror', None) or error}") from None


def _is_list(file: SourceFile) -> bool:
    """Whether a .json file is one list of examples, and not lines as in .jsonl."""
    first = next((line.strip() for line in _lines(file) if line.strip()), b"")
    return first.removeprefix(b"\xef\xbb\xbf").startswith(b"[")


def _list_items(file: SourceFile) -> Sequence[Any]:
    content = b"".join(_lines(file))
    try:
        items: list[Any] = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return [content]  # one bad row, which is reported where lines are parsed
    return items


def _table_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Rows of Parquet and Arrow files and of data sets, as mappings, a few hundred in memory at a time."""
    try:
        for batch in _open_table(file).iter(batch_size=_BATCH_EXAMPLES):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except Exception as error:  # pyarrow, datasets and the hub's client each raise types of their own
        first_line = one_line(str(error).split("\n")[0], 300)
        raise ValueError(f"cannot read {file.path} ({file.format}): {type(error).__name__}: {first_line}") from error


def _open_table(file: SourceFile) -> Any:
    import datasets  # takes seconds, and most runs read no table
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    assert file.spec is not None
    split = file.spec.split or "train"
    if file.format in ("parquet", "arrow"):
        # Streaming reads the file itself; without it `datasets` would first copy it to its cache.
        pattern = glob.escape(file.path)  # which the name would otherwise be taken for
        # Given a size, it does not take that of the first row group, which is 0 in a parquet file without rows.
        size = {"batch_size": _BATCH_EXAMPLES} if file.format == "parquet" else {}
        return datasets.load_dataset(file.format, data_files=pattern, split="train", streaming=True, **size)
    if file.format == "hub":
        return datasets.load_dataset(file.path, file.spec.name, split=split, streaming=file.spec.streaming)
    saved = datasets.load_from_disk(file.path).with_format(None)  # it may have been saved as arrays or tensors
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has no split {split}, only {', '.join(saved)}")
        return saved[split]
    if file.spec.split is not None:
        raise ValueError("it has no splits: leave out split")
    return saved


# What becomes of them.


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
    forms: Counter[str] = field(default_factory=Counter)
    """Documents kept, by the form of their example; `file` is a whole text file."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are not read, and documents that are empty or equal to an earlier one."""
    bad_rows: Counter[str] = field(default_factory=Counter)
    """Examples that cannot be trained on, by reason."""
    first_bad: dict[str, str] = field(default_factory=dict)
    """File and line of the first one of each reason, and what is wrong with it."""
    notes: Counter[str] = field(default_factory=Counter)
    """What chats had that was not learned, dropped or peculiar, and more; duplicates are counted too."""
    ignored_keys: list[str] = field(default_factory=list)
    """Keys of examples that nothing reads: the first MAX_IGNORED_KEYS, and one more if there are more."""
    unread_files: int | None = None
    """Files that give no document because of max_documents; None if it left out nothing."""

    def describe(self) -> str:
        """One line: what was kept, then every count of what was not."""
        text = f"{self.documents} documents of {self.files} files"
        if set(self.forms) - {"file"}:
            text += f" ({', '.join(f'{count} {form}' for form, count in self.forms.items())})"
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        text += "".join(f", {count} {what} left out" for what, count in sorted(self.left_out.items()) if count)
        if self.bad_rows:
            text += f", {self.describe_bad()} left out"
        text += "".join(f", {count} {what}" for what, count in sorted(self.notes.items()) if count)
        if self.unread_files is not None:
            text += f", stopped at max_documents with {self.unread_files} files unread"
        if not self.ignored_keys:
            return text
        more = " and others" if len(self.ignored_keys) > MAX_IGNORED_KEYS else ""
        return text + f", keys ignored: {', '.join(self.ignored_keys[:MAX_IGNORED_KEYS])}{more}"

    def describe_bad(self) -> str:
        """The bad rows, by reason, with the first of each."""
        counts = [f"{count} {reason} (first: {self.first_bad[reason]})" for reason, count in self.bad_rows.items()]
        return f"{sum(self.bad_rows.values())} bad rows: {'; '.join(counts)}"

    def check_bad(self, max_bad_rows: int, what: str = "") -> None:
        """ValueError if there are more bad rows than `max_bad_rows`."""
        if sum(self.bad_rows.values()) > max_bad_rows:
            raise ValueError(
                f"{what}{self.describe_bad()}: data.max_bad_rows is {max_bad_rows}; raise it to leave such rows out"
            )


Encoded = Iterable[tuple[list[RawExample], EncodedBatch]]
"""Batches of examples with what became of them, in order."""


def keep_documents(
    encoded: Encoded, report: SourceReport, max_documents: int | None, max_bad_rows: int
) -> Iterator[tuple[RawExample, EncodedExample]]:
    """Each document once, in order; everything else is counted in `report`.

    Raises:
        ValueError: more than `max_bad_rows` bad rows, or nothing to learn from.
    """
    keys, last_file = set[bytes](), -1
    for raws, batch in encoded:
        report.notes.update(batch.notes)
        new_keys = [key for key in batch.ignored_keys if key not in report.ignored_keys]
        report.ignored_keys = sorted(report.ignored_keys + new_keys[: MAX_IGNORED_KEYS + 1 - len(report.ignored_keys)])
        for raw, example in zip(raws, batch.examples, strict=True):
            if example is None:
                report.left_out["empty documents"] += 1
            elif isinstance(example, BadRow):
                report.bad_rows[example.reason] += 1
                report.first_bad.setdefault(example.reason, f"{raw.where}: {one_line(example.detail)}")
                report.check_bad(max_bad_rows)
            elif example.key in keys:
                report.left_out["duplicate documents"] += 1
            elif len(keys) == max_documents:
                report.unread_files = report.files - last_file - 1
                break
            else:
                keys.add(example.key)
                last_file = raw.file_index
                report.documents += 1
                report.forms[example.form] += 1
                report.tokens += example.input_ids.size
                report.supervised += int(example.loss_mask[1:].sum())
                yield raw, example
        if report.unread_files is not None:
            break
    if not report.supervised:
        raise ValueError(f"the data sources hold nothing to learn from: {report.describe()}")


class TokenStore:
    """Token ids (int32 [n]) and loss masks (uint8 [n]) of all documents side by side: in memory, or mapped from files.

    A store in files that is sent to another process is mapped there again, not copied.
    """

    def __init__(self, ids_n: np.ndarray, mask_n: np.ndarray, path: Path | None = None) -> None:
        self.ids_n, self.mask_n, self.path = ids_n, mask_n, path

    @staticmethod
    def files(path: Path) -> tuple[Path, Path]:
        """`PATH-ids.bin` and `PATH-mask.bin`."""
        return path.with_name(path.name + "-ids.bin"), path.with_name(path.name + "-mask.bin")

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """The store in `files(path)`."""
        ids, mask = cls.files(path)
        return cls(np.memmap(ids, np.int32, "r"), np.memmap(mask, np.uint8, "r"), path)

    def __reduce__(self) -> Any:
        return (TokenStore, (self.ids_n, self.mask_n)) if self.path is None else (TokenStore.open, (self.path,))


@dataclass(frozen=True)
class Documents:
    """Documents in order: what is known of each, and where its tokens are. They fill the store."""

    store: TokenStore
    """The tokens."""
    lengths_D: np.ndarray
    """int64, each >= 1."""
    sources_D: np.ndarray
    """int64: which source of the recipe."""
    keys_D32: np.ndarray
    """uint8: sha256 of ids and mask."""

    @property
    def starts_D(self) -> np.ndarray:
        """int64: a document's first token in the store."""
        return self.lengths_D.cumsum() - self.lengths_D

    def __len__(self) -> int:
        return self.lengths_D.size


def store_documents(kept: Iterable[tuple[RawExample, EncodedExample]], path: Path | None = None) -> Documents:
    """Put documents side by side, in memory or in `TokenStore.files(path)`."""
    lengths, sources, keys = list[int](), list[int](), bytearray()
    streams: Any = (
        [io.BytesIO(), io.BytesIO()] if path is None else [file.open("wb") for file in TokenStore.files(path)]
    )
    for raw, example in kept:
        streams[0].write(example.input_ids.tobytes())
        streams[1].write(example.loss_mask.tobytes())
        lengths.append(example.input_ids.size)
        sources.append(raw.source)
        keys += example.key
    if path is None:
        ids, mask = (stream.getbuffer() for stream in streams)
        store = TokenStore(np.frombuffer(ids, np.int32), np.frombuffer(mask, np.uint8))
    else:
        for stream in streams:
            stream.close()
        store = TokenStore.open(path)
    keys_D32 = np.frombuffer(keys, np.uint8).reshape(-1, 32)
    return Documents(store, np.array(lengths, np.int64), np.array(sources, np.int64), keys_D32)


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
    a special token in it stays text. Examples have one of the forms of encode.py. Equal documents are kept once.

    Args:
        sources: see `find_files`, as are `extensions` and `exclude`.
        tokenizer, vocab_size, mask_token_id, max_characters, make_chat: see `Encoder`.
        max_documents: read at most this many documents.
        max_bad_rows: leave out at most this many examples that cannot be trained on.

    Raises:
        ValueError: one line with file and line number.
    """
    found = find_files(sources, extensions, exclude)
    report = SourceReport(len(found.files), left_out=found.left_out)
    encode = Encoder(tokenizer, vocab_size, mask_token_id, max_characters, make_chat)
    encoded = ((raws, encode(raws)) for raws in in_batches(read_examples(found.files)))
    documents = [
        Document(torch.from_numpy(made.input_ids).long(), torch.from_numpy(made.loss_mask), raw.name, made.key.hex())
        for raw, made in keep_documents(encoded, report, max_documents, max_bad_rows)
    ]
    return documents, report
