"""Runs from recipe to drafter on one process: what is written, what is equal, what stops."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peagle_train.config import Train
from peagle_train.core.draft import PEagleDraft
from peagle_train.training.step import make_optimizers
from peagle_train.training.trainer import Trainer
from tests.helpers import command, make_draft
from tests.runs import drafter, last_error, lines, run, same_tensors
from tests.tiny import MASK, VOCAB


@pytest.fixture
def train(tmp_path, tiny):
    """Train a tiny recipe with these sections in a folder of this name; returns the output folder."""

    def go(name: str = "a", **sections: dict[str, Any]) -> Path:
        run(tiny(tmp_path / name, **sections))
        return tmp_path / name / "run"

    return go


def test_a_run_leaves_a_drafter_its_recipe_its_metrics_and_a_summary(train, capsys):
    output = train(data={"eval_fraction": 0.3}, train={"epochs": 2, "eval_steps": 3})
    printed = capsys.readouterr().out
    for word in (
        "segments:",
        "steps:",
        "parameters:",
        f"drafter: {output / 'final'}",
        "held-out before training",
        "(last 2 steps)",
    ):
        assert word in printed
    config = json.loads((output / "final" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["ptd_token_id"] == MASK and config["draft_vocab_size"] == 40
    loaded = PEagleDraft.from_pretrained(output / "final")
    assert torch.equal(loaded.lm_head.weight, drafter(output / "final")["lm_head.weight"])
    summary = json.loads((output / "run.json").read_text())
    steps = lines(output, "train")
    assert summary["state"] == "finished" and 0 < summary["best"]["step"] <= summary["steps"]
    assert [s["step"] for s in steps] == list(range(1, summary["steps"] + 1))
    assert {"loss", "accuracy", "expected_accepted_length", "tokens_per_second", "peak_memory_bytes"} <= set(steps[0])
    evals = lines(output, "eval")
    assert evals[0]["step"] == 0 and evals[-1]["step"] == summary["steps"] and evals[1]["step"] == 3
    assert (output / "recipe.yaml").read_text() == (output / "final" / "recipe.yaml").read_text()


def test_only_what_is_trained_moves_and_the_head_stays_the_targets(train, tiny_target):
    after = drafter(train("a", train={"max_steps": 2}) / "final")
    frozen = {"train_embeddings": False, "train_lm_head": True}
    turned = drafter(train("b", train={"max_steps": 2}, draft=frozen) / "final")
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float64)
    ids = after["d2t"] + torch.arange(40)
    assert torch.equal(after["t2d"].nonzero().flatten(), ids)
    assert torch.equal(after["lm_head.weight"], model.lm_head.weight[ids])
    assert not torch.equal(after["embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(turned["embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(turned["lm_head.weight"], model.lm_head.weight[ids])


WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "relay": {"cod": {"num_segments": 7}, "train": {"offload_features": True}},
    "recompute": {"cod": {"num_segments": 7}, "train": {"segment_mode": "recompute"}},
    "uniform": {
        "cod": {"num_segments": 4, "boundaries": "uniform"}, "train": {"activation_checkpointing": True},
        "data": {"num_workers": 2},
    },
    "a larger batch": {"train": {"batch_size": 4, "gradient_accumulation_steps": 1}},
}  # fmt: skip


def test_how_a_step_is_cut_does_not_change_what_is_learned_but_the_seed_does(train):
    shared = {"max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2}
    flat = drafter(train("flat", cod={"num_segments": 1}, train=shared) / "final")
    for name, sections in WAYS.items():
        cut = drafter(train(name, **{**sections, "train": {**shared, **sections["train"]}}) / "final")
        assert same_tensors(cut, flat, 1e-8), name
    other = drafter(train("other", cod={"num_segments": 1}, train={**shared, "seed": 1}) / "final")
    assert not torch.allclose(other["fc.weight"], flat["fc.weight"], rtol=0, atol=1e-4)


def test_bf16_autocast_learns_what_float32_learns(train):
    losses = []
    for name in ("no", "bf16"):
        settings = {"max_steps": 4, "dtype": "float32", "mixed_precision": name, "batch_size": 4}
        losses.append([s["loss"] for s in lines(train(name, train=settings), "train")])
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(abs(x - y) for x, y in zip(*losses)) < 0.05 * losses[0][0]


def test_a_drafter_of_another_width_trains_its_own_head(train):
    shape = {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6}
    shape["intermediate_size"] = 8
    after = drafter(train(draft=shape, train={"max_steps": 2}) / "final")
    assert after["fc.weight"].shape == (20, 48) and after["layers.0.self_attn.q_proj.weight"].shape == (24, 40)


def test_a_rate_warms_up_and_then_falls_to_0_or_stays(train):
    settings = {"warmup_ratio": 0.25, "learning_rate": 1.0}

    def rates(schedule: str, **more: float) -> list[float]:
        recipe = SimpleNamespace(train=Train(schedule=schedule, **settings, **more))
        return [Trainer.rate_after(SimpleNamespace(recipe=recipe, num_steps=8), step) for step in range(8)]

    sixths = [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates("constant") == [0.0, 0.5] + [1.0] * 6
    assert rates("linear") == pytest.approx([0.0, 0.5, *sixths])
    assert rates("constant_with_decay", decay_ratio=0.5) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates("constant_with_decay", decay_ratio=1.0) == pytest.approx([0.0, 0.5, *sixths])
    assert rates("cosine") == pytest.approx([0.0, 0.5, 1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987], abs=1e-6)
    output = train(train={**settings, "max_steps": 8, "max_grad_norm": 1e-9, "schedule": "linear"})
    assert [line["learning_rate"] for line in lines(output, "train")] == pytest.approx([0.0, 0.5, *sixths])


def test_weight_decay_shrinks_matrices_and_no_embeddings_norms_or_mask_hidden():
    draft = make_draft()
    before = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    for parameter in draft.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that decay alone moves anything
    for optimizer in make_optimizers(draft, Train(learning_rate=0.5, weight_decay=0.25)):
        optimizer.step()
    for name, parameter in draft.named_parameters():
        is_spared = name in ("embed_tokens.weight", "mask_hidden") or "norm" in name
        expected = before[name] * (1.0 if is_spared else 1 - 0.5 * 0.25)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_muons_steps_have_the_size_of_adamws_in_the_matrices_of_layers_and_fc_and_adamw_moves_the_rest(train):
    settings = {"optimizer": "muon", "learning_rate": 0.5, "muon_weight_decay": 0.25, "max_grad_norm": None}
    settings |= {"schedule": "constant", "warmup_ratio": 0.5, "max_steps": 2, "save_steps": 1}
    output = train(draft={"train_lm_head": True}, train=settings)
    by_adamw = train("adamw", draft={"train_lm_head": True}, train={**settings, "optimizer": "adamw"})
    moments = load_file(output / "checkpoint-1" / "optimizer.state")
    before, after = drafter(output / "checkpoint-1"), drafter(output / "final")
    assert same_tensors(before, drafter(by_adamw / "checkpoint-1")), "the first step's rate is 0"
    for name, weight in before.items():
        by_muon = name.endswith("proj.weight") or name == "fc.weight"
        assert (f"momentum_buffer.{name}" in moments) == by_muon
        assert (f"exp_avg.{name}" in moments) == (weight.is_floating_point() and not by_muon)
        if by_muon:
            # Singular values of about 1 would leave a root mean square of 1 / sqrt(the longer side): 0.2 is AdamW's.
            moved = (after[name] - weight * (1 - 0.5 * 0.25)) / (0.5 * 0.2 * max(weight.shape) ** 0.5)
            # However small the gradient; its largest singular value is a quarter or more of what Muon divides by.
            assert 0.6 < torch.linalg.svdvals(moved).max() < 1.4, name
        elif weight.is_floating_point():
            assert 0 < (after[name] - weight).abs().max() < 0.5 * 1.2, name


def test_a_device_that_is_neither_a_cpu_nor_a_gpu_is_refused_before_anything_is_loaded(
    tmp_path, tiny, monkeypatch, capsys
):
    monkeypatch.setattr(PartialState, "default_device", property(lambda _: torch.device("mps")))
    recipe = tiny(tmp_path, target={"path": "nowhere"})
    for words in (["train", recipe], ["cache", recipe, "--out", tmp_path / "run"]):
        assert command(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "mps" in line and "ACCELERATE_USE_CPU=true" in line and not (tmp_path / "run").exists()


MISTAKES = {
    "target.path=/nowhere": "is not a folder",
    f"draft.mask_token_id={VOCAB}": f"must lie in 0..{VOCAB - 1}",
    "draft.head_dim=7": "head_dim is 7",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_users_mistake_is_one_clear_line_before_any_training(override, tmp_path, tiny, capsys):
    run(tiny(tmp_path), override, code=2)
    assert MISTAKES[override] in last_error(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}, {"PYTORCH_ALLOC_CONF": "x"}])
def test_cudas_allocator_gets_expandable_segments_unless_the_user_has_set_it(given, monkeypatch):
    others = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    monkeypatch.setattr(os, "environ", {**others, **given})
    assert command("train", "quickstart", "--print-config") == 0
    found = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    assert found == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_a_profile_names_where_a_steps_time_goes(train, capsys):
    output = train(train={"max_steps": 3, "profile_steps": [2, 3]})
    printed = capsys.readouterr().out
    assert "profile of 2 steps" in printed
    for name in ("loader wait", "target", "pass A", "pass B forward", "loss", "backward", "optimizer"):
        assert name in printed
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "peagle::optimizer" for event in events) == 2
