"""Other people's drafters: `peagle-train import` and draft.init_from, from either format, whole or EAGLE-3's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from peagle_train.__main__ import main as train_main
from peagle_train.config import load_recipe
from peagle_train.serving.drafter_io import load_drafter
from peagle_train.serving.export import export_drafter
from peagle_train.serving.start import import_drafter
from peagle_train.target_model.cache import write_cache
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
    source = drafter(tmp_path / "trained", norm_before_residual=True, attention_bias=True)
    if format == "imported":
        import_drafter(source, tmp_path / "in")
    else:
        export_drafter(source, tmp_path / "in", format, target_name="x", speculative_tokens=4)
    assert start(tmp_path, target, rows, tmp_path / "in", "draft.norm_before_residual=true") == 0
    assert f"started from {tmp_path / 'in'}" in capsys.readouterr().out
    one, other = load_drafter(source), load_drafter(tmp_path / "run" / "final")
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], rtol=0, atol=1e-6), name
    before, after = (json.loads(d.config.to_json_string()) for d in (one, other))
    differ = {key for key in before | after if before.get(key) != after.get(key)}
    # The longest context is the target's; the rest is the imported drafter's.
    assert differ <= {"max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "initializer_range"}, differ
    assert after["max_position_embeddings"] == 256 and after["attention_bias"]


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


MISFITS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "layers": ({"num_hidden_layers": 3}, [], "draft.num_layers is 2, but .* has 3: give draft.num_layers=3"),
    "width": ({}, ["draft.hidden_size=24"], "draft.hidden_size is 24, but .* has 16"),
    "vocabulary size": ({}, ["draft.draft_vocab_size=31"], "draft.draft_vocab_size is 31, but .* has 30"),
    "vocabulary": ({"vocab_size": VOCAB + 1}, [], f"target of vocabulary {VOCAB + 1}, but this target's is {VOCAB}"),
    "target's width": ({"target_hidden_size": 12}, [], "target of hidden size 12, but this target's is 16"),
    "mask": ({}, ["draft.mask_token_id=3"], f"draft.mask_token_id is 3, but .* has {MASK}"),
    "residual": ({"norm_before_residual": True}, [], "has true: give draft.norm_before_residual=true"),
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


def test_an_eagle3_drafter_is_imported_with_what_it_lacks(tmp_path: Path, target: Path) -> None:
    source = eagle3(tmp_path / "in", "embed_tokens.weight", "lm_head.weight")
    with pytest.raises(ValueError, match="give --mask-token-id"):
        import_drafter(source, tmp_path / "out", target=target)
    with pytest.raises(ValueError, match=r"lacks embed_tokens\.weight, lm_head\.weight, .* give --target"):
        import_drafter(source, tmp_path / "out", mask_token_id=MASK)
    with pytest.raises(ValueError, match=f"must lie in 0..{VOCAB - 1}"):
        import_drafter(source, tmp_path / "out", target=target, mask_token_id=VOCAB)
    with pytest.raises(ValueError, match="gone cannot be read"):
        import_drafter(source, tmp_path / "out", target=tmp_path / "gone", mask_token_id=MASK)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    done = import_drafter(source, tmp_path / "out", target=target, mask_token_id=MASK, seed=4)
    assert {note.split()[0] for note in done.notes} >= {"mask_hidden", "embed_tokens.weight", "lm_head.weight", "the"}
    made, theirs = load_drafter(tmp_path / "out"), load_file(target / "model.safetensors")
    assert torch.equal(made.embed_tokens.weight, theirs["model.embed_tokens.weight"])
    assert torch.equal(made.lm_head.weight, theirs["lm_head.weight"][made.draft_token_ids])
    assert 0.01 < float(made.mask_hidden.detach().std()) < 0.03
    import_drafter(source, tmp_path / "again", target=target, mask_token_id=MASK, seed=4)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_a_tied_target_gives_its_embeddings_as_the_head_and_another_ones_are_refused(tmp_path: Path) -> None:
    source = eagle3(tmp_path / "in", "lm_head.weight")
    tied = make_target(tmp_path / "tied", tie_word_embeddings=True)
    import_drafter(source, tmp_path / "out", target=tied, mask_token_id=MASK)
    made, theirs = load_drafter(tmp_path / "out"), load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in theirs
    assert torch.equal(made.lm_head.weight, theirs["model.embed_tokens.weight"][made.draft_token_ids])
    for name, changes, message in (
        ("wide", {"hidden_size": 32}, r"lm_head.weight of .* is \[30, 32\]; the drafter's is \[30, 16\]"),
        ("other", {"vocab_size": VOCAB - 1}, f"has {VOCAB - 1} tokens, the drafter is for {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=message):
            import_drafter(source, tmp_path / "no", target=make_target(tmp_path / name, **changes), mask_token_id=MASK)
    assert not (tmp_path / "no").exists()


def test_the_command_imports_and_says_why_not(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(eagle3(tmp_path / "in", "embed_tokens.weight")), str(tmp_path / "out")
    assert command("import", source, "--out", out) == 2 and "--mask-token-id" in capsys.readouterr().err
    arguments = [source, "--out", out, "--target", str(target), "--mask-token-id", str(MASK)]
    assert command("import", *arguments) == 0 and "note: mask_hidden was drawn" in capsys.readouterr().err
    assert command("check", out) == 0
    assert command("import", *arguments) == 2 and "is there already" in capsys.readouterr().err
    whole = str(drafter(tmp_path / "whole"))
    assert command("import", whole, "--out", tmp_path / "b", "--mask-token-id", "3") == 2
    assert f"was trained with {MASK}" in capsys.readouterr().err
