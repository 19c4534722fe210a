"""Documents: what the sources of a recipe hold, each once, and a count of everything that is skipped.

Files are found in an order that is the same on every machine, examples are read from them in order, and the tokens of all
documents lie side by side in two flat arrays, in memory or mapped from files: millions of them cost no objects.
"""

import codecs
import fnmatch
import glob
import gzip
import io
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peagle_train.config import HUB, Data, SourceSpec, parse_sources
from peagle_train.data.encode import EncodedExample, Encoder, RawExample
from peagle_train.data.messages import BadRow
from peagle_train.files import one_line

STDLIB = "stdlib"  # the source that stands for the modules of the running Python's own library
TEXT_EXTENSIONS = (".py", ".txt", ".md")
EXAMPLE_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
EXAMPLE_FORMATS |= {".jsonl.gz": "jsonl", ".json.gz": "json"}
"""Files of examples by how their names end; any other file is one text."""
_NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_TABLE_ROWS = 256  # in memory at a time
Kept = tuple[RawExample, EncodedExample]


class SourceFile(NamedTuple):
    """A file to read, or a data set that is read like one."""

    path: str  # where it is, in the user's own words
    name: str  # `source/path/below/it`: the same on every machine
    format: str = "text"  # text, jsonl, json, parquet, arrow or hub (a name)
    spec: SourceSpec = SourceSpec()  # the source that names it: its weight, a data set's split and name


@dataclass
class SourceReport:
    """What was read, and what was skipped."""

    files: list[SourceFile] = field(default_factory=list)  # by source, then by the path below it
    examples: int = 0  # read
    documents: int = 0  # kept, as are those of the next three
    tokens: int = 0
    supervised: int = 0  # drafter rows with a loss: tokens with mask 1, without the first of each document
    forms: Counter[str] = field(default_factory=Counter)  # by the form of their example
    notes: Counter[str] = field(default_factory=Counter)  # what was skipped but bad rows, and see `EncodedChat`
    bad_rows: Counter[str] = field(default_factory=Counter)  # examples that cannot be trained on, by reason
    first_bad: dict[str, str] = field(default_factory=dict)  # of each reason: file and line, and what is wrong with it

    def describe(self) -> str:
        """One line: what was kept, then every count of what was not."""
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items())
        text = f"{self.documents} documents of {len(self.files)} files"
        text += f" ({forms})" if set(self.forms) - {"file"} else ""
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        text += "".join(f", {count} {what}" for what, count in sorted(self.notes.items()))
        bad = [f"{count} {reason} (first: {self.first_bad[reason]})" for reason, count in self.bad_rows.items()]
        return text + (f", skipped {self.bad_rows.total()} bad rows: {'; '.join(bad)}" if bad else "")

    def mistake(self, max_bad_rows: int | str) -> str | None:
        """Why a run would stop, if it would; `max_bad_rows` is a count or, as in "1%", a share of all examples."""
        allowed: Any = max_bad_rows
        if isinstance(max_bad_rows, str):
            allowed = Fraction(max_bad_rows[:-1]) / 100 * self.examples
        if (bad := self.bad_rows.total()) > allowed:
            return f"{bad} bad rows, but data.max_bad_rows is {max_bad_rows}: fix them, or allow more (as in 9, or 1%)"
        return None if self.supervised else "nothing to learn from in the data sources"


def find_all(data: Data) -> dict[str, SourceReport]:
    """The files of each role in the order in which they are read: `eval_sources`, if there are any, and `sources`. What
    a source may name is in docs/data.md. ValueError for one that names nothing to read.
    """
    found = {}
    for role, items in (("eval_sources", data.eval_sources), ("sources", data.sources)):
        report = SourceReport()
        for spec in parse_sources(items, f"data.{role}"):
            skipped = Counter[str]()
            files = list(_files_of(spec, data, skipped))
            if not files:
                counts = ", ".join(f"{count} {what}" for what, count in skipped.items()) or "none at all"
                keys = f"data.exclude or data.extensions ({' '.join(data.extensions)})"
                raise ValueError(f"data source {spec.describe()} has no file to read ({counts}): change {keys}")
            report.files += files
            report.notes += skipped
        if items:
            found[role] = report
    return found


def _files_of(spec: SourceSpec, data: Data, skipped: Counter[str]) -> Iterator[SourceFile]:
    if spec.path is None:
        yield SourceFile(str(spec.datasets), spec.describe(), "hub", spec)
        return
    root, extensions = os.path.expanduser(spec.path), tuple(data.extensions)
    is_file = os.path.isfile(root)
    if spec.path == STDLIB:
        root, extensions = sysconfig.get_paths()["stdlib"], (".py",)
        below = list(_walk(root, skipped, _NOT_LIBRARY))
    elif os.path.isdir(root):
        below = list(_walk(root, skipped))
        if "dataset_dict.json" in below:
            raise ValueError(f"data source {spec.path} is a data set of several splits: give the folder of one of them")
        if {"state.json", "dataset_info.json"} <= {*below}:  # a saved data set: not what `datasets` caches beside it
            state = json.loads(Path(root, "state.json").read_bytes())
            below = [file["filename"] for file in state.get("_data_files", [])]
    else:
        extensions = (*extensions, *TEXT_EXTENSIONS, *EXAMPLE_FORMATS)
        matches = [root] if is_file else [*filter(os.path.isfile, glob.glob(root, recursive=True))]
        if not matches and not glob.has_magic(root):
            raise ValueError(f"data source {spec.path} does not exist; a data set's name is given as {HUB}NAME")
        root = os.path.dirname(root)
        while not is_file and glob.has_magic(root):
            root = os.path.dirname(root)
        below = [os.path.relpath(match, root or os.curdir) for match in matches]
    prefix = f"{STDLIB if spec.path == STDLIB else os.path.basename(os.path.abspath(root))}/"
    for item in sorted(below):
        name = item if is_file else prefix + item  # wherever the file lies
        if not item.endswith(extensions):
            skipped["files of other types skipped"] += 1
        elif any(fnmatch.fnmatchcase(text, pattern) for text in (item, name) for pattern in data.exclude):
            skipped["excluded files skipped"] += 1
        else:
            kinds = (kind for ending, kind in EXAMPLE_FORMATS.items() if item.endswith(ending))
            yield SourceFile(os.path.join(root, item), name, next(kinds, "text"), spec)


def _walk(root: str, skipped: Counter[str], not_in: Sequence[str] = ()) -> Iterator[str]:
    """Paths below `root` of all files in it, except in folders named in `not_in`; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise ValueError(f"data source {root}: {error.filename} cannot be read: {error.strerror}") from None

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in not_in]
        skipped.update("linked folders skipped" for name in subfolders if os.path.islink(os.path.join(folder, name)))
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)


def read_examples(files: Sequence[SourceFile]) -> Iterator[RawExample]:
    """Every example in the order of the files; empty lines are none. ValueError, one line, for an unreadable file."""
    for file in files:
        path = file.path.encode("utf-8", "backslashreplace").decode()
        if file.format == "text":
            yield RawExample(file.spec.weight, path, file.name, b"".join(_lines(file)), is_text=True)
            continue
        read: Any = {"jsonl": _lines, "json": _json_items}.get(file.format, _table_rows)
        unit = "line" if file.format == "jsonl" else "row"
        for number, content in enumerate(read(file), start=1):
            if not isinstance(content, bytes) or content.strip():
                yield RawExample(file.spec.weight, f"{path}, {unit} {number}", f"{file.name}:{number}", content)


def _lines(file: SourceFile) -> Iterator[bytes]:
    opener: Any = gzip.open if file.path.endswith(".gz") else open
    try:
        with opener(file.path, "rb") as stream:
            yield from stream
    except (OSError, EOFError) as error:  # gzip raises both on a file of another kind or a cut one
        raise ValueError(f"cannot read {file.path}: {getattr(error, 'strerror', None) or error}") from None


def _json_items(file: SourceFile) -> list[bytes]:
    """The items of one list as lines, or lines as in .jsonl."""
    lines = list(_lines(file))
    content = b"".join(lines).removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        return lines
    try:
        return [json.dumps(item).encode() for item in json.loads(content)]
    except (ValueError, RecursionError):
        return [content]  # one bad row, which is reported where lines are parsed


def _table_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Rows of Parquet and Arrow files and of data sets, as mappings."""
    try:
        import datasets  # takes seconds, and most runs read no table

        datasets.disable_progress_bars()
        if file.format == "hub":
            table: Any = datasets.load_dataset(file.path, file.spec.name, split=file.spec.split or "train")
        else:
            # Streaming reads the file itself; without it `datasets` would first copy it to its cache. Given a size, it
            # does not take that of the first row group, which is 0 in a parquet file without rows.
            how = {"batch_size": _TABLE_ROWS} if file.format == "parquet" else {}
            path = glob.escape(file.path)
            table = datasets.load_dataset(file.format, data_files=path, split="train", streaming=True, **how)
        for batch in table.iter(batch_size=_TABLE_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except Exception as error:  # pyarrow, datasets and the hub's client each raise types of their own
        raise ValueError(f"cannot read {file.path} ({type(error).__name__}: {one_line(error, 300)})") from error


def read_documents(report: SourceReport, encoder: Encoder, stops: bool = True) -> Iterator[Kept]:
    """Each document of the report's files once, in order; everything else is counted in it.

    A text file is a document with every token but the first supervised, without bos and eos; what looks like a special
    token in it stays text. Examples have one of the forms of encode.py. ValueError, one line, for a file that cannot be
    read and, with `stops`, for the report's `mistake`.
    """
    keys, max_bad_rows = set[bytes](), encoder.data.max_bad_rows
    for raw, example in encoder.encode(read_examples(report.files)):
        report.examples += 1
        if example is None:
            report.notes["empty documents skipped"] += 1
        elif isinstance(example, BadRow):
            report.bad_rows[example.reason] += 1
            report.first_bad.setdefault(example.reason, f"{raw.where}: {one_line(example.detail)}")
            if stops and isinstance(max_bad_rows, int) and report.bad_rows.total() > max_bad_rows:
                break
        elif example.key in keys:
            report.notes["duplicate documents skipped"] += 1
        else:
            keys.add(example.key)
            report.documents += 1
            report.forms[example.form] += 1
            report.notes.update(example.notes)
            report.tokens += example.input_ids.size
            report.supervised += int(example.loss_mask[1:].sum())
            yield raw, example
    if stops and (mistake := report.mistake(max_bad_rows)):
        raise ValueError(f"{mistake}: {report.describe()} (peagle-train check-data counts all that is bad)")


class TokenStore(NamedTuple):
    """All documents side by side, in memory or mapped from files."""

    ids_n: np.ndarray  # int32
    mask_n: np.ndarray  # uint8: their loss masks


def open_tokens(path: Path) -> TokenStore:
    """PATH-ids.bin and PATH-mask.bin, mapped into memory."""
    return TokenStore(np.memmap(f"{path}-ids.bin", np.int32, "r"), np.memmap(f"{path}-mask.bin", np.uint8, "r"))


@dataclass(frozen=True)
class Documents:
    """Documents in order: what is known of each, and where its tokens are. They fill the store."""

    store: TokenStore
    lengths_D: np.ndarray  # int64, each >= 1
    weights_D: np.ndarray  # float64: their sources'
    keys_D32: np.ndarray  # uint8: sha256 of ids and mask

    @property
    def starts_D(self) -> np.ndarray:
        """int64: a document's first token in the store."""
        return self.lengths_D.cumsum() - self.lengths_D


def store_documents(kept: Iterable[Kept], path: Path | None = None) -> Documents:
    """Put documents side by side, in memory or where `open_tokens(path)` finds them."""
    lengths, weights, keys = list[int](), list[float](), bytearray()
    streams: Any = [io.BytesIO() if path is None else open(f"{path}-{what}.bin", "wb") for what in ("ids", "mask")]
    with streams[0] as ids, streams[1] as mask:
        for raw, example in kept:
            ids.write(example.input_ids.tobytes())
            mask.write(example.loss_mask.tobytes())
            lengths.append(example.input_ids.size)
            weights.append(raw.weight)
            keys += example.key
        if path is None:
            store = TokenStore(np.frombuffer(ids.getvalue(), np.int32), np.frombuffer(mask.getvalue(), np.uint8))
    if path is not None:
        store = open_tokens(path)
    keys_D32 = np.frombuffer(keys, np.uint8).reshape(-1, 32)
    return Documents(store, np.array(lengths, np.int64), np.array(weights, np.float64), keys_D32)
