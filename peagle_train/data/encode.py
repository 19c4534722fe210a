"""From raw examples to checked token ids with their loss masks. Each example is a document, a bad row, or empty.

The form of an example is the first of these whose keys it has, whatever else is in it:
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
from functools import partial
from typing import Any

import numpy as np

from peagle_train.config import Recipe
from peagle_train.data.chat import ChatEncoder, check_template
from peagle_train.data.messages import (
    BAD_IDS,
    FORMAT,
    NOTHING,
    TOO_LONG,
    UNREADABLE,
    BadRow,
    as_in_json,
    check_text,
    keys_read,
    messages_of,
    strings_in,
)

FORMS = ("input_ids", "messages", "conversations", "prompt", "text")
"""In the order in which they are looked for."""
_MISREAD_KEYS = ("labels", "attention_mask", "assistant_mask", "assistant_masks")
"""Keys that say which tokens count, in other formats. Ignoring them would train on what they exclude."""
SEVERAL_FORMS = f"examples of several forms read as the first of {', '.join(FORMS)}"


@dataclass(frozen=True)
class RawExample:
    """An example as its file has it."""

    file_index: int
    """Of the files that are read."""
    source: int
    """Of the sources of the recipe."""
    where: str
    """File and line, for messages: printable, whatever the file's name is."""
    name: str
    """The same on every machine."""
    content: Any
    """Bytes of a line of JSON or of a whole text, or an example's values."""
    kind: str
    """text (a whole file), line (of JSON, parsed or not) or table (null stands for a missing field)."""


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example of at least one token."""

    form: str
    """One of FORMS, or `file`: a whole text file."""
    input_ids: np.ndarray
    """int32 [n], n >= 1. An array, which travels from a worker process to the main one without a file handle."""
    loss_mask: np.ndarray
    """uint8 [n], 0 or 1."""
    key: bytes
    """sha256 of ids and mask: the same on every machine."""


@dataclass
class EncodedBatch:
    """What became of a batch of examples, in their order."""

    examples: list[EncodedExample | BadRow | None]
    """None stands for an example without a token."""
    notes: Counter[str] = field(default_factory=Counter)
    """Several forms, and what chats had that was not learned, dropped or peculiar: see `EncodedChat`."""
    ignored_keys: dict[str, None] = field(default_factory=dict)
    """Keys of examples that nothing reads, each once, in the order of the examples; short and printable."""


class Encoder:
    """Turns batches of raw examples into ids and masks.

    Args:
        tokenizer: transformers' tokenizer; None if all examples are ids.
        vocab_size: the target's; ids lie in 0..vocab_size - 1.
        mask_token_id: the drafter's mask token, which no example may hold.
        max_characters: an example with a longer string is a bad row; None: any length.
        make_chat: makes the `ChatEncoder` when the first chat comes.
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
        self.max_characters, self.make_chat = max_characters, make_chat or partial(ChatEncoder, tokenizer)
        self.chat: ChatEncoder | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> "Encoder":
        """What the recipe asks for; ValueError for a chat template that cannot be read."""
        data = recipe.data
        check_template(data.chat_template)
        make_chat = partial(ChatEncoder.from_recipe, data, tokenizer)
        return cls(tokenizer, vocab_size, mask_token_id, data.max_characters, make_chat)

    def __call__(self, raws: Sequence[RawExample]) -> EncodedBatch:
        batch = EncodedBatch([None] * len(raws))
        texts: dict[int, tuple[str, str]] = {}
        for i, raw in enumerate(raws):
            try:
                form, content = self._read(raw, batch)
                if isinstance(content, str):
                    texts[i] = form, content
                else:
                    batch.examples[i] = self._checked(form, *content)
            except BadRow as error:
                batch.examples[i] = error
            except RecursionError:
                batch.examples[i] = BadRow(FORMAT, "values are nested too deeply")
        tokenized = self._tokenized([text for _, text in texts.values()])
        for (i, (form, _)), ids in zip(texts.items(), tokenized, strict=True):
            try:
                batch.examples[i] = self._checked(form, ids, None)
            except BadRow as error:
                batch.examples[i] = error
        return batch

    def _read(
        self, raw: RawExample, batch: EncodedBatch
    ) -> tuple[str, str | tuple[Sequence[Any], Sequence[Any] | None]]:
        """The example's form, and its text that is still to be tokenized, or its ids and mask."""
        if raw.kind == "text":
            self._need_tokenizer(raw, "text")
            return "file", decode(raw.content)
        row = parse(raw.content)
        if not isinstance(row, dict):
            raise BadRow(FORMAT, f'give {{"messages": [...]}} or the like instead of {clip(repr(row))}')
        if raw.kind == "table":
            row = as_in_json(row)
        # A prompt without a completion is a form only if there is nothing else.
        forms = [form for form in FORMS if form in row and (form != "prompt" or "completion" in row)]
        form = next(iter(forms), "prompt")
        if form not in row:
            wanted = "input_ids, messages, conversations, prompt and completion, or text"
            raise BadRow(FORMAT, f"give {{...}} with {wanted}, instead of the keys {clip(', '.join(map(str, row)))}")
        read = {"input_ids": {"input_ids", "loss_mask"}, "text": {"text"}}.get(form) or keys_read(row)
        batch.ignored_keys.update(dict.fromkeys(clip(str(key)) for key in row if key not in read))
        batch.notes[SEVERAL_FORMS] += len(forms) > 1
        if form == "input_ids":
            return form, _ids_of(row)
        self._need_tokenizer(raw, f"an example with {form}")
        longest = max(map(len, strings_in([row[key] for key in read if key in row])), default=0)
        if self.max_characters is not None and longest > self.max_characters:
            raise BadRow(TOO_LONG, f"a text of {longest} characters; data.max_characters is {self.max_characters}")
        if form == "text":
            if not isinstance(row["text"], str):
                raise BadRow(FORMAT, f"text is {clip(repr(row['text']))}; give a string")
            check_text(row["text"])
            return form, row["text"]
        self.chat = self.chat or self.make_chat()
        encoded = self.chat.encode(messages_of(row))
        batch.notes.update(encoded.counts)
        return form, (encoded.input_ids, encoded.loss_mask)

    def _need_tokenizer(self, raw: RawExample, what: str) -> None:
        if self.tokenizer is None:
            raise ValueError(f"{raw.where} is {what}, which takes a tokenizer; without one give input_ids")

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

    def _checked(self, form: str, ids: Sequence[Any], mask: Sequence[Any] | None) -> EncodedExample | None:
        """The document, or None if it has no token; BadRow for what is not allowed in one."""
        mask = [int(position > 0) for position in range(len(ids))] if mask is None else mask
        if len(mask) != len(ids):
            raise BadRow(FORMAT, f"{len(ids)} input_ids but {len(mask)} in loss_mask; they must match")
        if not ids:
            return None
        # The first test is the fast one: a data set has tens of millions of tokens.
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= self.vocab_size:
            at = next(i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < self.vocab_size)
            raise BadRow(
                BAD_IDS,
                f"input_ids[{at}] is {clip(repr(ids[at]))}; ids are integers in 0..{self.vocab_size - 1},"
                " the target's vocabulary",
            )
        if self.mask_token_id in ids:
            raise BadRow(
                BAD_IDS,
                f"input_ids[{ids.index(self.mask_token_id)}] is the mask token {self.mask_token_id}, which"
                " must never occur in the data: set draft.mask_token_id to an unused token",
            )
        if set(map(type, mask)) != {int} or min(mask) < 0 or max(mask) > 1:
            at = next(i for i, bit in enumerate(mask) if type(bit) is not int or bit not in (0, 1))
            raise BadRow(FORMAT, f"loss_mask[{at}] is {clip(repr(mask[at]))}; give 0 or 1")
        if form != "file" and 1 not in mask[1:]:
            raise BadRow(NOTHING, f"no token of {len(ids)} has loss_mask 1 after the first")
        ids_n, mask_n = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)
        content = ids_n.astype("<i8").tobytes() + mask_n.tobytes()
        return EncodedExample(form, ids_n, mask_n, hashlib.sha256(content).digest())


def _ids_of(row: dict[str, Any]) -> tuple[list[Any], list[Any] | None]:
    if not isinstance(row["input_ids"], list):
        instead = clip(repr(row["input_ids"]))
        raise BadRow(FORMAT, f'give {{"input_ids": [...], "loss_mask": [...]}}; input_ids is {instead}')
    misread = [key for key in _MISREAD_KEYS if key in row]
    if misread:
        raise BadRow(FORMAT, f"{misread[0]} is not read: remove it, and give loss_mask instead")
    mask = row.get("loss_mask")
    if "loss_mask" in row and not isinstance(mask, list):
        raise BadRow(FORMAT, f"loss_mask is {clip(repr(mask))}; give a list of 0 and 1, or leave it out")
    return row["input_ids"], mask


def parse(content: Any) -> Any:
    """A line of JSON, or values that are parsed already; BadRow for broken JSON."""
    if not isinstance(content, bytes):
        return content
    text = decode(content)
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(UNREADABLE, f"not valid JSON ({error})") from None


def decode(data: bytes) -> str:
    """A text in UTF-8, without a byte order mark; BadRow with the line for anything else."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise BadRow(UNREADABLE, f"not UTF-8 (byte 0x{data[error.start]:02x} in line {line})") from None


def clip(text: str) -> str:
    """`text` in one short printable line."""
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."
