"""Drafters to start from: other people's (`peagle-train import`, draft.init_from), whole or EAGLE-3's, and new ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import peagle_train
from peagle_train import new_drafter, save_drafter
from peagle_train.__main__ import main as train_main
from peagle_train.config import load_recipe
from peagle_train.core.visibility import Causal
from peagle_train.serving.drafter_io import MAY_LACK, load_drafter
from peagle_train.serving.export import export_drafter
from peagle_train.serving.start import make_draft_config
from peagle_train.target_model.cache import write_cache
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import command
from tests.runs import last_error, same_tensors
from tests.test_check_drafter import set_config, set_masks, set_tensors
from tests.test_generate import tiny_draft
from tests.tiny import MASK, VOCAB, make_target, write_recipe

DRAFTED = 30


def drafter(folder: Path, **changes: Any) -> Path:
    """A P-EAGLE drafter for the tiny target with a shape and a vocabulary of its own."""
    own = {"eagle_aux_hidden_state_layer_ids": [2, 3, 4], "rms_norm_eps": 0.01, "intermediate_size": 20}
    draft = tiny_draft(torch.float32, ids=torch.arange(DRAFTED) * 2 + 1, **{**own, **changes})
    draft.save_pretrained(folder)
    return folder


def eagle3(folder: Path) -> Path:
    """The same as an EAGLE-3 drafter: midlayer names, no mask token, and without what may be the target's."""
    drafter(folder, num_hidden_layers=1)
    set_masks(folder, None)
    set_config(folder, eagle_aux_hidden_state_layer_ids=None)
    own = {name: t for name, t in load_file(folder / "model.safetensors").items() if name not in (*MAY_LACK, "t2d")}
    renamed = {"model." + name.replace("layers.0.", "midlayer."): tensor for name, tensor in own.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


def start(folder: Path, target: Path, rows: Path, source: Path, *overrides: str) -> int:
    """Run one step that changes next to nothing."""
    train = {"max_steps": 1, "dtype": "float32", "learning_rate": 1e-12}
    recipe = write_recipe(folder, target, rows, folder / "run", target={"dtype": "float32"}, train=train)
    return train_main([str(recipe), "draft.draft_vocab_size=null", f"draft.init_from={source}", *overrides])


@pytest.mark.parametrize("format", ["speculators", "imported"])
def test_a_run_starts_from_a_drafters_weights_shape_and_vocabulary(tmp_path, tiny_target, tiny_rows, format, capsys):
    shape: dict[str, Any] = {"attention_bias": True, "norm_before_fc": True, "sliding_window": 4}  # as many as depths
    if format == "speculators":
        shape = {"layer_type": "qwen3", "fc_norm": True, "sliding_window": 9}
    source = drafter(tmp_path / "trained", norm_before_residual=True, **shape)
    if format == "imported":
        assert command("import", source, "--out", tmp_path / "in") == 0
    else:
        export_drafter(source, tmp_path / "in", format, target_name="x", speculative_tokens=4)
    norms = [f"draft.{key}=true" for key in shape if key in ("norm_before_fc", "fc_norm")]
    assert start(tmp_path, tiny_target, tiny_rows, tmp_path / "in", "draft.norm_before_residual=true", *norms) == 0
    assert f"started from {tmp_path / 'in'}" in capsys.readouterr().out
    one, other = load_drafter(source), load_drafter(tmp_path / "run" / "final")
    assert same_tensors(other.state_dict(), one.state_dict(), 1e-6)
    before, after = (json.loads(d.config.to_json_string()) for d in (one, other))
    differ = {key for key in before | after if before.get(key) != after.get(key)}
    # The longest context is the target's; the rest is the imported drafter's.
    assert differ <= {"max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "initializer_range"}, differ
    assert after["max_position_embeddings"] == 256 and {k: after[k] for k in shape} == shape


def test_data_is_prepared_with_the_mask_token_that_the_drafter_brings(tmp_path, tiny_target, tiny_rows):
    source = drafter(tmp_path / "in")
    recipe = write_recipe(tmp_path, tiny_target, tiny_rows, tmp_path / "run", draft={"mask_token_id": None})
    prepared, given = tmp_path / "prepared", [f"draft.init_from={source}"]
    assert command("prepare", recipe, *given, "--out", prepared) == 0
    index = json.loads((prepared / "index.json").read_text())
    assert index["settings"]["draft.mask_token_id"] == MASK
    there = "draft.init_from=/nowhere", f"draft.mask_token_id={MASK}"  # where data is prepared it need not be
    assert command("prepare", recipe, *there, "--out", prepared) == 0 == command("check-data", recipe, *there)


@pytest.mark.parametrize("features", ["computed", "cached"])
def test_a_run_starts_from_an_eagle3_drafter_and_says_what_it_lacks(tmp_path, tiny_target, tiny_rows, features, capsys):
    source = eagle3(tmp_path / "in")
    given = ["draft.num_layers=1", f"draft.mask_token_id={MASK}"]
    if features == "cached":
        recipe = write_recipe(tmp_path, tiny_target, tiny_rows, tmp_path / "run", target={"dtype": "float32"})
        write_cache(load_recipe(recipe), str(tmp_path / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        given.append(f"target.cache={tmp_path / 'cache'}")
    assert start(tmp_path, tiny_target, tiny_rows, source, *given) == 0
    printed = capsys.readouterr().out
    for part in ("no mask_hidden", "no embed_tokens: the target's", "no lm_head: the target's"):
        assert part in printed, part
    made, stored = load_drafter(tmp_path / "run" / "final"), load_file(source / "model.safetensors")
    assert made.draft_token_ids.tolist() == list(range(1, 2 * DRAFTED, 2)) and made.mask_hidden.any()
    assert made.config.eagle_aux_hidden_state_layer_ids == [2, 3, 4]  # the default of a target of six layers
    theirs = load_file(tiny_target / "model.safetensors")
    assert torch.allclose(made.embed_tokens.weight, theirs["model.embed_tokens.weight"], atol=1e-6)
    assert torch.allclose(made.lm_head.weight, theirs["lm_head.weight"][made.draft_token_ids], atol=1e-6)
    assert torch.allclose(made.layers[0].hidden_norm.weight, stored["model.midlayer.hidden_norm.weight"], atol=1e-6)


def test_layers_are_of_the_targets_family_unless_the_recipe_says(tmp_path, tiny_target, tiny_rows):
    config = json.loads((tiny_target / "config.json").read_text())
    for family, asked, expected in (("qwen3", None, "qwen3"), ("qwen3", "llama", "llama"), ("llama", None, "llama")):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": family}))
        recipe = write_recipe(tmp_path, tiny_target, tiny_rows, tmp_path / "run", draft={"layer_type": asked})
        assert make_draft_config(load_recipe(recipe), FrozenTarget(model), MASK).layer_type == expected


MISFITS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "layers": ({"num_hidden_layers": 3}, [], "draft.num_layers is 2, but .* has another: give draft.num_layers=3"),
    "vocabulary": ({"vocab_size": VOCAB + 1}, [], rf"size \({VOCAB + 1}, 16\); .* \({VOCAB}, 16\)"),
    "target's width": ({"target_hidden_size": 12}, [], rf"\({VOCAB}, 12\); this .* \({VOCAB}, 16\)"),
    "mask": ({}, ["draft.mask_token_id=3"], f"draft.mask_token_id is 3, .* give draft.mask_token_id={MASK}"),
    "residual": ({"norm_before_residual": True}, [], "give draft.norm_before_residual=true"),
    "layer type": ({"layer_type": "qwen3"}, ["draft.layer_type=llama"], 'give draft.layer_type="qwen3"'),
    "rope": ({}, ["draft.rope_theta=7.0"], "draft.rope_theta is 7.0, .* give draft.rope_theta=5000.0"),
    "feature layers": ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, [], r"target.layer_ids=\[1, 3, 4\]"),
    "window": ({"sliding_window": 5}, ["cod.num_depths=6"], "window of .* is 5: give a cod.num_depths of at most that"),
    "nowhere": ({}, ["draft.init_from=/nowhere"], "/nowhere/config.json cannot be read"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_by_name_before_any_training(tmp_path, tiny_target, tiny_rows, case, capsys):
    changes, overrides, message = MISFITS[case]
    source = drafter(tmp_path / "in", **changes)
    assert start(tmp_path, tiny_target, tiny_rows, source, *overrides) == 2
    assert re.search(message, last_error(capsys)) and not (tmp_path / "run" / "final").exists()


def test_a_drafter_of_another_width_cannot_take_what_it_lacks_from_the_target(tmp_path, tiny_target, tiny_rows, capsys):
    source = drafter(tmp_path / "in", hidden_size=8)
    set_tensors(source, lm_head__weight=None)
    assert start(tmp_path, tiny_target, tiny_rows, source) == 2
    assert "has no lm_head.weight, and the target's does not fit width 8" in last_error(capsys)


# New ones, for a loop of one's own


@pytest.fixture
def frozen(tiny_target):
    return FrozenTarget.load(str(tiny_target), dtype="float32")


def test_a_new_drafter_has_the_targets_shape_embeddings_and_frozen_head_and_heeds_the_keys_of_a_recipe(
    frozen, tiny_target
):
    draft, model = new_drafter(frozen, MASK), frozen.model
    assert draft.config.eagle_aux_hidden_state_layer_ids == frozen.layer_ids
    assert torch.equal(draft.embed_tokens.weight, model.get_input_embeddings().weight)
    assert torch.equal(draft.lm_head.weight, model.lm_head.weight)
    assert draft.embed_tokens.weight.requires_grad and not draft.lm_head.weight.requires_grad
    assert draft.draft_token_ids.tolist() == list(range(VOCAB)) and draft.mask_token_id == MASK
    assert (draft.config.num_hidden_layers, draft.config.hidden_size) == (1, model.config.hidden_size)
    assert {p.dtype for p in draft.parameters()} == {torch.float32}
    by_folder, same = (new_drafter(t, MASK).state_dict() for t in (tiny_target, FrozenTarget.load(str(tiny_target))))
    assert same_tensors(by_folder, same)
    other = new_drafter(frozen, MASK, seed=1)
    assert not torch.equal(draft.fc.weight, other.fc.weight)
    assert torch.equal(draft.embed_tokens.weight, other.embed_tokens.weight)
    ids = torch.tensor([0, 3, 17, 42, VOCAB - 2])
    draft = new_drafter(frozen, MASK, ids, num_layers=3, intermediate_size=7, layer_type="qwen3", train_lm_head=True)
    assert torch.equal(draft.draft_token_ids, ids)
    assert torch.equal(draft.lm_head.weight, model.lm_head.weight[ids]) and draft.lm_head.weight.requires_grad
    config = draft.config
    assert (config.num_hidden_layers, config.intermediate_size, config.layer_type) == (3, 7, "qwen3")


def test_what_no_drafter_can_have_is_refused(frozen):
    for options, word in (
        ({"num_layer": 2}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"init_from": "elsewhere"}, "init_from"),
        ({"draft_vocab_size": 5}, "draft_token_ids"),
        ({"mask_token_id": VOCAB}, "mask_token_id"),
        *(({"draft_token_ids": torch.tensor(ids).long()}, "ascending") for ids in ([3, 3], [0, VOCAB], [-1, 3], [])),
    ):
        with pytest.raises(ValueError, match=word):
            new_drafter(frozen, **{"mask_token_id": MASK, **options})


@pytest.mark.parametrize("drafted", [VOCAB, 40, 1])
def test_a_saved_drafter_passes_the_check_and_loads_as_it_was(frozen, drafted, tmp_path):
    folder = tmp_path / "a" / "drafter"
    for seed in (0, 1):  # the second in place of the first
        draft = new_drafter(frozen, MASK, torch.arange(drafted), seed=seed, num_layers=2)
        save_drafter(str(folder), draft)
        assert same_tensors(load_drafter(folder).state_dict(), draft.state_dict())
    assert command("check", folder) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_saving_replaces_nothing_but_a_drafter(frozen, tmp_path):
    draft, model, notes = new_drafter(frozen, MASK), tmp_path / "model", tmp_path / "notes.txt"
    frozen.model.save_pretrained(model)
    notes.write_text("years of work")
    before = [(path, path.is_dir() or path.read_bytes()) for path in sorted(tmp_path.rglob("*"))]
    for place in (tmp_path, model, notes):  # a file's name, by mistake
        with pytest.raises(ValueError, match="other than a drafter"):
            save_drafter(place, draft)
    assert [(path, path.is_dir() or path.read_bytes()) for path in sorted(tmp_path.rglob("*"))] == before
    (tmp_path / "empty").mkdir()
    save_drafter(tmp_path / "empty", draft)


def test_the_package_has_every_name_that_it_lists():
    assert {"CompiledDraft", "new_drafter", "save_drafter"} <= set(peagle_train.__all__)
    assert all(callable(getattr(peagle_train, name)) for name in peagle_train.__all__)


def test_layers_norm_and_last_feature_of_the_target_are_what_a_drafter_starts_from(tmp_path):
    """With the last feature layer right below the copied ones, and no embeddings, the drafter is the target's top."""
    weights = make_target(tmp_path) / "model.safetensors"
    drawn = {n: torch.rand_like(t) + 0.5 if "norm" in n else t for n, t in load_file(weights).items()}
    save_file(drawn, weights, {"format": "pt"})
    target = FrozenTarget.load(str(tmp_path), dtype="float32", layer_ids=[0, 1, 4])
    draft, random = (new_drafter(target, MASK, num_layers=2, layers_from_target=copied) for copied in (True, False))
    H, first, other = draft.config.hidden_size, draft.layers[0], random.layers[0]
    kept = random.fc.weight / 4
    kept[:, -H:] += torch.eye(H)
    torch.testing.assert_close(draft.fc.weight, kept)
    assert torch.equal(first.input_layernorm.weight, other.input_layernorm.weight)  # the embeddings', not the target's
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    with torch.no_grad():
        draft.fc.weight[:, :-H] = 0
        draft.fc.weight[:, -H:] = torch.eye(H)
        for name in ("q_proj", "k_proj", "v_proj"):
            own = getattr(first.self_attn, name).weight[:, :H]
            assert torch.equal(own, getattr(other.self_attn, name).weight[:, :H])
            own.zero_()
        position = torch.arange(ids.shape[1])[None]
        features, last_hidden = target.features(ids, position)
        output = draft(ids, position, features, Causal(torch.zeros_like(ids)))
    torch.testing.assert_close(output.hidden, last_hidden, rtol=1e-5, atol=1e-5)


def test_layers_of_another_shape_than_the_targets_are_refused(frozen):
    for changes, words in (
        ({"intermediate_size": 7}, "mlp.*give the drafter the target's shape"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, "4 heads cannot"),  # of the same shapes
        ({"num_layers": frozen.config.num_hidden_layers + 1}, "6 llama layers .* to 7"),
    ):
        with pytest.raises(ValueError, match=f"layers_from_target.*{words}"):
            new_drafter(frozen, MASK, layers_from_target=True, **changes)


@pytest.mark.parametrize("model", ["qwen2", "gemma", "granite", "float8"])
def test_layers_that_hold_more_or_other_numbers_than_a_drafters_are_refused(model, tmp_path):
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "head_dim": 4}
    kind = "llama" if model == "float8" else model
    config = AutoConfig.for_model(kind, num_attention_heads=4, num_key_value_heads=2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    target = FrozenTarget.load(str(tmp_path))
    if model == "float8":
        tensors = load_file(tmp_path / "model.safetensors")
        small = {n: t.to(torch.float8_e4m3fn) if "mlp" in n else t for n, t in tensors.items()}
        save_file(small, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"layers_from_target: the target's .*{model}"):
        new_drafter(target, MASK, layers_from_target=True)
