"""From a recipe to a whole folder of features: what peagle-train cache does."""

import hashlib
import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from peagle_train.config import Recipe, Target, as_override
from peagle_train.core.segments import TargetOutputs
from peagle_train.data.packing import PackedRows
from peagle_train.data.training_data import (
    TrainingData,
    choose_mask_token,
    load_tokenizer,
    load_training_data,
    make_collator,
)
from peagle_train.distributed import check_device, check_device_map, check_launch, from_all
from peagle_train.files import alone_in, partial_path, put, write_json
from peagle_train.target_model.check import relative
from peagle_train.target_model.frozen import FrozenTarget, TargetBase, default_layer_ids

# ---- feature_cache
# Features of the target on disk, and how training reads them.
#
# A folder holds
#     cache.json              what the features are of, written first: `CacheIndex`
#     features-NNNNN.safetensors
#                             features [n, 3T] and last_hidden [n, T] of whole pieces side by side; keys int64 [P, 2] and
#                             lengths int64 [P] say which
#     features-NNNNN.sha256   that file's checksum, written after it: a shard without one is not there
#     head.safetensors        the target's head [V, T] and embeddings [V, T], and its .sha256
# A *piece* is a document, or the part of one that a row holds; its features depend on its ids alone, so it is found
# by their
# hash: rows may be shuffled, masked and packed in another way. T: the target's hidden size, n: tokens, P: pieces.

INDEX, HEAD, VERSION = "cache.json", "head.safetensors", 2
FIELDS = ("features", "last_hidden")
"""Of a row's tokens: bit for bit what the target gave, in the cache's dtype."""
Key = tuple[int, int]


@dataclass(frozen=True)
class CacheIndex:
    """What the features of a folder are of."""

    version: int
    target: str
    """`fingerprint` of the target's folder."""
    layer_ids: list[int]
    """The layers whose input the features are."""
    hidden_size: int
    """T."""
    vocab_size: int
    """V, of the target."""
    eos_token_ids: list[int]
    """What ends the target's answers."""
    dtype: str
    """Of features and last hidden states on disk."""
    computed_in: str
    """The target's own dtype."""
    chunk_tokens: int | None
    """target.chunk_tokens. Like the next one it moves roundings, so that one folder has one; training may name others."""
    attn_implementation: str | None
    """transformers' attention that the target ran with; both null for what was read from speculators' files."""
    max_length: int
    """data.max_length of the rows that were run: says why pieces may be missing."""
    source: str
    """"recipe", or "speculators" for what was read from its files."""
    shards: int
    tokens: int
    pieces: int
    plan: str
    """sha256 over keys and lengths of all pieces and where each shard ends."""


def piece_key(ids_n: Tensor) -> Key:
    """128 bits of the sha256 of a piece's ids: the same on every machine."""
    digest = hashlib.sha256(ids_n.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()).digest()
    return struct.unpack("<qq", digest[:16])


def pieces_of(row: Mapping[str, Any]) -> list[slice]:
    """Columns of each piece of a row of `PackedRows`, in order."""
    counts = row["document_ids"].unique_consecutive(return_counts=True)[1].tolist()
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts)]


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_damaged(path: Path) -> bool:
    """Whether a file is not what its checksum says; ValueError where the disk does not give it."""
    try:
        return checksum_path(path).read_text(encoding="ascii", errors="replace").split()[:1] != [sha256_of(path)]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def fingerprint(folder: str) -> str:
    """sha256 over config.json (without the version of transformers that wrote it) and, of every .safetensors file: name,
    size, header, and 256 blocks of 4 KiB spread evenly over the rest.

    Cheap on the largest target. Training changes nearly every weight, so that another training of the same model shows;
    an edit of a few numbers may fall between the blocks.
    """
    total = hashlib.sha256()
    root = Path(folder)
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
        config.pop("transformers_version", None)
        total.update(json.dumps(config, sort_keys=True).encode())
        for path in sorted(root.glob("*.safetensors")):
            size = path.stat().st_size
            total.update(f"{path.name},{size},".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                total.update(file.read(min(length, size)))
                for i in range(256):
                    file.seek(8 + length + max(0, size - 8 - length - 4096) * i // 255)
                    total.update(file.read(4096))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"target.path {folder} cannot be read: {error}") from error
    return total.hexdigest()


def read_index(folder: Path) -> CacheIndex | None:
    """A folder's index; None if it has none; ValueError for one that is no index of this version."""
    try:
        raw = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"target.cache {folder}: {INDEX} cannot be read ({error}): make the cache again") from error
    names = {field.name for field in fields(CacheIndex)}
    claimed = raw.pop("sha256", None) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or raw.get("version") != VERSION or raw.keys() != names:
        given = raw.get("version") if isinstance(raw, dict) else "none"
        raise ValueError(
            f"target.cache {folder} is of format {given}, this reads format {VERSION}: make the cache again with"
            " peagle-train cache, in another folder or after removing this one"
        )
    if claimed != _sum(raw):
        raise ValueError(
            f"target.cache {folder}: {INDEX} is not as it was written: make the cache again in another folder"
        )
    return CacheIndex(**raw)


def dump_index(index: CacheIndex) -> dict[str, Any]:
    """What the file holds: all fields, and a checksum of them."""
    content = asdict(index)
    return {**content, "sha256": _sum(content)}


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """A whole folder, memory-mapped.

    Raises:
        ValueError: one line, for a folder that is no cache or not a whole one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"target.cache {folder} is no folder: make it with peagle-train cache RECIPE --out DIR")
        index = read_index(self.folder)
        if index is None:
            hint = ""
            if any(self.folder.glob("hs_*.safetensors")):
                hint = f" (speculators wrote it: peagle-train cache RECIPE --speculators {folder} --out DIR reads it)"
            raise ValueError(f"target.cache {folder} has no {INDEX}{hint}: give a folder of peagle-train cache")
        self.index = index
        self.names = [HEAD, *map(shard_name, range(index.shards))]
        missing = [n for n in self.names if not self._path(n).exists() or not checksum_path(self._path(n)).exists()]
        if missing:
            raise ValueError(
                f"target.cache {folder} is not whole: {len(missing)} of {len(self.names)} files are missing, first"
                f" {missing[0]}: run the same peagle-train cache again, it goes on where it stopped"
            )
        self._handles: dict[str, Any] = {}
        self._where: dict[Key, tuple[int, int, int]] = {}  # piece: shard, first token, length
        for shard in range(index.shards):
            handle = self._open(shard_name(shard))
            try:
                pieces = list(
                    zip(handle.get_tensor("keys").tolist(), handle.get_tensor("lengths").tolist(), strict=True)
                )
            except (SafetensorError, ValueError):
                raise self._damaged(shard_name(shard)) from None
            start = 0
            for key, length in pieces:
                self._where[tuple(key)] = (shard, start, length)
                start += length

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.index.dtype)

    def missing(self, rows: PackedRows) -> tuple[int, int, int]:
        """(pieces of the rows, those that the cache lacks, tokens of the longest one that it lacks)."""
        total = lacking = longest = 0
        for i in range(len(rows)):
            row = rows[i]
            for part in pieces_of(row):
                total += 1
                if piece_key(row["input_ids"][part]) not in self._where:
                    lacking, longest = lacking + 1, max(longest, part.stop - part.start)
        return total, lacking, longest

    def read(self, row: Mapping[str, Any], out: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """`FIELDS` of a row's n tokens, [n, 3T] and [n, T]; `out`: where to put them, in the first n places."""
        if out is None:
            T, n = self.index.hidden_size, row["input_ids"].numel()
            widths = zip(FIELDS, (3 * T, T), strict=True)
            out = {name: torch.empty(n, width, dtype=self.dtype) for name, width in widths}
        for part in pieces_of(row):
            shard, start, length = self._where[piece_key(row["input_ids"][part])]
            assert length == part.stop - part.start, "two pieces have one key"
            handle = self._open(shard_name(shard))
            for name in FIELDS:
                out[name][part] = handle.get_slice(name)[start : start + length]
        return out

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every file of this process's share and compare checksums; ValueError names the first that differs."""

        names = self.names[share::shares]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter
            bad = [
                name for name, wrong in zip(names, pool.map(is_damaged, map(self._path, names)), strict=True) if wrong
            ]
        if bad:
            raise self._damaged(bad[0])

    def head_tensor(self, name: str) -> Tensor:
        """ "head" or "embeddings", [V, T], in the target's dtype."""
        return self._open(HEAD).get_tensor(name)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _open(self, name: str) -> Any:
        if name not in self._handles:
            try:
                self._handles[name] = safe_open(self._path(name), framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(name) from error
        return self._handles[name]

    def _damaged(self, name: str) -> ValueError:
        return ValueError(
            f"target.cache {self.folder}: {name} is not what was written (cut or edited): run the same"
            " peagle-train cache again, which writes it anew"
        )


# ---- cached_target
# A target whose features are on disk: what training needs of it, without its body.

logger = logging.getLogger(__name__)
AGAIN = "make the cache again with peagle-train cache, or change the recipe"


class CachedTarget(TargetBase):
    """A target that answers from a `FeatureCache`: its layers are never loaded, its head stays on the disk until its rows
    are asked for. Batches must be of rows that `check_rows` has seen, or bring features of their own.

    Args:
        cache: whole. config: the target's. pin: read into page-locked memory, for a CUDA device.
    """

    def __init__(self, cache: FeatureCache, config: Any, pin: bool = False) -> None:
        self.cache = cache
        self.config = config.get_text_config()
        self.layer_ids = list(cache.index.layer_ids)
        self._head: Tensor | None = None
        self._pin = pin
        self._reader = ThreadPoolExecutor(1)
        self._coming: dict[int, tuple[dict[str, Tensor], Future[dict[str, Tensor]]]] = {}  # by the batch's id

    @classmethod
    def opener(cls, target: Target) -> Callable[..., "CachedTarget"]:
        """A function that takes what `FrozenTarget.load` takes and opens the recipe's cache."""
        assert target.cache is not None
        return partial(cls.open, cache=target.cache, cache_dtype=target.cache_dtype)

    @classmethod
    def open(
        cls,
        path: str,
        *,
        cache: str,
        cache_dtype: str = "auto",
        dtype: str = "auto",
        device: torch.device | None = None,
        layer_ids: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        **unused: Any,
    ) -> "CachedTarget":
        """Open a cache and compare it with the target's folder and settings; ValueError, one line, where they differ."""
        opened = FeatureCache(cache)
        index = opened.index
        if fingerprint(path) != index.target:
            raise ValueError(
                f"target.cache {cache} is of another target than {path} (config or weights differ): {AGAIN}"
            )
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        wanted = list(layer_ids) if layer_ids else default_layer_ids(config.get_text_config().num_hidden_layers)
        if wanted != index.layer_ids:
            raise ValueError(f"target.cache {cache} holds layers {index.layer_ids}, the recipe wants {wanted}: {AGAIN}")
        if cache_dtype not in ("auto", index.dtype):
            raise ValueError(
                f"target.cache {cache} is in {index.dtype}, target.cache_dtype is {cache_dtype}: {AGAIN}, as with"
                " target.cache_dtype=auto"
            )
        if dtype not in ("auto", index.computed_in):
            raise ValueError(
                f"target.cache {cache} was computed in {index.computed_in}, target.dtype is {dtype}: {AGAIN}, as with"
                " target.dtype=auto"
            )
        return cls(opened, config, pin=device is not None and device.type == "cuda")

    def check_rows(self, data: TrainingData) -> None:
        """ValueError if the cache lacks some of the rows' features."""
        rows = {"data.sources": data.train_rows, "held-out rows": data.eval_rows}
        for name, part in rows.items():
            total, lacking, longest = self.cache.missing(part)
            if lacking:
                raise ValueError(
                    f"target.cache {self.cache.folder} lacks {lacking} of {total} pieces of the {name}, the longest of"
                    f" {longest} tokens (it was made of {self.cache.index.pieces} pieces with data.max_length"
                    f" {self.cache.index.max_length}): {AGAIN}"
                )

    @property
    def vocab_size(self) -> int:
        return self.cache.index.vocab_size

    def embedding_rows(self) -> Tensor:
        return self.cache.head_tensor("embeddings")

    def head_weight(self) -> Tensor:
        if self._head is None:
            self._head = self.cache.head_tensor("head")
        return self._head

    def eos_token_ids(self) -> list[int]:
        return self.cache.index.eos_token_ids

    def expect(self, batch: dict[str, Tensor]) -> None:
        if FIELDS[0] in batch:
            return
        B, L = batch["input_ids"].shape
        T = self.hidden_size
        # Allocated here: page-locked memory belongs to the device of the thread that asks for it.
        room = {
            name: torch.empty(B, L, width, dtype=self.cache.dtype, pin_memory=self._pin)
            for name, width in zip(FIELDS, (3 * T, T), strict=True)
        }
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

    def check(self) -> None:
        """Compare every file's checksum, shared out among the processes of this machine; ValueError names a damaged one.

        Cheap beside a run that learns from wrong numbers, so target.check does not turn it off.
        """
        size = sum(path.stat().st_size for path in self.cache.folder.glob("*.safetensors")) / 2**30
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank == 0:
            logger.warning("target.cache: reading %.2f GiB once to see that they are whole", size)
        self.cache.verify(rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# ---- cache_writer
# Writing a folder of `feature_cache`: what goes into which shard is a function of the rows alone, so that any number of
# processes, killed and started again as often as one likes, write the same bytes.
#
# T: the target's hidden size, n: tokens.

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


# ---- speculators_files
# Hidden states that speculators (vllm-project) has written for offline training, as rows and features.
#
# Its folder holds hs_{i}.safetensors, one a sample i, with `token_ids` [n] and `hidden_states` [n, 4, T]: three layers and
# what enters the target's final norm. The loss mask is in the data set next to it (Arrow, written by `datasets`): row i has
# `loss_mask` [n] and the same tokens as `input_ids`. T: the target's hidden size, n: tokens.

DOCUMENTS = "documents.jsonl"
"""In the folder that is written: the samples as a data source."""


class SpeculatorsFiles:
    """Each file is a row of one document, in the order of i.

    Args:
        folder: of hs_{i}.safetensors, or the one above its `hidden_states`.
        target: the target that they are said to be of. max_length: of a row; a longer sample is a ValueError.

    Raises:
        ValueError: one line, for files that are something else, and for features that the target does not give.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder)
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        numbered = {int(p.stem[3:]): p for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit()}
        if not numbered:
            raise ValueError(
                f"--speculators {folder} holds no hs_NUMBER.safetensors: give the folder that speculators wrote"
            )
        self.target, self.max_length = target, max_length
        self.samples = sorted(numbered.items())
        self.data_set = _data_set(root)
        self.last_is_normed = self._compare_with_target()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        ids, mask = self._read(path, ["token_ids", "loss_mask"])
        n, V = ids.numel(), self.target.vocab_size
        if ids.dim() != 1 or ids.is_floating_point() or n == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(f"{path}: token_ids must be a flat list of ids in 0..{V - 1}, the target's vocabulary")
        if n > self.max_length:
            raise ValueError(
                f"{path} has {n} tokens, more than data.max_length {self.max_length}: raise data.max_length"
            )
        if mask is None and self.data_set is not None:
            mask = self._mask_of(number, path, ids)
        mask = torch.ones(n, dtype=torch.int64) if mask is None else mask.flatten().to(torch.int64)
        if mask.numel() != n or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"{path} has {n} tokens; its loss_mask must be 0 or 1 for each of them")
        document_ids = torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.to(torch.int64), "loss_mask": mask, "document_ids": document_ids, "path": path}

    def compute(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A row's features [n, 3T] and last hidden states [n, T] after the final norm."""
        hidden = self._hidden(row)
        return hidden[:, :3].flatten(1).cpu(), self._normed(hidden[:, 3]).cpu()

    def write_documents(self, folder: Path) -> None:
        """The samples with their masks as a .jsonl source, whole or not at all.

        Those with nothing to learn from would be bad rows there: they are left out, and counted.
        """
        partial, left_out = partial_path(folder / DOCUMENTS), 0
        with partial.open("w", encoding="ascii") as file:
            for index in range(len(self)):
                row = self[index]
                pair = {"input_ids": row["input_ids"].tolist(), "loss_mask": row["loss_mask"].tolist()}
                if 1 not in pair["loss_mask"][1:]:
                    left_out += 1
                    continue
                file.write(json.dumps(pair) + "\n")
        put(partial, folder / DOCUMENTS)
        if left_out:
            logger.warning("%d samples with no token to learn from are not in %s", left_out, folder / DOCUMENTS)

    def _hidden(self, row: dict[str, Any]) -> Tensor:
        """[n, 4, T], in the target's dtype, on its device."""
        path, T = row["path"], self.target.hidden_size
        hidden = self._read(path, ["hidden_states"])[0]
        shape = (row["input_ids"].numel(), 4, T)
        if hidden is None or tuple(hidden.shape) != shape or not hidden.is_floating_point():
            given = "missing" if hidden is None else f"{hidden.dtype} {list(hidden.shape)}"
            raise ValueError(
                f"{path}: hidden_states is {given}; it must be floats {list(shape)}: three layers and what enters the final"
                " norm, for every token"
            )
        return hidden.to(self.target.device, self.target.head_weight().dtype)

    @torch.no_grad()
    def _normed(self, last: Tensor) -> Tensor:
        return last if self.last_is_normed else self.target.final_norm()(last[None])[0]

    def _compare_with_target(self) -> bool:
        """Run the target over the shortest of the first 16 samples with more than one token. Returns whether the last slot
        is behind the final norm already.

        The files do not say of which layers they are: this does.
        """
        rows = [self[i] for i in range(min(16, len(self)))]
        row = min(rows, key=lambda row: (row["input_ids"].numel() == 1, row["input_ids"].numel()))
        hidden = self._hidden(row)
        ids = row["input_ids"][None]
        features, last = self.target.features(ids, torch.arange(ids.shape[1])[None])
        off = relative(hidden[:, :3].flatten(1), features[0])
        if off > 0.1:
            raise ValueError(
                f"{row['path']}: its features are {off:.0%} off what the target gives in layers {self.target.layer_ids}:"
                " they are of another target, or of other layers (give target.layer_ids)"
            )
        self.last_is_normed = False
        before, behind = relative(self._normed(hidden[:, 3]), last[0]), relative(hidden[:, 3], last[0])
        if min(before, behind) > 0.1:
            raise ValueError(
                f"{row['path']}: its last hidden state is not the target's, neither before the final norm ({before:.0%}"
                f" off) nor behind it ({behind:.0%} off)"
            )
        if behind < before:
            logger.warning(
                "the last hidden states of %s are behind the final norm: taken as they are", row["path"].parent
            )
        return behind < before

    def _mask_of(self, number: int, path: Path, ids: Tensor) -> Tensor:
        if number >= len(self.data_set):
            raise ValueError(f"{path}: the data set next to it has {len(self.data_set)} rows only")
        sample = self.data_set[number]
        if list(sample["input_ids"]) != ids.tolist():
            raise ValueError(
                f"{path}: row {number} of the data set next to it has other tokens: another data set, or a cut one"
            )
        return torch.as_tensor(sample["loss_mask"])

    def _read(self, path: Path, names: list[str]) -> list[Any]:
        """Tensors by name, None where the file has no such one."""
        try:
            with safe_open(path, framework="pt") as file:
                known = set(file.keys())
                if "token_ids" not in known:
                    raise ValueError(
                        f"{path} has no token_ids (it has {', '.join(sorted(known))}): not speculators' format"
                    )
                return [file.get_tensor(name) if name in known else None for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _data_set(root: Path) -> Any:
    """The Arrow data set in this folder or in the one above; None, with a line, where there is none."""
    for folder in (root, root.parent):
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            from datasets import load_from_disk

            found: Any = load_from_disk(str(folder)).with_format(None)  # it may have been saved as tensors
            if not {"input_ids", "loss_mask"} <= set(found.column_names):
                raise ValueError(
                    f"the data set {folder} has no columns input_ids and loss_mask (has {found.column_names})"
                )
            return found
    logger.warning(
        "no data set next to %s: where a file has no loss_mask of its own, every token is learned from", root
    )
    return None


# ---- cache_run
# From a recipe to a whole folder of features: what peagle-train cache does.


class Rows:
    """The rows of several sets, one after the other."""

    def __init__(self, *parts: PackedRows) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Row:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("behind the last row")


def write_cache(recipe: Recipe, out: str | None, shard_mib: int = 512, speculators: str | None = None) -> str:
    """Fill `out` and return the lines that say how to train from it, on the main process.

    Args:
        shard_mib: size of a file. speculators: take what lies in this folder, see `SpeculatorsFiles`, instead of
            running the target over the recipe's rows.

    Raises:
        ValueError: for a user's mistake.
    """
    if out is None:
        raise ValueError("no folder given: --out DIR (or target.cache in the recipe)")
    out = os.path.expanduser(out)  # of --out=~/x the shell leaves it to us
    if shard_mib < 1:
        raise ValueError(f"--shard-mib is {shard_mib}; it must be at least 1")
    accelerator = Accelerator()
    check_device(accelerator.device)
    check_launch(accelerator.num_processes)
    say: Any = print if accelerator.is_main_process else (lambda *_: None)
    target = load_target(recipe, accelerator)
    dtype = target.head_weight().dtype
    stored = dtype if recipe.target.cache_dtype == "auto" else getattr(torch, recipe.target.cache_dtype)

    files: SpeculatorsFiles | None = None
    if speculators is None:
        tokenizer = load_tokenizer(recipe)
        mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)
        data = load_training_data(recipe, tokenizer, target.vocab_size, mask_token_id, say)
        rows: Any = Rows(data.train_rows, data.eval_rows)
        compute = online(recipe, target)
    else:
        rows = files = SpeculatorsFiles(os.path.expanduser(speculators), target, recipe.data.max_length)
        compute = files.compute

    per_token = 4 * target.hidden_size * stored.itemsize
    shards = plan_shards(rows, max(1, shard_mib * 2**20 // per_token))
    index = make_index(
        shards,
        target=fingerprint(recipe.target.path),
        layer_ids=target.layer_ids,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        eos_token_ids=target.eos_token_ids(),
        dtype=str(stored)[6:],
        computed_in=str(dtype)[6:],
        max_length=recipe.data.max_length,
        # What speculators left was computed by neither.
        chunk_tokens=target.chunk_tokens if files is None else None,
        attn_implementation=target.attn_implementation if files is None else None,
        source="recipe" if files is None else "speculators",
    )
    writer = CacheWriter(Path(out), index, shards, accelerator.process_index, accelerator.num_processes)
    with ExitStack() as held:
        fill(writer, target, rows, compute, say, held if accelerator.is_main_process else None)
        if files is not None and accelerator.is_main_process:
            files.write_documents(Path(out))
    accelerator.end_training()
    if not accelerator.is_main_process:
        return ""
    overrides = [as_override("target.cache", out)]
    if files is not None:
        overrides.append(as_override("data.sources", [str(Path(out) / DOCUMENTS)]))
    return f"train from it: python -m peagle_train RECIPE {' '.join(overrides)}\n"


def load_target(recipe: Recipe, accelerator: Accelerator) -> FrozenTarget:
    """The recipe's target, checked, never from a cache."""
    settings = recipe.target
    check_device_map(settings.device_map, accelerator.num_processes)
    if settings.shard:
        raise ValueError(
            "target.shard is true, but here every process gives other rows to a target of its own: set it to false"
            " (target.device_map spreads the target of a single process)"
        )
    target = FrozenTarget.load(
        settings.path,
        dtype=settings.dtype,
        device=accelerator.device,
        layer_ids=settings.layer_ids,
        chunk_tokens=settings.chunk_tokens,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        device_map=settings.device_map,
    )
    if settings.check:
        target.check()
    return target


def online(recipe: Recipe, target: FrozenTarget) -> Compute:
    """A row's features as a training step with one row a batch computes them: the same padding, so the same bits."""
    collator = make_collator(recipe, seed=0)

    def compute(row: Row) -> tuple[Tensor, Tensor]:
        batch = collator([row])
        features, last_hidden = target.features(batch["input_ids"], batch["position_ids"])
        return features[0].cpu(), last_hidden[0].cpu()

    return compute


def fill(
    writer: CacheWriter, target: FrozenTarget, rows: Any, compute: Compute, say: Any, held: ExitStack | None
) -> None:
    """Claim the folder, write head and shards; a failure of one process stops all.

    Args:
        held: of the main process: keeps the folder's lock, for all processes of this run; others have None.
    """
    head = target.head_weight()
    failure = ""
    if held is not None:
        try:
            held.enter_context(alone_in(writer.folder, "writing features"))
            say(f"cache: {writer.claim(2 * head.numel() * head.element_size())}")
            writer.write_head(target.head_weight, target.embedding_rows)
        except ValueError as error:
            failure = str(error)
    stop_together(failure)
    started, done = time.perf_counter(), [0]

    def report(tokens: int) -> None:
        done[0] += tokens
        seconds = time.perf_counter() - started
        say(f"cache: {done[0]} of {_own_tokens(writer)} tokens, {done[0] / seconds:.0f} tokens/s")

    try:
        writer.write_shards(rows.__getitem__, compute, report)
    except ValueError as error:
        failure = str(error)
    stop_together(failure)


def _own_tokens(writer: CacheWriter) -> int:
    own: list[PlannedShard] = list(writer.shards)[writer.rank :: writer.world_size]
    return sum(shard.tokens for shard in own)


def stop_together(failure: str) -> None:
    """ValueError on every process if one of them failed; waits for all, however long the last one still computes."""
    for first in filter(None, from_all(failure)):
        raise ValueError(first)
