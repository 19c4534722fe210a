"""A device that is full ends a run with what was planned and what would fit, not with a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from peagle_train.errors import RunStopped
from peagle_train.recipe import Recipe


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host's allocator in torch, had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_explained(recipe: Recipe, where: Callable[[], str]) -> Iterator[None]:
    """RunStopped in the place of an out-of-memory error inside; the table goes to stderr before.

    Args:
        where: asked only then: words for what was being done, and for how to go on.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunStopped) or not is_out_of_memory(error):
            raise
        from peagle_train.memory.dry_run import out_of_memory

        table, line = out_of_memory(recipe, error, where())
        sys.stderr.write(f"{table}\n" if table else "")
        raise RunStopped(line) from None
