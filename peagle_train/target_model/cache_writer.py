"""`peagle-train cache`: writes a folder of features (see `cache`), by any number of processes.

The features are the target's, of a recipe's sequences, or those that speculators wrote. What goes into which shard is a
function of the sequences alone, so the same command resumes a stopped write and ends in the same bytes.

T: the target's hidden size, n: tokens of a sequence.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import ConcatDataset

from peagle_train.config import Recipe, as_override
from peagle_train.data.training_data import load_training_data, make_collator
from peagle_train.data.vocab import choose_mask_token, load_tokenizer
from peagle_train.distributed import check_device, check_device_map, check_launch, from_all
from peagle_train.files import alone_in, checksum, one_line, partial_path, put, sha256_of, write_json, write_text
from peagle_train.target_model.cache import (
    HEAD,
    INDEX,
    VERSION,
    CacheIndex,
    Key,
    checksum_path,
    is_damaged,
    is_written,
    piece_key,
    pieces_of,
    read_index,
    shard_name,
)
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.loading import target_fingerprint
from peagle_train.target_model.speculators_files import SpeculatorsFiles

logger = logging.getLogger(__name__)

DOCUMENTS = "documents.jsonl"


class Piece(NamedTuple):
    sequence: int  # number of the first sequence that has it
    part: slice  # its positions there
    key: Key

    @property
    def tokens(self) -> int:
        return self.part.stop - self.part.start


Shard = list[Piece]
Compute = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
"""Features [n, 3T] and last hidden states [n, T] of a sequence, on the host."""


def write_cache(recipe: Recipe, out: str | None, shard_mib: float = 512, speculators: str | None = None) -> str:
    """Fill `out` and return the line that says how to train from it, on the main process. Run again, it resumes: whole
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

    files = None if speculators is None else SpeculatorsFiles(speculators, target, recipe.data.max_length)
    sequences, compute = (files, files.compute) if files else _sequences(recipe, target, say)
    stored = target.cache_dtype(recipe.target.cache_dtype)
    shards = plan_shards(sequences, max(1, int(shard_mib * 2**20 // (4 * target.hidden_size * stored.itemsize))))
    index = _index(recipe, target, shards, stored, from_files=files is not None)
    with ExitStack() as held:
        with _failing_together():
            if is_main:
                held.enter_context(alone_in(folder, "writing features"))
                say(f"cache: {_claim(folder, index, 2 * target.head_weight().nbytes)}")
                if not _is_whole(folder / HEAD):
                    tables = {"head": target.head_weight(), "embeddings": target.embedding_rows()}
                    # Copies: of tied weights safetensors would see one tensor under two names.
                    _write(folder / HEAD, {n: t.to("cpu", copy=True).contiguous() for n, t in tables.items()})
                    del tables
        started, done = time.perf_counter(), 0
        with _failing_together():
            for number in range(rank, len(shards), world_size):
                path = folder / shard_name(number)
                if not _is_whole(path):
                    _write(path, _tensors_of(shards[number], sequences, compute, stored))
                done += sum(piece.tokens for piece in shards[number])
                say(f"cache: shard {number}, {done} tokens here, {done / (time.perf_counter() - started):.0f} tokens/s")
        if files and is_main:
            files.write_documents(folder / DOCUMENTS)
    accelerator.end_training()
    if not is_main:
        return ""
    overrides = [as_override("target.cache", str(folder))]
    if files:
        overrides.append(as_override("data.sources", [str(folder / DOCUMENTS)]))
    return f"train from it: peagle-train train RECIPE {' '.join(overrides)}\n"


def _sequences(recipe: Recipe, target: FrozenTarget, say: Any) -> tuple[Any, Compute]:
    """The recipe's sequences, and how the target computes one."""
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.trust_remote_code)
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, target.vocab_size)
    data = load_training_data(recipe, tokenizer, target.vocab_size, mask_token_id, say)
    collator = make_collator(recipe, seed=0)

    def compute(sequence: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As a training step with one sequence a batch computes it: the same padding, so the same bits."""
        batch = collator([sequence])
        features, last_hidden = target.features(batch["input_ids"], batch["position_ids"])
        return features[0].cpu(), last_hidden[0].cpu()

    return ConcatDataset([data.train_rows, data.eval_rows]), compute


def plan_shards(sequences: Any, shard_tokens: int) -> list[Shard]:
    """Every piece once, in the order of the sequences; a shard ends after the sequence that fills it."""
    shards: list[Shard] = []
    seen: set[Key] = set()
    room = 0
    for number in range(len(sequences)):
        sequence, new = sequences[number], []
        for part in pieces_of(sequence["document_ids"]):
            key = piece_key(sequence["input_ids"][part])
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


def _index(
    recipe: Recipe, target: FrozenTarget, shards: list[Shard], stored: torch.dtype, from_files: bool
) -> CacheIndex:
    plan = hashlib.sha256()
    for shard in shards:
        plan.update(repr(([piece.key for piece in shard], [piece.tokens for piece in shard])).encode())
    return CacheIndex(
        version=VERSION,
        target=target_fingerprint(recipe.target.path),
        layer_ids=target.layer_ids,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        eos_token_ids=target.eos_token_ids(),
        dtype=str(stored)[6:],
        computed_in=str(target.dtype)[6:],
        chunk_tokens=None if from_files else recipe.target.chunk_tokens,
        attn_implementation=None if from_files else target.config._attn_implementation,
        max_length=recipe.data.max_length,
        source="speculators" if from_files else "recipe",
        shards=len(shards),
        tokens=sum(piece.tokens for shard in shards for piece in shard),
        pieces=sum(map(len, shards)),
        plan=plan.hexdigest(),
    )


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


def _tensors_of(shard: Shard, sequences: Any, compute: Compute, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard's file holds; ValueError for features that are not finite in the cache's dtype."""
    found = []
    for number, pieces in groupby(shard, key=lambda piece: piece.sequence):
        both = compute(sequences[number])
        found += [[tensor[piece.part].to(dtype) for tensor in both] for piece in pieces]
    features, last_hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not bool(features.isfinite().all() & last_hidden.isfinite().all()):
        raise ValueError(
            f"the target's features of sequences {shard[0].sequence} to {shard[-1].sequence} are not all finite in"
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


@contextmanager
def _failing_together() -> Iterator[None]:
    """ValueError on every process if one of them fails inside; waits for all, however long the last one still computes."""
    failure = ""
    try:
        yield
    except ValueError as error:
        failure = str(error)
    except (OSError, SafetensorError) as error:
        failure = f"{one_line(error)}: mend that and run the same command again, it resumes where it stopped"
    for first in filter(None, from_all(failure)):
        raise ValueError(first)
