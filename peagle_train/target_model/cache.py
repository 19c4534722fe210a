"""Features of the target on disk, and a target that reads them instead of computing. `cache_writer` makes the folder:

    cache.json              what the features are of, written first: `CacheIndex`, and a sha256 of it
    features-NNNNN.safetensors
                            features [n, 3T] and last_hidden [n, T] of whole pieces side by side; keys int64 [P, 2] and
                            lengths int64 [P] say which
    head.safetensors        the target's head and embeddings, [V, T] each
    *.sha256                the checksum of each .safetensors, written after it: one without is not there
    documents.jsonl         of a cache made from speculators' files: their samples as a data source

A *piece* is a document, or the part of one that a sequence holds; its features depend on its ids alone, so it is found by
their hash: sequences may be shuffled, masked and packed in another way.

T: the target's hidden size, V: its vocabulary, n: tokens, P: pieces, B: sequences of a batch, L: positions.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peagle_train.config import Target
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.packing import PackedRows, TrainingData
from peagle_train.data.vocab import load_config
from peagle_train.files import checksum, sha256_of
from peagle_train.target_model.frozen import FrozenTarget, TargetBase, default_layer_ids, target_fingerprint

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


def pieces_of(row: Mapping[str, Any]) -> list[slice]:
    """Positions of each piece of a sequence of `PackedRows`, in order."""
    counts = row["document_ids"].unique_consecutive(return_counts=True)[1].tolist()
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


class FeatureCache:
    """A whole folder, memory-mapped.

    Raises:
        ValueError: one line, for a folder that is no cache or not a whole one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            hint = " --speculators, as speculators wrote this one" if any(self.folder.glob("hs_*.safetensors")) else ""
            raise ValueError(
                f"target.cache {folder} has no {INDEX}: give a folder made by {COMMAND} RECIPE --out DIR{hint}"
            )
        self.index = index
        self.dtype: torch.dtype = getattr(torch, index.dtype)
        self.names = [HEAD, *map(shard_name, range(index.shards))]
        if missing := [name for name in self.names if not is_written(self.folder / name)]:
            raise ValueError(
                f"target.cache {folder} is not whole: {len(missing)} of {len(self.names)} files are missing, first"
                f" {missing[0]}: run the same {COMMAND} again, it resumes where it stopped"
            )
        self._files: dict[str, Any] = {}
        self._where: dict[Key, tuple[str, slice]] = {}  # of a piece: the shard, and its tokens there
        for name in self.names[1:]:
            try:
                keys, lengths = (self._open(name).get_tensor(field).tolist() for field in ("keys", "lengths"))
                ends = accumulate(lengths)
                for key, length, end in zip(keys, lengths, ends, strict=True):
                    self._where[tuple(key)] = name, slice(end - length, end)
            except (SafetensorError, TypeError, ValueError):
                raise self._damaged(name) from None

    def lacking(self, rows: PackedRows) -> list[int]:
        """Tokens of each piece of the sequences that the cache does not have."""
        found = ((row["input_ids"], part) for row in map(rows.__getitem__, range(len(rows))) for part in pieces_of(row))
        return [ids[part].numel() for ids, part in found if piece_key(ids[part]) not in self._where]

    def empty(self, *shape: int, pin: bool = False) -> dict[str, Tensor]:
        """Room for `FIELDS` of [*shape] tokens."""
        T = self.index.hidden_size
        widths = zip(FIELDS, (3 * T, T), strict=True)
        return {name: torch.empty(*shape, width, dtype=self.dtype, pin_memory=pin) for name, width in widths}

    def read(self, row: Mapping[str, Any], out: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """`FIELDS` of a sequence's n tokens, [n, 3T] and [n, T]; `out`: where to put them, in the first n places."""
        if out is None:
            out = self.empty(row["input_ids"].numel())
        for part in pieces_of(row):
            shard, tokens = self._where[piece_key(row["input_ids"][part])]
            assert tokens.stop - tokens.start == part.stop - part.start, "two pieces have one key"
            for name in FIELDS:
                out[name][part] = self._open(shard).get_slice(name)[tokens]
        return out

    def head_tensor(self, name: str) -> Tensor:
        """ "head" or "embeddings", [V, T], in the target's dtype."""
        return self._open(HEAD).get_tensor(name)

    def verify(self) -> None:
        """Compare every file's checksum, shared out among the processes of this machine; ValueError names a damaged one."""
        rank, size = (
            int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        if rank == 0:
            total = sum((self.folder / name).stat().st_size for name in self.names)
            logger.warning("target.cache: reading %.2f GiB once to see that they are whole", total / 2**30)
        names = self.names[rank::size]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter
            for name, damaged in zip(names, pool.map(is_damaged, map(self.folder.joinpath, names)), strict=True):
                if damaged:
                    raise self._damaged(name)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(name) from error
        return self._files[name]

    def _damaged(self, name: str) -> ValueError:
        return ValueError(
            f"target.cache {self.folder}: {name} is not what was written (cut or edited): run the same {COMMAND} again,"
            " which replaces it"
        )


class StoredTarget(TargetBase):
    """A target that answers from `target.cache`: its layers are never loaded, its head stays on the disk until its rows
    are asked for. Batches must be of sequences that `check_rows` has seen, or bring features of their own.

    Every file is read once and compared with its checksum: cheap beside a run that learns from wrong numbers, so
    target.check does not turn it off.

    Args:
        target: the recipe's section. device: that the outputs are for.

    Raises:
        ValueError: one line, where the cache is damaged, or of another target or other settings.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        assert target.cache is not None
        self.settings, self.cache = target, FeatureCache(target.cache)
        index = self.cache.index
        if target_fingerprint(target.path) != index.target:
            raise ValueError(
                f"target.cache {target.cache} is of another target than {target.path} (config or weights differ): {AGAIN}"
            )
        self.config = load_config(target.path, target.trust_remote_code).get_text_config()
        self.layer_ids, self.vocab_size = list(index.layer_ids), index.vocab_size
        for key, asked, has in (
            ("layer_ids", target.layer_ids or default_layer_ids(self.num_layers), index.layer_ids),
            ("cache_dtype", target.cache_dtype, index.dtype),
            ("dtype", target.dtype, index.computed_in),
        ):
            if asked not in ("auto", has):
                raise ValueError(f"target.cache {target.cache} is of {key} {has}, the recipe asks for {asked}: {AGAIN}")
        self.cache.verify()
        self.dtype = getattr(torch, index.computed_in)
        self._head: Tensor | None = None
        self._pin = device.type == "cuda"  # read into page-locked memory
        self._reader = ThreadPoolExecutor(1)
        self._coming: dict[int, tuple[dict[str, Tensor], Future[dict[str, Tensor]]]] = {}  # by the batch's id

    def cache_dtype(self, asked: str) -> torch.dtype:
        return self.cache.dtype

    def check_rows(self, data: TrainingData) -> None:
        for name, rows in {"data.sources": data.train_rows, "held-out sequences": data.eval_rows}.items():
            if lacking := self.cache.lacking(rows):
                raise ValueError(
                    f"target.cache {self.cache.folder} lacks {len(lacking)} pieces of the {name}, the longest of"
                    f" {max(lacking)} tokens (it was made with data.max_length {self.cache.index.max_length}): {AGAIN}"
                )

    def eos_token_ids(self) -> list[int]:
        return self.cache.index.eos_token_ids

    def embedding_rows(self) -> Tensor:
        return self.cache.head_tensor("embeddings")

    def head_weight(self) -> Tensor:
        if self._head is None:
            self._head = self.cache.head_tensor("head")
        return self._head

    def final_norm(self) -> nn.Module:
        """That of the target, which is loaded for it."""
        return FrozenTarget.from_recipe(self.settings, torch.device("cpu")).final_norm()

    def expect(self, batch: dict[str, Tensor]) -> None:
        if FIELDS[0] not in batch:
            # Allocated here: page-locked memory belongs to the device of the thread that asks for it.
            room = self.cache.empty(*batch["input_ids"].shape, pin=self._pin)
            self._coming[id(batch)] = batch, self._reader.submit(self._read, batch, room)

    def _read(self, batch: dict[str, Tensor], room: dict[str, Tensor]) -> dict[str, Tensor]:
        for b, documents in enumerate(batch["document_ids"]):
            n = int((documents >= 0).sum())
            row = {name: batch[name][b, :n] for name in ("input_ids", "document_ids")}
            self.cache.read(row, {name: tensor[b] for name, tensor in room.items()})
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
