"""What is planned: memory, against what autograd holds and in runs; FLOPs, by hand, as published and as torch counts."""

import itertools
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from peagle_train import memory as planning
from peagle_train.cli import main
from peagle_train.config import Cod, Data, Output, Recipe, Target, Train, load_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.relay import RelayBuffers
from peagle_train.machine import GIB, Device, available_ram, cores, parse_device
from peagle_train.memory import Sizes, capacity_of, largest_pass, plan_memory, read_sizes, resolve_segments, saved_bytes
from peagle_train.throughput import draft_flops, plan_throughput, target_flops
from peagle_train.training.trainer import Trainer
from tests.helpers import ROOT, LiveBytes, calls_of
from tests.ranks_run import make_trainer
from tests.runs import assert_same_run, run, stopped
from tests.tiny import make_target, write_rows

sys.path.insert(0, str(ROOT / "tools"))

from bench_segments import Bench, Settings, attention_without_kernel, buffer_tensors, sizes_of_bench
from measure import SavedBytes

# ---- the arithmetic

SHAPES = {
    "three layers, shared keys": {"layers": 3, "heads": 4, "kv_heads": 2},
    "wide feed-forward": {"layers": 2, "intermediate": 300},
    "float64": {"layers": 2, "dtype": "float64"},
    "bf16": {"layers": 2, "dtype": "bfloat16"},
    "a window": {"layers": 2, "window": 20},
    "prompts": {"layers": 1, "supervised_from": 0.5, "dtype": "bfloat16"},
    "qwen3": {"layers": 2, "draft": {"layer_type": "qwen3", "norm_before_fc": True}},
    "qwen3, bf16": {"layers": 2, "dtype": "bfloat16", "draft": {"layer_type": "qwen3", "fc_norm": True}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_planned_to_be_saved_is_what_autograd_holds(shape):
    settings = dict(SHAPES[shape])
    changes: Any = settings.pop("draft", {})
    bench = Bench(Settings(hidden=64, vocab=96, **settings))
    if changes:
        bench.draft = PEagleDraft(PEagleDraftConfig(**{**bench.draft.config.to_dict(), **changes}))
        bench.draft.lm_head.weight.requires_grad_(False)
    cases = [("flat", 1), ("checkpoint", 1), ("relay", 2), ("relay", 7), ("recompute", 2)]
    lengths = (131, 256) if "bf16" in shape else (256, 131)  # in turn: of each shape and of each case both are tried
    for (mode, S), n in zip(cases, itertools.cycle(lengths)):
        batch, outputs, buffers = bench.batch(n, S), bench.target(n), RelayBuffers()
        own = partial(lambda kept: [*bench.draft.parameters(), *buffer_tensors(kept)], buffers)
        with attention_without_kernel(), SavedBytes(own) as saved:
            bench.step(mode, batch, outputs, buffers)
        sizes = sizes_of_bench(bench, n, mode)
        planned = max(saved_bytes(sizes, largest_pass(sizes, S, all_supervised=True)))
        assert planned >= 0.85 * saved.peak_bytes, (n, mode, S)
        if shape != "prompts":  # whose passes are smaller than the largest, which is planned
            assert planned <= 1.15 * saved.peak_bytes, (n, mode, S)


def sizes(kind: str = "cpu", world_size: int = 1, sharded: bool = False, B: int = 1, **train: Any) -> Sizes:
    """Of passes padded to their capacity."""
    settings: Any = {"batch_size": B, "compile": True, **train}
    data = Data(["-"], max_length=4096)
    recipe = Recipe(Target("-"), data, Output("-"), cod=Cod(8, 0.8, 0.0, num_segments="auto"), train=Train(**settings))
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    draft = PEagleDraftConfig(**shape, head_dim=64, num_hidden_layers=2, vocab_size=1000, draft_vocab_size=500)
    return Sizes(recipe, draft, Device(kind, 0, world_size), 3_000_000, 2_500_000, sharded=sharded)


def test_a_plan_never_grows_where_memory_is_saved_and_counts_every_segment_of_a_batch_of_any_size():
    peaks = [plan_memory(sizes("cuda"), S).peak for S in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 3 * peaks[-1] - 3 * GIB
    for saving, S, before in (
        ({"activation_checkpointing": True}, 1, peaks[0]),
        ({"mixed_precision": "bf16"}, 1, peaks[0]),
        ({"offload_features": True}, 4, peaks[2]),
        ({"sharded": True, "world_size": 8}, 1, plan_memory(sizes("cuda", world_size=8), 1).peak),
    ):
        assert plan_memory(sizes("cuda", **saving), S).peak < before, saving
    assert plan_memory(sizes("cuda", segment_mode="recompute"), 8).peak > peaks[3]
    for S, B in ((1, 1), (4, 1), (4, 3)):
        one, capacity = largest_pass(sizes(B=B), S), capacity_of(sizes(), S)
        assert (one.N, one.Q, one.M) == (B * capacity, B * capacity, B * min(capacity, 4096))
        alone = max(saved_bytes(sizes(), largest_pass(sizes(), S)))
        assert max(saved_bytes(sizes(B=B), one)) == pytest.approx(B * alone)


def test_the_fewest_segments_that_fit_are_chosen_and_ranks_take_the_number_of_the_fullest(monkeypatch):
    def of(budget: int, margin: float) -> Sizes:
        return replace(sizes(memory_margin=margin), device=Device("cpu", budget))

    plans = {S: plan_memory(sizes(), S).peak for S in (1, 2, 4, 8, 16, 32, 64)}
    for S in (1, 2, 8):
        assert resolve_segments(of(int(plans[S] / 0.9) + 2, 0.1))[0] == S
    with pytest.raises(ValueError, match="no number up to 64 fits"):
        resolve_segments(of(min(plans.values()) - 1, 0.0))
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 8, 2])
    assert resolve_segments(of(2**40, 0.1))[0] == 8
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 128])  # which is how a rank says that none fits
    with pytest.raises(ValueError, match="no number up to 64 fits"):
        resolve_segments(of(2**40, 0.1))


def test_a_control_group_may_allow_less_than_the_machine_has(tmp_path, monkeypatch):
    everything = cores()
    monkeypatch.setattr("peagle_train.machine.CGROUP", tmp_path)
    none, most = ("max 100000", everything), (f"{everything}50000 100000", everything)
    for quota, expected in (none, most, ("150000 100000", min(2, everything)), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert cores() == expected
    for name, count in (("memory.max", 2000), ("memory.current", 500)):
        (tmp_path / name).write_text(str(count))
    assert available_ram() == 1500


# ---- the command line


def test_a_plan_needs_no_data_no_weights_and_no_output(tmp_path, tiny_target, tiny, capsys):
    (tmp_path / "config.json").write_text((tiny_target / "config.json").read_text())
    plan = ["plan", str(tiny(tmp_path, data={"sources": ["none.jsonl"]})), f"target.path={tmp_path}"]
    assert main([*plan, "--on", "cuda:8x2"]) == 0
    table = capsys.readouterr().out
    assert "2 processes, 8.0 GiB of CUDA memory each" in table and "  3*  " in table and "backward" in table
    assert not (tmp_path / "run").exists()
    assert main(plan) == 0
    assert "of RAM each" in capsys.readouterr().out
    assert main([*plan, "--on", "cpu:0.1"]) == 2
    assert "no number of segments up to 32 fits" in capsys.readouterr().out
    for wrong in ("8", "cuda:", "tpu:8", "cuda:8x0", "cuda:-1"):
        assert main([*plan, "--on", wrong]) == 2 and "give KIND:GIB" in capsys.readouterr().err
    assert main([*plan, "target.layer_ids=[1, 2, 9]"]) == 2
    assert "0..5" in capsys.readouterr().err.splitlines()[-1]


def test_a_plan_fits_with_the_recipes_own_number_of_segments_where_that_is_more_than_auto_tries(tmp_path, tiny):
    recipe = load_recipe(tiny(tmp_path, data={"max_length": 8192}, cod={"num_segments": 256}))
    gib = plan_memory(read_sizes(recipe, parse_device("cpu:1")), 256).peak / 2**30 / 0.9 + 1e-6
    table, fits = planning.plan_table(recipe, f"cpu:{gib}")
    assert fits and "cod.num_segments=256: the fewest that fit" in table


def test_the_plan_has_a_mask_of_tokens_by_tokens_where_the_target_makes_one(tmp_path, tiny):
    L = 65536
    target = make_target(tmp_path / "target", max_position_embeddings=L)
    for attention in ("", "sdpa", "eager"):
        how = [f"target.path={target}", f"target.attn_implementation={attention}"]
        asked = load_recipe(tiny(tmp_path, data={"max_length": L}), how)
        forward = read_sizes(asked, parse_device("cuda:80")).target_forward
        assert forward > L * L if attention == "eager" else forward < L * L / 8


# ---- runs


def test_a_probe_changes_no_number_of_a_run_or_of_a_resumed_one(tmp_path, tiny, monkeypatch, capsys):
    sections = {"data": {"eval_fraction": 0.2}, "cod": {"num_segments": 3}}
    train = {"max_steps": 3, "gradient_accumulation_steps": 2, "batch_size": 2}
    run(tiny(tmp_path / "without", **sections, train=train))
    assert "fits: peak" not in capsys.readouterr().out
    probed = tiny(tmp_path / "probed", **sections, train={"probe": True, **train})
    stopped(probed, 1, monkeypatch)
    assert "fits: peak" in capsys.readouterr().out
    run(probed, "--resume")
    assert "fits: peak" in capsys.readouterr().out
    assert_same_run(tmp_path / "probed" / "run", tmp_path / "without" / "run")


def test_auto_becomes_the_number_that_fits_and_stays_it_when_the_run_resumes(tmp_path, tiny, monkeypatch, capsys):
    def have(budget: int) -> None:
        monkeypatch.setattr("peagle_train.training.build.this_device", lambda: Device("cpu", budget))

    sections: dict[str, Any] = {"cod": {"num_segments": "auto"}, "train": {"max_steps": 2, "save_steps": 1}}
    folder, recipe = tmp_path / "run", tiny(tmp_path, **sections)
    have(int(plan_memory(read_sizes(load_recipe(recipe), Device("cpu", 0)), 4).peak / 0.9) + 2)
    run(recipe)
    assert "cod.num_segments: auto is 4:" in capsys.readouterr().out
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    assert load_recipe(folder / "checkpoint-1" / "recipe.yaml").cod.num_segments == 4
    have(2**50)
    run(recipe, "--resume", str(folder / "checkpoint-1"), "train.max_steps=3")
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    have(1)
    run(tiny(tmp_path / "other", **sections), code=2)
    assert "no number up to 64 fits" in capsys.readouterr().err


@pytest.mark.parametrize("fitting", [4, None])
def test_a_full_device_ends_a_run_in_a_line_that_says_what_to_change(fitting, tmp_path, tiny, monkeypatch, capsys):
    def full(self: Trainer, batches: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    recipe = tiny(tmp_path, cod={"num_segments": 2}, train={"max_steps": 3})
    peak = plan_memory(read_sizes(load_recipe(recipe), Device("cpu", 0)), fitting).peak if fitting else 0
    for module in ("peagle_train.training.build", "peagle_train.memory"):
        monkeypatch.setattr(f"{module}.this_device", lambda: Device("cpu", int(peak / 0.9) + 2))
    monkeypatch.setattr(Trainer, "accumulate", full)
    run(recipe, code=1)
    out, error = capsys.readouterr()
    words = "set cod.num_segments=4" if fitting else "more segments would not help: try"
    assert "out of memory in step 1 of 3" in error and "Traceback" not in error and words in error.splitlines()[-1]
    assert fitting or words in out, "a run that is planned to take too much says so"


@pytest.mark.parametrize("mode", ["relay", "recompute"])
def test_evaluation_has_no_larger_pass_or_tensor_than_training_and_holds_no_more(mode, tmp_path, tiny):
    lengths = [64, 60, 3, 33, 64]
    rows, held_out = (str(write_rows(tmp_path / f"{seed}.jsonl", lengths, seed=seed)) for seed in (0, 1))
    data = {"sources": [rows], "eval_sources": [held_out], "max_length": 64}
    recipe = load_recipe(tiny(tmp_path, cod={"num_segments": 6}, data=data, train={"segment_mode": mode}))
    trainer = make_trainer(recipe, Accelerator(cpu=True))
    with calls_of(trainer.draft) as trained, LiveBytes() as training:
        for batches in trainer.steps():
            trainer.accumulate(batches)
    with calls_of(trainer.draft) as passes, LiveBytes() as evaluating:
        values = trainer.runner.evaluate(trainer.data.eval_rows)
    assert sum(values["supervised"]) > 0
    # The draws differ, so that a segment may hold some more elements of one than of the other, up to the capacity.
    assert max(passes) <= max(trainer.collator.capacity, *trained) and len(passes) <= len(trained)
    assert evaluating.peak <= training.peak and evaluating.largest <= training.largest
    if mode == "relay":
        assert max(passes) < 64


# ---- FLOPs, and what is made of them for a machine of GPUs

RECIPE = ROOT / "recipes" / "qwen3_coder_30b_8k.yaml"
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
OF_70B = ["draft.intermediate_size=28672", "draft.mask_token_id=128011"]


def recipe_for(model: str, folder: Path, *overrides: str) -> Recipe:
    """The 30B's recipe with a target folder that holds a config.json alone. Llama-3.3-70B: Llama-3.1-8B's, larger."""
    is_70b = model == "llama-3.3-70b"
    config = json.loads((ROOT / "tests" / "configs" / f"{'llama-3.1-8b' if is_70b else model}.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (LLAMA_70B if is_70b else {})))
    return load_recipe(RECIPE, [f"target.path={folder}", *(OF_70B if is_70b else []), *overrides])


@pytest.mark.parametrize(
    "model, billions, heads",  # active, and heads x their size
    [("llama-3.3-70b", 70.55, 64 * 128), ("qwen3-coder-30b-a3b", 3.35, 32 * 128), ("gpt-oss-20b", 4.19, 64 * 64)],
)
def test_a_target_takes_two_flops_a_parameter_that_a_token_goes_through(model, billions, heads, tmp_path):
    """gpt-oss-20b: 3.61 published, which leaves the embeddings out."""
    L = 131
    target = planning.read_target(recipe_for(model, tmp_path), parse_device("cuda:79"))
    matrices, attention = target_flops(target, L)
    around = 2 * target.vocab_size * target.hidden_size  # embeddings and head, which the forward does not multiply by
    assert matrices / (2 * L) + around == pytest.approx(billions * 1e9, rel=0.01)
    kinds = getattr(target.config, "layer_types", None) or ["full_attention"] * target.config.num_hidden_layers
    windows = [128 if kind == "sliding_attention" else L for kind in kinds]
    pairs = sum(min(p + 1, window) for window in windows for p in range(L))
    assert attention == pytest.approx(4 * heads * pairs)


@pytest.mark.parametrize("mode, S", [("flat", 1), ("checkpoint", 1), ("relay", 2), ("relay", 7)])
def test_planned_flops_of_matrices_are_those_that_torch_counts(mode, S):
    bench = Bench(Settings(layers=3, heads=4, kv_heads=2, hidden=64, vocab=96, dtype="bfloat16"))
    n = 257  # padded, as passes in bfloat16 are
    batch, outputs = bench.batch(n, S), bench.target(n)
    with attention_without_kernel(), FlopCounterMode(display=False) as counter:
        bench.step(mode, batch, outputs, RelayBuffers())
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    planned, _ = draft_flops(sizes_of_bench(bench, n, mode), S)
    # A layer's last matrix is not computed again.
    assert planned == pytest.approx(counted, rel=0.07 if mode == "checkpoint" else 0.02)


def test_a_machine_is_split_where_both_sides_are_equally_fast(tmp_path):
    reuse, kept = 3, ("target.reuse=3", "target.ring=900", "train.max_steps=9")
    recipe = recipe_for("llama-3.3-70b", tmp_path, "data.max_length=32768", *kept)
    text = plan_throughput(recipe, "h200", 8, 5 * 10**8)
    serve, train = (
        float(re.search(rf"{side}.* ([\d,]+)\n", text)[1].replace(",", ""))
        for side in ("target's forward", "drafter's step")
    )
    assert serve == pytest.approx(0.4 * 989e12 * 32768 / 5.893e15, rel=0.01)  # 2 FLOPs a parameter, and attention
    serve *= reuse
    best = max(range(2, 8), key=lambda n: min(n * serve, (8 - n) * train))  # one GPU does not hold 141 GB
    pace = min(best * serve, (8 - best) * train)
    found = re.search(rf"{best} server \+ {8 - best} training\* +([\d,]+) +([\d.]+)\n", text)
    assert found and "1 server + 7" not in text
    assert float(found[1].replace(",", "")) == pytest.approx(pace, abs=8 * reuse)
    assert float(found[2]) == pytest.approx(5e8 / pace / 3600, abs=0.06)
    beside = re.search(r"8 with the target beside the drafter: too little memory +([\d,]+) ", text)
    assert beside and float(beside[1].replace(",", "")) == pytest.approx(8 / (1 / serve + 1 / train), abs=8)


def test_the_command_plans_a_machine_of_gpus(tmp_path, capsys):
    recipe_for("qwen3-coder-30b-a3b", tmp_path)
    words = ["plan", str(RECIPE), f"target.path={tmp_path}"]
    assert main([*words, "--gpu", "h200", "--gpus", "8"]) == 0
    both = capsys.readouterr().out
    # The target may have GPUs of its own.
    assert main([*words, "--gpu", "a100", "--gpus", "8", "target.dtype=float32"]) == 0
    assert "no number of segments" in capsys.readouterr().out
    assert "8 processes, 139.0 GiB of CUDA memory each" in both and "8 h200" in both and "8 training from it" in both
    assert main([*words, "--gpu", "h100", "target.server=http://localhost:8000"]) == 0  # one has nothing to share out
    alone = capsys.readouterr().out
    assert "1 h100" in alone and " server + " not in alone and "target weights" not in alone
    for wrong in ("--gpus 2", "--gpu h200 --on cuda:8", "--gpu gtx"):
        assert main([*words, *wrong.split()]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_worked_plans_in_the_docs_are_what_is_planned(tmp_path):
    lines = (ROOT / "docs" / "running.md").read_text().splitlines()
    cells = [[cell.strip() for cell in x.split("|")[1:-1]] for x in lines if "B-A3B |" in x or "70B |" in x]
    assert len(cells) == 6
    for model, length, limits, speeds, split, pace, hours, features, fits in cells:
        name = "llama-3.3-70b" if "70B" in model else "qwen3-coder-30b-a3b"
        window, anchors = limits.split(", ") if limits else ("null", "null")
        given = [f"data.max_length={length}", f"draft.window={window}", f"cod.max_anchors={anchors}"]
        text = plan_throughput(recipe_for(name, tmp_path, *given), "h200", 8, 5 * 10**8)
        shown = [*speeds.split(", "), *fits.split("; "), f"{features} TB an epoch"]
        assert all(figure in text for figure in shown), (shown, text)
        server, training = split.split(" + ")
        assert re.search(rf"{server} server \+ {training} training\* +{pace} +{hours}\n", text), text


def test_experts_without_a_number_a_token_are_refused(tmp_path):
    target = planning.read_target(recipe_for("qwen3-coder-30b-a3b", tmp_path), parse_device("cuda:79"))
    target.config = SimpleNamespace(num_experts=128)
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        target_flops(target, 8)
