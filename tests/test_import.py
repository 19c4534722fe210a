"""Other people's drafters: `peagle-train import` and draft.init_from, from either format, whole or EAGLE-3's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from peagle_train.__main__ import main as train_main
from peagle_train.config import load_recipe
from peagle_train.serving.drafter_io import load_drafter
from peagle_train.serving.export import export_drafter, import_drafter
from peagle_train.serving.start import make_draft_config
from peagle_train.target_model.cache import write_cache
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import command, make_draft
from tests.tiny import MASK, VOCAB, make_target, write_recipe, write_rows

DRAFTED = 30
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "ptd_token_id": MASK,
    "draft_vocab_size": DRAFTED,
    "target_hidden_size": 16,
    "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
    "rms_norm_eps": 0.01,
    "intermediate_size": 20,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26], prompt=0.3)


def drafter(folder: Path, **changes: Any) -> Path:
    """A P-EAGLE drafter for the tiny target with a shape and a vocabulary of its own."""
    draft = make_draft(torch.float32, **{**SHAPE, **changes})
    if draft.config.draft_vocab_size == DRAFTED:
        draft.set_draft_vocab(torch.arange(DRAFTED) * 2 + 1)
    draft.save_pretrained(folder)
    return folder


def eagle3(folder: Path, *gone: str, prefix: str = "", **changes: Any) -> Path:
    """The same as an EAGLE-3 drafter: midlayer names, no mask token, and without the tensors `gone`."""
    drafter(folder, num_hidden_layers=1, **changes)
    config = json.loads((folder / "config.json").read_text())
    left_out = ("mask_token_id", "ptd_token_id", "pard_token", "eagle_aux_hidden_state_layer_ids")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("mask_hidden", *gone)}
    renamed = {prefix + name.replace("layers.0.", "midlayer."): tensor for name, tensor in kept.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


def start(folder: Path, target: Path, rows: Path, source: Path, *overrides: str, **sections: dict[str, Any]) -> int:
    """Run one step that changes next to nothing."""
    sections = {"target": {"dtype": "float32"}, **sections}
    sections["train"] = {"max_steps": 1, "dtype": "float32", "learning_rate": 1e-12, **sections.get("train", {})}
    recipe = write_recipe(folder, target, rows, folder / "run", **sections)
    content = [line for line in recipe.read_text().splitlines() if "draft_vocab_size" not in line]
    recipe.write_text("\n".join(content) + "\n")
    return train_main([str(recipe), f"draft.init_from={source}", *overrides])


@pytest.mark.parametrize("format", ["speculators", "imported"])
def test_a_run_starts_from_a_drafters_weights_shape_and_vocabulary(
    tmp_path: Path, target: Path, rows: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape: dict[str, Any] = {"attention_bias": True, "norm_before_fc": True, "sliding_window": 8}
    if format == "speculators":
        shape = {"layer_type": "qwen3", "fc_norm": True, "sliding_window": 9}
    source = drafter(tmp_path / "trained", norm_before_residual=True, **shape)
    if format == "imported":
        import_drafter(source, tmp_path / "in")
    else:
        export_drafter(source, tmp_path / "in", format, target_name="x", speculative_tokens=4)
    norms = [f"draft.{key}=true" for key in shape if key in ("norm_before_fc", "fc_norm")]
    assert start(tmp_path, target, rows, tmp_path / "in", "draft.norm_before_residual=true", *norms) == 0
    assert f"started from {tmp_path / 'in'}" in capsys.readouterr().out
    one, other = load_drafter(source), load_drafter(tmp_path / "run" / "final")
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], rtol=0, atol=1e-6), name
    before, after = (json.loads(d.config.to_json_string()) for d in (one, other))
    differ = {key for key in before | after if before.get(key) != after.get(key)}
    # The longest context is the target's; the rest is the imported drafter's.
    assert differ <= {"max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "initializer_range"}, differ
    assert after["max_position_embeddings"] == 256 and {k: after[k] for k in shape} == shape


def test_a_run_starts_from_an_eagle3_drafter_and_says_what_it_lacks(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = eagle3(tmp_path / "in", "embed_tokens.weight", "lm_head.weight", "t2d", prefix="model.")
    given = ["draft.num_layers=1", f"draft.mask_token_id={MASK}"]
    assert start(tmp_path, target, rows, source, *given) == 0
    printed = capsys.readouterr().out
    for part in ("no mask_hidden", "no embed_tokens: the target's", "no lm_head: the target's", "renamed"):
        assert part in printed, part
    made, stored = load_drafter(tmp_path / "run" / "final"), load_file(source / "model.safetensors")
    assert made.draft_token_ids.tolist() == list(range(1, 2 * DRAFTED, 2)) and made.mask_hidden.any()
    theirs = load_file(target / "model.safetensors")
    assert torch.allclose(made.embed_tokens.weight, theirs["model.embed_tokens.weight"], atol=1e-6)
    assert torch.allclose(made.lm_head.weight, theirs["lm_head.weight"][made.draft_token_ids], atol=1e-6)
    assert torch.allclose(made.layers[0].hidden_norm.weight, stored["model.midlayer.hidden_norm.weight"], atol=1e-6)


def test_a_drafter_of_another_width_must_bring_its_embeddings(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    source = eagle3(tmp_path / "in", "embed_tokens.weight", "t2d", **shape)
    assert start(tmp_path, target, rows, source, "draft.num_layers=1", f"draft.mask_token_id={MASK}") == 2
    assert "has no embed_tokens.weight" in capsys.readouterr().err.splitlines()[-1]


def test_a_drafter_without_layer_ids_starts_a_run_from_cached_features(
    tmp_path: Path, target: Path, rows: Path
) -> None:
    source = eagle3(tmp_path / "in", "embed_tokens.weight", "lm_head.weight")
    recipe = write_recipe(tmp_path, target, rows, tmp_path / "run", target={"dtype": "float32"})
    write_cache(load_recipe(recipe), str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert start(tmp_path, target, rows, source, "draft.num_layers=1", f"target.cache={tmp_path / 'cache'}") == 0
    trained, weights = load_file(tmp_path / "run/final/model.safetensors"), load_file(target / "model.safetensors")
    assert torch.equal(trained["lm_head.weight"], weights["lm_head.weight"][torch.arange(DRAFTED) * 2 + 1])
    config = json.loads((tmp_path / "run/final/config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]  # the default of a target of six layers


@pytest.mark.parametrize(
    ("family", "asked", "expected"), [("qwen3", None, "qwen3"), ("qwen3", "llama", "llama"), ("llama", None, "llama")]
)
def test_layers_are_of_the_targets_family_unless_the_recipe_says(
    tmp_path: Path, target: Path, rows: Path, family: str, asked: str | None, expected: str
) -> None:
    config = json.loads((target / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": family}))
    recipe = load_recipe(write_recipe(tmp_path, target, rows, tmp_path / "run", draft={"layer_type": asked}))
    assert make_draft_config(recipe, FrozenTarget(model), MASK).layer_type == expected


MISFITS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "layers": ({"num_hidden_layers": 3}, [], "draft.num_layers is 2, but .* has 3: give draft.num_layers=3"),
    "vocabulary": (
        {"vocab_size": VOCAB + 1},
        [],
        rf"vocabulary and hidden size \({VOCAB + 1}, 16\); .* \({VOCAB}, 16\)",
    ),
    "target's width": ({"target_hidden_size": 12}, [], rf"\({VOCAB}, 12\); this target's are \({VOCAB}, 16\)"),
    "mask": ({}, ["draft.mask_token_id=3"], f"draft.mask_token_id is 3, but .* has {MASK}"),
    "residual": ({"norm_before_residual": True}, [], "has true: give draft.norm_before_residual=true"),
    "layer type": ({"layer_type": "qwen3"}, ["draft.layer_type=llama"], "has qwen3: give draft.layer_type=qwen3"),
    "rope": ({}, ["draft.rope_theta=7.0"], "draft.rope_theta is 7.0, but .* has 5000.0"),
    "feature layers": ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, [], r"give target.layer_ids=\[1, 3, 4\]"),
    "nowhere": ({}, ["draft.init_from=/nowhere"], "/nowhere is not a folder"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_by_name_before_any_training(
    tmp_path: Path, target: Path, rows: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, overrides, message = MISFITS[case]
    source = drafter(tmp_path / "in", **changes)
    assert start(tmp_path, target, rows, source, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error) and not (tmp_path / "run").exists(), error


def test_the_command_imports_a_whole_drafter_and_says_why_not_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = drafter(tmp_path / "whole"), tmp_path / "out"
    assert command("import", source, "--out", out) == 0 and command("check", out) == 0
    assert command("import", source, "--out", out) == 2 and "is there already" in capsys.readouterr().err
    lacking = eagle3(tmp_path / "in", "embed_tokens.weight")
    assert command("import", lacking, "--out", tmp_path / "b") == 2
    assert "lacks mask_hidden, embed_tokens.weight, a mask token" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
