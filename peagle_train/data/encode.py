"""From raw examples to checked token ids with their loss masks. Each example is a document, a bad row, or empty.

Its form is the first of FORMS whose keys it has, whatever else is in it; docs/data.md says what each of them means.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from peagle_train.config import Data
from peagle_train.data.chat import IDS_ALONE, ChatEncoder, EncodedChat, read_template
from peagle_train.data.messages import BAD_IDS, FORMAT, NOTHING, BadRow, decode, messages_of, parse, shown

FORMS = ("input_ids", "messages", "conversations", "prompt", "text")  # in the order in which they are looked for
BATCH = 16  # examples tokenized at once; few, as a text file is one, and each process holds `prefetch_factor` batches


class RawExample(NamedTuple):
    """An example as its file has it."""

    weight: float  # its source's
    where: str  # file and line, for messages: printable, whatever the file's name is
    name: str  # the same on every machine
    content: Any  # bytes of a line of JSON or of a whole text; or a table's row, where null stands for a missing field
    is_text: bool = False  # a whole file


@dataclass(frozen=True)
class EncodedExample:
    """An example of n >= 1 tokens. (A loader would make tensors of the arrays in a tuple, each with a file handle.)"""

    form: str  # one of FORMS, or `file`: a whole text file
    input_ids: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # uint8 [n], 0 or 1
    key: bytes  # sha256 of ids and mask: the same on every machine
    notes: Counter[str] | None  # of a chat: see `EncodedChat`


Encoded = EncodedExample | BadRow | None  # None: an example without a token


@dataclass(eq=False)
class Encoder(Dataset[list[tuple[RawExample, Encoded]] | ValueError]):
    """Turns batches of raw examples into ids and masks."""

    data: Data
    tokenizer: Any  # may be None if all examples are ids
    vocab_size: int  # ids are in 0..vocab_size - 1
    mask_token_id: int = -1  # which no example may hold; -1: no such id
    num_workers: int = 1  # processes; 1: this one
    progress: bool = False  # show a bar

    @cached_property
    def chat(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, read_template(self.data.chat_template), self.data.template_kwargs)

    def encode(self, examples: Iterator[RawExample]) -> Iterator[tuple[RawExample, Encoded]]:
        """Each example, without its content, and what became of it; few are in flight. ValueError: a user's mistake."""
        batches = iter(lambda: list(islice(examples, BATCH)), [])
        encoded: Iterable[list[tuple[RawExample, Encoded]] | ValueError] = map(self.__getitem__, batches)
        if self.num_workers > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
            # a fork would copy the tokenizers' threads in whatever state they are
            how: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 4, "batch_size": None}
            how |= {"sampler": batches, "num_workers": self.num_workers}  # the sampler's items go to `__getitem__`
            encoded = DataLoader(self, generator=torch.Generator(), **how)
        pace = 0.1 if sys.stderr.isatty() else 60.0
        with tqdm(unit=" examples", unit_scale=True, mininterval=pace, disable=not self.progress) as bar:
            for batch in encoded:
                if isinstance(batch, ValueError):
                    raise batch
                yield from batch
                bar.update(len(batch))

    def __getitem__(self, raws: list[RawExample]) -> list[tuple[RawExample, Encoded]] | ValueError:
        """A batch; a mistake is returned, since a loader's process would add its traceback to the message."""
        try:
            return [(raw._replace(content=None), made) for raw, made in zip(raws, self._encode(raws), strict=True)]
        except ValueError as error:
            return error

    def _encode(self, raws: list[RawExample]) -> list[Encoded]:
        made: list[Encoded] = [None] * len(raws)
        texts: dict[int, tuple[str, str]] = {}
        for i, raw in enumerate(raws):
            try:
                form, content = self._read(raw)
                if isinstance(content, str):
                    texts[i] = form, content
                else:
                    made[i] = self._check(form, *content)
            except BadRow as error:
                made[i] = error
            except RecursionError:
                made[i] = BadRow(FORMAT, "values are nested too deeply")
        if texts and self.tokenizer is None:
            raise ValueError(f"{raws[min(texts)].where} is text, which takes a tokenizer; without one give input_ids")
        if texts:
            # Text that spells a special token must not become that token.
            tokenized = self.tokenizer([text for _, text in texts.values()], split_special_tokens=True, **IDS_ALONE)
            for (i, (form, _)), ids in zip(texts.items(), tokenized["input_ids"], strict=True):
                made[i] = self._check(form, ids, _all_but_first(ids))
        return made

    def _read(self, raw: RawExample) -> tuple[str, str | tuple[list[Any], list[Any]] | EncodedChat]:
        """The example's form, and its text that is still to be tokenized, or its ids and mask."""
        if raw.is_text:
            return "file", decode(raw.content)
        row = parse(raw.content)
        # A prompt without a completion is a form only if there is nothing else.
        found = (form for form in FORMS if form in row and (form != "prompt" or "completion" in row))
        form = next(found, "prompt")
        if form not in row:
            wanted = "input_ids, messages, conversations, prompt and completion, or text"
            raise BadRow(FORMAT, f"give {{...}} with {wanted}, instead of the keys {shown(', '.join(row))}")
        if form == "input_ids":
            return form, _ids_of(row)
        if form == "text":
            if not isinstance(row["text"], str):
                raise BadRow(FORMAT, f"text is {shown(row['text'])}; give a string")
            return form, row["text"]
        return form, self.chat.encode(messages_of(row))

    def _check(self, form: str, ids: list[Any], mask: list[Any], notes: Counter[str] | None = None) -> Encoded:
        """The document, or None if it has no token."""
        if len(mask) != len(ids):
            return BadRow(FORMAT, f"{len(ids)} input_ids but {len(mask)} in loss_mask; they must match")
        if not ids:
            return None
        if (at := _first_outside(ids, self.vocab_size)) is not None:
            allowed = f"integers in 0..{self.vocab_size - 1}, the target's vocabulary"
            return BadRow(BAD_IDS, f"input_ids[{at}] is {shown(ids[at])}; ids are {allowed}")
        if self.mask_token_id in ids:
            what = f"input_ids[{ids.index(self.mask_token_id)}] is the mask token {self.mask_token_id}"
            return BadRow(BAD_IDS, f"{what}, which must never occur in the data: give another draft.mask_token_id")
        if (at := _first_outside(mask, 2)) is not None:
            return BadRow(FORMAT, f"loss_mask[{at}] is {shown(mask[at])}; give 0 or 1")
        if form != "file" and 1 not in mask[1:]:
            return BadRow(NOTHING, f"no token of {len(ids)} has loss_mask 1 after the first")
        ids_n, mask_n = np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)
        content = ids_n.astype("<i8").tobytes() + mask_n.tobytes()
        return EncodedExample(form, ids_n, mask_n, hashlib.sha256(content).digest(), notes)


def _first_outside(values: list[Any], end: int) -> int | None:
    """Index of the first value that is not an integer in 0..end - 1; None if there is none."""
    # The fast test: a data set has tens of millions of tokens.
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) < end:
        return None
    return next(i for i, value in enumerate(values) if type(value) is not int or not 0 <= value < end)


def _all_but_first(ids: list[Any]) -> list[int]:
    return [int(position > 0) for position in range(len(ids))]


def _ids_of(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    ids = row["input_ids"]
    if not isinstance(ids, list):
        raise BadRow(FORMAT, f'give {{"input_ids": [...], "loss_mask": [...]}}; input_ids is {shown(ids)}')
    # In other formats these say which tokens count: ignoring them would train on what they exclude.
    if misread := [key for key in ("labels", "attention_mask", "assistant_mask", "assistant_masks") if key in row]:
        raise BadRow(FORMAT, f"{misread[0]} is not read: remove it, and give loss_mask instead")
    mask = row.get("loss_mask", _all_but_first(ids))
    if not isinstance(mask, list):
        raise BadRow(FORMAT, f"loss_mask is {shown(mask)}; give a list of 0 and 1, or omit it")
    return ids, mask
