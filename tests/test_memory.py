"""Memory that is planned: against what autograd holds, and in what a run makes of it."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from peagle_train import memory as planning
from peagle_train.__main__ import main
from peagle_train.config import load_recipe
from peagle_train.core.relay import RelayBuffers
from peagle_train.machine import GIB, Device, parse_device
from peagle_train.memory import (
    Sizes,
    capacity_of,
    choose_segments,
    largest_pass,
    plan_memory,
    read_sizes,
    saved_bytes,
)
from peagle_train.training.trainer import Trainer
from tests.runs import Begun, assert_same_run
from tests.tiny import make_target, write_recipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from bench_memory import sizes_of_bench
from bench_segments import Bench, Settings, attention_without_kernel
from measure import SavedBytes


@pytest.fixture
def target(tiny_target: Path) -> Path:
    return tiny_target


@pytest.fixture
def rows(tiny_rows: Path) -> Path:
    return tiny_rows


# ---- the arithmetic

SHAPES = {
    "one layer": {"layers": 1},
    "three layers, shared keys": {"layers": 3, "heads": 4, "kv_heads": 2},
    "wide feed-forward": {"layers": 2, "intermediate": 300},
    "float64": {"layers": 2, "dtype": "float64"},
    "bf16": {"layers": 2, "dtype": "bfloat16"},
    "prompts": {"layers": 2, "supervised_from": 0.5, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_planned_to_be_saved_is_what_autograd_holds(shape: str) -> None:
    bench = Bench(Settings(hidden=64, vocab=96, device="cpu", **SHAPES[shape]).complete())  # type: ignore[arg-type]
    cases = [("flat", 1), ("checkpoint", 1), ("relay", 2), ("relay", 7), ("recompute", 2)]
    for n, (mode, S) in itertools.product((131, 256), cases):
        batch, outputs, buffers = bench.batch(n, S), bench.target(n), RelayBuffers()

        def own() -> Any:
            return [t for pair in (*buffers.keys_values, *buffers.gradients) for t in pair]  # noqa: B023

        with attention_without_kernel(), SavedBytes(bench.draft.parameters(), own) as saved:
            bench.step(mode, batch, outputs, buffers)
        sizes = sizes_of_bench(bench, n, mode)
        planned = saved_bytes(sizes, largest_pass(sizes, S, all_supervised=True))
        assert planned >= 0.85 * saved.peak_bytes, (n, mode, S)
        if shape != "prompts":  # whose passes are smaller than the largest, which is planned
            assert planned <= 1.15 * saved.peak_bytes, (n, mode, S)


def sizes(**changes: Any) -> Sizes:
    shape: dict[str, Any] = {"batch_size": 1, "length": 4096, "num_depths": 8, "ratio": 0.8, "ratio_min": 0.0}
    shape |= {"boundaries": "balanced", "hidden": 256, "target_hidden": 256, "intermediate": 768, "heads": 4}
    shape |= {"kv_heads": 2, "head_dim": 64, "layers": 2, "vocab": 1000, "draft_vocab": 500}
    return Sizes(**{**shape, "parameters": 3_000_000, "trained": 2_500_000, **changes})


def test_a_plan_never_grows_where_memory_is_saved() -> None:
    base = sizes(static=True, on_cuda=True, pad_context=True)
    peaks = [plan_memory(base, S).peak for S in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 3 * peaks[-1] - 3 * GIB
    assert plan_memory(replace(base, checkpointing=True), 1).peak < peaks[0]
    assert plan_memory(replace(base, compute_bytes=2), 1).peak < peaks[0]
    assert plan_memory(replace(base, offload_features=True), 4).peak < peaks[2]
    assert plan_memory(replace(base, relay=False), 8).peak > peaks[3]
    assert (
        plan_memory(replace(base, world_size=8, sharded=True), 1).peak
        < plan_memory(replace(base, world_size=8), 1).peak
    )


def test_a_plan_counts_every_segment_of_a_batch_of_any_size() -> None:
    for S, B in ((1, 1), (4, 1), (4, 3)):
        base = sizes(batch_size=B, static=True)
        one = largest_pass(base, S)
        capacity = capacity_of(base, S)
        assert (one.N, one.Q, one.M) == (B * capacity, B * capacity, B * min(capacity, base.length))
        assert saved_bytes(base, one) == pytest.approx(
            B * saved_bytes(sizes(static=True), largest_pass(sizes(static=True), S))
        )


def test_the_fewest_segments_that_fit_are_chosen_and_none_where_none_do() -> None:
    base = sizes(static=True)
    plans = {S: plan_memory(base, S).peak for S in (1, 2, 4, 8, 16, 32, 64)}
    for S in (1, 2, 8):
        chosen = choose_segments(base, int(plans[S] / 0.9) + 2, 0.1)
        assert chosen is not None and chosen.num_segments == S
    assert choose_segments(base, min(plans.values()) - 1, 0.0) is None
    assert choose_segments(sizes(length=9, static=True), 0, 0.0) is None


def test_a_device_is_read_as_it_is_written() -> None:
    assert parse_device("cuda:79x8") == Device("cuda", 79 * GIB, 8)
    assert parse_device("cpu:0.5") == Device("cpu", GIB // 2, 1)
    for wrong in ("cuda", "cuda:", "tpu:8", "cuda:8x0", "cuda:-1", "cuda:8x"):
        with pytest.raises(ValueError, match="give KIND:GIB"):
            parse_device(wrong)


def test_ranks_take_the_number_that_fits_the_fullest_of_them(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, target, rows, tmp_path / "x", cod={"num_segments": "auto"}))
    device = Device("cpu", 2**40)
    sizes = read_sizes(recipe, device)
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 8, 2])
    resolved, line = planning.resolve_segments(recipe, sizes, device)
    assert resolved.cod.num_segments == 8 and recipe.cod.num_segments == "auto" and "auto is 8" in line
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 128])  # which is how one says that none fits
    with pytest.raises(ValueError, match="no number up to 64 fits"):
        planning.resolve_segments(recipe, sizes, device)


# ---- the command line


def test_a_dry_run_needs_no_data_no_weights_and_no_output(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((target / "config.json").read_text())
    recipe = write_recipe(tmp_path, bare, tmp_path / "none.jsonl", tmp_path / "run")
    assert main([str(recipe), "--dry-run", "--on", "cuda:8x2"]) == 0
    table = capsys.readouterr().out
    assert "2 processes, 8.0 GiB of CUDA memory each" in table and "  3*  " in table and "saved for backward" in table
    assert "this recipe: 3 segments" in table and not (tmp_path / "run").exists()
    assert main([str(recipe), "--dry-run"]) == 0
    assert "of RAM each" in capsys.readouterr().out
    assert main([str(recipe), "--on", "cuda:8"]) == 2
    assert main([str(recipe), "--dry-run", "--on", "8"]) == 2
    assert main([str(recipe), "--dry-run", "target.layer_ids=[1, 2, 9]"]) == 2
    assert "0..5" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_the_plan_has_a_mask_of_tokens_by_tokens_where_the_target_makes_one(
    attention: str | None, tmp_path: Path, rows: Path
) -> None:
    L = 65536
    target = make_target(tmp_path / "target", max_position_embeddings=L)
    sections = {"target": {"attn_implementation": attention}, "data": {"max_length": L}}
    recipe = load_recipe(write_recipe(tmp_path, target, rows, tmp_path / "run", **sections))
    forward = read_sizes(recipe, parse_device("cuda:80")).target_forward
    assert forward > L * L if attention == "eager" else forward < L * L / 8


# ---- runs


def run(folder: Path, target: Path, rows: Path, /, *arguments: str, **sections: dict[str, Any]) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(exist_ok=True)
    assert main([str(write_recipe(folder, target, rows, folder / "run", **sections)), *arguments]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "sections",
    [
        {"cod": {"num_segments": 1}, "train": {"gradient_accumulation_steps": 2, "batch_size": 2}},
        {"train": {"segment_mode": "recompute", "activation_checkpointing": True}},
    ],
    ids=["flat", "recompute"],
)
def test_a_probe_changes_no_number_of_a_run(
    tmp_path: Path, target: Path, rows: Path, sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for probe in (True, False):
        train = {"max_steps": 3, "probe": probe, **sections.get("train", {})}
        run(tmp_path / str(probe), target, rows, **{**sections, "train": train, "data": {"eval_fraction": 0.2}})
        assert ("fits: peak" in capsys.readouterr().out) == probe
    assert_same_run(tmp_path / "True" / "run", tmp_path / "False" / "run")


def test_a_probe_changes_nothing_of_a_resumed_run(tmp_path: Path, begun: Begun) -> None:
    assert main([str(begun.copy(tmp_path)), "--resume", "train.probe=true"]) == 0
    assert_same_run(tmp_path / "run", begun.whole)


def test_auto_becomes_the_number_that_fits_and_stays_it_when_the_run_resumes(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"cod": {"num_segments": "auto"}, "train": {"max_steps": 2, "save_steps": 1}}
    recipe = load_recipe(write_recipe(tmp_path, target, rows, tmp_path / "x", **sections))
    four = plan_memory(read_sizes(recipe, Device("cpu", 0)), 4).peak
    monkeypatch.setattr("peagle_train.training.build.this_device", lambda _: Device("cpu", int(four / 0.9) + 2))
    folder = run(tmp_path / "a", target, rows, **sections)
    assert "cod.num_segments: auto is 4:" in capsys.readouterr().out
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    assert load_recipe(folder / "checkpoint-1" / "recipe.yaml").cod.num_segments == 4
    monkeypatch.setattr("peagle_train.training.build.this_device", lambda _: Device("cpu", 2**50))
    run(tmp_path / "a", target, rows, "--resume", str(folder / "checkpoint-1"), "train.max_steps=3", **sections)
    assert "cod.num_segments auto stays 4" in capsys.readouterr().out
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("peagle_train.training.build.this_device", lambda _: Device("cpu", 1))
    assert main([str(write_recipe(tmp_path, target, rows, tmp_path / "b", **sections))]) == 2
    assert "no number up to 64 fits" in capsys.readouterr().err


def test_a_run_that_no_machine_holds_ends_with_its_plan_before_anything_is_loaded(
    tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"  # there is nothing to load
    bare.mkdir()
    (bare / "config.json").write_text((target / "config.json").read_text())
    sections = {"data": {"max_length": 4_000_000}, "target": {"attn_implementation": "eager"}}  # scores, and a mask
    recipe = write_recipe(tmp_path, bare, rows, tmp_path / "run", **sections)
    assert main([str(recipe)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("peak") for line in said) and "GiB are planned for 3 segments" in said[-1]
    assert "--force" in said[-1] and not (tmp_path / "run").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), "--force"]) == 2  # and then it comes to its target
    assert "no .safetensors weights" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "code"), [(0.51, 0), (0.49, 2)])
def test_only_over_twice_the_memory_that_there_is_a_run_does_not_start_unless_it_is_forced_to(
    tmp_path: Path, target: Path, rows: Path, share: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, target, rows, tmp_path / "run", train={"max_steps": 1})
    peak = plan_memory(read_sizes(load_recipe(path), Device("cpu", 0)), 3).peak
    monkeypatch.setattr("peagle_train.training.build.this_device", lambda _: Device("cpu", int(peak * share)))
    assert main([str(path)]) == code
    AcceleratorState._reset_state(reset_partial_state=True)
    if code:
        assert main([str(path), "--force"]) == 0


def test_a_full_device_ends_a_run_with_the_table_and_the_number_that_fits(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, target, rows, tmp_path / "run", cod={"num_segments": 2}, train={"max_steps": 3})
    accumulate, calls = Trainer.accumulate, []

    def full(self: Trainer, batches: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")
        return accumulate(self, batches)

    monkeypatch.setattr(Trainer, "accumulate", full)
    four = plan_memory(read_sizes(load_recipe(recipe), Device("cpu", 0)), 4).peak
    monkeypatch.setattr(planning, "this_device", lambda: Device("cpu", int(four / 0.9) + 2))
    assert main([str(recipe)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "saved for backward" in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("peagle_train: error: out of memory in step 2 of 3") and "set cod.num_segments=4" in last
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(planning, "this_device", lambda: Device("cpu", 1))
    calls.clear()
    other = write_recipe(tmp_path, target, rows, tmp_path / "other", train={"max_steps": 3})
    assert main([str(other)]) == 1
    assert "more segments would not help: try" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_error_of_another_kind_keeps_its_traceback(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Trainer, "accumulate", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main([str(write_recipe(tmp_path, target, rows, tmp_path / "run"))])
