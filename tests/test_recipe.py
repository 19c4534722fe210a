"""The recipe: reading, overriding, writing back, and one clear line for each mistake."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from peagle_train import config
from peagle_train.cli import main
from peagle_train.config import ELSEWHERE, Data, Output, Recipe, RecipeError, Target, dump_recipe, load_recipe

MINIMAL = "target: {path: model}\ndata: {sources: [stdlib]}\noutput: {dir: out}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_recipe


@pytest.fixture
def minimal(write: Any) -> Path:
    return write(MINIMAL)


def message(path: Path, *overrides: str) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert text.isascii() and "\n" not in text and len(text) < 400
    return text


def test_a_minimal_recipe_has_the_defaults(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe == Recipe(Target("model"), Data(["stdlib"]), Output("out"))
    assert (recipe.data.max_length, recipe.cod.num_depths, recipe.train.segment_mode) == (2048, 8, "relay")
    assert recipe.data.extensions == [".py", ".txt", ".md", ".jsonl", ".parquet", ".arrow"]


def test_every_field_says_what_it_is_below_it() -> None:
    source = Path(config.__file__).read_text()
    for cls in get_type_hints(Recipe).values():
        body = source.split(f"class {cls.__name__}:")[1].split("@dataclass")[0]
        assert body.count('\n    """') == len(fields(cls)) + 1, cls.__name__


def test_overrides_replace_what_the_file_says_and_the_last_one_counts(write: Any) -> None:
    path = write(MINIMAL + "train: {epochs: 3, seed: 7}\n")
    recipe = load_recipe(path, ["train.epochs=4", "train.epochs=5"])
    assert (recipe.train.epochs, recipe.train.seed) == (5, 7)


YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "truncate": False, "mscale": 0.7}
READ = {
    "target.layer_ids=[1, 2, 9]": [1, 2, 9],
    "data.pack=false": False,
    "train.max_grad_norm=null": None,
    "output.dir=runs/lr=1e-4.x": "runs/lr=1e-4.x",
    "output.dir=~/runs": "/home/someone/runs",
    "train.learning_rate=1e-4": 1e-4,
    "train.learning_rate=1": 1.0,
    "train.mixed_precision=no": "no",
    "draft.rope_scaling={rope_type: yarn, factor: 4.0, beta_fast: 8, truncate: false, mscale: 0.7}": YARN,
}


@pytest.mark.parametrize("override", READ)
def test_an_override_is_read_as_people_mean_it(minimal: Path, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    section, leaf = override.partition("=")[0].split(".")
    value = getattr(getattr(load_recipe(minimal, [override]), section), leaf)
    assert value == READ[override] and type(value) is type(READ[override])


WRONG = {
    "train.epochs=null": "got null; it should be",
    "data.pack=yes": "got 'yes' (str); it should be a valid boolean",
    "train.epochs=true": "got true (bool); it should be a valid integer",
    "train.epochs=010": "got '010' (str)",
    "train.epochs=0": "got 0 (int); it should be greater than or equal to 1",
    "train.learning_rate=.nan": "got nan (float); it should be a finite number",
    "train.learning_rate=1.5": "got 1.5 (float); it should be less than or equal to 1",
    "train.memory_margin=1": "it should be less than 1",
    "train.seed=-1": "got -1 (int)",
    "train.loss=mse": "got 'mse' (str); it should be 'kl', 'soft_ce', 'hard_ce', 'tv' or 'lk'",
    "train.compile=maybe": "got 'maybe' (str); it should be a valid boolean, or it should be 'auto'",
    "cod.num_segments=0": "got 0 (int); it should be greater than or equal to 1, or it should be 'auto'",
    "output.dir=2024": "got 2024 (int); it should be a valid string",
    "output.dir='  '": "got '  ' (str); give a non-empty string",
    "data.exclude=a": "got 'a' (str); it should be a valid list",
    "data.sources=[]": "give a non-empty list",
    "data.extensions=[py]": "got ['py'] (list); give a list such as [.py, .jsonl], with the dots",
    "target.layer_ids=[0, 1, true]": "got true (bool); it should be a valid integer",
    "train.profile_steps=[0, 4]": "give the first and the last step",
    **{
        f"target.layer_ids={ids}": "give 1 to 8 strictly increasing integers >= 0"
        for ids in ("[]", "[0, 1, 2, 3, 4, 5, 6, 7, 8]", "[1, 1, 2]", "[3, 2, 1]", "[-1, 0, 1]")
    },
    "data.num_workers=1000": "less than or equal to",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(minimal: Path, override: str) -> None:
    text = message(minimal, override)
    assert text.startswith(f"{override.partition('=')[0]}: got ") and WRONG[override] in text


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("train.learning_rte=1", "train.learning_rate"),
        ("train.max_length=9", "data.max_length"),  # the right name in the wrong section
        ("trian.epochs=2", "train"),
        ("draft.rope_scaling.factor=2", "draft.rope_scaling"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(minimal: Path, override: str, nearest: str) -> None:
    assert message(minimal, override).endswith(f"did you mean {nearest}?")


def test_a_key_without_its_section_gets_the_whole_name(write: Any) -> None:
    assert message(write(MINIMAL + "learning_rate: 1\n")).endswith("did you mean train.learning_rate?")


FOREIGN = {
    "output_dir": "output.dir",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "base_model": "target.path",
    "num_train_epochs": "train.epochs",
    "logging_steps": "train.log_steps",
    "report_to": "train.log_with",
    "push_to_hub": "peagle-train export --push-to-hub NAME",
    "lr": "train.learning_rate",
    "total_seq_len": "data.max_length",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_key_of_another_trainer_is_answered_with_ours(
    minimal: Path, write: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        message(write(MINIMAL + f"{name}: 1\n")),
        message(minimal, f"train.{name}=1"),
        message(minimal, f"{name}=1"),
    ]
    for words in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name.replace('_', '-')}", "1"]):
        assert main(["train", str(minimal), *words]) == 2
        given.append(capsys.readouterr().err)
    assert all(FOREIGN[name] in line and len(line.splitlines()) == 1 for line in given), given


def test_every_key_that_others_names_lead_to_exists() -> None:
    ours = {f"{section}.{spec.name}" for section, cls in get_type_hints(Recipe).items() for spec in fields(cls)}
    assert {key for key in ELSEWHERE if not key.startswith("peagle-train ")} <= ours
    theirs = {name for names in ELSEWHERE.values() for name in " ".join(names).split()}
    assert not theirs & {key.partition(".")[2] for key in ours}


def test_a_section_that_does_not_exist_lists_the_sections(write: Any) -> None:
    line = message(write(MINIMAL + "tokenizer: {name: muon}\n"))
    assert all(section in line for section in get_type_hints(Recipe)) and "did you mean" not in line


@pytest.mark.parametrize("override", ["", "train", "train=1", "epochs=2", "=", "train.epochs"])
def test_an_override_of_another_form_is_refused(minimal: Path, override: str) -> None:
    assert "give section.key=value" in message(minimal, override)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data: {sources: [stdlib]}\noutput: {dir: out}\n", "target.path is missing"),
        ("target: {path: model}\noutput: {dir: out}\n", "data.sources is missing"),
        ("target: {path: model}\ndata: {sources: [stdlib]}\noutput:\n", "output.dir is missing"),
        ("# nothing but a comment\n", "is null; give a mapping of sections"),
        ("- target\n", "is ['target'] (list); give a mapping of sections"),
        ("train: false\n", "train: got false (bool); give a mapping of its keys to values"),
        ("1: {path: model}\n", "1 is not a section"),
        ("target: {path: a, path: b}\n", "duplicate key 'path' at line 1, column 19"),
        ("target: {path: [}\n", "not valid YAML"),
        ("target: {path: a}\n---\ndata: {}\n", "not valid YAML"),
        ("target: {path: !!python/object:os.system a}\n", "not valid YAML"),
        ("target: {path: a}\ntrain: {epochs: !!bool x}\n", "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
        (b"target: {path: \xff}\n", "is not UTF-8 (byte 15): save it as UTF-8"),
    ],
)
def test_a_broken_file_is_told_apart_in_one_line(write: Any, text: str | bytes, expected: str) -> None:
    assert expected in message(write(text))


def test_a_missing_file_is_refused_and_a_byte_order_mark_and_a_section_of_comments_do_no_harm(write: Any) -> None:
    assert "cannot be read: No such file" in message(Path("none.yaml"))
    recipe = load_recipe(write(b"\xef\xbb\xbf" + MINIMAL.encode() + b"train:\n  # epochs: 2\n"))
    assert recipe.train.epochs == 1


@pytest.mark.parametrize(
    "overrides, keys",
    [
        (["data.max_length=7"], ("data.max_length is 7", "cod.num_depths is 8")),
        (["cod.num_segments=2049"], ("cod.num_segments is 2049", "data.max_length is 2048")),
        (["train.mixed_precision=bf16", "train.dtype=float64"], ("mixed_precision is 'bf16'", "dtype is 'float64'")),
        (["target.shard=true", "target.device_map=auto"], ("target.shard is true", "device_map is 'auto'")),
        (["draft.init_from=a", "draft.vocab_from=b"], ("draft.init_from is 'a'", "draft.vocab_from is 'b'")),
        (["draft.window=7"], ("draft.window is 7", "cod.num_depths is 8")),
    ],
)
def test_fields_that_contradict_each_other_are_both_named(
    minimal: Path, overrides: list[str], keys: tuple[str, str]
) -> None:
    text = message(minimal, *overrides)
    assert keys[0] in text and keys[1] in text


def test_a_recipe_built_in_python_is_checked_alike() -> None:
    recipe = Recipe(Target("model"), Data(["stdlib"]), Output("out"))
    recipe.train.learning_rate = 1
    recipe.validate()
    recipe.train.epochs = 0
    with pytest.raises(RecipeError, match=r"train\.epochs: got 0 \(int\)"):
        recipe.validate()


def test_sources_are_words_or_mappings_and_their_mistakes_are_told_with_their_number(write: Any) -> None:
    text = MINIMAL.replace("[stdlib]", "[stdlib, {path: chats.jsonl, weight: 2.5}, {datasets: a/b, streaming: true}]")
    recipe = load_recipe(write(text))
    assert recipe.data.sources[1] == {"path": "chats.jsonl", "weight": 2.5}
    assert load_recipe(write(dump_recipe(recipe))) == recipe
    assert "data.sources[1].wight is not a key; did you mean data.sources[1].weight?" in message(
        write(text.replace("weight", "wight"))
    )
    assert "data.sources: got 5 (int)" in message(write(text), "data.sources=[5]")
    weighed = message(write(text), "data.eval_sources=[{path: a, weight: 2}]")
    assert weighed.startswith("data.eval_sources is") and "remove weight" in weighed
    assert "neither of path and datasets" in message(write(text), "data.sources=[{weight: 2}]")


def test_a_dump_reads_back_to_the_same_recipe(minimal: Path, write: Any) -> None:
    overrides = ["target.layer_ids=[0, 3, 5]", "draft.rope_scaling={rope_type: linear, factor: 1e1}", "train.seed=5"]
    recipe = load_recipe(minimal, [*overrides, "train.adam_epsilon=1e-12", "train.max_grad_norm=null"])
    assert recipe.draft.rope_scaling == {"rope_type": "linear", "factor": 10.0}
    assert load_recipe(write(dump_recipe(recipe))) == recipe


ROPES = {
    "{}": "rope_type is missing; give one of default, linear, llama3, yarn",
    "{rope_type: dynamic, factor: 2}": "rope_type is 'dynamic'; give one of",
    "{rope_type: default, rope_theta: 5}": "rope_theta is a key of its own: draft.rope_theta",
    "{rope_type: linear, factor: 2.0, foo: 1}": "has 'foo', which rope type linear does not have",
    "{rope_type: linear}": "factor is missing; rope type linear takes factor",
    "{rope_type: llama3, factor: 2}": "low_freq_factor is missing; rope type llama3 takes factor, low_freq_factor",
    "{rope_type: linear, factor: two}": "factor is 'two'; give a number of 1 to 1e+06",
    "{rope_type: yarn, factor: 2, beta_slow: 33}": "beta_slow is 33, beta_fast 32; give a smaller beta_slow",
    "{rope_type: yarn, factor: 2, truncate: 1}": "truncate is 1; give true or false",
    "{rope_type: yarn, factor: 2, original_max_position_embeddings: 4.5}": "is 4.5; give an integer of 1 to",
}


@pytest.mark.parametrize("given", ROPES)
def test_a_rope_that_would_be_changed_ignored_or_not_a_number_is_refused(minimal: Path, given: str) -> None:
    text = message(minimal, f"draft.rope_scaling={given}")
    assert text.startswith("draft.rope_scaling") and ROPES[given] in text and "target" not in text


def test_a_number_beyond_any_use_is_refused_and_its_limit_named(minimal: Path) -> None:
    for section, cls in get_type_hints(Recipe).items():
        for name, hint in get_type_hints(cls).items():
            if "int" in str(hint).replace("list[int]", "") and name != "seed":
                assert "less than or equal to" in message(minimal, f"{section}.{name}=99999999999999999999999"), name
