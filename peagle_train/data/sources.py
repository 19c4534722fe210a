"""Documents: what the sources of a recipe hold, each once, and the count of everything that is left out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peagle_train.data.chat import ChatEncoder
from peagle_train.data.document_table import DocumentTable, Shard, make_shard
from peagle_train.data.files import TEXT_EXTENSIONS, FoundFiles, find_files
from peagle_train.data.readers import RawRow, batches, read_rows
from peagle_train.data.row_encoder import FORMS, EncodedBatch, EncodedRow, RejectedRow, RowEncoder
from peagle_train.data.source_spec import SourceSpec

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
