"""Documents: checked token ids with their loss masks. Whatever is wrong with the data is found here, once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peagle_train.files import TEXT_EXTENSIONS, find_files
from peagle_train.readers import RawDocument, clip, read_files


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
    ignored_keys: list[str] = field(default_factory=list)
    """Keys of .jsonl rows that mean nothing here."""
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
        text += f", {self.tokens} tokens, {self.supervised} supervised"
        text += "".join(f", {count} {what} left out" for what, count in left_out.items() if count)
        if self.stopped:
            text += f", stopped at max_documents with {self.unread_files} files unread"
        if self.unsupervised:
            text += f", {self.unsupervised} documents without a supervised row"
        return text + (f", keys ignored: {', '.join(self.ignored_keys)}" if self.ignored_keys else "")


def load_documents(
    sources: Sequence[str],
    *,
    tokenizer: Any,
    vocab_size: int,
    mask_token_id: int | None = None,
    extensions: Sequence[str] = TEXT_EXTENSIONS,
    exclude: Sequence[str] = (),
    max_documents: int | None = None,
) -> tuple[list[Document], SourceReport]:
    """Read, tokenize and check every document that the sources name.

    A text file is a document with every token but the first supervised, without bos and eos; what looks like
    a special token in it stays text. A `.jsonl` file has rows `{"input_ids": [...], "loss_mask": [...]}`, the
    mask optional (then as for text). Equal documents are kept once.

    Args:
        sources: see `find_files`, as are `extensions` and `exclude`.
        tokenizer: transformers' tokenizer; may be None if there are only .jsonl files.
        vocab_size: the target's; ids lie in 0..vocab_size - 1.
        mask_token_id: the drafter's mask token, which no document may hold.
        max_documents: stop behind so many documents.

    Raises:
        ValueError: one line with file and line number.
    """
    found = find_files(sources, extensions, exclude)
    report = SourceReport(
        files=len(found.files),
        excluded=found.excluded,
        other_files=found.other,
        linked_folders=found.linked_folders,
    )
    documents: dict[str, Document] = {}
    ignored_keys: set[str] = set()
    last_file = -1
    for raw in read_files(found.files, tokenizer, ignored_keys):
        document = _checked(raw, vocab_size, mask_token_id)
        if document is None:
            report.empty += 1
        elif document.key in documents:
            report.duplicates += 1
        elif len(documents) == max_documents:
            report.stopped, report.unread_files = True, report.files - last_file - 1
            break
        else:
            documents[document.key] = document
            last_file = raw.file_index
            report.tokens += document.input_ids.numel()
            supervised = int(document.loss_mask[1:].sum())
            report.supervised += supervised
            report.unsupervised += supervised == 0
    report.documents, report.ignored_keys = len(documents), sorted(ignored_keys)
    if not documents:
        raise ValueError(f"the data sources hold no token: {report.files} files, {report.empty} empty documents")
    if report.supervised == 0:
        raise ValueError(
            f"nothing to learn from: none of {report.documents} documents has loss_mask 1 behind its start"
        )
    return list(documents.values()), report


def _checked(raw: RawDocument, vocab_size: int, mask_token_id: int | None) -> Document | None:
    """The document, or None if it has no token; ValueError on what is not allowed in one."""
    ids = raw.ids
    mask = [int(position > 0) for position in range(len(ids))] if raw.mask is None else raw.mask
    if len(mask) != len(ids):
        raise ValueError(f"{raw.where}: {len(ids)} input_ids but {len(mask)} in loss_mask; they must match")
    if not ids:
        return None
    # The first test is the fast one: a data set has tens of millions of tokens.
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size:
        at = next(i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < vocab_size)
        raise ValueError(
            f"{raw.where}: input_ids[{at}] is {clip(repr(ids[at]))}; ids are integers in 0..{vocab_size - 1},"
            " the target's vocabulary"
        )
    if mask_token_id in ids:
        raise ValueError(
            f"{raw.where}: input_ids[{ids.index(mask_token_id)}] is the mask token {mask_token_id}, which"
            " must never occur in the data: set draft.mask_token_id to an unused token"
        )
    if set(map(type, mask)) != {int} or min(mask) < 0 or max(mask) > 1:
        at = next(i for i, bit in enumerate(mask) if type(bit) is not int or bit not in (0, 1))
        raise ValueError(f"{raw.where}: loss_mask[{at}] is {clip(repr(mask[at]))}; give 0 or 1")
    ids_n, mask_n = torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.uint8)
    content = ids_n.numpy().astype("<i8").tobytes() + mask_n.numpy().tobytes()
    return Document(ids_n, mask_n, raw.name, hashlib.sha256(content).hexdigest())
