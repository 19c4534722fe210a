"""Raw rows from files and data sets, in order: a line, a text or a mapping each. What is in them is looked at elsewhere."""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peagle_train.data.files import SourceFile

_BATCH_CHARACTERS = 1_000_000
_BATCH_ROWS = 256


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it."""

    file_index: int
    """Of the files that are read."""
    source: int
    """Of the sources of the recipe."""
    where: str
    """File and line, for messages: printable, whatever the file's name is."""
    name: str
    """The same on every machine."""
    content: Any
    """Bytes of a line of JSON or of a whole text, or a row's values."""
    kind: str
    """text (a whole file), line (of JSON, parsed or not) or table (null stands for a field that is not there)."""


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
    from peagle_train.data.tables import table_rows

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


def clip(text: str) -> str:
    """`text` in one short line."""
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."
