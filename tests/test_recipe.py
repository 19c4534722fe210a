"""The recipe: reading, overriding, writing back, strict YAML, and one clear line for each mistake."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peagle_train.config import (
    ELSEWHERE,
    Data,
    Output,
    Recipe,
    RecipeError,
    Target,
    as_override,
    dump_recipe,
    dump_yaml,
    load_recipe,
    parse_yaml,
)

KEYS = [f"{section}.{spec.name}" for section, cls in get_type_hints(Recipe).items() for spec in fields(cls)]
MINIMAL = "target: {path: model}\ndata: {sources: [stdlib]}\noutput: {dir: out}\n"


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_recipe


@pytest.fixture
def minimal(write):
    return write(MINIMAL)


def message(path: Path, *overrides: str) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert text.isascii() and "\n" not in text and len(text) < 400
    return text


def test_a_minimal_recipe_has_the_defaults_and_the_last_override_counts(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe == Recipe(Target("model"), Data(["stdlib"]), Output("out"))
    assert (recipe.data.max_length, recipe.cod.num_depths, recipe.train.segment_mode) == (2048, 8, "relay")
    assert recipe.data.extensions == [".py", ".txt", ".md", ".jsonl", ".parquet", ".arrow"]
    recipe = load_recipe(write(MINIMAL + "train: {epochs: 3, seed: 7}\n"), ["train.epochs=4", "train.epochs=5"])
    assert (recipe.train.epochs, recipe.train.seed) == (5, 7)


READ = {
    "output.dir=runs/lr=1e-4.x": "runs/lr=1e-4.x",
    "output.dir=~/runs": "/home/someone/runs",
    "train.learning_rate=1e-4": 1e-4,
    "train.learning_rate=1": 1.0,
    "train.mixed_precision=no": "no",
}


def test_an_override_is_read_as_people_mean_it(minimal, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for override, expected in READ.items():
        section, leaf = override.partition("=")[0].split(".")
        value = getattr(getattr(load_recipe(minimal, [override]), section), leaf)
        assert value == expected and type(value) is type(expected)


WRONG = {
    "train.epochs=null": "got null; it should be",
    "train.epochs=0": "got 0 (int); it should be greater than or equal to 1",
    "train.learning_rate=.nan": "got nan (float); it should be a finite number",
    "train.loss=mse": "got 'mse' (str); it should be 'kl', 'soft_ce', 'hard_ce', 'tv' or 'lk'",
    "cod.num_segments=0": "got 0 (int); it should be greater than or equal to 1, or it should be 'auto'",
    "output.dir='  '": "got '  ' (str); give a non-empty string",
    "data.max_bad_rows=200%": "give a count, or a share of at most 100%, as in 1%",
    "data.sources=[]": "give a non-empty list",
    "data.extensions=[py]": "got ['py'] (list); give a list such as [.py, .jsonl], with the dots",
    "target.layer_ids=[0, 1, true]": "got true (bool); it should be a valid integer",
    "data.sources=a.jsonl": "it should be a list, as in [a, b]",
    "train.profile_steps=[0, 4]": "give the first and the last step",
    **{
        f"target.layer_ids={ids}": "give 1 to 8 strictly increasing integers >= 0"
        for ids in ("[]", "[0, 1, 2, 3, 4, 5, 6, 7, 8]", "[1, 1, 2]", "[3, 2, 1]", "[-1, 0, 1]")
    },
    "data.sources=[{path: a, datasets: b}]": "data.sources[0] has both of path and datasets",
    "data.sources=[{weight: 2}]": "data.sources[0] has neither of path and datasets",
    "data.sources=[{path: a, weight: 0}]": "data.sources[0].weight: got 0 (int); it should be greater than 0",
    "data.sources=[{path: a, split: test}]": "data.sources[0] has split or name",
    "train.learning_rte=1": "did you mean train.learning_rate?",
    "train.max_length=9": "did you mean data.max_length?",  # the right name in the wrong section
    "trian.epochs=2": "trian is not a section; there are target, data, output, draft, cod, train",
    "draft.rope_scaling.factor=2": "did you mean draft.rope_scaling?",
    "train.push_to_hub=1": "did you mean peagle-train export --push-to-hub NAME?",  # as another trainer calls it
    "lr=1": "give section.key=value, as in train.learning_rate",
    **dict.fromkeys(("", "train", "train=1", "epochs=2", "=", "train.epochs"), "give section.key=value"),
    "draft.rope_scaling={}": "rope_type is missing; give one of default, linear, llama3, yarn",
    "draft.rope_scaling={rope_type: dynamic, factor: 2}": "rope_type is 'dynamic'; give one of",
    "draft.rope_scaling={rope_type: linear, factor: 2.0, foo: 1}": "has 'foo', which rope type linear does not have",
    "draft.rope_scaling={rope_type: linear, factor: two}": "factor is 'two'; give a number of at least 1",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_or_name_is_named_with_what_is_allowed(minimal, override):
    text, key = message(minimal, override), override.partition("=")[0]
    assert WRONG[override] in text
    if "rope_scaling=" in override or "got" in WRONG[override] or "it should be" in text:
        assert text.startswith(key) and "target" not in text.removeprefix(key)


def test_what_other_trainers_call_our_keys_is_no_key_of_ours_but_stands_for_one():
    assert {key for key in ELSEWHERE if not key.startswith("peagle-train ")} <= {*KEYS}
    theirs = {name for names in ELSEWHERE.values() for name in " ".join(names).split()}
    assert not theirs & {key.partition(".")[2] for key in KEYS}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data: {sources: [stdlib]}\noutput: {dir: out}\n", "target.path is missing"),
        ("target: {path: model}\ndata: {sources: [stdlib]}\noutput:\n", "output.dir is missing"),
        ("# nothing but a comment\n", "is null; give a mapping of sections"),
        ("train: false\n", "train: got false (bool); give a mapping of its keys to values"),
        ("1: {path: model}\n", "1 is not a section"),
        ('"\\x80\\n": 1\n', r"\x80\n is not a section"),
        (MINIMAL.replace("dir:", '"\\x80\\n": 1, dir:'), r"output.\x80\n is not a key; output has dir"),
        (MINIMAL + "per_device_train_batch_size: 1\n", "did you mean train.batch_size?"),
        (MINIMAL + "tokenizer: {name: muon}\n", "there are target, data, output, draft, cod, train"),
        (MINIMAL.replace("stdlib", "{path: c, wight: 2}"), "data.sources[0].wight is not a key; did you mean"),
        ("target: {path: a, 'path': b}\n", "duplicate key 'path' at line 1, column 19"),
        ("target: {path: a}\n---\ndata: {}\n", "not valid YAML"),
        ("target: {path: !!python/object:os.system a}\n", "not valid YAML"),
        ("target: {path: a}\ntrain: {epochs: !!bool x}\n", "not valid YAML"),
        ("[" * 500, "not valid YAML"),
        (b"target: {path: \xff}\n", "is not UTF-8 (byte 15): save it as UTF-8"),
    ],
)
def test_a_broken_file_is_told_apart_in_one_line(write, text, expected):
    assert expected in message(write(text))


def test_a_missing_file_is_refused_and_a_byte_order_mark_and_a_section_of_comments_do_no_harm(write):
    assert "cannot be read: No such file" in message(Path("none.yaml"))
    recipe = load_recipe(write(b"\xef\xbb\xbf" + MINIMAL.encode() + b"train:\n  # epochs: 2\n"))
    assert recipe.train.epochs == 1


def test_fields_that_contradict_each_other_are_both_named_and_may_be_equal(minimal):
    for overrides, *words in (
        (["draft.window=7"], "draft.window is 7", "cod.num_depths is 8"),
        (["target.reuse=2"], "target.reuse is 2", "target.ring is null"),
        (["data.max_length=7"], "data.max_length is 7", "cod.num_depths is 8"),
        (["cod.num_segments=11", "data.max_length=10"], "cod.num_segments is 11", "data.max_length is 10"),
        (["data.eval_sources=[{path: a, weight: 2}]"], "data.eval_sources is", "remove weight"),
    ):
        assert all(word in message(minimal, *overrides) for word in words)
    load_recipe(minimal, ["data.max_length=8", "cod.num_segments=8", "draft.window=8"])


def test_keys_of_before_are_ignored_where_they_change_nothing_and_refused_with_another_value(minimal):
    was = "draft.embeddings_from_target=true draft.lm_head_from_target=true train.muon_learning_rate=0.002"
    was += " train.average=0.0 train.compile_mode=default draft.vocab_from=null target.device_map=null"
    was += " data.max_documents=null data.max_characters=4000000 data.on_rewrite=last_turn"
    assert load_recipe(minimal, was.split()) == load_recipe(minimal)
    load_recipe(minimal, ["data.sources=[{path: a.jsonl, format: auto, streaming: false}]"])
    for other in ("train.average=0.2", "draft.vocab_from=x", "data.sources=[{path: a.jsonl, format: text}]"):
        assert "remove it" in message(minimal, other)


def test_a_number_beyond_any_use_is_refused_and_its_limit_named(minimal):
    for section, cls in get_type_hints(Recipe).items():
        for name, hint in get_type_hints(cls).items():
            if "int" in str(hint).replace("list[int]", "") and name != "seed":
                assert "less than or equal to" in message(minimal, f"{section}.{name}=99999999999999999999999"), name


# YAML as people mean it: words stay words, numbers are numbers, and nothing changes on its way out and in.

WORDS = "no yes on off y n 010 0x10 0b1 1:30 1:30.5 2024-01-01 << = 1e 1e-4x nano trueish +".split()
NUMBERS = {"1e-4": 1e-4, "1E5": 1e5, "-2.5e+3": -2500.0, "1_000": 1000, "-7": -7, "+7": 7, "0": 0, ".5": 0.5, "1.": 1.0}


def test_words_and_numbers_are_what_they_look_like_and_only_true_and_false_are_booleans():
    for text in WORDS:  # what only old YAML takes for something else
        assert parse_yaml(text, "test") == parse_yaml(dump_yaml(text), "test") == text
    for text, number in NUMBERS.items():
        value = parse_yaml(text, "test")
        assert value == number and type(value) is type(number)
        assert parse_yaml(dump_yaml(text), "test") == text, "a string that looks like a number is quoted"
    assert parse_yaml("[true, False, TRUE, null, ~, '']", "test") == [True, False, True, None, None, ""]


texts = st.text(st.characters(codec="utf-8"))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


@settings(max_examples=20, deadline=None)
@given(nested)
@example({"\x85": "\u2028"})
def test_no_value_changes_on_its_way_out_and_in_for_this_reader_and_the_usual_one_and_a_shell(value):
    text = dump_yaml(value)
    assert text.isascii() and parse_yaml(text, "test") == yaml.safe_load(text) == value
    [pasted] = shlex.split(as_override("a.b", value))
    assert parse_yaml(pasted.removeprefix("a.b="), "test") == value


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), nested)
@example("data.sources", ["/with space/x", "it's", "#x: y", "a~b", 'q"$HOME`', "\u00e9 \u4e2d \U0001f600", "w " * 99])
@example("data.eval_sources", ["stdlib", {"path": "a,b [c] {d}"}, {"datasets": "a/b", "split": "test"}])
@example("draft.rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "truncate": False, "mscale": 0.7})
@example("target.layer_ids", [1, 2, 9])
@example("train.max_grad_norm", None)
@example("train.adam_epsilon", 1e-12)
@example("output.dir", "12")
def test_any_value_is_kept_as_given_and_in_a_dump_or_refused_in_one_line(minimal, key, value):
    section, leaf = key.split(".")
    try:
        recipe = load_recipe(minimal, shlex.split(as_override(key, value)))
    except RecipeError as error:
        assert str(error).isascii() and "\n" not in str(error) and len(str(error)) < 1500
    else:
        assert getattr(getattr(recipe, section), leaf) == value or "~" in str(value)
        kept = minimal.with_name("kept.yaml")
        kept.write_text(dump_recipe(recipe))
        assert load_recipe(kept) == recipe
