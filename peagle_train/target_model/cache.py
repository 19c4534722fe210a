"""Features of the target on disk: written once, by any number of processes, and read instead of running the target.

A folder holds
    cache.json              what the features are of, written first: `CacheIndex`, and a sha256 of it
    features-NNNNN.safetensors
                            features [n, 3T] and last_hidden [n, T] of whole pieces side by side; keys int64 [P, 2] and
                            lengths int64 [P] say which
    head.safetensors        the target's head and embeddings, [V, T] each
    *.sha256                the checksum of each .safetensors, written after it: one without is not there
    documents.jsonl         of a cache made from speculators' files: their samples as a data source
A *piece* is a document, or the part of one that a sequence holds; its features depend on its ids alone, so it is found by
their hash: sequences may be shuffled, masked and packed in another way. What goes into which shard is a function of the
sequences alone, so a stopped write is resumed by the same command.

T: the target's hidden size, V: its vocabulary, n: tokens, P: pieces, B: sequences of a batch, L: positions.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import ConcatDataset

from peagle_train.config import Recipe, Target, as_override
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.packing import PackedRows, TrainingData
from peagle_train.data.training_data import load_training_data, make_collator
from peagle_train.data.vocab import choose_mask_token, load_config, load_tokenizer
from peagle_train.distributed import check_device, check_device_map, check_launch, from_all
from peagle_train.files import alone_in, checksum, one_line, partial_path, put, sha256_of, write_json, write_text
from peagle_train.target_model.check import relative
from peagle_train.target_model.frozen import FrozenTarget, TargetBase, default_layer_ids

logger = logging.getLogger(__name__)

INDEX, HEAD, DOCUMENTS, VERSION = "cache.json", "head.safetensors", "documents.jsonl", 2
COMMAND = "peagle-train cache"
AGAIN = f"make the cache again with {COMMAND}, or change the recipe"
FIELDS = ("features", "last_hidden")
"""Of a sequence's tokens: bit for bit what the target gave, in the cache's dtype."""
Key = tuple[int, int]


@dataclass(frozen=True)
class CacheIndex:
    """What the features of a folder are of."""

    version: int
    target: str  # `fingerprint` of the target's folder
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
    except (OSError, ValueError) as error:
        raise ValueError(f"target.path {folder} cannot be read: {error}") from error
    return total.hexdigest()


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


def read_index(folder: Path) -> CacheIndex | None:
    """A folder's index; None if it has none; ValueError for one that is no index of this version."""
    try:
        raw = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"target.cache {folder}: {INDEX} cannot be read ({error}): {AGAIN}") from error
    is_ours = isinstance(raw, dict) and raw.get("version") == VERSION
    if not is_ours or raw.keys() != {"sha256", *(field.name for field in fields(CacheIndex))}:
        given = raw.get("version") if isinstance(raw, dict) else "none"
        raise ValueError(
            f"target.cache {folder} is of format {given}, this reads format {VERSION}: make the cache again with {COMMAND},"
            " in another folder or after removing this one"
        )
    claimed = raw.pop("sha256")
    if claimed != checksum(raw):
        raise ValueError(
            f"target.cache {folder}: {INDEX} is not what was written: make the cache with {COMMAND} in another folder"
        )
    return CacheIndex(**raw)


# Reading


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

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every file of this process's share and compare checksums; ValueError names the first that differs."""
        names = self.names[share::shares]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter
            for name, damaged in zip(names, pool.map(is_damaged, map(self.folder.joinpath, names)), strict=True):
                if damaged:
                    raise self._damaged(name)

    def head_tensor(self, name: str) -> Tensor:
        """ "head" or "embeddings", [V, T], in the target's dtype."""
        return self._open(HEAD).get_tensor(name)

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


class CachedTarget(TargetBase):
    """A target that answers from a `FeatureCache`: its layers are never loaded, its head stays on the disk until its rows
    are asked for. Batches must be of sequences that `check_rows` has seen, or bring features of their own.

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
    def open(cls, target: Target, device: torch.device) -> "CachedTarget":
        """The recipe's cache, if it is of the recipe's target and settings; ValueError, one line, where they differ."""
        assert target.cache is not None
        opened = FeatureCache(target.cache)
        index = opened.index
        if fingerprint(target.path) != index.target:
            raise ValueError(
                f"target.cache {target.cache} is of another target than {target.path} (config or weights differ): {AGAIN}"
            )
        config = load_config(target.path, target.trust_remote_code)
        layers = target.layer_ids or default_layer_ids(config.get_text_config().num_hidden_layers)
        for key, asked, has in (
            ("layer_ids", layers, index.layer_ids),
            ("cache_dtype", target.cache_dtype, index.dtype),
            ("dtype", target.dtype, index.computed_in),
        ):
            if asked not in ("auto", has):
                raise ValueError(f"target.cache {target.cache} is of {key} {has}, the recipe asks for {asked}: {AGAIN}")
        return cls(opened, config, pin=device.type == "cuda")

    def check_rows(self, data: TrainingData) -> None:
        """ValueError if the cache lacks some of the sequences' features."""
        for name, rows in {"data.sources": data.train_rows, "held-out sequences": data.eval_rows}.items():
            if lacking := self.cache.lacking(rows):
                raise ValueError(
                    f"target.cache {self.cache.folder} lacks {len(lacking)} pieces of the {name}, the longest of"
                    f" {max(lacking)} tokens (it was made with data.max_length {self.cache.index.max_length}): {AGAIN}"
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

    def check(self) -> None:
        """Compare every file's checksum, shared out among the processes of this machine; ValueError names a damaged one.

        Cheap beside a run that learns from wrong numbers, so target.check does not turn it off.
        """
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank == 0:
            size = sum((self.cache.folder / name).stat().st_size for name in self.cache.names)
            logger.warning("target.cache: reading %.2f GiB once to see that they are whole", size / 2**30)
        self.cache.verify(rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# Writing


class Piece(NamedTuple):
    row: int  # number of the first sequence that has it
    part: slice  # its positions there
    key: Key

    @property
    def tokens(self) -> int:
        return self.part.stop - self.part.start


Shard = list[Piece]


def plan_shards(rows: Any, shard_tokens: int) -> list[Shard]:
    """Every piece once, in the order of the sequences; a shard ends after the sequence that fills it."""
    shards: list[Shard] = []
    seen: set[Key] = set()
    room = 0
    for number in range(len(rows)):
        row, new = rows[number], []
        for part in pieces_of(row):
            key = piece_key(row["input_ids"][part])
            if key not in seen:
                seen.add(key)
                new.append(Piece(number, part, key))
        if new and room <= 0:
            shards.append([])
            room = shard_tokens
        if new:
            shards[-1] += new
            room -= sum(piece.tokens for piece in new)
    return shards


def write_cache(recipe: Recipe, out: str | None, shard_mib: float = 512, speculators: str | None = None) -> str:
    """Fill `out` and return the lines that say how to train from it, on the main process. Run again, it resumes: whole
    files stay, missing and damaged ones are written.

    Args:
        shard_mib: size of a file. speculators: take what lies in this folder, see `SpeculatorsFiles`, instead of
            running the target over the recipe's sequences.

    Raises:
        ValueError: for a user's mistake.
    """
    if out is None:
        raise ValueError("no folder given: --out DIR (or target.cache in the recipe)")
    if shard_mib <= 0:
        raise ValueError(f"--shard-mib is {shard_mib}; it must be at least 1")
    if recipe.target.shard:
        raise ValueError(
            "target.shard is true, but here every process gives other sequences to a target of its own: set it to false"
            " (target.device_map spreads the target of a single process)"
        )
    folder = Path(out).expanduser()  # of --out=~/x the shell leaves it to us
    accelerator = Accelerator()
    rank, world_size, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    check_device(accelerator.device)
    check_launch(world_size)
    check_device_map(recipe.target.device_map, world_size)
    say: Any = print if is_main else (lambda *_: None)
    target = FrozenTarget.from_recipe(recipe.target, accelerator.device)
    if recipe.target.check:
        target.check()

    files = None
    if speculators is None:
        tokenizer = load_tokenizer(recipe.target.path, recipe.target.trust_remote_code)
        mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)
        data = load_training_data(recipe, tokenizer, target.vocab_size, mask_token_id, say)
        rows: Any = ConcatDataset([data.train_rows, data.eval_rows])
        collator = make_collator(recipe, seed=0)

        def compute(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
            """As a training step with one sequence a batch computes it: the same padding, so the same bits."""
            batch = collator([row])
            features, last_hidden = target.features(batch["input_ids"], batch["position_ids"])
            return features[0].cpu(), last_hidden[0].cpu()
    else:
        rows = files = SpeculatorsFiles(speculators, target, recipe.data.max_length)
        compute = files.compute

    head = target.head_weight()
    stored = head.dtype if recipe.target.cache_dtype == "auto" else getattr(torch, recipe.target.cache_dtype)
    per_token = 4 * target.hidden_size * stored.itemsize
    shards = plan_shards(rows, max(1, int(shard_mib * 2**20 // per_token)))
    plan = hashlib.sha256()
    for shard in shards:
        plan.update(repr(([piece.key for piece in shard], [piece.tokens for piece in shard])).encode())
    index = CacheIndex(
        version=VERSION,
        target=fingerprint(recipe.target.path),
        layer_ids=target.layer_ids,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        eos_token_ids=target.eos_token_ids(),
        dtype=str(stored)[6:],
        computed_in=str(head.dtype)[6:],
        chunk_tokens=None if files else recipe.target.chunk_tokens,
        attn_implementation=None if files else target.config._attn_implementation,
        max_length=recipe.data.max_length,
        source="speculators" if files else "recipe",
        shards=len(shards),
        tokens=sum(piece.tokens for shard in shards for piece in shard),
        pieces=sum(map(len, shards)),
        plan=plan.hexdigest(),
    )
    with ExitStack() as held:
        with _failing_together():
            if is_main:
                held.enter_context(alone_in(folder, "writing features"))
                say(f"cache: {_claim(folder, index, 2 * head.numel() * head.element_size())}")
                if not _is_whole(folder / HEAD):
                    # Copies: of tied weights safetensors would see one tensor under two names.
                    pair = {"head": head, "embeddings": target.embedding_rows()}
                    _write(
                        folder / HEAD, {name: t.detach().to("cpu", copy=True).contiguous() for name, t in pair.items()}
                    )
        started, done = time.perf_counter(), 0
        with _failing_together():
            own = list(enumerate(shards))[rank::world_size]
            for number, shard in own:
                if not _is_whole(folder / shard_name(number)):
                    _write(folder / shard_name(number), _tensors_of(shard, rows, compute, target.hidden_size, stored))
                done += sum(piece.tokens for piece in shard)
                say(f"cache: shard {number}, {done} tokens here, {done / (time.perf_counter() - started):.0f} tokens/s")
        if files is not None and is_main:
            files.write_documents(folder)
    accelerator.end_training()
    if not is_main:
        return ""
    overrides = [as_override("target.cache", str(folder))]
    if files is not None:
        overrides.append(as_override("data.sources", [str(folder / DOCUMENTS)]))
    return f"train from it: peagle-train train RECIPE {' '.join(overrides)}\n"


@contextmanager
def _failing_together() -> Iterator[None]:
    """ValueError on every process if one of them fails inside; waits for all, however long the last one still computes."""
    failure = ""
    try:
        yield
    except ValueError as error:
        failure = str(error)
    except (OSError, SafetensorError) as error:
        failure = f"{one_line(error)}: make room and run the same command again, it resumes where it stopped"
    for first in filter(None, from_all(failure)):
        raise ValueError(first)


def _claim(folder: Path, index: CacheIndex, head_bytes: int) -> str:
    """Make the folder this cache's; returns what is to do, in one line.

    Raises:
        ValueError: the folder holds something else, or the disk has too little room.
    """
    old = read_index(folder)
    if old is not None and old != index:
        names = [name for name, value in asdict(index).items() if getattr(old, name) != value]
        raise ValueError(
            f"--out {folder} holds the cache of another target, other sequences or other settings"
            f" ({', '.join(names)} differ): give another folder, or remove it"
        )
    if old is None and any(path != partial_path(folder / INDEX) for path in folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty and holds no cache; give another folder")
    per_token = 4 * index.hidden_size * getattr(torch, index.dtype).itemsize
    size = index.tokens * per_token + 24 * index.pieces + 4096 * (index.shards + 1) + head_bytes
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    words = (
        f"{index.tokens} tokens of {index.pieces} pieces at {per_token} bytes ({index.dtype}): {size / 2**30:.2f} GiB in"
        f" {index.shards} shards, {there / 2**30:.2f} GiB there, {free / 2**30:.2f} GiB free"
    )
    if size - there > free:
        raise ValueError(
            f"--out {folder} has too little room: {words}; give a folder on another disk, target.cache_dtype=bfloat16, or"
            " fewer documents (data.max_documents)"
        )
    if old is None:
        content = asdict(index)
        write_json(folder / INDEX, {**content, "sha256": checksum(content)})
    return words


def _tensors_of(shard: Shard, rows: Any, compute: Any, T: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard's file holds; ValueError for features that are not finite in the cache's dtype."""
    n = sum(piece.tokens for piece in shard)
    features, last_hidden = torch.empty(n, 3 * T, dtype=dtype), torch.empty(n, T, dtype=dtype)
    end = 0
    for number, pieces in groupby(shard, key=lambda piece: piece.row):
        row_features, row_last = compute(rows[number])
        for piece in pieces:
            start, end = end, end + piece.tokens
            features[start:end], last_hidden[start:end] = row_features[piece.part], row_last[piece.part]
    if not bool(features.isfinite().all() & last_hidden.isfinite().all()):
        raise ValueError(
            f"the target's features of sequences {shard[0].row} to {shard[-1].row} are not all finite in"
            f" {str(dtype)[6:]}: give another target.cache_dtype or target.dtype"
        )
    keys, lengths = torch.tensor([piece.key for piece in shard]), torch.tensor([piece.tokens for piece in shard])
    return {"features": features, "last_hidden": last_hidden, "keys": keys, "lengths": lengths}


def _is_whole(path: Path) -> bool:
    """Whether an earlier run has written the file, and it is still that; reads all of it."""
    if is_written(path) and is_damaged(path):
        logger.warning("%s is not what was written (cut or edited): it is replaced", path)
        checksum_path(path).unlink()
    return is_written(path)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = partial_path(path)
    save_file(tensors, partial, metadata={"format": "pt"})
    checksum = sha256_of(partial)
    put(partial, path)
    write_text(checksum_path(path), f"{checksum}  {path.name}\n")


# What speculators (vllm-project) wrote for offline training


class SpeculatorsFiles:
    """Its samples as sequences of one document each, in the order of i, with their features.

    hs_{i}.safetensors holds `token_ids` [n] and `hidden_states` [n, 4, T]: three layers and what enters the target's final
    norm. The loss mask is in the file, or in the data set next to it (Arrow, written by `datasets`): its row i has
    `loss_mask` [n] and the same tokens as `input_ids`.

    Args:
        folder: of hs_{i}.safetensors, or the one above its `hidden_states`.
        target: the target that they are said to be of. max_length: of a sequence; a longer sample is a ValueError.

    Raises:
        ValueError: one line, for files that are something else, and for features that the target does not give.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder).expanduser()
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        numbered = {int(p.stem[3:]): p for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit()}
        if not numbered:
            raise ValueError(
                f"--speculators {folder} holds no hs_NUMBER.safetensors: give the folder that speculators wrote"
            )
        self.target, self.max_length = target, max_length
        self.samples = sorted(numbered.items())
        self.masks = _data_set(root)
        self.last_is_normed = False
        self._compare_with_target()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        try:
            with safe_open(path, framework="pt") as file:
                views = {name: file.get_slice(name) for name in file.keys()}
                has = {name: (view.get_dtype(), *view.get_shape()) for name, view in views.items()}
                ids, mask = (file.get_tensor(n) if n in has else torch.empty(0) for n in ("token_ids", "loss_mask"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        n, T, V = ids.numel(), self.target.hidden_size, self.target.vocab_size
        if "loss_mask" not in has and self.masks is not None:
            row = self.masks[number] if number < len(self.masks) else {"input_ids": None}
            if row["input_ids"] != ids.tolist():
                raise ValueError(f"{path}: row {number} of the data set next to it has other tokens")
            mask = torch.tensor(row["loss_mask"])
        elif "loss_mask" not in has:
            mask = torch.ones(n)
        is_ids = n > 0 and ids.dim() == 1 and not ids.is_floating_point() and 0 <= ids.min() <= ids.max() < V
        is_hidden = has.get("hidden_states") in [(dtype, n, 4, T) for dtype in ("F64", "F32", "BF16", "F16")]
        if not (is_ids and is_hidden and mask.numel() == n and bool(((mask == 0) | (mask == 1)).all())):
            raise ValueError(
                f"{path} has {has}; it must have token_ids [n], ids in 0..{V - 1}, hidden_states, floats [n, 4, {T}] (three"
                " layers and what enters the final norm), and a loss_mask, if any, of 0 or 1 [n]"
            )
        if n > self.max_length:
            raise ValueError(f"{path} has {n} tokens, data.max_length is {self.max_length}: raise data.max_length")
        mask, document_ids = mask.flatten().long(), torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.long(), "loss_mask": mask, "document_ids": document_ids, "path": path}

    def compute(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A sample's features [n, 3T] and last hidden states [n, T] after the final norm."""
        hidden = self._hidden(row)
        last = hidden[:, 3] if self.last_is_normed else self._normed(hidden[:, 3])
        return hidden[:, :3].flatten(1).cpu(), last.cpu()

    def _hidden(self, row: dict[str, Any]) -> Tensor:
        """[n, 4, T], in the target's dtype, on its device."""
        return load_file(row["path"])["hidden_states"].to(self.target.device, self.target.head_weight().dtype)

    @torch.no_grad()
    def _normed(self, last: Tensor) -> Tensor:
        return self.target.final_norm()(last[None])[0]

    def _compare_with_target(self) -> None:
        """Run the target over the shortest of the first 16 samples with more than one token: the files say neither of which
        layers they are nor whether their last hidden states have been through the final norm.
        """
        first = [self[i] for i in range(min(16, len(self)))]
        row = min(first, key=lambda row: (row["input_ids"].numel() == 1, row["input_ids"].numel()))
        ids = row["input_ids"][None]
        features, last = self.target.features(ids, torch.arange(ids.shape[1])[None])
        given = self._hidden(row)
        off = relative(given[:, :3].flatten(1), features[0])
        before, after = relative(self._normed(given[:, 3]), last[0]), relative(given[:, 3], last[0])
        if off > 0.1 or min(before, after) > 0.1:
            raise ValueError(
                f"--speculators: features are {off:.0%} off what the target gives in layers {self.target.layer_ids}, last"
                f" hidden states {before:.0%} off before the final norm and {after:.0%} after it: they are of another"
                " target, or of other layers (give target.layer_ids)"
            )
        self.last_is_normed = after < before
        if self.last_is_normed:
            logger.warning("speculators' last hidden states are after the final norm: taken as they are")

    def write_documents(self, folder: Path) -> None:
        """The samples with their masks as a .jsonl source. Those with nothing to learn from are dropped, and counted."""
        partial, dropped = partial_path(folder / DOCUMENTS), 0
        with partial.open("w", encoding="utf-8") as file:
            for i in range(len(self)):
                row = {name: self[i][name].tolist() for name in ("input_ids", "loss_mask")}
                if 1 in row["loss_mask"][1:]:
                    file.write(json.dumps(row) + "\n")
                else:
                    dropped += 1
        put(partial, folder / DOCUMENTS)
        if dropped:
            logger.warning("%d samples with no token to learn from are not in %s", dropped, folder / DOCUMENTS)


def _data_set(root: Path) -> Any:
    """The Arrow data set in this folder or in the one above; None, with a line, where there is none."""
    for folder in (root, root.parent):
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            from datasets import load_from_disk

            found: Any = load_from_disk(str(folder)).with_format(None)  # it may have been saved as tensors
            if {"input_ids", "loss_mask"} <= set(found.column_names):
                return found
            raise ValueError(f"the data set {folder} has {found.column_names}, but not input_ids and loss_mask")
    logger.warning(
        "no data set next to %s: where a file has no loss_mask of its own, every token is learned from", root
    )
    return None
