"""A drafter for a loop of one's own: made from a target, saved as a folder that engines load."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peagle_train
from peagle_train import FrozenTarget, new_drafter, save_drafter
from peagle_train.core.visibility import Causal
from peagle_train.serving.drafter_io import load_drafter
from tests.helpers import ENVIRONMENT, command
from tests.tiny import MASK, VOCAB


@pytest.fixture
def target(tiny_target: Path) -> FrozenTarget:
    return FrozenTarget.load(str(tiny_target), dtype="float32")


def test_a_new_drafter_has_the_targets_shape_embeddings_and_frozen_head(target: FrozenTarget) -> None:
    draft = new_drafter(target, MASK)
    model, config = target.model, draft.config
    assert config.eagle_aux_hidden_state_layer_ids == target.layer_ids
    assert torch.equal(draft.embed_tokens.weight, model.get_input_embeddings().weight)
    assert torch.equal(draft.lm_head.weight, model.lm_head.weight)
    assert draft.embed_tokens.weight.requires_grad and not draft.lm_head.weight.requires_grad
    assert draft.draft_token_ids.tolist() == list(range(VOCAB)) and draft.mask_token_id == MASK
    assert (config.num_hidden_layers, config.hidden_size) == (1, model.config.hidden_size)
    assert {p.dtype for p in draft.parameters()} == {torch.float32}


def test_a_new_drafter_drafts_the_tokens_given_and_heeds_the_keys_of_a_recipe(target: FrozenTarget) -> None:
    ids = torch.tensor([0, 3, 17, 42, VOCAB - 2])
    draft = new_drafter(target, MASK, ids, num_layers=3, intermediate_size=7, layer_type="qwen3", train_lm_head=True)
    assert torch.equal(draft.draft_token_ids, ids)
    assert torch.equal(draft.lm_head.weight, target.model.lm_head.weight[ids]) and draft.lm_head.weight.requires_grad
    config = draft.config
    assert (config.num_hidden_layers, config.intermediate_size, config.layer_type) == (3, 7, "qwen3")


def test_a_folder_gives_the_same_drafter_as_its_target_and_a_seed_other_weights(tiny_target: Path) -> None:
    one, same = (new_drafter(t, MASK).state_dict() for t in (tiny_target, FrozenTarget.load(str(tiny_target))))
    other = new_drafter(tiny_target, MASK, seed=1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    assert torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_layer": 2}, "num_layers"),
        ({"num_layers": 0}, "num_layers"),
        ({"init_from": "elsewhere", "vocab_from": "there"}, "init_from, vocab_from"),
        ({"draft_vocab_size": 5}, "draft_token_ids"),
        ({"mask_token_id": VOCAB}, "mask_token_id"),
        ({"draft_token_ids": torch.tensor([3, 3])}, "ascending"),
        ({"draft_token_ids": torch.tensor([5, 3])}, "ascending"),
        ({"draft_token_ids": torch.tensor([0, VOCAB])}, f"0..{VOCAB - 1}"),
        ({"draft_token_ids": torch.tensor([-1, 3])}, f"0..{VOCAB - 1}"),
        ({"draft_token_ids": torch.tensor([], dtype=torch.int64)}, "draft_token_ids"),
    ],
)
def test_what_no_drafter_can_have_is_refused(target: FrozenTarget, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        new_drafter(target, **{"mask_token_id": MASK, **options})


@pytest.mark.parametrize("drafted", [VOCAB, 40, 1])
def test_a_saved_drafter_passes_the_check_and_loads_as_it_was(
    target: FrozenTarget, drafted: int, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "drafter"
    for seed in (0, 1):  # the second in place of the first
        draft = new_drafter(target, MASK, torch.arange(drafted), seed=seed, num_layers=2)
        save_drafter(str(folder), draft)
        loaded = load_drafter(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in draft.state_dict().items())
    assert command("check", folder) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_saving_replaces_nothing_but_a_drafter(target: FrozenTarget, tmp_path: Path) -> None:
    draft = new_drafter(target, MASK)
    work, model = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    save_drafter(work, draft)  # an empty folder is fine
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    target.model.save_pretrained(model)
    with pytest.raises(ValueError, match="other than a drafter"):  # a file's name, by mistake
        save_drafter(tmp_path / "notes" / "thesis.txt", draft)
    for folder in (tmp_path / "notes", model):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="other than a drafter"):
            save_drafter(folder, draft)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_package_imports_nothing_until_a_name_is_used_and_has_every_name() -> None:
    code = "import sys, peagle_train; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
    assert {"CompiledDraft", "new_drafter", "save_drafter"} <= set(peagle_train.__all__)
    assert all(callable(getattr(peagle_train, name)) for name in peagle_train.__all__)


def test_layers_norm_and_last_feature_of_the_target_are_what_a_drafter_starts_from(
    tiny_target: Path, target: FrozenTarget
) -> None:
    """With the last feature layer right below the copied ones, and no embeddings, the drafter is the target's top."""
    target = FrozenTarget.load(str(tiny_target), dtype="float32", layer_ids=[0, 1, target.num_layers - 2])
    draft = new_drafter(target, MASK, num_layers=2, layers_from_target=True, norm_before_residual=False)
    H, ids = draft.config.hidden_size, torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    with torch.no_grad():
        draft.fc.weight[:, :-H] = 0
        draft.fc.weight[:, -H:] = torch.eye(H)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(draft.layers[0].self_attn, name).weight[:, :H] = 0
        position = torch.arange(ids.shape[1])[None]
        features, last_hidden = target.features(ids, position)
        output = draft(ids, position, features, Causal(torch.zeros_like(ids)))
    torch.testing.assert_close(output.hidden, last_hidden, rtol=1e-5, atol=1e-5)
    random = new_drafter(target, MASK, num_layers=2)
    copied = new_drafter(target, MASK, num_layers=2, layers_from_target=True)
    torch.testing.assert_close(copied.fc.weight[:, :-H], random.fc.weight[:, :-H] / 4)


def test_layers_of_another_shape_than_the_targets_are_refused(target: FrozenTarget) -> None:
    with pytest.raises(ValueError, match=r"layers_from_target.*mlp.*shape"):
        new_drafter(target, MASK, layers_from_target=True, intermediate_size=7)
    with pytest.raises(ValueError, match=r"layers_from_target.*0 tensors"):
        new_drafter(target, MASK, layers_from_target=True, num_layers=target.num_layers + 1)
