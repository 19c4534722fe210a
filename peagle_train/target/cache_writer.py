"""Writing a folder of `feature_cache`: what goes into which shard is a function of the rows alone, so that any number of
processes, killed and started again as often as one likes, write the same bytes.

T: the target's hidden size, n: tokens.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.durable import partial_path, put, write_json
from peagle_train.target.feature_cache import (
    HEAD,
    INDEX,
    VERSION,
    CacheIndex,
    Key,
    checksum_path,
    dump_index,
    is_damaged,
    piece_key,
    pieces_of,
    read_index,
    sha256_of,
    shard_name,
)

logger = logging.getLogger(__name__)
Row = dict[str, Any]
Compute = Callable[[Row], tuple[Tensor, Tensor]]
"""A row's features [n, 3T] and last hidden states [n, T], for all its tokens, on any device."""


@dataclass
class PlannedShard:
    """Pieces that are written together."""

    rows: list[tuple[int, list[slice]]] = field(default_factory=list)
    """Which row, and which of its columns: pieces that no earlier row has."""
    keys: list[Key] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def plan_shards(rows: Iterable[Row], shard_tokens: int) -> list[PlannedShard]:
    """Every piece once, in the order of the rows; a shard ends behind the row that fills it."""
    shards, seen, filled = [PlannedShard()], set(), 0
    for number, row in enumerate(rows):
        new = []
        for part in pieces_of(row):
            key = piece_key(row["input_ids"][part])
            if key not in seen:
                seen.add(key)
                new.append((key, part))
        if not new:
            continue
        if filled >= shard_tokens:
            shards.append(PlannedShard())
            filled = 0
        shards[-1].rows.append((number, [part for _, part in new]))
        shards[-1].keys += [key for key, _ in new]
        shards[-1].lengths += [part.stop - part.start for _, part in new]
        filled += sum(part.stop - part.start for _, part in new)
    return shards if shards[0].rows else []


def make_index(shards: Sequence[PlannedShard], **target: Any) -> CacheIndex:
    """`target`: the fields of `CacheIndex` that say what the features are of."""
    plan = hashlib.sha256()
    for shard in shards:
        plan.update(repr((shard.keys, shard.lengths)).encode())
    pieces, tokens = sum(len(s.keys) for s in shards), sum(s.tokens for s in shards)
    return CacheIndex(
        version=VERSION, shards=len(shards), tokens=tokens, pieces=pieces, plan=plan.hexdigest(), **target
    )


class CacheWriter:
    """Writes the shards of one process.

    Args:
        folder: made if missing; may hold the same cache, whole or in part. index: see `make_index`. shards: the plan.
        rank, world_size: this process and their number; shard i is written by rank i % world_size.
    """

    def __init__(
        self, folder: Path, index: CacheIndex, shards: Sequence[PlannedShard], rank: int = 0, world_size: int = 1
    ) -> None:
        self.folder, self.index, self.shards, self.rank, self.world_size = folder, index, shards, rank, world_size
        self.dtype: torch.dtype = getattr(torch, index.dtype)

    def claim(self, head_bytes: int) -> str:
        """Make the folder this cache's, and say in one line what is to do; rank 0 alone calls it.

        Raises:
            ValueError: the folder holds something else, or the disk has too little room.
        """
        old = read_index(self.folder) if self.folder.exists() else None
        if old is not None and old != self.index:
            names = [name for name, value in asdict(self.index).items() if getattr(old, name) != value]
            raise ValueError(
                f"--out {self.folder} holds the cache of another target, other rows or other settings"
                f" ({', '.join(names)} differ): give another folder, or remove it"
            )
        if old is None and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"--out {self.folder} is not empty and holds no cache; give another folder")
        todo = [s for i, s in enumerate(self.shards) if not self._is_written(shard_name(i))]
        per_token = 4 * self.index.hidden_size * self.dtype.itemsize
        needed = sum(s.tokens * per_token + 24 * len(s.keys) + 4096 for s in todo)
        needed += 0 if self._is_written(HEAD) else head_bytes + 4096
        free = _free_bytes(self.folder)
        words = (
            f"{self.index.tokens} tokens of {self.index.pieces} pieces at {per_token} bytes ({self.index.dtype}):"
            f" {needed / 2**30:.2f} GiB to write in {len(todo)} of {len(self.shards)} shards, {free / 2**30:.2f} GiB free"
        )
        if needed > free:
            raise ValueError(
                f"--out {self.folder} has too little room: {words}; give a folder on another disk,"
                " target.cache_dtype=bfloat16, or fewer documents (data.max_documents)"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if old is None:
                write_json(self.folder / INDEX, dump_index(self.index))
        except OSError as error:
            raise ValueError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        return words

    def write_head(self, head: Callable[[], Tensor], embeddings: Callable[[], Tensor]) -> None:
        """The target's head and embeddings, [V, T]; rank 0 alone calls it."""
        if not self._is_whole(HEAD):
            tensors = {"head": head(), "embeddings": embeddings()}
            # Copies: of tied weights safetensors would see one tensor under two names.
            self._write(HEAD, {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})

    def write_shards(self, row_of: Callable[[int], Row], compute: Compute, done: Callable[[int], None]) -> None:
        """Compute and write this process's shards that are missing or damaged; `done` is told the tokens of each.

        Holds one shard's tensors, and a copy while they are written.
        """
        T = self.index.hidden_size
        for number, shard in list(enumerate(self.shards))[self.rank :: self.world_size]:
            if not self._is_whole(shard_name(number)):
                features = torch.empty(shard.tokens, 3 * T, dtype=self.dtype)
                last_hidden = torch.empty(shard.tokens, T, dtype=self.dtype)
                at = 0
                for index, parts in shard.rows:
                    row_features, row_last = compute(row_of(index))
                    for part in parts:
                        end = at + part.stop - part.start
                        features[at:end], last_hidden[at:end] = row_features[part], row_last[part]
                        at = end
                assert at == shard.tokens, "the plan and the rows differ"
                if not bool(features.isfinite().all() & last_hidden.isfinite().all()):
                    raise ValueError(
                        f"the target's features of rows {shard.rows[0][0]} to {shard.rows[-1][0]} are not all finite in"
                        f" {self.index.dtype}: give another target.cache_dtype or target.dtype"
                    )
                keys, lengths = torch.tensor(shard.keys), torch.tensor(shard.lengths)
                tensors = {"features": features, "last_hidden": last_hidden, "keys": keys, "lengths": lengths}
                self._write(shard_name(number), tensors)
            done(shard.tokens)

    def _is_whole(self, name: str) -> bool:
        """Whether an earlier run has written the file, and it is still that; reads all of it. A damaged one is removed."""
        if not self._is_written(name):
            return False
        path = self.folder / name
        if is_damaged(path):
            logger.warning("--out %s: %s is not what was written (cut or edited): written anew", self.folder, name)
            try:
                checksum_path(path).unlink()
                path.unlink()
            except OSError as error:
                raise ValueError(f"--out {self.folder}: {name} cannot be removed: {error.strerror}") from error
            return False
        return True

    def _is_written(self, name: str) -> bool:
        return (self.folder / name).exists() and checksum_path(self.folder / name).exists()

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.folder / name
        partial, checksum = partial_path(path), partial_path(checksum_path(path))
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
            checksum.write_text(f"{sha256_of(partial)}  {name}\n", encoding="ascii")
            put(partial, path)
            put(checksum, checksum_path(path))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"--out {self.folder}: {name} cannot be written ({error}): make room and run the same line again, it goes"
                " on where it stopped"
            ) from error


def _free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder that may not exist yet."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free
