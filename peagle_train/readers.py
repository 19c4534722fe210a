"""Raw documents from files: text, tokenized whole, and `.jsonl` rows of ids. Ids are checked elsewhere."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peagle_train.files import JSONL, SourceFile

_BATCH_CHARACTERS = 1_000_000
_MISREAD_KEYS = ("labels", "attention_mask", "assistant_mask", "assistant_masks")
"""Keys that say which tokens count, in other formats. Ignoring them would train on what they exclude."""


@dataclass(frozen=True)
class RawDocument:
    """A document as its file has it."""

    file_index: int
    """Of the files that are read."""
    where: str
    """File and line, for messages."""
    name: str
    """The same on every machine."""
    ids: list[Any]
    """Token ids, if the file is right."""
    mask: list[Any] | None
    """0 or 1 for each, if the file is right; None if it has no mask."""


def read_files(files: Sequence[SourceFile], tokenizer: Any, ignored_keys: set[str]) -> Iterator[RawDocument]:
    """Documents in the order of the files; adds to `ignored_keys` what rows have besides ids and mask.

    Raises:
        ValueError: one line with file and line number.
    """
    batch: list[tuple[int, SourceFile, str]] = []
    characters = 0
    for index, file in enumerate(files):
        if file.path.endswith(JSONL):
            yield from _tokenized(batch, tokenizer)
            batch, characters = [], 0
            yield from _read_jsonl(index, file, ignored_keys)
            continue
        if tokenizer is None:
            raise ValueError(f"{file.path} is text, which takes a tokenizer; without one give {JSONL} files")
        text = _decode(b"".join(_lines(file)), file.path, 1)
        batch.append((index, file, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield from _tokenized(batch, tokenizer)
            batch, characters = [], 0
    yield from _tokenized(batch, tokenizer)


def _tokenized(batch: list[tuple[int, SourceFile, str]], tokenizer: Any) -> Iterator[RawDocument]:
    if not batch:
        return
    encoded = tokenizer(
        [text for _, _, text in batch],
        add_special_tokens=False,
        # Text that spells a special token, as tokenizer sources do, must not become that token.
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        # No warning of documents longer than the model's window: they are split later, on purpose.
        verbose=False,
    )
    for (index, file, _), ids in zip(batch, encoded["input_ids"], strict=True):
        yield RawDocument(index, file.path, file.name, ids, None)


def _read_jsonl(index: int, file: SourceFile, ignored_keys: set[str]) -> Iterator[RawDocument]:
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file.path}, line {number}"
        text = _decode(line, file.path, number)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("input_ids"), list):
            raise ValueError(
                f'{where}: give {{"input_ids": [...], "loss_mask": [...]}} instead of {clip(text.strip())}'
            )
        misread = [key for key in _MISREAD_KEYS if key in row]
        if misread:
            raise ValueError(f"{where}: {misread[0]} is not read: remove it, and give loss_mask instead")
        mask = row.get("loss_mask")
        if "loss_mask" in row and not isinstance(mask, list):
            raise ValueError(f"{where}: loss_mask is {clip(repr(mask))}; give a list of 0 and 1, or leave it out")
        ignored_keys.update(key for key in row if key not in ("input_ids", "loss_mask"))
        yield RawDocument(index, where, f"{file.name}:{number}", row["input_ids"], mask)


def _lines(file: SourceFile) -> Iterator[bytes]:
    try:
        with open(file.path, "rb") as stream:
            yield from stream
    except OSError as error:
        raise ValueError(f"cannot read {file.path}: {error.strerror or error}") from None


def _decode(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def clip(text: str) -> str:
    """`text` in one short line."""
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."
