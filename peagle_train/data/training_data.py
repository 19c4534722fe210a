"""What a run learns from: the rows of its recipe's data section, and what is counted on the way."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from peagle_train.config import Data, Draft, Recipe, SourceSpec, parse_sources
from peagle_train.core.attention import uses_flex
from peagle_train.core.block_mask import BLOCK_SIZE
from peagle_train.core.collator import CODCollator
from peagle_train.data.chat import ChatEncoder, check_template
from peagle_train.data.documents import (
    DocumentTable,
    FoundFiles,
    Intake,
    SourceReport,
    find_files,
    new_report,
    read_documents,
)
from peagle_train.data.encode import RowEncoder
from peagle_train.data.messages import CHAT_KEYS
from peagle_train.data.packing import PackedRows, PackReport, held_out_documents, pack_table, times_an_epoch
from peagle_train.data.vocab import count_repeated, default_mask_token_id

logger = logging.getLogger(__name__)

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
    in_both: int = 0
    """Documents of data.sources that are in data.eval_sources too, and not trained on."""
    source_reports: dict[str, SourceReport] = field(default_factory=dict)
    """What was read for `sources`, and for `eval_sources` if there are any."""

    @property
    def has_chats(self) -> bool:
        """Whether a chat template made any of the documents."""
        return any(form in CHAT_KEYS for report in self.source_reports.values() for form in report.forms)

    def describe(self) -> list[str]:
        """What was read, left out and packed, in lines."""
        lines = [f"data: {report.describe()}" for report in self.source_reports.values()]
        if self.in_both:
            lines.append(f"data: {self.in_both} documents of data.sources are in data.eval_sources too: not trained on")
        lines.append(f"train: {self.report.describe()}")
        if self.eval_report.rows:
            is_limited = len(self.eval_rows) < self.eval_report.rows
            used = f"; {len(self.eval_rows)} rows used" if is_limited else ""
            lines.append(f"held out: {self.eval_report.describe()}{used}")
        return lines


def load_training_data(
    recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None, say: Say = print
) -> TrainingData:
    """The rows that the recipe's data section names: read, tokenized and packed now, or as they were prepared.

    The same on every machine and rank, and nothing here waits for another rank.

    Args:
        tokenizer: the target's; may be None where the data is rows of ids.
        vocab_size: V, the target's: ids lie in 0..V - 1.
        mask_token_id: the drafter's mask token, which no document may hold.
        say: takes each line of the report.

    Raises:
        ValueError: one line, for a user's mistake and for data with nothing to learn from.
    """
    if recipe.data.prepared is not None:
        from peagle_train.data.prepare import open_prepared  # which imports this file

        made = open_prepared(recipe, tokenizer, vocab_size, mask_token_id)
        say(f"data: as prepared in {recipe.data.prepared}, checksums verified")
    else:
        _refuse_streaming(recipe.data)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            say(
                f"data: each of {dist.get_world_size()} processes reads and tokenizes it all; tools/prepare_data.py does it"
                " once"
            )
        encode = make_encoder(recipe, tokenizer, vocab_size, mask_token_id)
        tables, reports = {}, {}
        for role, found in find_all(recipe.data).items():
            intake = Intake(new_report(found), recipe.data.max_documents, recipe.data.max_bad_rows)
            tables[role], _ = read_documents(found, encode, intake)
            reports[role] = intake.report
        made = replace(assemble(recipe.data, tables, vocab_size), source_reports=reports)
    made = replace(made, eval_rows=made.eval_rows.limit(recipe.data.max_eval_rows))
    notices = ChatEncoder.from_recipe(recipe.data, tokenizer).notices if made.has_chats else []
    for line in [*made.describe(), *(f"data: {notice}" for notice in notices)]:
        say(line)
    if recipe.data.eval_fraction > 0 and not made.eval_report.rows:
        say("held out: nothing: data.eval_fraction chose none of so few documents; raise it, or give data.eval_sources")
    return made


def find_all(data: Data) -> dict[str, FoundFiles]:
    """The files of each role in the order in which they are read: `eval_sources`, if there are any, and `sources`."""
    roles = {"eval_sources": data.eval_sources, "sources": data.sources}
    return {
        role: find_files(parse_sources(items, f"data.{role}"), data.extensions, data.exclude)
        for role, items in roles.items()
        if items
    }


def make_encoder(recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None) -> RowEncoder:
    """What turns raw rows into documents, as the recipe says; ValueError for a chat template that is not there."""
    check_template(recipe.data.chat_template)
    return RowEncoder(
        tokenizer,
        vocab_size,
        mask_token_id,
        recipe.data.max_characters,
        lambda: ChatEncoder.from_recipe(recipe.data, tokenizer),
    )


def assemble(data: Data, tables: dict[str, DocumentTable], vocab_size: int) -> TrainingData:
    """Split documents into those to train on and those to evaluate on, and pack both.

    Args:
        tables: the documents of each role: see `find_all`.

    Raises:
        ValueError: nothing to train on, or nothing to learn.
    """
    table, in_both = tables["sources"], 0
    if "eval_sources" in tables:
        eval_table = tables["eval_sources"]
        eval_times_D = np.ones(len(eval_table), np.int64)
        held_out = {key.tobytes() for key in eval_table.keys_D32}
        is_out_D = np.array([key.tobytes() in held_out for key in table.keys_D32], dtype=bool)
        in_both = int(is_out_D.sum())
        if in_both == len(table):
            raise ValueError("every document of data.sources is in data.eval_sources too: nothing is left to train on")
    else:
        is_out_D = held_out_documents(table.keys_D32, data.eval_fraction)
        eval_table, eval_times_D = table, is_out_D.astype(np.int64)
    weights = np.array([source.weight for source in parse_sources(data.sources)])
    times_D = np.where(is_out_D, 0, times_an_epoch(table.keys_D32, weights[table.sources_D]))
    if not times_D.any():
        raise ValueError("the weights of data.sources leave no document to train on: raise them, or give more data")
    train_rows, report = pack_table(table, times_D, data.max_length, data.pack)
    report = replace(report, left_out_by_weight=int(((times_D == 0) & ~is_out_D).sum()))
    eval_rows, eval_report = pack_table(eval_table, eval_times_D, data.max_length, data.pack)
    if report.supervised == 0:
        raise ValueError("the data has nothing supervised: no document has a token with loss_mask 1 behind its first")
    return TrainingData(train_rows, eval_rows, count_repeated(table, times_D, vocab_size), report, eval_report, in_both)


def _refuse_streaming(data: Data) -> None:
    sources: list[SourceSpec] = parse_sources(data.sources) + parse_sources(data.eval_sources, "data.eval_sources")
    streamed = next((source for source in sources if source.streaming), None)
    if streamed is not None:
        raise ValueError(
            f"data source {streamed.describe()} is streamed, which takes prepared rows (a resume could not be exact"
            " without): run tools/prepare_data.py on this recipe, and give its folder as data.prepared"
        )


def load_tokenizer(recipe: Recipe) -> Any:
    """The target's own tokenizer, or None where its folder has none (rows of ids need none)."""
    try:
        return AutoTokenizer.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        logger.warning(
            "target.path %s has no usable tokenizer (%s)",
            recipe.target.path,
            str(error).splitlines()[0][:200],
        )
        return None


def target_vocab_size(recipe: Recipe) -> int:
    """V, from the target's config alone; ValueError if its folder has none."""
    try:
        config = AutoConfig.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"target.path {recipe.target.path} has no config that can be read: {reason}") from None
    return int(config.get_text_config().vocab_size)


def choose_mask_token(draft: Draft, tokenizer: Any, vocab_size: int) -> int:
    """The recipe's mask token, or one that the tokenizer provably never produces; ValueError if there is none."""
    if draft.mask_token_id is not None:
        if not 0 <= draft.mask_token_id < vocab_size:
            raise ValueError(
                f"draft.mask_token_id is {draft.mask_token_id}; it must lie in 0..{vocab_size - 1}, the target's vocabulary"
            )
        return draft.mask_token_id
    default = None if tokenizer is None else default_mask_token_id(tokenizer, vocab_size)
    if default is None:
        raise ValueError(
            "draft.mask_token_id is missing and the tokenizer leaves no id of the target's vocabulary provably unused:"
            " give the id of a token that never occurs in your data"
        )
    logger.warning("draft.mask_token_id was not given: %d, the first id that the tokenizer never produces", default)
    return default


def make_collator(recipe: Recipe, seed: int, device: torch.device | None = None) -> CODCollator:
    """`device`: that the drafter trains on, for its attention's blocks."""
    cod = recipe.cod
    return CODCollator(
        recipe.data.max_length,
        cod.num_depths,
        cod.down_sample_ratio,
        cod.down_sample_ratio_min,
        cod.segments,
        cod.boundaries,
        seed=seed,
        capacity_multiple=BLOCK_SIZE if device and uses_flex(device) else 1,
    )
