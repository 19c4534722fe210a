"""The draft vocabulary: the most frequent supervised tokens, in the form that engines read."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peagle_train.data.packing import Document
from peagle_train.data.vocab import (
    choose_draft_vocab,
    count_supervised,
    coverage,
    default_mask_token_id,
)

VOCAB = 12


def document(ids: list[int], mask: list[int]) -> Document:
    return Document(torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.uint8), "test", "0" * 64)


def slow_choice(pairs: list[tuple[int, int]], size: int, always: set[int]) -> list[int]:
    """Take the best token left, one at a time."""
    chosen = set(always)
    while len(chosen) < size:
        left = [token for token in range(VOCAB) if token not in chosen]
        chosen.add(max(left, key=lambda token: (pairs.count((token, 1)), -token)))
    return sorted(chosen)


tokens = st.integers(0, VOCAB - 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(tokens, st.integers(0, 1)), max_size=40), st.sets(tokens, max_size=4), st.data())
def test_the_choice_is_that_of_a_slow_chooser(pairs: list[tuple[int, int]], always: set[int], data: Any) -> None:
    size = data.draw(st.integers(max(1, len(always)), VOCAB))
    cut = data.draw(st.integers(0, len(pairs)))
    documents = [document([i for i, _ in part], [m for _, m in part]) for part in (pairs[:cut], pairs[cut:])]
    flat = (torch.tensor([i for i, _ in pairs], dtype=torch.int32), torch.tensor([m for _, m in pairs]))
    expected = slow_choice(pairs, size, always)
    for given_as in (documents, flat):
        ids = choose_draft_vocab(given_as, VOCAB, size, always)
        assert ids.dtype == torch.int64 and ids.tolist() == expected


def test_of_equally_frequent_tokens_the_lower_id_wins_and_unseen_ones_fill_up() -> None:
    data = [document([9, 5, 5, 9, 3, 7], [1, 1, 1, 1, 1, 0])]
    assert choose_draft_vocab(data, VOCAB, 1).tolist() == [5]
    assert choose_draft_vocab(data, VOCAB, 2).tolist() == [5, 9]
    assert choose_draft_vocab(data, VOCAB, 3).tolist() == [3, 5, 9]
    assert choose_draft_vocab(data, VOCAB, 5).tolist() == [0, 1, 3, 5, 9]
    assert choose_draft_vocab(data, VOCAB, 2, always=[11]).tolist() == [5, 11]
    assert choose_draft_vocab(data, VOCAB, VOCAB).tolist() == list(range(VOCAB))


@pytest.mark.parametrize(
    "size, always, expected",
    [
        (13, (), "draft_vocab_size is 13, but the target's vocabulary has 12 tokens: give 1 to 12"),
        (0, (), "draft_vocab_size is 0"),
        (2, (1, 2, 3, 3), "draft_vocab_size is 2, but 3 tokens must always be drafted: give at least 3"),
        (5, (1, 12), "token 12 must always be drafted, but the vocabulary is 0..11"),
        (5, (-1,), "token -1 must always be drafted"),
    ],
)
def test_sizes_and_tokens_that_do_not_fit_are_refused(size: int, always: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        choose_draft_vocab([], VOCAB, size, always)


def test_supervised_ids_outside_of_the_vocabulary_are_refused() -> None:
    assert count_supervised([document([1, 99], [1, 0])], VOCAB).tolist()[1] == 1
    for token in (12, -1):
        with pytest.raises(ValueError, match=r"outside of the vocabulary 0\.\.11"):
            count_supervised([document([1, token], [1, 1])], VOCAB)


def test_coverage_is_the_share_of_supervised_tokens_that_can_be_drafted() -> None:
    counts = count_supervised([document([9, 5, 5, 9, 5, 7, 0], [1, 1, 1, 1, 1, 1, 0])], VOCAB)
    assert coverage(torch.tensor([5, 8]), counts) == 0.5
    assert coverage(torch.arange(VOCAB), counts) == 1.0
    with pytest.raises(ValueError, match="no supervised token"):
        coverage(torch.tensor([5]), torch.zeros(VOCAB, dtype=torch.int64))


def test_the_mask_token_is_the_first_id_behind_all_that_the_tokenizer_knows() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "gap": 5}, unk_token="a"))
    core.add_special_tokens(["<end>"])  # takes the id behind the highest, or a free one: either way a known one
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    behind = max(tokenizer.get_vocab().values()) + 1
    assert behind >= 6
    assert default_mask_token_id(tokenizer, 20) == behind
    assert default_mask_token_id(tokenizer, behind + 1) == behind
    assert default_mask_token_id(tokenizer, behind) is None
    assert default_mask_token_id(tokenizer, 2) is None
