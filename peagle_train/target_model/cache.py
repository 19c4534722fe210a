"""Features of the target on disk, and a target that reads them instead of computing. `cache_writer` makes the folder:

    cache.json              what the features are of, written first: `CacheIndex`, and a sha256 of it
    features-NNNNN.safetensors
                            features [n, 3T] and last_hidden [n, T] of whole pieces side by side; keys int64 [P, 2] and
                            lengths int64 [P] say which
    head.safetensors        the target's head and embeddings, [V, T] each
    *.sha256                the checksum of each .safetensors, written after it: a file without one is unfinished
    documents.jsonl         of a cache made from speculators' files: their samples as a source for training

A *piece* is a document, or the part of one that a sequence holds; its features depend on its ids alone, so it is found by
their hash: sequences may be shuffled, masked and packed in another way.

T: the target's hidden size, V: its vocabulary, n: tokens, P: pieces, B: sequences of a batch, L: positions.
"""

import hashlib
import json
import logging
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from peagle_train.config import Target
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.packing import TrainingData
from peagle_train.data.vocab import load_config
from peagle_train.distributed import wait_for_all
from peagle_train.files import checksum, sha256_of
from peagle_train.machine import cores
from peagle_train.target_model.frozen import FrozenTarget, TargetBase
from peagle_train.target_model.loading import default_layer_ids, target_fingerprint

logger = logging.getLogger(__name__)

INDEX, HEAD, VERSION = "cache.json", "head.safetensors", 2
COMMAND = "peagle-train cache"
AGAIN = f"make the cache again with {COMMAND}, or change the recipe"
FIELDS = ("features", "last_hidden")
"""Of a sequence's tokens: bit for bit what the target gave, in the cache's dtype."""
Key = tuple[int, int]


@dataclass(frozen=True)
class CacheIndex:
    """What the features of a folder are of."""

    version: int
    target: str  # `target_fingerprint`
    layer_ids: list[int]
    hidden_size: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str  # of features and last hidden states on disk
    computed_in: str  # the target's own dtype
    # These two move roundings, so that one folder has one of each; training may name others. null for speculators' files.
    chunk_tokens: int | None
    attn_implementation: str | None
    max_length: int  # data.max_length: says why pieces may be missing
    source: str  # "recipe" or "speculators"
    shards: int
    tokens: int
    pieces: int
    plan: str  # sha256 over keys and lengths of all pieces and where each shard ends


def read_index(folder: Path) -> CacheIndex | None:
    """A folder's index; None if it has none; ValueError for one that is no index of this version."""
    where = f"target.cache {folder}: {INDEX}"
    try:
        raw = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError(
                f"{where} is of format {raw['version']}, this reads format {VERSION}: make the cache again with {COMMAND},"
                " in another folder or after removing this one"
            )
        if raw.pop("sha256") == checksum(raw):
            return CacheIndex(**raw)
        reason = "its sha256 differs"
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, RecursionError) as error:
        reason = type(error).__name__
    raise ValueError(f"{where} is not what was written ({reason}): make the cache with {COMMAND} in another folder")


def piece_key(ids_n: Tensor) -> Key:
    """128 bits of the sha256 of a piece's ids: the same on every machine."""
    digest = hashlib.sha256(ids_n.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()).digest()
    return struct.unpack("<qq", digest[:16])


def pieces_of(document_ids: Tensor) -> list[slice]:
    """Positions of each piece of a sequence without padding, in order."""
    counts = document_ids.unique_consecutive(return_counts=True)[1].tolist()
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts)]


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def is_written(path: Path) -> bool:
    return path.exists() and checksum_path(path).exists()


def is_damaged(path: Path) -> bool:
    """Whether a file is not what its checksum says, or cannot be read."""
    try:
        return checksum_path(path).read_text(encoding="ascii", errors="replace").split()[:1] != [sha256_of(path)]
    except OSError:
        return True


class StoredTarget(TargetBase):
    """A target that answers from `target.cache`, memory-mapped: its layers are never loaded, its head stays on the disk
    until its rows are asked for. Batches must be of sequences that `check_rows` has seen, or bring features of their own.

    Every file is read once and compared with its checksum: cheap beside a run that learns from wrong numbers, so
    target.check does not turn it off.

    Args:
        settings: the recipe's section. device: that the outputs are for.

    Raises:
        ValueError: one line, for a folder that is no whole cache of this target in these settings.
    """

    def __init__(self, settings: Target, device: torch.device) -> None:
        assert settings.cache is not None
        self.settings, self.folder = settings, Path(settings.cache)
        index = read_index(self.folder)
        if index is None:
            hint = " --speculators, as speculators wrote this one" if any(self.folder.glob("hs_*.safetensors")) else ""
            raise ValueError(
                f"target.cache {self.folder} has no {INDEX}: give a folder made by {COMMAND} RECIPE --out DIR{hint}"
            )
        names = [HEAD, *map(shard_name, range(index.shards))]
        if missing := [name for name in names if not is_written(self.folder / name)]:
            raise ValueError(
                f"target.cache {self.folder} is not whole: {len(missing)} of {len(names)} files are missing, first"
                f" {missing[0]}: run the same {COMMAND} again, it resumes where it stopped"
            )
        if target_fingerprint(settings.path) != index.target:
            raise ValueError(
                f"target.cache {self.folder} is of another target than {settings.path} (config or weights differ): {AGAIN}"
            )
        self.config = load_config(settings.path, settings.trust_remote_code).get_text_config()
        for key, asked, has in (
            ("layer_ids", settings.layer_ids or default_layer_ids(self.num_layers), index.layer_ids),
            ("cache_dtype", settings.cache_dtype, index.dtype),
            ("dtype", settings.dtype, index.computed_in),
        ):
            if asked not in ("auto", has):
                raise ValueError(f"target.cache {self.folder} is of {key} {has}, the recipe asks for {asked}: {AGAIN}")
        self._verify(names)
        self.index, self.layer_ids, self.vocab_size = index, list(index.layer_ids), index.vocab_size
        self.dtype, self._stored = getattr(torch, index.computed_in), getattr(torch, index.dtype)
        self._tables, *files = (safe_open(self.folder / name, framework="pt") for name in names)
        self._head: Tensor | None = None
        self._where: dict[Key, tuple[Any, slice]] = {}  # of a piece: the file, and its tokens there
        for file in files:
            keys, lengths = (file.get_tensor(field).tolist() for field in ("keys", "lengths"))
            for key, length, end in zip(keys, lengths, accumulate(lengths), strict=True):
                self._where[tuple(key)] = file, slice(end - length, end)
        self._pin = device.type == "cuda"  # read into page-locked memory
        self._reader = ThreadPoolExecutor(1)
        self._coming: dict[int, tuple[dict[str, Tensor], Future[dict[str, Tensor]]]] = {}  # by the batch's id

    def _verify(self, names: list[str]) -> None:
        """Compare checksums, shared out among the processes of this machine."""
        rank, size = (
            int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        if rank == 0:
            total = sum((self.folder / name).stat().st_size for name in names)
            logger.warning("target.cache: reading %.2f GiB once to see that they are whole", total / 2**30)
        names = names[rank::size]
        with ThreadPoolExecutor(min(8, cores())) as pool:  # hashlib lets go of the interpreter
            for name, damaged in zip(names, pool.map(is_damaged, map(self.folder.joinpath, names)), strict=True):
                if damaged:
                    raise ValueError(
                        f"target.cache {self.folder}: {name} is not what was written (cut or edited): run the same"
                        f" {COMMAND} again, which replaces it"
                    )
        wait_for_all()  # a damaged file may be in another process's share

    def cache_dtype(self, asked: str) -> torch.dtype:
        return self._stored

    def check_rows(self, data: TrainingData) -> None:
        for name, rows in {"data.sources": data.train_rows, "held-out sequences": data.eval_rows}.items():
            each = (rows[i] for i in range(len(rows)))
            pieces = (row["input_ids"][part] for row in each for part in pieces_of(row["document_ids"]))
            if lacking := [ids_n.numel() for ids_n in pieces if piece_key(ids_n) not in self._where]:
                raise ValueError(
                    f"target.cache {self.folder} lacks {len(lacking)} pieces of the {name}, the longest of {max(lacking)}"
                    f" tokens (it was made with data.max_length {self.index.max_length}): {AGAIN}"
                )

    def eos_token_ids(self) -> list[int]:
        return self.index.eos_token_ids

    def embedding_rows(self) -> Tensor:
        return self._tables.get_tensor("embeddings")

    def head_weight(self) -> Tensor:
        if self._head is None:
            self._head = self._tables.get_tensor("head")
        return self._head

    def final_norm(self) -> nn.Module:
        """That of the target, which is loaded for it."""
        return FrozenTarget.from_recipe(self.settings, torch.device("cpu")).final_norm()

    def expect(self, batch: dict[str, Tensor]) -> None:
        if FIELDS[0] not in batch:
            shape, T = batch["input_ids"].shape, self.hidden_size
            # Allocated here: page-locked memory belongs to the device of the thread that asks for it.
            room = {
                name: torch.empty(*shape, width, dtype=self._stored, pin_memory=self._pin)
                for name, width in zip(FIELDS, (3 * T, T), strict=True)
            }
            self._coming[id(batch)] = batch, self._reader.submit(self.read, batch, room)

    def read(self, batch: dict[str, Tensor], room: dict[str, Tensor]) -> dict[str, Tensor]:
        """`FIELDS` of a batch, [B, L, 3T] and [B, L, T], in `room`; padding gets zeros."""
        for b, documents in enumerate(batch["document_ids"]):
            ids, n = batch["input_ids"][b], int((documents >= 0).sum())
            for part in pieces_of(documents[:n]):
                file, tokens = self._where[piece_key(ids[part])]
                assert tokens.stop - tokens.start == part.stop - part.start, "two pieces have one key"
                for name in FIELDS:
                    room[name][b, part] = file.get_slice(name)[tokens]
            for tensor in room.values():
                tensor[b, n:] = 0
        return room

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        """What the cache has for the batch, in the dtype in which the target computed."""
        if id(batch) not in self._coming:
            self.expect(batch)
        known = batch if FIELDS[0] in batch else self._coming.pop(id(batch))[1].result()
        features, last_hidden = (known[n].to(head_rows.device, head_rows.dtype, non_blocking=True) for n in FIELDS)
        return TargetOutputs(features, last_hidden, head_rows)
