"""Which documents are held out, and how often each other one comes in an epoch: decided by their own keys."""

import math
from collections.abc import Sequence

import numpy as np

from peagle_train.data.sources import Document


def held_out_documents(keys_D32: np.ndarray, eval_fraction: float) -> np.ndarray:
    """bool [D]: whether a document is held out, about `eval_fraction` of them.

    Its own key decides, so it lands on the same side on every machine and whatever the others are.

    Args:
        keys_D32: uint8, sha256 of each document.

    Raises:
        ValueError: a fraction outside of [0, 1), or one that leaves nothing to train on.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; it must lie in [0, 1)")
    held_out_D = _lies_below(keys_D32[:, :8], eval_fraction)
    if held_out_D.size and held_out_D.all():
        raise ValueError(f"data.eval_fraction {eval_fraction} holds out all {held_out_D.size} documents: lower it")
    return held_out_D


def _lies_below(bytes_D8: np.ndarray, fraction: float) -> np.ndarray:
    """bool [D]: whether 8 bytes, read as a number in [0, 1), lie below the fraction, itself in [0, 1)."""
    numbers_D = np.ascontiguousarray(bytes_D8).view(">u8").reshape(-1)
    return numbers_D < np.uint64(math.ceil(fraction * 2**64))


def split_train_eval(documents: Sequence[Document], eval_fraction: float) -> tuple[list[Document], list[Document]]:
    """Those to train on and those that `held_out_documents` holds out."""
    keys_D32 = np.frombuffer(bytes.fromhex("".join(d.key for d in documents)), dtype=np.uint8).reshape(-1, 32)
    held_out_D = held_out_documents(keys_D32, eval_fraction)
    train = [document for document, is_out in zip(documents, held_out_D, strict=True) if not is_out]
    return train, [document for document, is_out in zip(documents, held_out_D, strict=True) if is_out]


def times_an_epoch(keys_D32: np.ndarray, weights_D: np.ndarray) -> np.ndarray:
    """int64 [D]: how often each document is packed.

    Weight 2.25 is twice, and a third time for that quarter of the documents that their keys choose (by other bytes than
    those that hold documents out).
    """
    whole_D = np.floor(weights_D)
    times_D = whole_D.astype(np.int64)
    for weight in np.unique(weights_D).tolist():
        is_more_D = (weights_D == weight) & _lies_below(keys_D32[:, 8:16], weight - math.floor(weight))
        times_D += is_more_D
    return times_D
