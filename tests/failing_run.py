"""Started by torchrun: the command line, with one part that fails on rank 1.

python -m torch.distributed.run ... tests/failing_run.py WHERE RECIPE [override ...]
"""

import os
import sys
from typing import Any

import peagle_train.training.build
from peagle_train.__main__ import main
from peagle_train.data.packing import PackedRows

RANK = int(os.environ["RANK"])


def fail_in(owner: Any, name: str, error: Exception, call: int = 1) -> None:
    """Make a function raise at its n-th call."""
    original, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] < call:
            return original(*arguments, **keywords)
        raise error

    setattr(owner, name, failing)


if __name__ == "__main__":
    where, *arguments = sys.argv[1:]
    if where == "data" and RANK == 1:
        fail_in(PackedRows, "__getitem__", OSError("the disk is gone"), call=4)
    if where == "start" and RANK == 1:
        fail_in(peagle_train.training.build, "load_tokenizer", ValueError("rows.jsonl cannot be read"))
    sys.exit(main(arguments))
