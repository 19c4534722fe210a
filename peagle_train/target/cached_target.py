"""A target whose features are on disk: what training needs of it, without its body."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from peagle_train.core.segments import TargetOutputs
from peagle_train.data.training_data import TrainingData
from peagle_train.recipe import Target
from peagle_train.target.base import TargetBase, default_layer_ids
from peagle_train.target.feature_cache import FIELDS, FeatureCache, fingerprint

logger = logging.getLogger(__name__)
AGAIN = "make the cache again with tools/cache_features.py, or change the recipe"


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
