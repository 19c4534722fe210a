"""Features of the target on disk: `peagle-train cache` writes the folder, and a target reads it instead of computing.

    cache.json              what the features are of, written first: see `_index`
    features-NNNNN.safetensors
                            whole pieces side by side: keys int64 [P, 2]; needs uint8 [n], which of their positions are
                            here (see `needs_of`); of those, features [f, F*T] and last_hidden [l, T]; lengths int64
                            [P, 3], each piece's share of n, f and l; in FP8, scales float32 [f] multiply the features
    documents.jsonl         of a cache made from speculators' files: their samples as a source for training

A *piece* is a document, or the part of one that a sequence holds; its features depend on its ids alone, so it is found by
their hash: sequences may be shuffled and packed in another way. Of its positions, those are here that a supervised element
can reach under the masks and the window that the cache was made for. What goes into which file is a function of the
sequences alone, and a file is written whole or not at all, so the same command resumes a stopped write, on any number of
processes, and ends in the same bytes. Each carries the sha256 of what it holds, for `verify_cache`.

T: the target's hidden size, F: feature layers, n: tokens, P: pieces, B: sequences of a batch, L: positions.
"""

import hashlib
import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import ConcatDataset

from peagle_train.config import Recipe, Target, as_override, with_segments
from peagle_train.core.cod import supervised_rows
from peagle_train.core.elements import positions_read
from peagle_train.data.packing import TrainingData
from peagle_train.data.training_data import encoder_of, load_training_data, make_collator
from peagle_train.distributed import check_device, check_launch, wait_for_all
from peagle_train.files import alone_in, one_line, partial_path, put, save_tensors, write_json
from peagle_train.machine import cores
from peagle_train.target_model.frozen import FP8, AbsentTarget, FrozenTarget, TargetBase, pieces_of
from peagle_train.target_model.loading import open_tensors, target_fingerprint
from peagle_train.target_model.packed import relative
from peagle_train.target_model.server import ServedTarget

logger = logging.getLogger(__name__)
INDEX, DOCUMENTS, VERSION = "cache.json", "documents.jsonl", 3
COMMAND = "peagle-train cache"
AGAIN = f"make the cache again with {COMMAND}, or change the recipe"
FIELDS = ("features", "last_hidden")  # of a sequence's tokens: bit for bit what the target gave, in the cache's dtype
Key = tuple[int, int]


def read_index(folder: Path, given_as: str) -> dict[str, Any]:
    """See `_index`; ValueError for a folder that has none of this version."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["version"] == VERSION:
            names = "target", "layer_ids", "dtype", "computed_in", "max_length"
            return {**index, **{name: index[name] for name in names}, "shards": int(index["shards"])}
        why = f"is of format {index['version']}, this reads format {VERSION}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = f"cannot be read ({one_line(error, 200)})"
    raise ValueError(f"{given_as} {folder}: {INDEX} {why}: give a folder of {COMMAND} RECIPE --out DIR (--speculators)")


def piece_key(ids_n: Tensor) -> Key:
    """128 bits of the sha256 of a piece's ids: the same on every machine."""
    digest = hashlib.sha256(ids_n.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()).digest()
    return struct.unpack("<qq", digest[:16])


def needs_of(row: Mapping[str, Any], reach: int | None) -> Tensor:
    """uint8 [n] of a sequence: 1 where its features are read, 2 where its last hidden state is, 3 for both."""
    documents_n = row["document_ids"]
    features_n, labels_n = positions_read(supervised_rows(row["loss_mask"], documents_n), documents_n, reach)
    return features_n + 2 * labels_n.byte()


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


class StoredTarget(AbsentTarget):
    """A target that answers from `target.cache`, memory-mapped; with zeros where it has nothing, as for `train.probe`.

    ValueError: one line, for a folder that is no whole cache of this target in these settings.
    """

    def __init__(self, settings: Target, device: torch.device) -> None:
        assert settings.cache is not None
        self.folder = Path(settings.cache)
        where, index = f"target.cache {self.folder}", read_index(self.folder, "target.cache")
        super().__init__(settings, device, 1)
        if target_fingerprint(settings.path) != index["target"]:
            raise ValueError(f"{where} is of another target than {settings.path} (config or weights differ): {AGAIN}")
        for key, asked, has in (
            ("layer_ids", self.layer_ids, index["layer_ids"]),
            ("cache_dtype", settings.cache_dtype, index["dtype"]),
            ("dtype", settings.dtype, index["computed_in"]),
        ):
            if asked not in ("auto", has):
                raise ValueError(f"{where} is of {key} {has}, the recipe asks for {asked}: {AGAIN}")
        self.index = index
        self.read_around(getattr(torch, index["computed_in"]))
        self._where: dict[Key, tuple[Any, list[slice]]] = {}  # of a piece: the file, and its needs, features and labels
        for name in map(shard_name, range(index["shards"])):
            file = open_tensors(self.folder / name)
            keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
            for key, ends, each in zip(keys.tolist(), lengths.cumsum(0).tolist(), lengths.tolist(), strict=True):
                self._where[tuple(key)] = file, [slice(end - n, end) for end, n in zip(ends, each, strict=True)]

    def cache_dtype(self, asked: str) -> torch.dtype:
        return super().cache_dtype(self.index["dtype"])

    def check_rows(self, data: TrainingData) -> None:
        rows: Any = ConcatDataset([data.train_rows, data.eval_rows])
        lacking = 0
        for row in (rows[i] for i in range(len(rows))):
            needs_n = needs_of(row, self.reach)
            for part in pieces_of(row["document_ids"]):
                key = piece_key(row["input_ids"][part])
                lacking += key not in self._where or bool((needs_n[part] & ~self._has(key)).any())
        if lacking:
            what = f"{lacking} pieces of the sequences, or positions of them"
            how = f"data.max_length {self.index['max_length']}, or other loss masks, draft.window or draft.num_layers"
            raise ValueError(f"target.cache {self.folder} lacks {what}: it was made with {how}: {AGAIN}")

    def _has(self, key: Key) -> Tensor:
        """uint8 [n]: what of a piece is there, as in `needs_of`."""
        file, (tokens, *_) = self._where[key]
        return file.get_slice("needs")[tokens]

    def expect(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches[:2]:  # as one is used, the next is read
            self.begin(batch)

    def fetch(self, batch: dict[str, Tensor], room: list[Tensor]) -> list[AsyncResult[None]]:
        return [self.threads.apply_async(self.read, (batch, room))]

    def read(self, batch: dict[str, Tensor], room: list[Tensor]) -> None:
        """Put what is stored of a batch's features and last hidden states into `room`."""
        for b, documents in enumerate(batch["document_ids"]):
            for part in pieces_of(documents[documents >= 0]):
                if (key := piece_key(batch["input_ids"][b, part])) not in self._where:
                    continue
                file, (_, *spans) = self._where[key]
                has_n = self._has(key)
                for bit, name, span, values_BL in zip((1, 2), FIELDS, spans, room, strict=True):
                    values, out = file.get_slice(name)[span], values_BL[b, part]
                    if values.dtype == torch.float8_e4m3fn:
                        values = values.float() * file.get_slice("scales")[span][:, None]
                    out[(has_n & bit) > 0] = values.to(out.dtype)


# What speculators wrote


class SpeculatorsFiles:
    """Hidden states that speculators (vllm-project) wrote for offline training of this target, as sequences of one document
    each, in the order of i, of at most `max_length` tokens. ValueError: one line, for anything else.

    hs_{i}.safetensors holds `token_ids` [n] and `hidden_states` [n, F + 1, T]: the feature layers and what enters the
    target's final norm. The loss mask is in the file, or in the data set next to it (Arrow, written by `datasets`): its row
    i has `loss_mask` [n] and the same tokens as `input_ids`.

    folder: of hs_{i}.safetensors, or the one above its `hidden_states`.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder).expanduser()
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        self.samples = sorted((int(p.stem[3:]), p) for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit())
        if not self.samples:
            raise ValueError(f"--speculators {folder} has no hs_NUMBER.safetensors: give the folder that has them")
        self.target, self.max_length, self.norm = target, max_length, target.final_norm()
        self.masks: Any = None
        if data_sets := [each for each in (root, root.parent) if (each / "state.json").is_file()]:
            from datasets import load_from_disk

            self.masks = load_from_disk(str(data_sets[0])).with_format(None)  # it may have been saved as tensors
            if not {"input_ids", "loss_mask"} <= {*self.masks.column_names}:
                has = self.masks.column_names
                raise ValueError(f"the data set {data_sets[0]} has {has}, but not input_ids and loss_mask")
        else:
            logger.warning("no data set next to %s: all of a file without a loss_mask is learned from", root)
        self._compare()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        file = open_tensors(path)
        has = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        ids, mask = (file.get_tensor(n) if n in has else torch.empty(0) for n in ("token_ids", "loss_mask"))
        n, T, V, layers = ids.numel(), self.target.hidden_size, self.target.vocab_size, len(self.target.layer_ids) + 1
        if "hidden_states_scales" in has:
            raise ValueError(f"{path} has hidden states in FP8 (hidden_states_scales), unsupported: write 16 bits")
        if "loss_mask" not in has:
            mask = torch.ones(n)
            if self.masks is not None:
                row = self.masks[number] if number < len(self.masks) else {"input_ids": None}
                if row["input_ids"] != ids.tolist():
                    raise ValueError(f"{path}: row {number} of the data set next to it has other tokens")
                mask = torch.tensor(row["loss_mask"])
        is_ids = n > 0 and ids.dim() == 1 and not ids.is_floating_point() and 0 <= ids.min() <= ids.max() < V
        if not (is_ids and has.get("hidden_states") == (n, layers, T) and mask.shape == (n,)):
            wanted = f"token_ids [n], ids in 0..{V - 1}, hidden_states [n, {layers}, {T}] (of target.layer_ids and what"
            raise ValueError(f"{path} has {has}; it must have {wanted} enters the final norm), perhaps loss_mask [n]")
        if n > self.max_length:
            raise ValueError(f"{path} has {n} tokens, data.max_length is {self.max_length}: raise data.max_length")
        document_ids = torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.long(), "loss_mask": mask.long(), "document_ids": document_ids, "path": path}

    @torch.no_grad()
    def compute(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sample's features [n, F*T] and last hidden states [n, T] after the final norm."""
        for row in rows:
            hidden_nFT = open_tensors(row["path"]).get_tensor("hidden_states").to(self.target.device, self.target.dtype)
            yield hidden_nFT[:, :-1].flatten(1).cpu(), self.norm(hidden_nFT[None, :, -1])[0].cpu()

    def _compare(self) -> None:
        """ValueError unless the target gives a sample's first features, that of the most tokens of the first 16."""
        sample = max((self[i] for i in range(min(16, len(self)))), key=lambda sample: sample["input_ids"].numel())
        ids = sample["input_ids"][None, :32]
        own = self.target.features(ids, torch.arange(ids.shape[1])[None])
        part = slice(int(ids.shape[1] > 1), ids.shape[1])  # beside a first token's activations others may not count
        pairs = zip(next(self.compute([sample])), own, strict=True)
        off, off_last = (relative(theirs[part], ours[0, part].cpu()) for theirs, ours in pairs)
        if max(off, off_last) > 0.1:
            offs = f"features are {off:.0%}, last hidden states after the final norm {off_last:.0%} off the target's"
            why = f"another target, other layers than target.layer_ids {self.target.layer_ids}, or after that norm already"
            raise ValueError(f"--speculators: {offs}: {why}")

    def write_documents(self, path: Path) -> None:
        """The samples with their masks as a .jsonl source. Those with nothing to learn from are dropped, and counted."""
        dropped = 0
        with partial_path(path).open("w", encoding="utf-8") as file:
            for sample in (self[i] for i in range(len(self))):
                row = {name: sample[name].tolist() for name in ("input_ids", "loss_mask")}
                if 1 in row["loss_mask"][1:]:
                    file.write(json.dumps(row) + "\n")
                else:
                    dropped += 1
        put(partial_path(path), path)
        if dropped:
            logger.warning("%d samples with no token to learn from are not in %s", dropped, path)


# Writing


class Piece(NamedTuple):
    sequence: int  # number of the first sequence that has it
    part: slice  # its positions there
    key: Key
    needs: Tensor  # uint8 [n], of all sequences that have it


Shard = list[Piece]
Compute = Callable[[list[dict[str, Any]]], Iterable[tuple[Tensor, Tensor]]]
"""Features [n, F*T] and last hidden states [n, T] of each sequence, on the host."""


def write_cache(recipe: Recipe, out: str | None, speculators: str | None = None, shard_mib: float = 512) -> str:
    """Fill `out`, with the features of the recipe's sequences or with what a folder for `SpeculatorsFiles` has, and return
    the line that says how to train from it, on the main process. Run again, it writes what is missing. ValueError: for a
    user's mistake.
    """
    settings = recipe.target
    if out is None:
        raise ValueError(f"no folder given: {COMMAND} RECIPE --out DIR (or target.cache in the recipe)")
    if settings.shard:
        raise ValueError("target.shard is true, but here every process has a target of its own: set it to false")
    folder = Path(out).expanduser()  # of --out=~/x the shell leaves it to us
    accelerator = Accelerator()
    rank, world_size, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    check_device(accelerator.device)
    check_launch(world_size)
    say: Any = print if is_main else (lambda *_: None)
    target: TargetBase
    files = None
    if speculators:
        # It runs over a few tokens only: its weights stay on the disk.
        target = FrozenTarget.from_recipe(settings, accelerator.device, where="disk")
        files = SpeculatorsFiles(speculators, target, recipe.data.max_length)
    elif settings.server:
        target = ServedTarget(settings, accelerator.device, recipe.data.max_length)
    else:
        target = FrozenTarget.from_recipe(settings, accelerator.device)
        if settings.check:
            target.check()
    target.reach = recipe.draft.reach
    sequences, compute = (files, files.compute) if files else _sequences(recipe, target, accelerator.device, say)
    dtype, as_fp8 = target.cache_dtype(settings.cache_dtype), settings.cache_dtype == FP8
    feature_bytes = len(target.layer_ids) * target.hidden_size * (1 if as_fp8 else dtype.itemsize) + 4 * as_fp8
    widths = feature_bytes, target.hidden_size * dtype.itemsize
    shards = plan_shards(sequences, target.reach, int(shard_mib * 2**20), widths)
    index = _index(recipe, target, shards, FP8 if as_fp8 else str(dtype)[6:])
    size = index["tokens"] + sum(index[name] * width for name, width in zip(FIELDS, widths, strict=True))
    with alone_in(folder, "writing features") if is_main else nullcontext():
        if is_main:
            say(f"cache: {_claim(folder, index, size)}")
        wait_for_all()  # nothing is written into a folder that is refused
        for number in range(rank, len(shards), world_size):
            if (path := folder / shard_name(number)).exists():
                continue
            tensors = _tensors_of(shards[number], sequences, compute, dtype, as_fp8)
            save_tensors(partial_path(path), tensors, "sha256", _checksum(tensors))
            put(partial_path(path), path)
            say(f"cache: shard {number + 1} of {len(shards)}")
        if files and is_main:
            files.write_documents(folder / DOCUMENTS)
        wait_for_all()
    accelerator.end_training()
    overrides = [as_override("target.cache", str(folder))]
    if recipe.target.reuse > 1:  # the cache has the features of all passes
        overrides += ["target.reuse=1", "target.ring=null"]
    if files:
        overrides.append(as_override("data.sources", [str(folder / DOCUMENTS)]))
    return f"train from it: peagle-train train RECIPE {' '.join(overrides)}\n" if is_main else ""


def _sequences(recipe: Recipe, target: TargetBase, device: torch.device, say: Any) -> tuple[Any, Compute]:
    """The recipe's sequences, and how the target computes some of them."""
    data = load_training_data(encoder_of(recipe, target.vocab_size), say)
    # Nothing of the draw is read: also while nobody knows how many segments `auto` will be.
    collator = make_collator(with_segments(recipe, 1), seed=0)
    no_rows = target.head_rows(torch.zeros(0, dtype=torch.int64)).to(device)

    def compute(each: list[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """As a training step with one sequence a batch computes it: the same padding, so the same bits."""
        batches = [collator([sequence]) for sequence in each]
        for i, batch in enumerate(batches):
            target.expect(batches[i:])
            found = target.outputs(batch, no_rows)
            yield found.features[0].cpu(), found.last_hidden[0].cpu()

    return ConcatDataset([data.train_rows, data.eval_rows]), compute


def plan_shards(sequences: Any, reach: int | None, shard_bytes: int, widths: tuple[int, int]) -> list[Shard]:
    """Every piece once; a shard ends after the sequence that fills it. `widths`: bytes of a position in each of FIELDS."""
    pieces: dict[Key, Piece] = {}
    for number in range(len(sequences)):
        sequence = sequences[number]
        needs_n = needs_of(sequence, reach)
        for part in pieces_of(sequence["document_ids"]):
            key = piece_key(sequence["input_ids"][part])
            pieces.setdefault(key, Piece(number, part, key, needs_n[part])).needs.bitwise_or_(needs_n[part])
    shards, room = list[Shard](), 0
    for _, new in groupby(pieces.values(), key=lambda piece: piece.sequence):
        if room <= 0:
            shards.append([])
            room = shard_bytes
        for piece in new:
            shards[-1].append(piece)
            room -= sum(n * width for n, width in zip(_counts(piece)[1:], widths, strict=True))
    return shards


def _counts(piece: Piece) -> list[int]:
    """Its tokens, those whose features are kept, and those whose last hidden states are."""
    return [piece.needs.numel(), int((piece.needs & 1).sum()), int((piece.needs >> 1).sum())]


def _index(recipe: Recipe, target: TargetBase, shards: list[Shard], stored: str) -> dict[str, Any]:
    """What the features are of."""
    plan = hashlib.sha256()  # over keys and needs of all pieces and where each shard ends
    for shard in shards:
        plan.update(repr([(piece.key, piece.needs.numpy().tobytes()) for piece in shard]).encode())
    counts = [sum(each) for each in zip(*(_counts(piece) for shard in shards for piece in shard), strict=True)]
    return {
        "version": VERSION,
        "target": target_fingerprint(recipe.target.path),
        "layer_ids": target.layer_ids,
        "dtype": stored,
        "computed_in": str(target.dtype)[6:],
        "max_length": recipe.data.max_length,  # why something may be missing
        "shards": len(shards),
        **dict(zip(("tokens", *FIELDS), counts, strict=True)),
        "plan": plan.hexdigest(),
    }


def _claim(folder: Path, index: dict[str, Any], size: int) -> str:
    """Make the folder this cache's; returns what is to do. ValueError if it holds something else, or has no room."""
    old = read_index(folder, "--out") if (folder / INDEX).exists() else None
    if old is None and any(path != partial_path(folder / INDEX) for path in folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty and holds no cache; give another folder")
    if old is not None and (names := [name for name, value in index.items() if old.get(name) != value]):
        what = f"of another target, other sequences or other settings ({', '.join(names)} differ)"
        raise ValueError(f"--out {folder} holds the cache {what}: give another folder, or remove it")
    there, free = sum(path.stat().st_size for path in folder.glob("*.safetensors")), shutil.disk_usage(folder).free
    gib = f"{size / 2**30:.2f} GiB, {there / 2**30:.2f} GiB there, {free / 2**30:.2f} GiB free"
    words = f"{index['tokens']} tokens in {index['shards']} shards: {gib}"
    if size - there > free:
        remedy = "give another disk, or a smaller target.cache_dtype"
        raise ValueError(f"--out {folder} has too little room: {words}: {remedy}")
    if old is None:
        write_json(folder / INDEX, index)
    return words


def _tensors_of(shard: Shard, sequences: Any, compute: Compute, dtype: torch.dtype, as_fp8: bool) -> dict[str, Tensor]:
    """What a shard's file holds; ValueError for features that are not finite in the cache's dtype."""
    found, rows = [], []
    by_sequence = [(number, [*pieces]) for number, pieces in groupby(shard, key=lambda piece: piece.sequence)]
    for number, pieces in by_sequence:
        rows.append({**sequences[number], "loss_mask": torch.zeros_like(sequences[number]["loss_mask"])})
        for piece in pieces:  # the mask that asks for these pieces' needs, be they other sequences', too
            rows[-1]["loss_mask"][piece.part] = piece.needs >> 1
    for (_, pieces), both in zip(by_sequence, compute(rows), strict=True):
        for piece in pieces:
            found.append([t[piece.part][(piece.needs & bit) > 0].to(dtype) for bit, t in enumerate(both, start=1)])
    features, last_hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not bool(features.isfinite().all() & last_hidden.isfinite().all()):
        what = f"of sequences {shard[0].sequence} to {shard[-1].sequence} are not all finite in {str(dtype)[6:]}"
        raise ValueError(f"the target's features {what}: give another target.cache_dtype or target.dtype")
    keys, lengths = torch.tensor([piece.key for piece in shard]), torch.tensor([_counts(piece) for piece in shard])
    needs = torch.cat([piece.needs for piece in shard])
    tensors = {"features": features, "last_hidden": last_hidden, "keys": keys, "lengths": lengths, "needs": needs}
    if as_fp8:
        scales = (features.abs().amax(1).float() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-30)
        tensors |= {"features": (features / scales[:, None]).to(torch.float8_e4m3fn), "scales": scales}
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verify_cache(folder: Path) -> str:
    """Compare what every file of a cache holds with its checksum; ValueError names the first that has another."""

    def check(path: Path) -> None:
        file = open_tensors(path)
        if _checksum({key: file.get_tensor(key) for key in file.keys()}) != file.metadata().get("sha256"):
            raise ValueError(f"--verify: {path} is damaged: remove it and run the same {COMMAND} again")

    paths = [folder / shard_name(number) for number in range(read_index(folder, "--verify")["shards"])]
    with ThreadPoolExecutor(cores()) as threads:
        list(threads.map(check, paths))
    return f"verified: {len(paths)} files of {folder}"
