"""Which answers are unfit to train on, and why."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.answers.answers import LOOP_CHARACTERS, LOOP_PERIOD, LOOP_REPEATS, Answer, fault, is_loop

PROSE = (
    "Binary search halves the range with every step. It needs the list to be sorted; that is what makes it fast. Each look"
    " at the middle element tells on which side the answer lies, and the other side is never visited again, so a million"
    " elements take twenty looks."
)


def slow_repeats(text: str) -> bool:
    """The rule as it is written, one character at a time."""
    text = text.rstrip()
    for period in range(1, LOOP_PERIOD + 1):
        length = max(LOOP_REPEATS * period, LOOP_CHARACTERS)
        if length <= len(text) and all(text[-i] == text[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab", max_size=120), st.text("ab", min_size=1, max_size=70), st.integers(0, 60), st.text("ab", max_size=2)
)
def test_an_end_that_repeats_is_found_as_a_slow_reader_finds_it(start: str, unit: str, times: int, rest: str) -> None:
    text = start + unit * times + rest
    assert is_loop(text) == slow_repeats(text)


@pytest.mark.parametrize("period", [1, 7, 49, 50, 51, 1000])
def test_a_unit_must_stand_four_times_and_for_200_characters(period: int) -> None:
    rng = random.Random(0)
    unit = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(period))
    length = max(4 * period, 200)
    text = (unit * 300)[:length]
    assert is_loop(text) and is_loop(PROSE + text + " \n\n")
    assert not is_loop(text[1:])
    assert not is_loop(text + PROSE)


def test_a_period_of_more_than_1000_characters_is_no_loop() -> None:
    rng = random.Random(0)
    unit = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(1001))
    assert not is_loop(unit * 6)
    assert is_loop(unit[:1000] * 6)


def test_a_line_that_only_counts_up_is_a_loop_and_short_or_rare_lines_are_not() -> None:
    counted = "".join(f"{i}. The answer is to try once more.\n" for i in range(8))
    assert is_loop(counted) and is_loop(PROSE[:200] + "\n" + counted + "And so on.")
    assert not is_loop(counted.split("\n", 1)[1])  # seven times
    assert not is_loop("".join(f"{i}. Try it once more {chr(97 + i)}\n" for i in range(8)))
    assert not is_loop("".join(f"{i}. Try.\n" for i in range(20)))
    assert not is_loop(counted + 2 * PROSE)


@pytest.mark.parametrize("text", ["", " ", "a", PROSE, "=" * 199, "| --- | --- |\n" * 10, PROSE * 3])
def test_ordinary_texts_are_no_loops(text: str) -> None:
    assert not is_loop(text)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (Answer("fine"), None),
        (Answer("fine", reasoning="hm"), None),
        (Answer(" \n"), "empty"),
        (Answer("", reasoning="hm"), "empty"),
        (Answer("cut", "length"), "truncated"),
        (Answer("na " * 100), "loop"),
        (Answer("na " * 100, "length"), "loop"),
        (Answer("fine", reasoning="na " * 100), "loop"),
        (Answer("call", "tool_calls"), "finish_reason tool_calls"),
        (Answer("", "refused", detail="400 too long"), "refused"),
    ],
)
def test_an_unfit_answer_has_one_reason(answer: Answer, expected: str | None) -> None:
    assert fault(answer) == expected


def test_truncated_answers_are_kept_on_demand_unless_they_loop_or_are_empty() -> None:
    assert fault(Answer("cut", "length"), keep_truncated=True) is None
    assert fault(Answer("na " * 100, "length"), keep_truncated=True) == "loop"
    assert fault(Answer("", "length", reasoning="hm"), keep_truncated=True) == "empty"
