"""Features of the target on disk, and how training reads them.

A folder holds
    cache.json              what the features are of, written first: `CacheIndex`
    features-NNNNN.safetensors
                            features [n, 3T] and last_hidden [n, T] of whole pieces side by side; keys int64 [P, 2] and
                            lengths int64 [P] say which
    features-NNNNN.sha256   that file's checksum, written after it: a shard without one is not there
    head.safetensors        the target's head [V, T] and embeddings [V, T], and its .sha256
A *piece* is a document, or the part of one that a row holds; its features depend on its ids alone, so it is found by their
hash: rows may be shuffled, masked and packed in another way. T: the target's hidden size, n: tokens, P: pieces.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.data.packing import PackedRows

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
            " tools/cache_features.py, in another folder or after removing this one"
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
            raise ValueError(
                f"target.cache {folder} is no folder: make it with tools/cache_features.py RECIPE --out DIR"
            )
        index = read_index(self.folder)
        if index is None:
            hint = ""
            if any(self.folder.glob("hs_*.safetensors")):
                hint = (
                    f" (speculators wrote it: tools/cache_features.py RECIPE --speculators {folder} --out DIR reads it)"
                )
            raise ValueError(f"target.cache {folder} has no {INDEX}{hint}: give a folder of tools/cache_features.py")
        self.index = index
        self.names = [HEAD, *map(shard_name, range(index.shards))]
        missing = [n for n in self.names if not self._path(n).exists() or not checksum_path(self._path(n)).exists()]
        if missing:
            raise ValueError(
                f"target.cache {folder} is not whole: {len(missing)} of {len(self.names)} files are missing, first"
                f" {missing[0]}: run the same tools/cache_features.py again, it goes on where it stopped"
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
            " tools/cache_features.py again, which writes it anew"
        )
