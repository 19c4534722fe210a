"""YAML as people mean it: words stay words, numbers are numbers, and nothing changes on its way out and in."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.config import RecipeError, dump_yaml, parse_yaml

WORDS = "no yes on off y n 010 0x10 0b1 1:30 1:30.5 2024-01-01 << = 1e 1e-4x nano trueish +".split()
NUMBERS = {"1e-4": 1e-4, "1E5": 1e5, "-2.5e+3": -2500.0, "1_000": 1000, "-7": -7, "+7": 7, "0": 0, ".5": 0.5, "1.": 1.0}


@pytest.mark.parametrize("text", WORDS)
def test_what_only_old_yaml_takes_for_something_else_is_a_word(text: str) -> None:
    assert parse_yaml(text, "test") == text
    assert parse_yaml(dump_yaml(text), "test") == text


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_one_with_or_without_a_dot(text: str) -> None:
    value = parse_yaml(text, "test")
    assert value == NUMBERS[text] and type(value) is type(NUMBERS[text])
    assert parse_yaml(dump_yaml(text), "test") == text, "a string that looks like a number is quoted"


def test_only_true_and_false_are_booleans_and_nothing_is_null() -> None:
    assert parse_yaml("[true, False, TRUE, null, ~, '']", "test") == [True, False, True, None, None, ""]


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "{a: {b: 1, 'b': 2}}", "[{1: x, 1: y}]"])
def test_duplicate_keys_are_refused_at_any_depth(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^here: not valid YAML: duplicate key .* at line 1, column"):
        parse_yaml(text, "here")


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(nested)
def test_no_value_changes_on_its_way_out_and_in_for_this_reader_and_the_usual_one(value: Any) -> None:
    text = dump_yaml(value)
    assert text.isascii()
    assert parse_yaml(text, "test") == value
    assert yaml.safe_load(text) == value
