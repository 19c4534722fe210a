"""The sampler: every sequence once an epoch, the same ones for any split of the work, and no cost or change on resume."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.data.packing import EMPTY_ROW
from peagle_train.data.training_data import StepBatchSampler, epoch_order


def slow_oracle(
    num_rows: int, batch: int, accumulation: int, rank: int, world: int, seed: int, num_steps: int
) -> list[list[tuple[int, int]]]:
    """Deal out one sequence at a time, as the contract says it."""
    per_step = batch * accumulation * world
    micro_batches = []
    epoch, queue = -1, []
    for _ in range(num_steps):
        if not queue:
            epoch += 1
            queue = epoch_order(num_rows, seed, epoch).tolist()
            queue += [EMPTY_ROW] * (-num_rows % per_step)
        step: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for j in range(per_step):
            step.setdefault((j // (world * batch), (j // batch) % world), []).append((epoch, queue.pop(0)))
        micro_batches += [step[micro_batch, rank] for micro_batch in range(accumulation)]
    return micro_batches


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), sizes, sizes, sizes, st.integers(1, 7), st.integers(0, 9), st.data())
def test_the_batches_are_those_of_a_slow_dealer(num_rows, batch, accumulation, world, num_steps, seed, data):
    rank = data.draw(st.integers(0, world - 1))
    start = data.draw(st.integers(0, num_steps))
    sampler = StepBatchSampler(num_rows, batch, accumulation, rank, world, seed, start, num_steps)
    expected = slow_oracle(num_rows, batch, accumulation, rank, world, seed, num_steps)
    assert list(sampler) == list(sampler) == expected[start * accumulation :]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and torch.equal(torch.get_rng_state(), state)
    # Seeds that agree in their low 32 bits, which are all that torch keeps of one.
    assert epoch_order(50, 0, 0).tolist() != epoch_order(50, 2**32, 0).tolist()
    assert epoch_order(8, 0, 0).tolist() == [3, 7, 4, 6, 5, 1, 0, 2], "the same in every release"


def test_resuming_late_costs_one_permutation_and_without_num_steps_it_is_one_epoch():
    assert len(list(StepBatchSampler(1000, batch_size=4, seed=3, start_step=10**9 + 7, num_steps=10**9 + 8))) == 1
    assert len(list(StepBatchSampler(7, batch_size=2))) == 4


def test_every_block_that_comes_again_is_mixed_in_a_way_of_its_own():
    sampler = StepBatchSampler(64, batch_size=1, num_steps=128, reuse=2, block_steps=16)
    blocks = [[index for ((_, index),) in list(sampler)[first : first + 16]] for first in range(0, 128, 16)]
    mixes = {tuple(first.index(row) for row in again) for first, again in zip(blocks[::2], blocks[1::2], strict=True)}
    assert len(mixes) == 4
