"""Started by torchrun: the command line, with one part that fails on rank 1.

python -m torch.distributed.run ... tests/failing_run.py WHERE RECIPE [override ...]
"""

import os
import signal
import sys
from typing import Any

import peagle_train.training.build
from peagle_train.__main__ import main
from peagle_train.data.packing import PackedRows
from peagle_train.target_model.frozen import FrozenTarget

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


def wait_for_ever(*_: Any) -> None:
    """As a rank does in a collective whose peer is gone."""
    signal.sigwait({signal.SIGUSR1})


if __name__ == "__main__":
    where, *arguments = sys.argv[1:]
    if where == "data" and RANK == 1:
        fail_in(PackedRows, "__getitem__", OSError("the disk is gone"), call=4)
    if where == "start" and RANK == 1:
        fail_in(peagle_train.training.build, "load_tokenizer", ValueError("rows.jsonl cannot be read"))
    if where == "stuck":  # rank 1 in the forward, while rank 0 is where nobody comes
        if RANK == 1:
            fail_in(FrozenTarget, "outputs", RuntimeError("no such kernel"))
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run does that finishes its step first
            FrozenTarget.outputs = wait_for_ever  # type: ignore[method-assign, assignment]
    sys.exit(main(arguments))
