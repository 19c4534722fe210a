"""Features computed once for several passes: files, from a sequence's first visit in a block of steps to its last (see
`StepBatchSampler`). B: sequences of a batch, L: positions, n: tokens, T: the target's hidden size, F: feature layers.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peagle_train.config import Recipe
from peagle_train.core.cod import hash63
from peagle_train.core.passes import TargetOutputs
from peagle_train.files import one_line, put_tensors
from peagle_train.target_model.cache import FIELDS
from peagle_train.target_model.frozen import TargetBase, TargetLost

SLACK = 8192  # bytes that a file takes at most beside its numbers: its header, and what a disk rounds up
Batch = dict[str, Tensor]


def block_steps(recipe: Recipe, target: TargetBase, sequences: int) -> int:
    """How many steps of `sequences` each have features that fit in `target.ring`; ValueError if not even one has."""
    ring, numbers = recipe.target.ring, recipe.data.max_length * (len(target.layer_ids) + 1) * target.hidden_size
    assert ring is not None
    step = sequences * (numbers * target.dtype.itemsize + SLACK)
    if ring * 2**30 < step:
        needed = f"features of a step's {sequences} sequences take {step / 2**30:.3g}: give that, or a smaller step"
        raise ValueError(f"target.ring is {ring:g} GiB; {needed}")
    return int(ring * 2**30) // step


class Ring:
    """A target's outputs for training's batches, of sequences computed one at a time: the bits of one do not depend on the
    others. Each rank keeps its own; what an earlier run has left is removed. OSError: the folder cannot be used.
    """

    def __init__(self, recipe: Recipe, target: TargetBase, rank: int, world_size: int) -> None:
        output = Path(recipe.output.dir)
        root = Path(recipe.target.ring_dir or output) / f"ring-{hash63(str(output.resolve()).encode()):x}"
        self.target, self.folder = target, root / str(rank)
        for old in root.glob("[0-9]*"):
            if int(old.name) % world_size == rank:  # there may have been more ranks
                shutil.rmtree(old)
        self.folder.mkdir(parents=True)
        self._asked: dict[int, Batch] = {}  # sequences that the target is asked for, by their keys
        self.keeps = True  # whether the sequences of the next batch will come again

    def _path(self, key: int) -> Path:
        return self.folder / f"{key:016x}.safetensors"

    def expect(self, batches: Sequence[Batch]) -> None:
        """See `TargetBase`."""
        for batch in batches:
            for b, key in enumerate(batch["row_key"].tolist()):
                if key and key not in self._asked and not self._path(key).exists():  # 0: a sequence of no tokens
                    self._asked[key] = _alone(batch, b)
        self.target.expect([*self._asked.values()])

    def outputs(self, batch: Batch, head_rows: Tensor) -> TargetOutputs:
        """See `TargetBase`; zeros at padding. TargetLost: the files cannot be written."""
        shape, T, F = batch["input_ids"].shape, self.target.hidden_size, len(self.target.layer_ids)
        whole = [torch.zeros(*shape, w, dtype=self.target.dtype, device=head_rows.device) for w in (F * T, T)]
        for b, key in enumerate(batch["row_key"].tolist()):
            n = int((batch["document_ids"][b] >= 0).sum())
            if n == 0:
                continue
            if self._path(key).exists():
                stored = load_file(self._path(key))
                found = [stored[name] for name in FIELDS]
            else:  # asked for, unless it comes a second time at the end of a block
                row = self._asked.pop(key) if key in self._asked else _alone(batch, b)
                one = self.target.outputs(row, head_rows)
                found = [tensor[0, :n].to(self.target.dtype) for tensor in (one.features, one.last_hidden)]
                if self.keeps:
                    self._write(key, found)
            for tensor, part in zip(whole, found, strict=True):
                tensor[b, :n] = part
            if not self.keeps:
                self._path(key).unlink(missing_ok=True)
        return TargetOutputs(whole[0], whole[1], head_rows)

    def _write(self, key: int, tensors: list[Tensor]) -> None:
        try:
            put_tensors(self._path(key), dict(zip(FIELDS, tensors, strict=True)))
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)  # the checkpoint may need the room
            remedy = "give another folder as target.ring_dir"
            raise TargetLost(f"target.ring {self.folder} cannot be written: {one_line(error)}: {remedy}") from None

    def remove(self) -> None:
        """Remove this rank's files; nothing will read them again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other ranks' are there
            self.folder.parent.rmdir()


def _alone(batch: Batch, b: int) -> Batch:
    return {name: tensor[b : b + 1] for name, tensor in batch.items()}
