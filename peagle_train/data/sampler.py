"""Which sequences a rank trains on in which step: a pure function of (seed, epoch, rank, step)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from peagle_train.core.cod import seeded

EMPTY_ROW = -1
"""The index of no sequence: `PackedRows` answers it with one of length 0."""


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank, lists of `(epoch, index)`, `accumulation` of them for every optimizer step.

    Epoch e visits every sequence once, in an order drawn from (seed, e). A step takes the next batch_size *
    accumulation * world_size sequences: number j of them belongs to micro-batch j // (world_size * batch_size) of
    rank j // batch_size % world_size, so that one process with twice the accumulation trains on the same sequences
    as two processes. The last step of an epoch is filled up with `EMPTY_ROW`: nothing is repeated or skipped.

    A `DataLoader`'s `batch_sampler`, which has divided the sequences among the ranks: do not let Accelerate prepare that
    loader. `num_steps` are optimizer steps of the whole run (None: those of one epoch), `start_step` of them done already.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int = 1,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        assert min(num_rows, batch_size, accumulation, world_size) >= 1 and 0 <= rank < world_size
        self.num_rows, self.batch_size, self.accumulation = num_rows, batch_size, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.num_steps = self.steps_per_epoch if num_steps is None else num_steps
        assert 0 <= start_step <= self.num_steps
        self.start_step = start_step

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    def check_global_batch_size(self, before: int) -> None:
        """ValueError unless a run that took `before` sequences a step resumes with the same sequences in the same steps."""
        if before != self.global_batch_size:
            raise ValueError(
                f"sequences of a step: {before} when the run began, {self.global_batch_size} now (train.batch_size"
                f" {self.batch_size} x train.gradient_accumulation_steps {self.accumulation} x {self.world_size}"
                f" processes): change them so that the product is {before}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    def __len__(self) -> int:
        """Micro-batches that are left for this rank."""
        return (self.num_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.start_step, self.num_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.num_rows, self.seed, epoch)
            for micro_batch in range(self.accumulation):
                first_j = (micro_batch * self.world_size + self.rank) * self.batch_size
                first = step_in_epoch * self.global_batch_size + first_j
                indices = order[first : first + self.batch_size].tolist()
                indices += [EMPTY_ROW] * (self.batch_size - len(indices))
                yield [(epoch, index) for index in indices]


def epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """int64 [num_rows]: the order in which an epoch visits the sequences."""
    return torch.randperm(num_rows, generator=seeded("row order", seed, epoch))
