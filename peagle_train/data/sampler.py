"""Which sequences a rank trains on in which step: a pure function of (seed, epoch, rank, step)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from peagle_train.core.cod import seeded

EMPTY_ROW = -1  # the index of no sequence: `PackedRows` answers it with one of length 0


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank, lists of `(epoch, index)`, `accumulation` of them for every optimizer step.

    Epoch e visits every sequence once, in an order drawn from (seed, e). A step takes the next batch_size *
    accumulation * world_size sequences: number j of them belongs to micro-batch j // (world_size * batch_size) of
    rank j // batch_size % world_size, so that one process with twice the accumulation trains on the same sequences
    as two processes. The last step of an epoch is filled up with `EMPTY_ROW`: nothing is repeated or skipped.

    With `reuse` R, R epochs go together, in the order of the first of them cut into blocks of `block_steps` steps: each
    block is visited R times, once for each epoch, before the next one. Every visit but the first mixes the block's steps
    anew, but a sequence keeps its place j in a step, and so its rank.

    A `DataLoader`'s `batch_sampler`, which has divided the sequences among the ranks: do not let Accelerate prepare that
    loader.
    """

    num_rows: int
    batch_size: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0  # done already
    num_steps: int = 0  # optimizer steps of the whole run; 0: those of one epoch
    reuse: int = 1
    block_steps: int = 0  # 0: those of one epoch

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        self.num_steps = self.num_steps or self.steps_per_epoch
        self.block_steps = self.block_steps or self.steps_per_epoch

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        made, table = None, torch.empty(0)
        for step in range(self.start_step, self.num_steps):
            visit, at = self._visit(step)
            if visit != made:
                made, table = visit, self._sequences(*visit)
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.world_size + self.rank) * self.batch_size
                yield [(visit[0], index) for index in table[at, first : first + self.batch_size].tolist()]

    def comes_again(self, step: int) -> bool:
        """Whether a step (counted from 0) is not in the last visit to its block."""
        return self._visit(step)[0][0] % self.reuse < self.reuse - 1

    def _visit(self, step: int) -> tuple[tuple[int, int, int], int]:
        """A step's visit (its epoch, the block's first step in the order, the block's number of steps), and place there."""
        group, in_group = divmod(step, self.reuse * self.steps_per_epoch)
        first = in_group // (self.reuse * self.block_steps) * self.block_steps
        steps = min(self.block_steps, self.steps_per_epoch - first)
        number, at = divmod(in_group - self.reuse * first, steps)
        return (group * self.reuse + number, first, steps), at

    def _sequences(self, epoch: int, first: int, steps: int) -> Tensor:
        """int64 [steps, global batch]: those of a visit."""
        group, number = divmod(epoch, self.reuse)
        table = torch.full((steps, self.global_batch_size), EMPTY_ROW)
        rows = epoch_order(self.num_rows, self.seed, group)[first * self.global_batch_size :][: table.numel()]
        table.view(-1)[: rows.numel()] = rows
        if number > 0:
            draw = torch.rand(table.shape, generator=seeded("block order", self.seed, epoch, first))
            table = table.gather(0, draw.argsort(stable=True, dim=0))
        return table


def epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """int64 [num_rows]: the order in which an epoch visits the sequences."""
    return torch.randperm(num_rows, generator=seeded("row order", seed, epoch))
