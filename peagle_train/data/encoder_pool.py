"""Worker processes that encode batches of rows; results come in the order of the batches."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from peagle_train.data.readers import RawRow
from peagle_train.data.row_encoder import EncodedBatch, RowEncoder
from peagle_train.data.training_data import make_encoder
from peagle_train.recipe import Recipe

_WINDOW = 4
"""Batches under way for each worker."""


def encoded_by_workers(
    rows: Iterator[list[RawRow]], num_workers: int, initial: tuple[Any, ...]
) -> Iterator[tuple[list[RawRow], EncodedBatch]]:
    """Batches in their order, encoded by processes of their own; a bounded number is under way."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizers' threads in whatever state they are
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=initial)
    window: deque[tuple[list[RawRow], Future[EncodedBatch]]] = deque()
    try:
        for raws in rows:
            window.append((raws, pool.submit(_work, raws)))
            if len(window) > _WINDOW * num_workers:
                first, future = window.popleft()
                yield first, future.result()
        for first, future in window:
            yield first, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process ended (out of memory?): start again, with fewer --workers; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: RowEncoder


def _start_worker(recipe: Recipe, vocab_size: int, mask_token_id: int | None) -> None:
    from peagle_train.training.build import load_tokenizer

    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells it
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encoder = make_encoder(recipe, load_tokenizer(recipe), vocab_size, mask_token_id)


def _end_with(parent: Any) -> None:
    """A parent that is killed leaves its workers waiting for ever."""
    parent.join()
    os._exit(1)


def _work(raws: list[RawRow]) -> EncodedBatch:
    return _encoder(raws)
