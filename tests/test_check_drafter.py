"""Folders that are broken, or another's: what the check says, what reading refuses, and that an export never does it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import Finding, check_folder, export_drafter, is_loadable, table
from peagle_train.serving.formats import parse_config
from tests.helpers import DRAFT_VOCAB, MASK_TOKEN, TARGET_HIDDEN, VOCAB, command, make_draft
from tests.runs import same_tensors

WEIGHTS, LAYERS = "model.safetensors", "eagle_aux_hidden_state_layer_ids"
ROPE = {"rope_type": "default", "rope_theta": 1e4}
IDS = torch.arange(DRAFT_VOCAB) + (torch.arange(DRAFT_VOCAB) > 11) * 9


@pytest.fixture
def folder(tmp_path):
    draft = make_draft(torch.float32, eagle_aux_hidden_state_layer_ids=[2, 9, 17], hidden_size=TARGET_HIDDEN)
    draft.set_draft_vocab(IDS)
    draft.save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


def set_config(folder: Path, **changes: Any) -> None:
    """Replace keys of config.json; None removes one."""
    config = {**read_config(folder), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def set_masks(folder: Path, value: Any) -> None:
    set_config(folder, mask_token_id=value, ptd_token_id=value, pard_token=value)


def set_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors (`lm_head__weight` is lm_head.weight); None removes one."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {**load_file(folder / WEIGHTS), **named}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / WEIGHTS)


def set_full(folder: Path, **changes: Tensor) -> None:
    """Make it a drafter of the full vocabulary, whose files have no mapping, but for `changes`."""
    make_draft(torch.float32, draft_vocab_size=VOCAB).save_pretrained(folder)
    assert not {"d2t", "t2d"} & load_file(folder / WEIGHTS).keys()
    set_tensors(folder, t2d=torch.ones(VOCAB, dtype=torch.bool), **changes)


def tensor(folder: Path, name: str) -> Tensor:
    return load_file(folder / WEIGHTS)[name]


def found(findings: list[Finding], level: str) -> list[str]:
    return [f"{finding.what}: {finding.detail}" for finding in findings if finding.level == level]


def fill(folder: Path, name: str, index: int, value: float) -> None:
    values = tensor(folder, name)
    values[index] = value
    set_tensors(folder, **{name: values})


# What is done to a folder (a dict: to its config), and a word of what is said.
BROKEN: dict[str, tuple[Callable[[Path], Any] | dict[str, Any], str]] = {
    "cut in the weights": (lambda f: os.truncate(f / WEIGHTS, 3000), "is missing or damaged"),
    "mask_hidden of two layers": (lambda f: set_tensors(f, mask_hidden=torch.ones(2 * TARGET_HIDDEN)), "mask_hidden"),
    "integers": (lambda f: set_tensors(f, norm__weight=torch.ones(TARGET_HIDDEN).int()), "floating point"),
    "one inf": (lambda f: fill(f, "norm.weight", 3, float("inf")), "1 values that are not finite"),
    "no d2t": (lambda f: set_tensors(f, d2t=None), "d2t"),
    "d2t beyond": (
        lambda f: fill(f, "d2t", -1, VOCAB - DRAFT_VOCAB + 1),
        f"of the vocabulary 0..{VOCAB - 1}, ascending",
    ),
    "d2t before": (lambda f: fill(f, "d2t", 0, -1), "maps to -1.."),
    "d2t twice": (lambda f: fill(f, "d2t", 5, 1), "distinct tokens"),
    "d2t out of order": (lambda f: fill(f, "d2t", 5, 3), "ascending"),
    "d2t beside the full vocabulary": (lambda f: set_full(f, d2t=torch.zeros(VOCAB).long()), "d2t is no tensor"),
    "mask beyond": (lambda f: set_masks(f, VOCAB), f"{VOCAB}"),
    "two masks": ({"mask_token_id": 3}, f"mask_token_id 3, pard_token {MASK_TOKEN}"),
    "mask is text": (lambda f: set_masks(f, "<mask>"), "one token id"),
    "two feature layers": ({LAYERS: [2, 9]}, "fc.weight"),
    "no feature layer": ({LAYERS: [-1, 2, 3]}, "1 to 8 layers"),
    "layers out of order": ({LAYERS: [9, 2, 17]}, "ascending"),
    "a layer twice": ({LAYERS: [2, 9, 9]}, "ascending"),
    "rope dynamic": ({"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, "dynamic"),
    "a layer too many": ({"num_hidden_layers": 1}, "layers.1.input_layernorm.weight is no tensor"),
    "a size in words": ({"hidden_size": "x"}, "hidden_size"),
    "layers without end": ({"num_hidden_layers": 10**7}, "tensors"),
    "a size beyond any": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a theta in words": ({"rope_parameters": {**ROPE, "rope_theta": "x"}}, "rope_theta"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act"),
    "no shape": ({"hidden_size": None}, "hidden_size"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickled"),
    "a stray file": (lambda f: save_file({"exp_avg": torch.ones(2)}, f / "optimizer.safetensors"), "exp_avg"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "cannot be read"),
    "a whole model": (
        lambda f: (set_config(f, model_type="gpt2"), save_file({"wte": torch.ones(2)}, f / WEIGHTS)),
        "whole model",
    ),
    # drafters of other kinds, which engines may serve
    "rope partial": ({"partial_rotary_factor": 0.5}, "rope is partial"),
    "rope of several positions": ({"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}, "multimodal"),
    "logits scaled": ({"logit_scale": 0.5}, "logit_scale"),
    "qwen3 of heads to guess": ({"model_type": "qwen3", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    "norm before fc": ({"norm_before_fc": True}, "input_norm.weight"),
    "both norms": ({"eagle_config": {"norm_before_fc": True}, "fc_norm": True}, "both true"),
    "windows of no size": ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "no sliding_window"),
    "eagle's first kind": ({"eagle_config": {"use_aux_hidden_state": False}}, "the last layer alone"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "layers of two windows": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "qwen3 of a head size to guess": ({"model_type": "qwen3", "head_dim": None}, "head_dim is missing"),
    "qwen3 without its norms": ({"model_type": "qwen3"}, "self_attn.k_norm.weight"),
    "dflash": ({"speculators_model_type": "dflash"}, "peagle and eagle3"),
    "gemma layers": ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named_by_the_check_refused_by_reading_and_never_exported(folder, case):
    change, message = BROKEN[case]
    if isinstance(change, dict):
        set_config(folder, **change)
    else:
        change(folder)
    findings = check_folder(folder)
    assert not is_loadable(findings) and any(message in line for line in found(findings, "BAD")), table(findings)
    assert command("check", folder) == 2
    out = folder.parent / "out"
    for refusing in (lambda: load_drafter(folder), lambda: export_drafter(folder, out, "eagle3")):
        with pytest.raises(ValueError) as caught:
            refusing()
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    assert {path.name for path in folder.parent.iterdir()} <= {"drafter", "elsewhere"}


def test_a_window_is_one_unless_it_is_switched_off_and_a_qwen3s_only_where_it_is_switched_on(folder):
    raw = read_config(folder) | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}
    for changes, window in (
        ({}, 9),
        ({"use_sliding_window": False}, None),
        ({"model_type": "qwen3"}, None),
        ({"model_type": "qwen3", "use_sliding_window": True}, 9),
    ):
        given = {key: value for key, value in raw.items() if key != "use_sliding_window"} | changes
        assert parse_config(given).sliding_window == window, changes


def test_what_may_lack_is_warned_of(folder):
    def warned(*words: str) -> bool:
        findings = check_folder(folder)
        return is_loadable(findings) and all(w in line for w, line in zip(words, found(findings, "warn"), strict=True))

    assert warned()
    set_tensors(folder, embed_tokens__weight=None)
    assert warned("the target's")
    set_tensors(folder, mask_hidden=None)
    assert any("mask_hidden" in line for line in found(check_folder(folder), "BAD"))
    set_masks(folder, None)
    assert warned("one token a pass", "the target's")
    with pytest.raises(ValueError, match=r"lacks mask_hidden, embed_tokens\.weight, a mask token"):
        load_drafter(folder)
    set_tensors(folder, lm_head__weight=None)
    assert any("does not fit a pruned vocabulary" in line for line in found(check_folder(folder), "BAD"))
    set_full(folder)
    set_tensors(folder, lm_head__weight=None)
    assert warned("engines take the target's")


def test_an_architecture_is_judged_by_what_vllm_reads_it_as(folder):
    def judged(name: str) -> list[str]:
        set_config(folder, architectures=[name])
        return [f.what for f in check_folder(folder) if f.level == "BAD"]

    for name in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"):
        assert judged(name) == []
    for name in ("PEagleDraftModel", "PeagleLlamaForCausalLM", "Eagle3Qwen3ForCausalLM"):
        assert judged(name) == ["architectures"]
    make_draft(torch.float32, layer_type="qwen3").save_pretrained(folder)
    assert is_loadable(check_folder(folder)) and judged("LlamaForCausalLMEagle3") == ["architectures"]


def test_names_that_vllm_would_not_find_or_does_not_know_are_refused_but_read(folder):
    draft, whole = load_drafter(folder).state_dict(), load_file(folder / WEIGHTS)
    for odd in (
        {f"model.{name}": t for name, t in whole.items()},  # which vLLM would prefix again
        {"draft_id_to_target_id" if name == "d2t" else name: t for name, t in whole.items()},
        {**whole, "verifier_norm.weight": torch.ones(4), "verifier_lm_head.weight": torch.ones(4)},
    ):
        save_file(odd, folder / WEIGHTS)
        assert {f.what for f in check_folder(folder) if f.level == "BAD"} == odd.keys() - whole.keys()
        assert same_tensors(load_drafter(folder).state_dict(), draft)


def test_the_check_compares_with_the_target(folder):
    target = {"vocab_size": VOCAB, "hidden_size": TARGET_HIDDEN, "num_hidden_layers": 20, "max_position_embeddings": 64}
    assert is_loadable(check_folder(folder, target)) and found(check_folder(folder, target), "warn") == []
    for key, value in {"vocab_size": VOCAB + 1, "hidden_size": 99, "num_hidden_layers": 17}.items():
        assert not is_loadable(check_folder(folder, {**target, key: value})), key
        assert not is_loadable(check_folder(folder, {"text_config": {**target, key: value}})), key
    set_config(folder, eagle_aux_hidden_state_layer_ids=None)  # vLLM then reads layers 2, n // 2 and n - 3
    for layers, reads in ((20, True), (7, True), (6, False), (4, False)):
        assert is_loadable(check_folder(folder, {**target, "num_hidden_layers": layers})) == reads, layers
    assert "not drafted for" in found(check_folder(folder, {**target, "max_position_embeddings": 10**6}), "warn")[0]


@pytest.mark.parametrize("gone", ["speculators_config", "transformer_layer_config", "mask_token_id"])
def test_a_speculators_folder_without_a_part_is_not_loadable(folder, gone):
    out = folder.parent / "out"
    export_drafter(folder, out, "speculators", target_name="org/target", speculative_tokens=3)
    assert is_loadable(check_folder(out)) and found(check_folder(out), "warn") == []
    set_config(out, **{gone: None})
    assert not is_loadable(check_folder(out))
