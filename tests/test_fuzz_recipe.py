"""Recipes, overrides and command lines of any content: accepted and kept as given, or refused in one line, exit code 2."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peagle_train.__main__ import main
from peagle_train.config import Recipe, RecipeError, dump_recipe, load_recipe

QUIET = settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

KEYS = [
    f"{section.name}.{leaf.name}" for section in fields(Recipe) for leaf in fields(get_type_hints(Recipe)[section.name])
]
REQUIRED = {"target": {"path": "somewhere"}, "data": {"sources": ["stdlib"]}, "output": {"dir": "somewhere-else"}}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 20),
    st.floats(),
    st.sampled_from(["", "auto", "1e-4", "0x10", "yes", "null", "~", "stdlib", "kl", "float64", "\x00", "a\nb"]),
    st.text(max_size=20),
    st.binary(max_size=4),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3))


def same(a: Any, b: Any) -> bool:
    """Equal in type and value; 1 is 1.0 where a number was asked for, and nan is nan."""
    return repr(a) == repr(b) or (type(a) is float and type(b) is int and a == b)


@contextlib.contextmanager
def one_line_at_most() -> Iterator[None]:
    """A RecipeError in the block is a refusal: one line of readable text."""
    try:
        yield
    except RecipeError as error:
        text = str(error)
        assert text and "\n" not in text and "\r" not in text and len(text) < 1000, repr(text)


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
@QUIET
def test_a_value_is_kept_as_given_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, given_values
) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("recipe")
    sections: dict[str, dict[str, Any]] = {name: dict(content) for name, content in REQUIRED.items()}
    for key, value in given_values.items():
        section, leaf = key.split(".")
        sections.setdefault(section, {})[leaf] = value
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8")
    with one_line_at_most():
        recipe = load_recipe(path)
        read = asdict(recipe)
        for key, value in given_values.items():
            section, leaf = key.split(".")
            if not (isinstance(value, str) and ("~" in value or leaf == "path")):  # a leading ~ is the home folder
                assert same(read[section][leaf], value), key
        again = folder / "again.yaml"
        again.write_text(dump_recipe(recipe), encoding="utf-8")
        assert repr(load_recipe(again)) == repr(recipe)


content = st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
odd = st.sampled_from(
    ["[", "{a: ", "&a [*a]", "!!python/object:os.system", "- 1", "1_0", "0o7", ".inf", "<<: 1", "? a"]
)
text = values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | st.text(max_size=40) | odd


@given(content, st.sampled_from(KEYS), text)
@QUIET
def test_a_file_of_any_bytes_and_an_override_of_any_text_are_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, key: str, text: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "r.yaml"
    path.write_bytes(content)
    with one_line_at_most():
        load_recipe(path)
    path.write_text(yaml.safe_dump(REQUIRED))
    with one_line_at_most():
        load_recipe(path, [f"{key}={text}"])


@given(
    st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["RECIPE", "a.b=c", "-x", "--", "=", "."])), max_size=4)
)
@QUIET
def test_a_command_line_of_any_words_prints_a_recipe_or_says_in_a_line_what_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    path = tmp_path_factory.mktemp("words") / "r.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main([*(str(path) if word == "RECIPE" else word for word in words), "--print-config"])
        except SystemExit as stop:  # argparse's own
            code = stop.code
    if code == 0:
        found = yaml.safe_load(out.getvalue())["target"]["path"]
        assert found == "somewhere" or any("target.path" in word for word in words)
    else:
        assert code == 2, (code, err.getvalue())
        assert err.getvalue().startswith("peagle-train train: error: ") and len(err.getvalue().splitlines()) == 1
