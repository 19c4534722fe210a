"""What a run learns from: the sequences of its recipe's data section, and the collator that draws from them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peagle_train.config import Recipe, parse_sources
from peagle_train.core.attention import uses_flex
from peagle_train.core.block_mask import BLOCK_SIZE
from peagle_train.core.collator import CODCollator
from peagle_train.data.chat import read_template
from peagle_train.data.documents import find_all
from peagle_train.data.encode import Encoder
from peagle_train.data.packing import TrainingData, make_data
from peagle_train.data.prepare import open_prepared, settings_of


def load_training_data(
    recipe: Recipe, tokenizer: Any, vocab_size: int, mask_token_id: int | None, say: Callable[[str], object] = print
) -> TrainingData:
    """The sequences that the recipe's data section names: read, tokenized and packed now, or as they were prepared.

    The same on every machine and rank, and no rank waits for another here. `tokenizer` may be None where the data is ids;
    no document may hold the mask token; `say` takes each line of the report. ValueError, one line, for a user's mistake.
    """
    data = recipe.data
    if data.prepared is not None:
        settings = settings_of(recipe, tokenizer, vocab_size, mask_token_id)
        made = open_prepared(Path(data.prepared), settings, data.max_bad_rows)
        say(f"data: as prepared in {data.prepared}, checksums verified")
    else:
        read_template(data.chat_template)  # a mistake even where no example is a chat
        for spec in parse_sources([*data.sources, *data.eval_sources]):
            if spec.streaming:  # a resume could not be exact
                raise ValueError(
                    f"data source {spec.describe()} is streamed, which has to be prepared: run peagle-train prepare on"
                    " this recipe, and give its folder as data.prepared"
                )
        encode = Encoder(data, tokenizer, vocab_size, mask_token_id).encode
        made = make_data(data, find_all(data), encode, vocab_size)
    made = replace(made, eval_rows=made.eval_rows.limit(data.max_eval_rows))
    for line in made.describe():
        say(line)
    if data.eval_fraction > 0 and not made.eval_report.rows:
        say("no evaluation: a single document can be learned from, and is; give more, or data.eval_sources")
    return made


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
        max_anchors=cod.max_anchors,
    )
