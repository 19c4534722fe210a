"""A job of ranks_run.py: what sharding must not change, asserted on every rank, in float64 on CPU."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from peagle_train import distributed
from peagle_train.config import Train, load_recipe
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.step import make_optimizers
from tests.helpers import make_draft
from tests.ranks_run import make_trainer
from tests.runs import same_tensors

CPU = torch.device("cpu")


def rows(rank: int, call: int) -> tuple[Tensor, Tensor]:
    """Packed rows of a length of the rank's own: one, or several documents, or padding alone."""
    n = 5 + 7 * rank + call
    ids = torch.randint(0, 60, (1, n), generator=torch.Generator().manual_seed(rank))
    position = torch.arange(n)[None] % (4 + rank)
    return (ids, position) if call != 2 or rank else (torch.zeros_like(ids), torch.zeros_like(position))


def check_target(folder: str, rank: int, chunk_tokens: int | None) -> None:
    """With chunks, ranks have different numbers of forwards."""
    whole = FrozenTarget.load(folder, dtype="float64")
    with distributed.one_at_a_time():
        sharded = FrozenTarget.load(folder, dtype="float64", shard=True, chunk_tokens=chunk_tokens)
    sharded.check()
    for call in range(3):
        for ours, theirs in zip(sharded.features(*rows(rank, call)), whole.features(*rows(rank, call)), strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    local = sum(p.to_local().numel() for p in sharded.base.parameters())  # type: ignore[attr-defined]
    total = sum(p.numel() for p in whole.base.parameters())
    assert local < 0.7 * total, (local, total)  # and not whole again after the forward
    assert torch.equal(sharded.head_weight(), whole.head_weight())
    assert torch.equal(sharded.embedding_rows(), whole.embedding_rows())


def gradients_of(draft: Any, step: int) -> None:
    """The same on all ranks, sharded or not."""
    for i, parameter in enumerate(draft.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        full = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        if parameter.requires_grad:
            parameter.grad = full


def stepped(sharded: bool, steps: range, state: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> Any:
    draft = make_draft(layer_type="qwen3", fc_norm=True)
    draft.lm_head.weight.requires_grad_(False)
    if sharded:
        distributed.shard(draft, draft.layers, CPU)
    optimizers = make_optimizers(draft, Train(optimizer="muon", weight_decay=0.1, learning_rate=0.1))
    assert optimizers[0].defaults["fused"]  # nothing beside its states, as the plan of memory takes it
    assert distributed.full_moments(draft, optimizers) == {}
    if state is not None:
        distributed.load_full(draft, optimizers, *state)
    for step in steps:
        gradients_of(draft, step)
        norm = distributed.clip_gradients([p for p in draft.parameters() if p.requires_grad], 1.0)
        assert norm > 10 and type(norm) is Tensor
        for optimizer in optimizers:
            optimizer.step()
    return draft, optimizers


def check_state(rank: int) -> None:
    """Muon's, which orthogonalises in bfloat16. AdamW's: whole runs move it in test_ranks.py."""
    plain = stepped(False, range(5))
    expected = distributed.full_weights(plain[0]), distributed.full_moments(*plain)
    assert (len(expected[1]) > 20) == (rank == 0)
    for first, second in ((False, True), (True, False)):
        draft, optimizers = stepped(first, range(2))
        saved = distributed.full_weights(draft), distributed.full_moments(draft, optimizers)
        assert bool(saved[0]) == bool(saved[1]) == (rank == 0)
        draft, optimizers = stepped(second, range(2, 5), distributed.from_all(saved)[0])
        again = distributed.full_weights(draft), distributed.full_moments(draft, optimizers)
        for ours, theirs in zip(again, expected, strict=True):
            assert same_tensors(ours, theirs, 0.01), (first, second)


def check_reductions(recipe_path: str) -> None:
    """Gradients are reduced once a step, however many passes and micro-batches there are; nothing stays whole."""
    settings = ["train.sharding=fsdp2", "train.gradient_accumulation_steps=4"]
    trainer = make_trainer(load_recipe(recipe_path, settings), Accelerator())
    with torch.profiler.profile() as profile:
        trainer.accumulate(next(trainer.steps()))
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("c10d::")}
    groups = len(trainer.draft.layers) + 1
    assert sum(n for op, n in counts.items() if "reduce_scatter" in op) == groups, counts
    # Forward and backward of each of four micro-batches, in some of several passes.
    assert sum(n for op, n in counts.items() if "allgather" in op) >= 8 * groups, counts
    trainer.runner.evaluate(trainer.data.eval_rows)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.draft.parameters())


def check_agreement(rank: int, folder: Path) -> None:
    distributed.agree({"recipe": "a", "set of data": "b"})
    with pytest.raises(ValueError, match="set of data: not the same") if rank == 2 else nullcontext():
        distributed.agree({"recipe": "a", "set of data": "b" if rank < 2 else "c"})
    os.environ.pop("LOCAL_WORLD_SIZE", None)  # which launchers other than torchrun may not set
    with distributed.one_at_a_time(), (folder / "turns").open("a") as file:
        file.write(str(rank))
    assert (folder / "turns").read_text() == "012"


def run(recipe_path: str, *target_folders: str) -> None:
    rank = dist.get_rank()
    distributed.world_mesh("cpu")
    assert distributed.counts_over_ranks([rank, 7], CPU).tolist() == [3, 21]
    # A sum in its place would change no gradient: passes over nothing, which only cost time.
    assert distributed.counts_over_ranks([rank, 7], CPU, largest=True).tolist() == [2, 7]
    check_reductions(recipe_path)
    for folder, chunk_tokens in zip(target_folders, (None, 3), strict=True):
        check_target(folder, rank, chunk_tokens)
    check_agreement(rank, Path(recipe_path).parent)
    check_state(rank)
    distributed.wait_for_all()
