"""The drafter's rope: what trains is what config.json says, whoever gave it."""

from pathlib import Path
from typing import Any

import pytest

from peagle_train.config import Recipe, load_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.rope import rope_mistake
from peagle_train.serving.start import make_draft_config
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_config
from tests.tiny import MASK, make_target, write_recipe


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return FrozenTarget.load(str(make_target(tmp_path_factory.mktemp("target"))), dtype="float64")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path, tmp_path, tmp_path / "rows.jsonl", tmp_path / "run"))


def made(recipe: Recipe, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch, **rope: Any) -> PEagleDraftConfig:
    monkeypatch.setattr(target.config, "rope_parameters", rope)
    return make_draft_config(recipe, target, MASK)


def test_what_a_targets_rope_has_beyond_its_type_is_left_out_of_the_drafters_and_said(
    recipe, target, monkeypatch, caplog
):
    config = made(recipe, target, monkeypatch, rope_type="default", rope_theta=5e3, partial_rotary_factor=0.5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e3}
    assert "the drafter's rope has partial_rotary_factor, which a drafter does not use: dropped" in caplog.text
    assert PEagleDraft.make_rotary(config).inv_freq.numel() == config.head_dim // 2


def test_a_rope_that_no_drafter_can_have_is_refused_with_the_way_out(recipe, target, monkeypatch):
    for rope, words in (
        ({}, "rope_type is missing"),
        (
            {"rope_type": "linear", "rope_theta": 1e4},
            "factor is missing; rope type linear takes factor; give draft.rope_",
        ),
        ({"rope_type": "default"}, "rope_theta is missing; it must be > 1"),
        ({"rope_type": "default", "rope_theta": 0.0}, "rope_theta is 0.0; it must be"),
        ({"rope_type": "default", "rope_theta": "x"}, "rope_theta is x; it must be"),
    ):
        with pytest.raises(ValueError, match=words):
            made(recipe, target, monkeypatch, **rope)
    config = make_config(rope_theta=None, rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"the drafter's rope: factor is 0\.0; give a number of at least 1"):
        config.check_trainable()


def test_rows_longer_than_the_drafter_says_to_serve_are_told(recipe, target, caplog):
    recipe.draft.max_position_embeddings = recipe.data.max_length
    make_draft_config(recipe, target, MASK)
    assert not caplog.text
    recipe.draft.max_position_embeddings -= 1
    make_draft_config(recipe, target, MASK)
    assert "draft.max_position_embeddings is 31" in caplog.text


def test_tables_that_turn_nothing_or_are_out_of_order_are_refused():
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3 |= {"original_max_position_embeddings": 8192}
    assert rope_mistake(llama3) is None
    for changed in ({"low_freq_factor": 4}, {"low_freq_factor": 0}, {"high_freq_factor": 0.5}):
        assert rope_mistake(llama3 | changed), changed
    yarn = {"rope_type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 0}
    assert rope_mistake(yarn) is None
    assert rope_mistake(yarn | {"attention_factor": 0}) and rope_mistake(yarn | {"beta_slow": 33})
