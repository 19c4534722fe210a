"""A target whose features are on disk: what training needs of it, without its body."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from peagle_train.core.segments import TargetOutputs
from peagle_train.data.packing import PackedRows
from peagle_train.data.training_data import TrainingData
from peagle_train.recipe import Target
from peagle_train.target.base import TargetBase, default_layer_ids
from peagle_train.target.feature_cache import FIELDS, CachedRows, FeatureCache, fingerprint

logger = logging.getLogger(__name__)
AGAIN = "make the cache again with tools/cache_features.py, or change the recipe"


class CachedTarget(TargetBase):
    """A target that answers from a `FeatureCache`: its layers are never loaded, its head stays on the disk until its rows
    are asked for. Batches must come from `attach`ed rows.

    Args:
        cache: whole. config: the target's.
    """

    def __init__(self, cache: FeatureCache, config: Any) -> None:
        self.cache = cache
        self.config = config.get_text_config()
        self.layer_ids = list(cache.index.layer_ids)
        self._head: Tensor | None = None

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
        return cls(opened, config)

    def attach(self, data: TrainingData) -> TrainingData:
        """The same rows with their features; ValueError if the cache lacks some."""
        rows = {"data.sources": data.train_rows, "held-out rows": data.eval_rows}
        for name, part in rows.items():
            total, lacking, longest = self.cache.missing(part)
            if lacking:
                raise ValueError(
                    f"target.cache {self.cache.folder} lacks {lacking} of {total} pieces of the {name}, the longest of"
                    f" {longest} tokens (it was made of {self.cache.index.pieces} pieces with data.max_length"
                    f" {self.cache.index.max_length}): {AGAIN}"
                )
        return replace(
            data, train_rows=self._with_features(data.train_rows), eval_rows=self._with_features(data.eval_rows)
        )

    def _with_features(self, rows: PackedRows) -> CachedRows:
        return CachedRows(rows, self.cache)

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

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        """What the batch brought along, in the dtype in which the target computed."""
        features, last_hidden = (batch[n].to(head_rows.device, head_rows.dtype, non_blocking=True) for n in FIELDS)
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
