"""Another drafter's vocabulary: taken as it is where it fits, refused in one line where it does not."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.__main__ import main
from peagle_train.config import Data, Draft
from peagle_train.data.vocab import end_of_turn_ids, eos_token_ids, read_draft_vocab, t2d_mask
from peagle_train.serving.start import always_drafted
from peagle_train.target_model.frozen import FrozenTarget
from tests.tiny import VOCAB, make_target, write_recipe, write_rows
from tests.tiny_chat import END, TEMPLATE, make_chat_target, make_tokenizer

IDS = torch.tensor([0, 2, 3, 9, VOCAB - 1])
TARGET = SimpleNamespace(
    vocab_size=VOCAB,
    config=SimpleNamespace(eos_token_id=3),
    eos_token_ids=lambda: [3, 4],
)
D2T, T2D = IDS - torch.arange(len(IDS)), t2d_mask(IDS, VOCAB)


def read(path: Path, size: int | None = None, always: tuple[int, ...] = (), target: Any = TARGET) -> Tensor:
    return read_draft_vocab(Draft(vocab_from=str(path), draft_vocab_size=size), target, None, always)


def save(folder: Path, name: str = "model.safetensors", **tensors: Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"fc.weight": torch.zeros(2), **tensors}, folder / name)
    return folder


def test_folders_files_shards_and_speculators_arrays_are_read(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", d2t=D2T, t2d=T2D)
    shards = save(save(tmp_path / "shards", "a.safetensors", d2t=D2T.int()), "b.safetensors", t2d=T2D)
    alone = save(tmp_path / "alone", d2t=D2T)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "d2t.npy", D2T.numpy())
    np.save(arrays / "t2d.npy", T2D.numpy())
    for path in (whole, whole / "model.safetensors", shards, alone, arrays):
        ids = read(path)
        assert ids.dtype == torch.int64 and ids.tolist() == IDS.tolist()
    assert read(whole, size=5).numel() == 5


@pytest.mark.parametrize(
    "tensors, size, expected",
    [
        ({"d2t": D2T, "t2d": T2D}, 6, "draft_vocab_size is 6, but draft.vocab_from .* drafts 5 tokens: leave one out"),
        ({"d2t": D2T, "t2d": T2D[:-1]}, None, "is for a vocabulary of 60 tokens, the target has 61"),
        ({"d2t": D2T + 1}, None, r"drafts token 61, but the target's vocabulary is 0\.\.60"),
        ({"d2t": D2T - 1}, None, "leads to token -1, below 0"),
        ({"d2t": torch.tensor([0, 2, 1])}, None, "leads to token 3 twice"),
        ({"d2t": torch.tensor([0, 5, 2])}, None, "leads to token 4 behind token 6; draft tokens must ascend"),
        ({"d2t": IDS, "t2d": T2D}, None, "drafts token 64, but the target"),
        ({"d2t": D2T, "t2d": t2d_mask(IDS[1:], VOCAB)}, None, "its d2t and t2d disagree"),
        ({"d2t": D2T.float()}, None, r"d2t is torch.float32 \[5\]; it must be a vector of integers"),
        ({"d2t": D2T[None]}, None, r"d2t is torch.int64 \[1, 5\]"),
        ({"d2t": D2T[:0]}, None, r"d2t is torch.int64 \[0\]"),
        ({"t2d": T2D}, None, "has no d2t: it is no drafter, or drafts the full vocabulary"),
        ({"d2t": torch.tensor([1, 1])}, None, r"lacks every end token \(3, 4\): its drafter could never end an answer"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_line(
    tmp_path: Path, tensors: dict[str, Tensor], size: int | None, expected: str
) -> None:
    folder = save(tmp_path / "drafter", **{name: tensor.contiguous() for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=expected) as caught:
        read(folder, size)
    assert "\n" not in str(caught.value) and "drafter" in str(caught.value)


@pytest.mark.parametrize("config", [{"vocab_size": 50}, {"transformer_layer_config": {"vocab_size": 50}}])
def test_without_t2d_the_drafters_config_tells_whose_vocabulary_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = save(tmp_path / "drafter", d2t=D2T[:4].clone())
    assert read(folder).numel() == 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is for a vocabulary of 50 tokens, the target has 61"):
        read(folder)


def test_a_drafter_of_the_full_vocabulary_has_no_mapping_and_is_read_if_its_config_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path / "drafter")
    for config in ({"vocab_size": VOCAB}, {"vocab_size": VOCAB, "draft_vocab_size": 9}, {"draft_vocab_size": VOCAB}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="has no d2t"):
            read(folder)
    for config in ({"vocab_size": VOCAB}, {"transformer_layer_config": {"vocab_size": VOCAB}}):
        (folder / "config.json").write_text(json.dumps({**config, "draft_vocab_size": VOCAB}))
        assert read(folder).tolist() == list(range(VOCAB))
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB - 1, "draft_vocab_size": VOCAB - 1}))
    with pytest.raises(ValueError, match="is for a vocabulary of 60 tokens, the target has 61"):
        read(folder)


def test_special_tokens_that_the_mapping_lacks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path / "drafter", d2t=D2T, t2d=T2D)
    with caplog.at_level(logging.WARNING):
        read(folder, always=(3, 9))
        assert caplog.text == ""
        read(folder, always=(3, 4, 9, *range(20, 40)))
    assert "lacks 21 special or end tokens, which will not be drafted: 4, 20, 21" in caplog.text
    assert ", ..." in caplog.text


def test_what_is_no_drafter_is_one_line_and_no_pickle_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(b"")
    for path in (tmp_path / "empty", tmp_path / "none", tmp_path / "none.safetensors", tmp_path / "model.pt"):
        with pytest.raises(ValueError, match="give a drafter's folder or"):
            read(path)
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"cannot read cut\.safetensors"):
        read(tmp_path / "cut.safetensors")
    np.save(tmp_path / "empty" / "d2t.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot read d2t\.npy"):
        read(tmp_path / "empty")


def test_end_tokens_of_configs_tokenizer_and_chat_template_are_always_drafted(tmp_path: Path) -> None:
    """Each from its own place: 3 of the config, 4 and 5 of the generation config, <end> of the chats."""
    target = FrozenTarget.load(str(make_chat_target(tmp_path / "target")), dtype="float64", layer_ids=[0, 1, 2])
    for tokenizer in (make_tokenizer(), make_tokenizer(eos_token="w7"), make_tokenizer(extra_special_tokens=["w8"])):
        always = always_drafted(tokenizer, target, mask_token_id=1)
        expected = {3, 4, 5, END, *eos_token_ids(tokenizer)}
        assert expected <= set(always)
    assert {8, END} <= set(always)
    assert END not in always_drafted(make_tokenizer(), target, END)


def test_the_end_of_a_turn_is_read_off_the_chat_template(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(eos_token="w7")
    assert end_of_turn_ids(tokenizer) == [END]
    for template in (TEMPLATE.replace("<end>", "w9"), TEMPLATE.replace("<end>", ""), "{{ messages[0].content }}", None):
        tokenizer.chat_template = template  # a word, nothing, no answer at all, no template
        assert end_of_turn_ids(tokenizer) == []
    assert caplog.text == ""
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with caplog.at_level(logging.WARNING):
        assert end_of_turn_ids(tokenizer) == []
    assert "the chat template fails" in caplog.text
    assert end_of_turn_ids(None) == []


def test_the_end_of_a_turn_is_that_of_the_recipes_own_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(eos_token="w7", extra_special_tokens=["w8"])
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("<end>", "{{ finish }}"))
    data = Data([], chat_template=str(tmp_path / "own.jinja"), template_kwargs={"finish": "w8"})
    assert end_of_turn_ids(tokenizer, data) == [8] and end_of_turn_ids(tokenizer, Data([])) == [END]
    tokenizer.chat_template = None
    assert end_of_turn_ids(tokenizer, data) == [8] and end_of_turn_ids(tokenizer, Data([])) == []
    assert end_of_turn_ids(None, data) == []
    target = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=lambda: [])
    plain = make_tokenizer(eos_token="w7")
    plain.add_tokens(["w9"])
    data.template_kwargs = {"finish": "w9"}
    assert 9 in always_drafted(plain, target, 1, data) and 9 not in always_drafted(plain, target, 1)
    save_file({"d2t": torch.tensor([0, 6, 7])}, tmp_path / "ends.safetensors")
    save_file({"d2t": torch.tensor([0, 1, 7])}, tmp_path / "own.safetensors")
    for name in ("ends", "own"):
        draft = Draft(vocab_from=str(tmp_path / f"{name}.safetensors"))
        assert 9 in read_draft_vocab(draft, target, plain, [], data)
    with pytest.raises(ValueError, match="lacks every end token"):
        read_draft_vocab(draft, target, plain, [])


def test_a_run_drafts_the_vocabulary_of_an_earlier_runs_drafter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_target(tmp_path / "target")
    rows = write_rows(tmp_path / "rows.jsonl", [40, 33])
    first = write_recipe(tmp_path, target, rows, tmp_path / "first", train={"max_steps": 1})
    assert main([str(first)]) == 0
    others = write_rows(tmp_path / "others.jsonl", [40, 33], seed=5)
    second = write_recipe(
        tmp_path, target, others, tmp_path / "second", train={"max_steps": 1}, draft={"draft_vocab_size": None}
    )
    capsys.readouterr()
    assert main([str(second), f"draft.vocab_from={tmp_path / 'first' / 'final'}"]) == 0
    assert f"draft vocabulary: 40 of {VOCAB} tokens" in capsys.readouterr().out
    mappings = []
    for run in ("first", "second"):
        with safe_open(tmp_path / run / "final" / "model.safetensors", framework="pt") as file:
            mappings.append(
                (file.get_tensor("d2t"), file.get_tensor("t2d"), file.get_slice("lm_head.weight").get_shape())
            )
    assert torch.equal(mappings[0][0], mappings[1][0]) and torch.equal(mappings[0][1], mappings[1][1])
    assert mappings[1][2][0] == 40
    assert main([str(second), "draft.vocab_from=/nowhere", f"output.dir={tmp_path / 'third'}"]) == 2
    error = capsys.readouterr().err
    assert "draft.vocab_from /nowhere: give a drafter's folder" in error and not (tmp_path / "third").exists()
