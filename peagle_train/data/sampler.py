"""Which rows a rank trains on in which step: a pure function of (seed, epoch, rank, step)."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

EMPTY_ROW = -1
"""The index of no row: `PackedRows` answers it with a row of length 0."""


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank, lists of `(epoch, index)`, `accumulation` of them for every optimizer step.

    Epoch e visits every row once, in an order drawn from (seed, e). A step takes the next batch_size *
    accumulation * world_size rows: row j of them belongs to micro-batch j // (world_size * batch_size) of
    rank j // batch_size % world_size, so that one process with twice the accumulation trains on the same rows
    as two processes. The last step of an epoch is filled up with `EMPTY_ROW`: no row is repeated or left out.

    A `DataLoader`'s `batch_sampler`. It has shared the rows out among the ranks already: do not have
    Accelerate prepare that loader.

    Args:
        num_rows: rows of the data set, >= 1.
        batch_size: rows per rank and micro-batch.
        accumulation: micro-batches per optimizer step.
        rank, world_size: this process and their number.
        seed: any int.
        num_steps: optimizer steps of the whole run; None: those of one epoch.
        start_step: steps that are done already (0 <= start_step <= num_steps).
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
        sizes = {
            "num_rows": num_rows,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "world_size": world_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it must lie in 0..{world_size - 1}")
        self.num_rows, self.batch_size, self.accumulation = num_rows, batch_size, accumulation
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.num_steps = self.steps_per_epoch if num_steps is None else num_steps
        if self.num_steps < 0:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 0")
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(
                f"start_step is {start_step}; with num_steps {self.num_steps} it must lie in 0..{self.num_steps}"
            )
        self.start_step = start_step

    @property
    def global_batch_size(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    def check_global_batch_size(self, before: int) -> None:
        """ValueError unless a run that took so many rows a step before goes on with the same rows in the same steps."""
        if before != self.global_batch_size:
            raise ValueError(
                f"rows of a step: {before} when the run began, {self.global_batch_size} now (train.batch_size"
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
    """int64 [num_rows]: the order in which an epoch visits the rows."""
    # Hashed: torch's CPU generator keeps 32 bits of a seed, and seed + epoch repeats other seeds' orders.
    digest = hashlib.sha256(f"row order,{seed},{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(num_rows, generator=generator)
