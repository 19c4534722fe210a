"""Documents side by side in a few flat tensors, in memory or mapped from files: millions of them cost no objects.

Shapes: n tokens and D documents, of one shard or of all of them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from peagle_train.data.row_encoder import EncodedRow

Shard = dict[str, Tensor]
"""input_ids int32 [n], loss_mask uint8 [n]; and of each document: lengths int32 [D], sources int32 [D] (which source of
the recipe it is from), keys uint8 [D, 32] (sha256 of its ids and mask)."""


def make_shard(rows: Sequence[EncodedRow], sources: Sequence[int]) -> Shard:
    """The rows side by side, in their order."""
    keys = np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, 32)
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)])),
        "loss_mask": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *(row.loss_mask for row in rows)])),
        "lengths": torch.tensor([row.input_ids.size for row in rows], dtype=torch.int32),
        "sources": torch.tensor(sources, dtype=torch.int32),
        "keys": torch.from_numpy(keys.copy()),
    }


class TokenStore:
    """Token ids and loss masks of all documents, one behind the other, in shards that no document crosses.

    Read from files, they are mapped into memory, and a copy of the store that goes to another process maps them again.
    """

    def __init__(self, shards: Iterable[tuple[Tensor, Tensor]], paths: Sequence[Path] = ()) -> None:
        """`shards`: (ids int32 [n], mask uint8 [n]) of each; `paths`: the files that they are in, if they are in any."""
        self.shards, self.paths = list(shards), list(paths)
        self.starts = [0]
        for ids, _ in self.shards:
            self.starts.append(self.starts[-1] + ids.numel())

    def piece(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """(ids int32, mask uint8), [length] each, of the tokens from `start` on; without a copy."""
        shard = bisect_right(self.starts, start) - 1
        first = start - self.starts[shard]
        ids, mask = self.shards[shard]
        assert first + length <= ids.numel(), "a piece crosses the end of its shard"
        return ids[first : first + length], mask[first : first + length]

    def __reduce__(self) -> Any:
        if self.paths:
            return _open_store, (self.paths,)
        return TokenStore, (self.shards,)


def _open_store(paths: Sequence[Path]) -> TokenStore:
    return DocumentTable.open(paths).store


@dataclass(frozen=True)
class DocumentTable:
    """Documents in order: what is known of each, and where its tokens are."""

    store: TokenStore
    """The tokens."""
    starts_D: np.ndarray
    """int64: a document's first token in the store."""
    lengths_D: np.ndarray
    """int64, each >= 1."""
    sources_D: np.ndarray
    """int32: which source of the recipe."""
    keys_D32: np.ndarray
    """uint8: sha256 of ids and mask."""

    @classmethod
    def of(cls, shards: Sequence[Shard], paths: Sequence[Path] = ()) -> "DocumentTable":
        """The documents of all shards."""

        def column(name: str, empty: Tensor) -> np.ndarray:
            return torch.cat([empty, *(shard[name] for shard in shards)]).numpy()

        lengths_D = column("lengths", torch.zeros(0, dtype=torch.int32)).astype(np.int64)
        return cls(
            TokenStore([(shard["input_ids"], shard["loss_mask"]) for shard in shards], paths),
            np.concatenate([np.zeros(1, np.int64), lengths_D.cumsum()])[:-1],
            lengths_D,
            column("sources", torch.zeros(0, dtype=torch.int32)),
            column("keys", torch.zeros((0, 32), dtype=torch.uint8)),
        )

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "DocumentTable":
        """Those of shards in files; the tokens are mapped, not read."""
        shards = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                shards.append({name: file.get_tensor(name) for name in file.keys()})
        return cls.of(shards, paths)

    def __len__(self) -> int:
        return len(self.lengths_D)
