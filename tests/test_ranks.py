"""Two and three processes, data-parallel and sharded (FSDP2), on CPU: the run of one process on the same global batch."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from peagle_train.config import load_recipe
from peagle_train.target_model.cache_writer import write_cache
from tests import fsdp_run
from tests.ranks_run import run
from tests.test_distributed import launch
from tests.tiny import make_target, write_recipe, write_rows

pytestmark = pytest.mark.slow

# 6 micro-batches a step are 6, 3 or 2 a process; 11 rows leave an epoch's last step incomplete, and ranks with nothing.
MICRO_BATCHES = 6
LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 5]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "relay": {"data": {"pack": False}, "cod": {"num_segments": 5}},
    "recompute": {"data": {"pack": False}, "cod": {"num_segments": 5}, "train": {"segment_mode": "recompute"}},
    "flat": {"cod": {"num_segments": 1}, "train": {"activation_checkpointing": True, "max_grad_norm": None}},
    "packed": {"data": {"max_length": 48}, "train": {"batch_size": 2, "offload_features": True, "probe": True}},
    "nothing to learn": {"data": {"pack": False}},
    "sharded target": {"data": {"pack": False, "max_length": 24}, "target": {"shard": True}},
}
RUNS = [
    ("relay", 2, "none"), ("flat", 2, "fsdp2"), ("recompute", 2, "fsdp2"), ("nothing to learn", 2, "none"),
    ("packed", 3, "none"), ("relay", 3, "fsdp2"), ("nothing to learn", 3, "fsdp2"), ("sharded target", 3, "fsdp2"),
]  # fmt: skip
# Stopped after step 2 by a signal to one of the ranks, then resumed on others: (processes, sharding) twice.
MOVES = [((1, "none"), (2, "fsdp2")), ((2, "fsdp2"), (3, "none")), ((3, "fsdp2"), (1, "none"))]


def write_case(folder: Path, target: Path, name: str) -> Path:
    folder.mkdir()
    rows = write_rows(folder / "rows.jsonl", LENGTHS, prompt=0.3)
    if name == "nothing to learn":  # but in two documents: whole micro-batches, and one step, have nothing supervised
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        ids = [token for line in lines[2:] for token in line["input_ids"]] * 2
        # cut to rows of which only the first has something
        lines[2:] = [{"input_ids": ids, "loss_mask": [0, 1] + [0] * (len(ids) - 2)}]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = write_rows(folder / "held_out.jsonl", [30, 7, 12, 2, 25], seed=9)
    shared = {"max_steps": 4, "eval_steps": 2, "learning_rate": 1e-3}
    sections = {s: dict(values) for s, values in CASES[name].items()}
    sections["train"] = {**shared, **sections.get("train", {})}
    sections["data"] = {"eval_sources": [str(held_out)], **sections.get("data", {})}
    return write_recipe(folder, target, rows, folder / "run", **sections)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    target = make_target(folder / "target")
    return {name: write_case(folder / name, target, name) for name in CASES}


@pytest.fixture(scope="module")
def outputs(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Output folders by (case, processes, sharding), or by move; of the jobs of fsdp_run.py and sharded_run.py, too."""
    folder = tmp_path_factory.mktemp("jobs")
    out: dict[Any, Path] = {"gradients": folder}
    jobs: dict[int, list[list[str]]] = {1: [], 2: [["gradients", str(folder)]], 3: [sharded_job(folder)]}

    def add(key: Any, case: str, processes: int, sharding: str, *options: str) -> None:
        out[key] = recipes[case].parent / re.sub(r"\W+", "-", str(key))
        each = f"train.gradient_accumulation_steps={MICRO_BATCHES // processes}"
        settings = [f"output.dir={out[key]}", f"train.sharding={sharding}", each]
        jobs[processes].append(["run", str(recipes[case]), *settings, *options])

    for case, processes, sharding in [*((case, 1, "none") for case in CASES), *RUNS]:
        add((case, processes, sharding), case, processes, sharding)
    for move in MOVES:
        add(move, "relay", *move[0], "--stop-after=2")
        if move[1][0] > move[0][0]:  # the launches come one after the other, those of more processes later
            add(move, "relay", *move[1], "--resume")
    accelerator = Accelerator(cpu=True)
    jobs[2].append(cache_job(folder, recipes["relay"]))
    for _, *arguments in jobs[1]:
        run(accelerator, *arguments)
    for processes in (2, 3):
        path = folder / f"{processes}.json"
        path.write_text(json.dumps(jobs[processes]))
        result = launch(1, "tests/ranks_run.py", str(processes), str(path))
        assert result.returncode == 0, result.stderr[-3000:]
    jobs[1].clear()
    add(MOVES[-1], "relay", *MOVES[-1][1], "--resume")
    run(accelerator, *jobs[1][0][1:])
    return out


def sharded_job(folder: Path) -> list[str]:
    """What it asserts is in sharded_run.py."""
    targets = [make_target(folder / "untied"), make_target(folder / "tied", tie_word_embeddings=True)]
    rows = write_rows(folder / "rows.jsonl", [30, 32, 28, 31, 32, 29])
    train, data = {"gradient_accumulation_steps": 2}, {"eval_sources": [str(rows)]}
    recipe = write_recipe(folder, targets[0], rows, folder / "run", train=train, data=data)
    return ["sharded", str(recipe), *map(str, targets)]


def cache_job(folder: Path, recipe: Path) -> list[str]:
    """Features on disk, made whole, and beside that begun: some shards are missing, one is damaged."""
    write_cache(load_recipe(recipe), str(folder / "whole"), shard_mib=0.02)
    shutil.copytree(folder / "whole", folder / "begun")
    first, *others = sorted((folder / "begun").glob("features-*.safetensors"))
    assert len(others) > 2
    first.write_bytes(first.read_bytes()[:-1])
    for path in others[1:]:
        path.with_suffix(".sha256").unlink()
    return ["cache", str(recipe), str(folder / "begun"), "data.max_length=16"]


def test_two_processes_finish_the_features_that_one_has_begun(outputs: dict[Any, Path]) -> None:
    begun, whole = ({p.name: p.read_bytes() for p in (outputs["gradients"] / n).iterdir()} for n in ("begun", "whole"))
    assert begun == whole


@pytest.mark.parametrize("mode, case, variant", fsdp_run.CASES)
def test_sharded_ranks_with_different_segments_give_one_processs_gradients(
    mode: str, case: str, variant: str, outputs: dict[Any, Path]
) -> None:
    ours, theirs = load_file(outputs["gradients"] / f"{mode} {case} {variant}"), fsdp_run.alone(case)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert error < (0.05 if "bf16" in variant else 1e-10), (name, float(error))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case, processes, sharding", RUNS)
def test_several_processes_train_and_evaluate_as_one_does(
    case: str, processes: int, sharding: str, outputs: dict[Any, Path]
) -> None:
    assert_same_run(outputs[case, processes, sharding], outputs[case, 1, "none"])


@pytest.mark.parametrize("move", MOVES)
def test_a_run_resumes_with_other_numbers_of_processes_and_another_sharding(
    move: Any, outputs: dict[Any, Path]
) -> None:
    assert_same_run(outputs[move], outputs["relay", 1, "none"])


def assert_same_run(together: Path, alone: Path) -> None:
    ours, theirs = records(together), records(alone)
    assert [r["kind"] for r in ours] == [r["kind"] for r in theirs] and len(ours) == 4 + 3
    for own, expected in zip(ours, theirs):
        for key in ("loss", "grad_norm", "mass_outside"):
            if key in expected:
                assert own[key] == pytest.approx(expected[key], rel=1e-9), (own["step"], key)
        for key in ("accuracy", "supervised", "hits", "expected_accepted_length"):
            if key in expected:
                assert own[key] == expected[key], (own["step"], key)
    weights, expected_weights = (load_file(f / "final" / "model.safetensors") for f in (together, alone))
    assert list(weights) == list(expected_weights)
    for name, value in expected_weights.items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-8), name
