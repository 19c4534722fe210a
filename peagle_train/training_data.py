"""What a run learns from: the rows of its recipe's data section, and what is counted on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peagle_train.data import PackedRows, PackReport, pack_documents, split_train_eval
from peagle_train.recipe import Data, Recipe
from peagle_train.sources import Document, load_documents
from peagle_train.vocab import count_supervised

Say = Callable[[str], object]


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and rows to evaluate on."""

    train_rows: PackedRows
    """Every row of an epoch."""
    eval_rows: PackedRows
    """At most data.max_eval_rows; may be empty."""
    counts_V: Tensor
    """int64 [V]: how often each of the target's tokens is supervised in train_rows. Chooses the draft vocabulary."""
    report: PackReport
    """Of train_rows."""
    eval_report: PackReport
    """Of all held-out rows, those beyond data.max_eval_rows included."""


def load_training_data(
    recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None, say: Say = print
) -> TrainingData:
    """Read, tokenize, split and pack what the recipe's data section names. The same on every machine and rank.

    Args:
        tokenizer: the target's; may be None where the data is rows of ids.
        vocab_size: V, the target's: ids lie in 0..V - 1.
        mask_token_id: the drafter's mask token, which no document may hold.
        say: takes each line of the report.

    Raises:
        ValueError: one line, for a user's mistake and for data with nothing to learn from.
    """
    data = recipe.data

    def load(sources: list[str]) -> list[Document]:
        documents, report = load_documents(
            sources,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            extensions=data.extensions,
            exclude=data.exclude,
            max_documents=data.max_documents,
        )
        say(f"data: {report.describe()}")
        return documents

    train_documents, eval_documents = _split(data, load, say)
    train_rows, report = pack_documents(train_documents, data.max_length, data.pack)
    say(f"train: {report.describe()}")
    eval_rows, eval_report = pack_documents(eval_documents, data.max_length, data.pack)
    used = eval_rows.limit(data.max_eval_rows)
    if len(eval_rows):
        say(f"held out: {eval_report.describe()}" + (f"; {len(used)} rows used" if len(used) < len(eval_rows) else ""))
    if report.supervised == 0:
        raise ValueError("the data has nothing supervised: no document has a token with loss_mask 1 behind its first")
    return TrainingData(train_rows, used, count_supervised(train_documents, vocab_size), report, eval_report)


def _split(data: Data, load: Callable[[list[str]], list[Document]], say: Say) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents to evaluate on."""
    if not data.eval_sources:
        train_documents, eval_documents = split_train_eval(load(data.sources), data.eval_fraction)
        if not train_documents:
            raise ValueError("data.eval_fraction leaves no document to train on: lower it, or give more data")
        return train_documents, eval_documents
    eval_documents = load(data.eval_sources)
    held_out = {document.key for document in eval_documents}
    everything = load(data.sources)
    kept = [document for document in everything if document.key not in held_out]
    if len(kept) < len(everything):
        say(
            f"data: {len(everything) - len(kept)} documents of data.sources are in data.eval_sources too: not trained on"
        )
    if not kept:
        raise ValueError("every document of data.sources is in data.eval_sources too: nothing is left to train on")
    return kept, eval_documents
