"""From raw rows to checked token ids with their loss masks. Each row is a document, a bad row, or empty.

The form of a row is the first of these whose keys it has, whatever else is in it:
    input_ids [, loss_mask]             ids as they are
    messages                            a chat
    conversations                       a chat (ShareGPT)
    prompt and completion               a chat of two parts, or two plain texts
    text                                a text, every token but the first learned from
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peagle_train.data.chat import ChatEncoder
from peagle_train.data.messages import BadRow, as_in_json, check_text, keys_read, messages_of, strings_in


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


def clip(text: str) -> str:
    """`text` in one short line."""
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."


FORMS = ("input_ids", "messages", "conversations", "prompt", "text")
"""In the order in which they are looked for."""
_MISREAD_KEYS = ("labels", "attention_mask", "assistant_mask", "assistant_masks")
"""Keys that say which tokens count, in other formats. Ignoring them would train on what they exclude."""


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row of at least one token."""

    raw_index: int
    """Of the batch's rows."""
    form: str
    """One of FORMS, or `file`: a whole text file."""
    input_ids: np.ndarray
    """int32 [n], n >= 1. An array, which goes from a worker process to the main one without a file handle."""
    loss_mask: np.ndarray
    """uint8 [n], 0 or 1."""
    key: bytes
    """sha256 of ids and mask: the same on every machine."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be trained on."""

    raw_index: int
    """Of the batch's rows."""
    where: str
    """File and line."""
    reason: str
    """What it is counted by: see `BadRow`."""
    detail: str
    """What is wrong with this one."""


@dataclass
class EncodedBatch:
    """What became of a batch of rows, in their order."""

    rows: list[EncodedRow | RejectedRow | None]
    """None stands for a row without a token."""
    several_forms: int = 0
    """Rows that had the keys of more than one form."""
    ignored_keys: dict[str, None] = field(default_factory=dict)
    """Keys of rows that were not looked at, each once, in the order of the rows; short and printable."""
    chat_counts: Counter[str] = field(default_factory=Counter)
    """What chats had that was not learned, left out or peculiar: see `EncodedChat`."""


class RowEncoder:
    """Turns batches of raw rows into ids and masks.

    Args:
        tokenizer: transformers' tokenizer; None if all rows are ids.
        vocab_size: the target's; ids lie in 0..vocab_size - 1.
        mask_token_id: the drafter's mask token, which no row may hold.
        max_characters: a row with a longer string is a bad row; None: any length.
        make_chat: makes the `ChatEncoder` when the first chat comes; None: chats are bad rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        mask_token_id: int | None,
        max_characters: int | None = None,
        make_chat: Callable[[], ChatEncoder] | None = None,
    ) -> None:
        self.tokenizer, self.vocab_size, self.mask_token_id = tokenizer, vocab_size, mask_token_id
        self.max_characters, self.make_chat = max_characters, make_chat
        self.chat: ChatEncoder | None = None

    def __call__(self, raws: Sequence[RawRow]) -> EncodedBatch:
        batch = EncodedBatch([None] * len(raws))
        texts: dict[int, tuple[str, str]] = {}
        for i, raw in enumerate(raws):
            try:
                form, content = self._read(raw, batch)
                if isinstance(content, str):
                    texts[i] = form, content
                else:
                    batch.rows[i] = self._checked(i, form, *content)
            except BadRow as error:
                batch.rows[i] = _rejected(i, raw, error)
            except RecursionError:
                batch.rows[i] = _rejected(i, raw, BadRow("wrong types", "values are nested too deeply"))
        tokenized = self._tokenized([text for _, text in texts.values()])
        for (i, (form, _)), ids in zip(texts.items(), tokenized, strict=True):
            try:
                batch.rows[i] = self._checked(i, form, ids, None)
            except BadRow as error:
                batch.rows[i] = _rejected(i, raws[i], error)
        return batch

    def _read(self, raw: RawRow, batch: EncodedBatch) -> tuple[str, str | tuple[Sequence[Any], Sequence[Any] | None]]:
        """The row's form, and its text that is still to be tokenized, or its ids and mask."""
        if raw.kind == "text":
            self._need_tokenizer(raw, "text")
            return "file", _decode(raw.content)
        row = _parse(raw.content) if isinstance(raw.content, bytes) else raw.content
        form = self._form(row, raw.kind == "table")
        if raw.kind == "table":
            row = as_in_json(row)
        read = {"input_ids": {"input_ids", "loss_mask"}, "text": {"text"}}.get(form) or keys_read(row)
        batch.ignored_keys.update(dict.fromkeys(clip(str(key)) for key in row if key not in read))
        batch.several_forms += len(_forms_of(row)) > 1
        if form == "input_ids":
            return form, _ids_of(row)
        self._need_tokenizer(raw, f"a row with {form}")
        if self.max_characters is not None:
            longest = max((len(text) for text in strings_in([row[key] for key in read if key in row])), default=0)
            if longest > self.max_characters:
                detail = f"a text of {longest} characters; data.max_characters is {self.max_characters}"
                raise BadRow("text too long", detail)
        if form == "text":
            if not isinstance(row["text"], str):
                reason = "null field" if row["text"] is None else "wrong types"
                raise BadRow(reason, f"text is {clip(repr(row['text']))}; give a string")
            check_text(row["text"])
            return form, row["text"]
        conversation = messages_of(row)
        if self.chat is None:
            if self.make_chat is None:
                raise BadRow("chats are not read", f"{form}: only ids and texts are read here")
            self.chat = self.make_chat()
        encoded = self.chat.encode(conversation)
        if not any(encoded.loss_mask[1:]):
            raise BadRow("no supervised token", "the chat has no token to learn from behind its first")
        batch.chat_counts.update(encoded.counts)
        return form, (encoded.input_ids, encoded.loss_mask)

    def _form(self, row: Any, is_table: bool) -> str:
        if not isinstance(row, dict):
            raise BadRow("no known form", f'give {{"{FORMS[1]}": [...]}} or the like instead of {clip(repr(row))}')
        forms = _forms_of({key: value for key, value in row.items() if not is_table or value is not None})
        if forms:
            return forms[0]
        if is_table and _forms_of(row):
            raise BadRow("null field", f"{', '.join(_forms_of(row))}: null in this row")
        wanted = "input_ids, messages, conversations, prompt and completion, or text"
        raise BadRow(
            "no known form", f"give {{...}} with {wanted}, instead of the keys {clip(', '.join(map(str, row)))}"
        )

    def _need_tokenizer(self, raw: RawRow, what: str) -> None:
        if self.tokenizer is None:
            raise ValueError(f"{raw.where} is {what}, which takes a tokenizer; without one give rows of input_ids")

    def _tokenized(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            # Text that spells a special token, as tokenizer sources do, must not become that token.
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            # No warning of documents longer than the model's window: they are split later, on purpose.
            verbose=False,
        )
        return list(encoded["input_ids"])

    def _checked(self, index: int, form: str, ids: Sequence[Any], mask: Sequence[Any] | None) -> EncodedRow | None:
        """The document, or None if it has no token; BadRow on what is not allowed in one."""
        mask = [int(position > 0) for position in range(len(ids))] if mask is None else mask
        if len(mask) != len(ids):
            raise BadRow("wrong loss_mask", f"{len(ids)} input_ids but {len(mask)} in loss_mask; they must match")
        if not ids:
            return None
        # The first test is the fast one: a data set has tens of millions of tokens.
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= self.vocab_size:
            at = next(i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < self.vocab_size)
            raise BadRow(
                "id out of range" if type(ids[at]) is int else "null field" if ids[at] is None else "wrong types",
                f"input_ids[{at}] is {clip(repr(ids[at]))}; ids are integers in 0..{self.vocab_size - 1},"
                " the target's vocabulary",
            )
        if self.mask_token_id in ids:
            raise BadRow(
                "holds the mask token",
                f"input_ids[{ids.index(self.mask_token_id)}] is the mask token {self.mask_token_id}, which"
                " must never occur in the data: set draft.mask_token_id to an unused token",
            )
        if set(map(type, mask)) != {int} or min(mask) < 0 or max(mask) > 1:
            at = next(i for i, bit in enumerate(mask) if type(bit) is not int or bit not in (0, 1))
            raise BadRow("wrong loss_mask", f"loss_mask[{at}] is {clip(repr(mask[at]))}; give 0 or 1")
        if form != "file" and 1 not in mask[1:]:
            raise BadRow("no supervised token", f"no token of {len(ids)} has loss_mask 1 behind the first")
        ids_n, mask_n = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)
        content = ids_n.astype("<i8").tobytes() + mask_n.tobytes()
        return EncodedRow(index, form, ids_n, mask_n, hashlib.sha256(content).digest())


def _forms_of(row: dict[Any, Any]) -> list[str]:
    """Forms whose keys the row has. A prompt without a completion is one only if there is nothing else."""
    forms = [form for form in FORMS if form in row and (form != "prompt" or "completion" in row)]
    return forms or (["prompt"] if "prompt" in row else [])


def _ids_of(row: dict[str, Any]) -> tuple[list[Any], list[Any] | None]:
    if not isinstance(row["input_ids"], list):
        reason = "null field" if row["input_ids"] is None else "wrong types"
        instead = clip(json.dumps({"input_ids": row["input_ids"]}, default=str))
        raise BadRow(reason, f'give {{"input_ids": [...], "loss_mask": [...]}} instead of {instead}')
    misread = [key for key in _MISREAD_KEYS if key in row]
    if misread:
        raise BadRow("unread loss mark", f"{misread[0]} is not read: remove it, and give loss_mask instead")
    mask = row.get("loss_mask")
    if "loss_mask" in row and not isinstance(mask, list):
        reason = "null field" if mask is None else "wrong types"
        raise BadRow(reason, f"loss_mask is {clip(repr(mask))}; give a list of 0 and 1, or leave it out")
    return row["input_ids"], mask


def _parse(line: bytes) -> Any:
    text = _decode(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON", f"not valid JSON ({error})") from None


class _NotUtf8(BadRow):
    def __init__(self, line: int, byte: int) -> None:
        super().__init__("not UTF-8", f"not UTF-8 (byte 0x{byte:02x})")
        self.line = line


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _NotUtf8(1 + data[: error.start].count(b"\n"), data[error.start]) from None


def _rejected(index: int, raw: RawRow, error: BadRow) -> RejectedRow:
    where = f"{raw.where}, line {error.line}" if isinstance(error, _NotUtf8) and raw.kind == "text" else raw.where
    return RejectedRow(index, where, error.reason, " ".join((error.detail or error.reason).split()))
