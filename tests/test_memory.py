"""Memory that is planned: against what autograd holds, and in what a run makes of it."""

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from peagle_train import memory as planning
from peagle_train.__main__ import main
from peagle_train.config import Cod, Data, Output, Recipe, Target, Train, load_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
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
def write(tmp_path: Path, tiny_target: Path, tiny_rows: Path) -> Callable[..., str]:
    """Writes a recipe of a folder's name; its run goes to `run` in there."""

    def written(name: str = "one", target: Path = tiny_target, **sections: dict[str, Any]) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / name).mkdir(exist_ok=True)
        return str(write_recipe(tmp_path / name, target, tiny_rows, tmp_path / name / "run", **sections))

    return written


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
def test_what_is_planned_to_be_saved_is_what_autograd_holds(shape: str) -> None:
    settings = dict(SHAPES[shape])
    changes: Any = settings.pop("draft", {})
    bench = Bench(Settings(hidden=64, vocab=96, device="cpu", **settings).complete())  # type: ignore[arg-type]
    if changes:
        config = copy.deepcopy(bench.draft.config)
        for name, value in changes.items():
            setattr(config, name, value)
        bench.draft = PEagleDraft(config)
        bench.draft.lm_head.weight.requires_grad_(False)
    cases = [("flat", 1), ("checkpoint", 1), ("relay", 2), ("relay", 7), ("recompute", 2)]
    for n, (mode, S) in itertools.product((131, 256), cases):
        batch, outputs, buffers = bench.batch(n, S), bench.target(n), RelayBuffers()

        def own() -> Any:
            return [t for pair in (*buffers.keys_values, *buffers.gradients) for t in pair]  # noqa: B023

        with attention_without_kernel(), SavedBytes(bench.draft.parameters(), own) as saved:
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
    recipe = Recipe(Target("-"), data, Output("-"), cod=Cod(8, 0.8, 0.0), train=Train(**settings))
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    draft = PEagleDraftConfig(**shape, head_dim=64, num_hidden_layers=2, vocab_size=1000, draft_vocab_size=500)
    return Sizes(recipe, draft, Device(kind, 0, world_size), 3_000_000, 2_500_000, sharded=sharded)


def test_a_plan_never_grows_where_memory_is_saved() -> None:
    peaks = [plan_memory(sizes("cuda"), S).peak for S in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 3 * peaks[-1] - 3 * GIB
    assert plan_memory(sizes("cuda", activation_checkpointing=True), 1).peak < peaks[0]
    assert plan_memory(sizes("cuda", mixed_precision="bf16"), 1).peak < peaks[0]
    assert plan_memory(sizes("cuda", offload_features=True), 4).peak < peaks[2]
    assert plan_memory(sizes("cuda", segment_mode="recompute"), 8).peak > peaks[3]
    replicated, sharded = (plan_memory(sizes("cuda", 8, is_sharded), 1).peak for is_sharded in (False, True))
    assert sharded < replicated


def test_a_plan_counts_every_segment_of_a_batch_of_any_size() -> None:
    for S, B in ((1, 1), (4, 1), (4, 3)):
        base = sizes(B=B)
        one, capacity = largest_pass(base, S), capacity_of(base, S)
        assert (one.N, one.Q, one.M) == (B * capacity, B * capacity, B * min(capacity, 4096))
        assert max(saved_bytes(base, one)) == pytest.approx(B * max(saved_bytes(sizes(), largest_pass(sizes(), S))))


def test_the_fewest_segments_that_fit_are_chosen_and_none_where_none_do() -> None:
    def of(budget: int, margin: float) -> Sizes:
        return replace(sizes(memory_margin=margin), device=Device("cpu", budget))

    plans = {S: plan_memory(sizes(), S).peak for S in (1, 2, 4, 8, 16, 32, 64)}
    for S in (1, 2, 8):
        chosen = choose_segments(of(int(plans[S] / 0.9) + 2, 0.1))
        assert chosen is not None and chosen.num_segments == S
    assert choose_segments(of(min(plans.values()) - 1, 0.0)) is None


def test_a_device_is_read_as_it_is_written() -> None:
    assert parse_device("cuda:79x8") == Device("cuda", 79 * GIB, 8)
    assert parse_device("cpu:0.5") == Device("cpu", GIB // 2, 1)
    for wrong in ("cuda", "cuda:", "tpu:8", "cuda:8x0", "cuda:-1", "cuda:8x"):
        with pytest.raises(ValueError, match="give KIND:GIB"):
            parse_device(wrong)


def test_ranks_take_the_number_that_fits_the_fullest_of_them(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = read_sizes(load_recipe(write(cod={"num_segments": "auto"})), Device("cpu", 2**40))
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 8, 2])
    S, line = planning.resolve_segments(sizes)
    assert S == 8 and "auto is 8" in line
    monkeypatch.setattr(planning, "from_all", lambda own: [own, 128])  # which is how one says that none fits
    with pytest.raises(ValueError, match="no number up to 64 fits"):
        planning.resolve_segments(sizes)


# ---- the command line


def test_a_dry_run_needs_no_data_no_weights_and_no_output(
    tmp_path: Path, tiny_target: Path, write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_target / "config.json").read_text())
    recipe = write(target=bare, data={"sources": ["none.jsonl"]})
    assert main([recipe, "--dry-run", "--on", "cuda:8x2"]) == 0
    table = capsys.readouterr().out
    assert "2 processes, 8.0 GiB of CUDA memory each" in table and "  3*  " in table and "saved for backward" in table
    assert "this recipe: 3 segments" in table and not (tmp_path / "one" / "run").exists()
    assert main([recipe, "--dry-run"]) == 0
    assert "of RAM each" in capsys.readouterr().out
    assert main([recipe, "--on", "cuda:8"]) == 2
    assert main([recipe, "--dry-run", "--on", "8"]) == 2
    assert main([recipe, "--dry-run", "target.layer_ids=[1, 2, 9]"]) == 2
    assert "0..5" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_the_plan_has_a_mask_of_tokens_by_tokens_where_the_target_makes_one(
    attention: str | None, tmp_path: Path, write: Callable[..., str]
) -> None:
    L = 65536
    target = make_target(tmp_path / "target", max_position_embeddings=L)
    recipe = load_recipe(
        write(target=target, data={"max_length": L}), [f"target.attn_implementation={attention or ''}"]
    )
    forward = read_sizes(recipe, parse_device("cuda:80")).target_forward
    assert forward > L * L if attention == "eager" else forward < L * L / 8


# ---- runs


@pytest.mark.parametrize(
    "train",
    [
        {"gradient_accumulation_steps": 2, "batch_size": 2},
        {"segment_mode": "recompute", "activation_checkpointing": True},
    ],
    ids=["flat", "recompute"],
)
def test_a_probe_changes_no_number_of_a_run(
    tmp_path: Path, write: Callable[..., str], train: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for probe in (True, False):
        sections = {"data": {"eval_fraction": 0.2}, "train": {"max_steps": 3, "probe": probe, **train}}
        cod = {"num_segments": 1 if "batch_size" in train else 3}
        assert main([write(str(probe), **sections, cod=cod)]) == 0
        assert ("fits: peak" in capsys.readouterr().out) == probe
    assert_same_run(tmp_path / "True" / "run", tmp_path / "False" / "run")


def test_a_probe_changes_nothing_of_a_resumed_run(tmp_path: Path, begun: Begun) -> None:
    assert main([str(begun.copy(tmp_path)), "--resume", "train.probe=true"]) == 0
    assert_same_run(tmp_path / "run", begun.whole)


def test_auto_becomes_the_number_that_fits_and_stays_it_when_the_run_resumes(
    tmp_path: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def have(budget: int) -> None:
        monkeypatch.setattr("peagle_train.training.build.this_device", lambda _: Device("cpu", budget))

    sections: dict[str, Any] = {"cod": {"num_segments": "auto"}, "train": {"max_steps": 2, "save_steps": 1}}
    folder, recipe = tmp_path / "one" / "run", write(**sections)
    have(int(plan_memory(read_sizes(load_recipe(recipe), Device("cpu", 0)), 4).peak / 0.9) + 2)
    assert main([recipe]) == 0
    assert "cod.num_segments: auto is 4:" in capsys.readouterr().out
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    assert load_recipe(folder / "checkpoint-1" / "recipe.yaml").cod.num_segments == 4
    have(2**50)
    assert main([write(**sections), "--resume", str(folder / "checkpoint-1"), "train.max_steps=3"]) == 0
    assert "cod.num_segments auto stays 4" in capsys.readouterr().out
    assert load_recipe(folder / "recipe.yaml").cod.num_segments == 4
    have(1)
    assert main([write("other", **sections)]) == 2
    assert "no number up to 64 fits" in capsys.readouterr().err


@pytest.mark.parametrize("fitting", [4, None])
def test_a_full_device_ends_a_run_in_a_line_that_says_what_to_change(
    fitting: int | None,
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: Trainer, batches: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    recipe = write(cod={"num_segments": 2}, train={"max_steps": 3})
    peak = plan_memory(read_sizes(load_recipe(recipe), Device("cpu", 0)), fitting).peak if fitting else 0
    for module in ("peagle_train.training.build", "peagle_train.memory"):
        monkeypatch.setattr(f"{module}.this_device", lambda *_: Device("cpu", int(peak / 0.9) + 2))
    monkeypatch.setattr(Trainer, "accumulate", full)
    assert main([recipe]) == 1
    out, error = capsys.readouterr()
    last = error.strip().splitlines()[-1]
    assert "Traceback" not in error and "out of memory in step 1 of 3" in last
    words = "set cod.num_segments=4" if fitting else "more segments would not help: try"
    assert words in last and (fitting or words in out)  # a run that is planned to take too much says so at its start


def test_an_error_of_another_kind_keeps_its_traceback(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Trainer, "accumulate", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main([write()])
