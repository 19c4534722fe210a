"""Features that are used several times: computed once, the same training bit for bit, never more of them than allowed. On
several processes: test_ranks.py."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.config import load_recipe
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.packing import EMPTY_ROW
from peagle_train.data.training_data import StepBatchSampler
from peagle_train.files import put_tensors
from peagle_train.target_model.cache import write_cache
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.ring import Ring, block_steps
from tests.helpers import ENVIRONMENT
from tests.runs import assert_same_run, last_error, recipe_for, run, stopped
from tests.tiny import write_rows

L = 64
LENGTHS = [L] * 7 + [40, 13, L - 1, 2]
ROW = L * 4 * 16 * 8  # bytes of three layers and the last hidden state, 16 numbers each in float64
SIZE = 4 * (ROW + 8192)  # four sequences fit, with what a file may take beside its numbers, and five do not


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("long") / "rows.jsonl", LENGTHS, prompt=0.3)


def recipe_in(folder: Path, target: Path, rows: Path, **train: Any) -> Path:
    held_out = write_rows(folder.parent / "held_out.jsonl", [30, 7], seed=9)
    data = {"max_length": L, "pack": False, "eval_sources": [str(held_out)]}
    train = {"epochs": 4, "learning_rate": 1e-3, **train}
    return recipe_for(folder, target, rows, data=data, train=train, target={"reuse": 2, "ring": SIZE / 2**30})


def held(folder: Path) -> int:
    """Bytes of all files in a folder that others write."""
    total = 0
    for path in folder.rglob("*.*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """How much the ring in tmp_path / "fast" held before each of its renames."""
    found, replace, ring = list[int](), os.replace, tmp_path / "fast"

    def measured(partial: Path, path: Path) -> None:
        if ring in Path(path).parents:
            found.append(held(ring))
        replace(partial, path)

    monkeypatch.setattr(os, "replace", measured)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), *[st.integers(1, 3)] * 4, st.integers(1, 5), st.data())
def test_each_block_is_visited_by_all_epochs_of_a_group_in_turn_and_a_sequence_stays_on_its_rank(
    num_rows, batch, accumulation, world, reuse, block, data
):
    steps = 2 * reuse * -(-num_rows // (batch * accumulation * world))
    start = data.draw(st.integers(0, steps))

    def made(rank: int, start_step: int = 0) -> StepBatchSampler:
        sizes = num_rows, batch, accumulation, rank, world
        return StepBatchSampler(*sizes, 3, start_step, steps, reuse, block)

    epochs: dict[int, list[int]] = {}
    for rank in range(world):
        batches = list(made(rank))
        assert list(made(rank, start)) == batches[start * accumulation :]
        needed: dict[tuple[int, int], list[int]] = {}  # each sequence of a group of epochs: its steps
        for i, (epoch, index) in ((i, pair) for i, each in enumerate(batches) for pair in each if pair[1] != EMPTY_ROW):
            epochs.setdefault(epoch, []).append(index)
            needed.setdefault((epoch // reuse, index), []).append(i // accumulation)
        assert all(len(own) == reuse for own in needed.values())
        for step in range(steps):  # what is still needed is never more than a block
            assert sum(own[0] <= step <= own[-1] for own in needed.values()) <= block * accumulation * batch
    assert sorted(epochs) == list(range(2 * reuse))
    assert all(sorted(order) == list(range(num_rows)) for order in epochs.values())


@pytest.mark.parametrize("weight", [1, 2])  # 2: each sequence twice an epoch
def test_training_with_it_is_training_without_bit_for_bit_and_the_target_runs_once_a_sequence(
    weight, tmp_path, tiny_target, rows, monkeypatch
):
    features = create_autospec(FrozenTarget.features, side_effect=FrozenTarget.features)
    monkeypatch.setattr(FrozenTarget, "features", features)
    more = [f"data.sources=[{{path: {rows}, weight: {weight}}}]", f"train.eval_steps={7 * weight}"]
    more += ["target.check=false", "train.epochs=2"]
    run(recipe_in(tmp_path / "ring", tiny_target, rows), *more)
    evaluations = 1 + 22 // 7 + 1
    computed = features.call_count - 2 * evaluations
    assert computed == len(LENGTHS) if weight == 1 else computed < 2 * 2 * len(LENGTHS)
    assert not [*(tmp_path / "ring" / "run").glob("ring*")]
    monkeypatch.setattr(Ring, "outputs", lambda self, batch, head_rows: self.target.outputs(batch, head_rows))
    features.reset_mock()
    run(recipe_in(tmp_path / "anew", tiny_target, rows), *more)
    assert features.call_count == weight * 2 * len(LENGTHS) + 2 * evaluations
    assert_same_run(tmp_path / "ring" / "run", tmp_path / "anew" / "run")


def test_its_target_is_told_of_each_sequence_that_comes_and_is_not_there_and_is_asked_for_that_one(tmp_path):
    def batch_of(*keys: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[key, key, 0] for key in keys])
        return {"row_key": torch.tensor(keys), "input_ids": ids, "document_ids": (ids > 0).long() - 1}

    def outputs(row: dict[str, torch.Tensor], head: torch.Tensor) -> TargetOutputs:
        asked.append(row)
        values = row["input_ids"][..., None].float() * torch.ones(2)
        return TargetOutputs(values, values + 1, head)

    head, ahead, asked = torch.zeros(5, 2), list[Any](), list[Any]()
    target = Mock(hidden_size=2, layer_ids=[0], dtype=torch.float32, outputs=outputs)
    recipe: Any = SimpleNamespace(output=SimpleNamespace(dir=tmp_path), target=SimpleNamespace(ring_dir=None))
    ring, batches = Ring(recipe, target, 0, 1), [batch_of(1, 2), batch_of(2, 0, 3), batch_of(1, 4)]
    for number, told in enumerate(([1, 2, 3, 4], [3, 4], [4])):
        ring.expect(batches[number:])
        ahead += target.expect.call_args.args[0]
        assert [int(row["row_key"]) for row in target.expect.call_args.args[0]] == told
        found = ring.outputs(batches[number], head)
        assert torch.equal(found.features[..., 0], batches[number]["input_ids"].float())
    assert [int(row["row_key"]) for row in asked] == [1, 2, 3, 4]
    assert all(any(row is each for each in ahead) for row in asked) and len({*map(id, ahead)}) == 4


def test_a_cache_of_a_recipe_with_a_ring_says_how_to_train_without_one(tmp_path, tiny_target, rows):
    recipe = recipe_in(tmp_path, tiny_target, rows)
    said = write_cache(load_recipe(recipe), str(tmp_path / "features"))
    run(recipe, *said.split("RECIPE ")[1].split(), "train.max_steps=1")


@pytest.mark.slow
def test_its_size_is_never_passed_not_even_where_a_killed_run_resumes_which_ends_as_if_it_had_not_been_killed(
    tmp_path, tiny_target, rows, monkeypatch, sizes
):
    run(recipe_in(tmp_path / "whole", tiny_target, rows, save_steps=3, max_steps=14))
    recipe = recipe_in(tmp_path / "parts", tiny_target, rows, save_steps=3, max_steps=14)
    output, ring = tmp_path / "parts" / "run", tmp_path / "fast"
    more = [f"target.ring_dir={ring}", "train.log_steps=1"]
    child = subprocess.Popen([sys.executable, "-m", "peagle_train", str(recipe), *more], env=ENVIRONMENT)
    while child.poll() is None and not (output / "checkpoint-6").exists():
        assert held(ring) <= SIZE
        time.sleep(0.01)  # another process works: there is nothing else to wait for
    child.send_signal(signal.SIGKILL)
    child.wait()
    (folder,) = ring.glob("*/0")
    assert 0 < held(ring) <= SIZE
    # What else a kill may leave: of another block, of other ranks, half a file.
    for stale in (folder / f"{1:016x}.safetensors", folder / ".x.partial", folder.with_name("1") / "y.safetensors"):
        stale.parent.mkdir(exist_ok=True)
        stale.write_bytes(bytes(SIZE))
    stopped(recipe, 10, monkeypatch, "--resume", *more)
    assert held(ring) <= SIZE
    run(recipe, "--resume", *more)
    assert ROW < max(sizes) <= SIZE and not [*ring.iterdir()]
    assert_same_run(output, tmp_path / "whole" / "run")


def test_its_size_is_not_passed_in_a_second_block_of_the_same_process(tmp_path, tiny_target, rows, sizes):
    run(recipe_in(tmp_path / "run", tiny_target, rows, max_steps=14), f"target.ring_dir={tmp_path / 'fast'}")
    assert ROW < max(sizes) <= SIZE


def test_a_disk_that_fills_up_ends_a_run_with_a_checkpoint(tmp_path, tiny_target, rows, monkeypatch, capsys):
    recipe = recipe_in(tmp_path / "full", tiny_target, rows, max_steps=3)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr("peagle_train.target_model.ring.put_tensors", create_autospec(put_tensors, side_effect=full))
        run(recipe, code=1)
    message = last_error(capsys)
    assert "target.ring" in message and "No space left" in message and "--resume continues" in message
    run(recipe, "--resume")


def test_a_block_has_as_many_steps_as_fit_and_what_cannot_be_is_one_line(tmp_path, tiny_target, rows, capsys):
    recipe = recipe_in(tmp_path / "wrong", tiny_target, rows)
    target = FrozenTarget.load(str(tiny_target), dtype="float64")
    for more, steps in ((0, 4), (-1, 3), (ROW + 8192, 5)):
        assert block_steps(load_recipe(recipe, [f"target.ring={(SIZE + more) / 2**30}"]), target, 1) == steps
    for setting, named in (
        ("target.ring_dir=/dev/null/ring", "Not a directory"),
        ("train.batch_size=5", "features of a step's 5 sequences"),
    ):
        run(recipe, setting, f"output.dir={tmp_path / setting[:12]}", code=2)
        assert named in last_error(capsys), setting
