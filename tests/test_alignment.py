"""The alignment contract in words: what each element reads, and what it is to predict."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peagle_train.core.cod import supervised_rows
from peagle_train.core.elements import positions_read
from peagle_train.core.passes import StepStats, TargetOutputs, recompute_step
from peagle_train.core.relay import relay_step
from tests import oracles
from tests.helpers import DRAFT_VOCAB, TARGET_HIDDEN, make_draft, make_rows

# Two documents, one column of padding; the assistant's words are in capitals.
WORDS = ["name", "a", "colour", "DARK", "SEA", "BLUE", "END", "bye", "SO", "LONG", "<pad>"]
DOCUMENTS = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1]
MASK = [int(word.isupper()) for word in WORDS]
IDS = list(range(len(WORDS)))
MASK_TOKEN = 40

# An element, what it reads (word; feature, named by the word whose column it comes from; position id), the word that
# the label's distribution is over, and whether it is trained. The pair (anchor, depth) of columns names it.
TABLE = [
    ((0, 0), "a", "name", 0, "colour", False),
    ((1, 0), "colour", "a", 1, "DARK", False),
    ((2, 0), "DARK", "colour", 2, "SEA", True),
    ((3, 0), "SEA", "DARK", 3, "BLUE", True),
    ((4, 0), "BLUE", "SEA", 4, "END", True),
    ((5, 0), "END", "BLUE", 5, None, True),
    ((7, 0), "SO", "bye", 0, "LONG", True),
    ((8, 0), "LONG", "SO", 1, None, True),
    # The drafts that start after "colour", behind "DARK", ... and behind "SO".
    ((1, 1), "<mask>", "<mask>", 2, "SEA", True),
    ((1, 2), "<mask>", "<mask>", 3, "BLUE", True),
    ((1, 3), "<mask>", "<mask>", 4, "END", True),
    ((2, 1), "<mask>", "<mask>", 3, "BLUE", True),
    ((3, 1), "<mask>", "<mask>", 4, "END", True),
    ((3, 2), "<mask>", "<mask>", 5, None, True),
    ((7, 1), "<mask>", "<mask>", 1, None, True),
]


def hand_made_batch() -> dict[str, Tensor]:
    """As a collator would make it, with one slot of padding behind the depth-0 elements and one at the end."""
    batch = {"input_ids": IDS, "document_ids": DOCUMENTS, "position_ids": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0]}
    slots: list[tuple[int, int, bool]] = [(a, d, trained) for (a, d), *_, trained in TABLE]
    slots.append((0, -1, False))
    batch["anchor"], batch["depth"], batch["supervised"] = (list(column) for column in zip(*slots))
    batch["segment_ids"] = [0] * len(slots)
    batch["supervised_per_depth"] = [6, 4, 2, 1]
    return {name: torch.tensor([values]) for name, values in batch.items()}


def word_after(column: int) -> str | None:
    """The word that the target's distribution at `column` is over; None behind the document's end."""
    inside = column + 1 < len(WORDS) and DOCUMENTS[column + 1] == DOCUMENTS[column]
    return WORDS[column + 1] if inside else None


def handed_to_the_drafter(
    step: Callable[..., StepStats], batch: dict[str, Tensor]
) -> dict[tuple[int, int], tuple[str, str, int, str | None, bool]]:
    """Run a step on features and hidden states that are their column's number, and note what each element was given."""
    draft = make_draft(ptd_token_id=MASK_TOKEN)
    L = batch["input_ids"].shape[1]
    column = torch.arange(L, dtype=torch.float64)[None, :, None]
    target = TargetOutputs(
        column.expand(1, L, 3 * TARGET_HIDDEN),
        column.expand(1, L, TARGET_HIDDEN),
        torch.ones(DRAFT_VOCAB, TARGET_HIDDEN),
    )
    words = {MASK_TOKEN: "<mask>", **dict(enumerate(WORDS))}
    given: dict[tuple[int, int], tuple[str, str, int, str | None, bool]] = {}

    def note(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        token, position, features, visibility = arguments
        labels = keywords["labels"]
        if labels is None:
            return  # columns for the sake of their keys and values
        N, skip = token.shape[1], keywords["skip"]
        # A pass counts columns from the first of its context; a feature is its column's number.
        own = int((visibility.depth[0] == 0).nonzero()[0])
        first = int(features[0, own, 0]) - int(visibility.anchor[0, own])
        label_of = dict(zip((labels.rows + skip).tolist(), labels.target_hidden[:, 0].tolist()))
        for i in range(skip, N):
            anchor, depth = first + int(visibility.anchor[0, i]), int(visibility.depth[0, i])
            if depth < 0:
                continue
            feature = WORDS[int(features[0, i, 0])] if depth == 0 else "<mask>"
            predicted = word_after(int(label_of[i])) if i in label_of else None
            assert (anchor, depth) not in given
            given[anchor, depth] = (words[int(token[0, i])], feature, int(position[0, i]), predicted, i in label_of)

    handle = draft.register_forward_pre_hook(note, with_kwargs=True)
    step(draft, batch, target, min_passes=None if step is relay_step else 0)
    handle.remove()
    return given


EXPECTED = {
    e: (read, feature, at, next_ if trained else None, trained) for e, read, feature, at, next_, trained in TABLE
}


@pytest.mark.parametrize("step", [recompute_step, relay_step])
def test_a_step_flat_or_in_segments_hands_the_drafter_what_the_contract_says(step):
    batch, order = hand_made_batch(), []
    assert handed_to_the_drafter(step, batch) == EXPECTED
    # Cut before columns 4 and 8; eight slots a segment.
    for low, high in ((0, 4), (4, 8), (8, 11)):
        own = [i for i, ((a, d), *_) in enumerate(TABLE) if low <= a + (d > 0) < high]
        order += own + [len(TABLE)] * (8 - len(own))
    cut = {name: batch[name][:, order] for name in ("anchor", "depth", "supervised")}
    cut["segment_ids"] = torch.arange(3).repeat_interleave(8)[None]
    assert handed_to_the_drafter(step, {**batch, **cut}) == EXPECTED


@pytest.mark.parametrize(
    ("length", "window", "layers"),
    [(2, None, 1), (5, 4, 2), (31, None, 3), (31, 4, 1), (31, 5, 3), (31, 7, 2), (31, 200, 3)],
)
def test_no_draw_reads_more_columns_than_are_said_and_each_reads_all_of_these(length, window, layers):
    reach = None if window is None else layers * (window - 1)
    g = torch.Generator().manual_seed(length)
    rows = [make_rows(length + 2, n, prompt=0.7, seed=n)[0] for n in (1, 2, 3)]
    for row in rows:
        for share in (1.0, 0.3, 0.05, 0.0):  # of what is learned from
            mask = (torch.tensor(row["loss_mask"]) * (torch.rand(length, generator=g) < share)).tolist()
            documents = [*row["document_ids"], -1, -1]
            elements = oracles.draw_packed([*mask, 0, 0], documents, 4, 0.8, 0.2, g)
            learned = [d > 0 or mask[a + 1] == 1 for a, d in elements]
            who = [(documents[a], a, d) for a, d in elements]
            read = {a for _, a, d in oracles.reached(who, learned, window, layers) if d == 0}
            labels = {a + d + 1 for (a, d), counts in zip(elements, learned, strict=True) if counts}
            mask_L, documents_L = torch.tensor([*mask, 0, 0]), torch.tensor(documents)
            found = positions_read(supervised_rows(mask_L, documents_L), documents_L, reach)
            assert [{*columns.nonzero().flatten().tolist()} for columns in found] == [read, labels]
