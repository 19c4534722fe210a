"""Runs from recipe to drafter on one process: what is written, what is equal, what stops."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from peagle_train.__main__ import main
from peagle_train.core.draft import PEagleDraft
from tests.helpers import command
from tests.tiny import MASK, VOCAB, write_recipe

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13]


@pytest.fixture
def target(tiny_target: Path) -> Path:
    return tiny_target


@pytest.fixture
def rows(tiny_rows: Path) -> Path:
    return tiny_rows


def train(folder: Path, target: Path, rows: Path, /, *overrides: str, **sections: dict[str, Any]) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    output = folder / "run"
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, target, rows, output, **sections)
    assert main([str(recipe), *overrides]) == 0
    return output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_a_run_leaves_a_drafter_its_recipe_its_metrics_and_a_summary(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, target, rows, data={"eval_fraction": 0.3}, train={"epochs": 2, "eval_steps": 3})
    printed = capsys.readouterr().out
    for word in (
        "sequences:",
        "elements:",
        "segments:",
        "steps:",
        "parameters:",
        "drafter:",
        "held-out before training",
    ):
        assert word in printed
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["ptd_token_id"] == MASK and config["draft_vocab_size"] == 40
    drafter = PEagleDraft.from_pretrained(run / "final")
    assert torch.equal(drafter.lm_head.weight, weights(run)["lm_head.weight"])
    summary = json.loads((run / "run.json").read_text())
    assert (summary["state"] == "finished" and summary["steps"] == summary["best"]["step"]) or summary["best"]
    steps = lines(run, "train")
    assert [s["step"] for s in steps] == list(range(1, summary["steps"] + 1))
    assert {"loss", "accuracy", "expected_accepted_length", "tokens_per_second", "peak_memory_bytes"} <= set(steps[0])
    evals = lines(run, "eval")
    assert evals[0]["step"] == 0 and evals[-1]["step"] == summary["steps"] and evals[1]["step"] == 3
    assert 0 < evals[0]["mass_outside"] < 1
    assert (run / "recipe.yaml").read_text() == (run / "final" / "recipe.yaml").read_text()
    assert main(["--summary", str(run)]) == 0
    assert str(run / "final") in capsys.readouterr().out


def test_only_what_is_trained_moves_and_the_head_stays_the_targets(tmp_path: Path, target: Path, rows: Path) -> None:
    run = train(tmp_path, target, rows, train={"max_steps": 3})
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64)
    after = weights(run)
    ids = after["d2t"] + torch.arange(40)
    assert torch.equal(after["t2d"].nonzero().flatten(), ids)
    assert torch.equal(after["lm_head.weight"], model.lm_head.weight[ids])
    assert not torch.equal(after["embed_tokens.weight"], model.model.embed_tokens.weight)
    frozen = train(
        tmp_path / "frozen",
        target,
        rows,
        train={"max_steps": 3},
        draft={"train_embeddings": False, "train_lm_head": True},
    )
    assert torch.equal(weights(frozen)["embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(weights(frozen)["lm_head.weight"], model.lm_head.weight[ids])


def test_how_a_step_is_cut_does_not_change_what_is_learned(tmp_path: Path, target: Path, rows: Path) -> None:
    shared = {"max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2}
    flat = weights(train(tmp_path / "flat", target, rows, cod={"num_segments": 1}, train=shared))
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "relay": {"cod": {"num_segments": 7}, "train": {"offload_features": True}},
        "recompute": {"cod": {"num_segments": 7}, "train": {"segment_mode": "recompute"}},
        "uniform": {
            "cod": {"num_segments": 4, "boundaries": "uniform"},
            "train": {"activation_checkpointing": True},
            "data": {"num_workers": 2},
        },
        "a larger batch": {"train": {"batch_size": 4, "gradient_accumulation_steps": 1}},
    }
    for name, sections in ways.items():
        cut = weights(
            train(tmp_path / name, target, rows, **{**sections, "train": {**shared, **sections.get("train", {})}})
        )
        for tensor, value in flat.items():
            assert torch.allclose(cut[tensor], value, rtol=0, atol=1e-8), (name, tensor)


def test_two_runs_of_a_recipe_are_equal_bit_for_bit_and_another_seed_is_not(
    tmp_path: Path, target: Path, rows: Path
) -> None:
    seeds = {"a": 0, "b": 0, "c": 1}
    runs = (train(tmp_path / n, target, rows, train={"max_steps": 3, "seed": s}) for n, s in seeds.items())
    a, b, c = map(weights, runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_bf16_autocast_learns_what_float32_learns(tmp_path: Path, target: Path, rows: Path) -> None:
    losses = []
    for name, precision in (("a", "no"), ("b", "bf16")):
        settings = {"max_steps": 6, "dtype": "float32", "mixed_precision": precision, "batch_size": 4}
        losses.append([s["loss"] for s in lines(train(tmp_path / name, target, rows, train=settings), "train")])
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(abs(x - y) for x, y in zip(*losses)) < 0.05 * losses[0][0]


def test_a_drafter_of_another_width_trains_its_own_head(tmp_path: Path, target: Path, rows: Path) -> None:
    shape = {
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "intermediate_size": 8,
    }
    run = train(tmp_path, target, rows, draft=shape, train={"max_steps": 2})
    after = weights(run)
    assert after["fc.weight"].shape == (20, 48) and after["mask_hidden"].shape == (1, 1, 48)
    assert after["layers.0.self_attn.q_proj.weight"].shape == (24, 40)
    assert json.loads((run / "final" / "config.json").read_text())["target_hidden_size"] == 16


@pytest.mark.parametrize("name", ["train", "cache"])
def test_a_device_that_is_neither_a_cpu_nor_a_gpu_is_refused_before_anything_is_loaded(
    name: str, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PartialState, "default_device", property(lambda _: torch.device("mps")))
    recipe = write_recipe(tmp_path, tmp_path / "no target", rows, tmp_path / "run")
    if name == "train":
        assert main([str(recipe)]) == 2
    else:
        assert command("cache", recipe, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mps" in line and "ACCELERATE_USE_CPU=true" in line and not (tmp_path / "run").exists()


BAD = {
    "no target": ({"target": {"path": "/nowhere"}}, "is no folder"),
    "mask outside": ({"draft": {"mask_token_id": VOCAB}}, f"must lie in 0..{VOCAB - 1}"),
    "draft vocabulary": ({"draft": {"draft_vocab_size": 100}}, "draft_vocab_size"),
    "layers": ({"target": {"layer_ids": [1, 2, 9]}}, "layer_ids"),
    "unknown key": ({"train": {"learnig_rate": 1.0}}, "learning_rate"),
    "odd head": ({"draft": {"head_dim": 7}}, "head_dim is 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_mistake_is_one_clear_line_before_any_training(
    case: str, tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, message = BAD[case]
    recipe = write_recipe(tmp_path, target, rows, tmp_path / "run", **sections)
    assert main([str(recipe)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peagle_train: error") and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1, 99, 3]}', "99"),
        ('{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}', "nothing to learn from"),
        ('{"input_ids": [1, 2', "line 1"),
    ],
)
def test_bad_rows_are_one_clear_line(
    line: str, message: str, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    recipe = write_recipe(tmp_path, target, tmp_path / "bad.jsonl", tmp_path / "run")
    assert main([str(recipe)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error.lower() and not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_something_is_left_alone(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, target, rows, train={"max_steps": 1})
    before = weights(run)
    recipe = write_recipe(tmp_path, target, rows, run)
    assert main([str(recipe)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert all(torch.equal(before[n], t) for n, t in weights(run).items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert main([str(recipe), f"output.dir={tmp_path / 'other'}"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_cudas_allocator_gets_expandable_segments_unless_the_user_has_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for given in ({}, {names[0]: "backend:native"}, {names[1]: "backend:native"}):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert main(["train"]) == 2
        found = {name: os.environ[name] for name in names if name in os.environ}
        assert found == (given or {names[0]: "expandable_segments:True"})


def test_print_config_shows_every_setting_and_reads_back(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, target, rows, tmp_path / "run")
    assert main([str(recipe), "--print-config", "train.learning_rate=3e-5"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert main([str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed and "learning_rate: 3.0e-05" in printed


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'transformers', 'accelerate'}"
    code = f"import sys, peagle_train; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_profile_names_where_a_steps_time_goes(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, target, rows, train={"max_steps": 3, "profile_steps": [2, 3]})
    printed = capsys.readouterr().out
    assert "profile of 2 steps" in printed
    for name in ("loader wait", "target", "pass A", "pass B forward", "loss", "backward", "optimizer"):
        assert name in printed
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "peagle::optimizer" for event in events) == 2
    assert all(0 <= m["loader_wait_share"] < 1 for m in lines(run, "train"))
