"""The weight of a layer as a plain matrix, whatever a quantiser has made of it. V: vocabulary, T: the target's width."""

from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(module: nn.Module) -> bool:
    """Whether `module.weight` alone says what the layer does, in numbers that mean what they say (a bias may be there)."""
    weight: Any = getattr(module, "weight", None)
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return (
        type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and names <= {"weight", "bias", "embed_scale"}
    )


@torch.no_grad()
def dense_head(head: nn.Module, width: int, dtype: torch.dtype, device: torch.device, chunk: int = 256) -> Tensor:
    """[V, T]: the matrix that a linear layer multiplies by, found by giving it the rows of the identity.

    Exact for what stores its weight in fewer bits and multiplies in `dtype`; `FrozenTarget.check` compares the result with
    the model's own logits.

    Args:
        width: T. chunk: rows of the identity at a time.
    """
    weight_VT: Tensor | None = None
    for start in range(0, width, chunk):
        identity = torch.eye(min(chunk, width - start), width, dtype=dtype, device=device).roll(start, dims=1)
        columns = head(identity)
        if weight_VT is None:
            weight_VT = columns.new_empty(columns.shape[1], width, dtype=dtype)
        weight_VT[:, start : start + chunk] = columns.T
    assert weight_VT is not None
    return weight_VT


@torch.no_grad()
def dense_embeddings(embeddings: nn.Module, vocab_size: int, device: torch.device) -> Tensor:
    """[V, T]: what a table of embeddings answers for every token."""
    return embeddings(torch.arange(vocab_size, device=device)[None])[0]
