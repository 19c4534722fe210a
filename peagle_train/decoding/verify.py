"""The target's side of speculative decoding: a cache of keys and values that tokens are added to and taken from again.

n: tokens of a call, T: the target's hidden size, V: its vocabulary.
"""

import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peagle_train.target.frozen import FrozenTarget


class CachedTarget:
    """A frozen target over one growing text. A context manager: inside, hooks keep the three layers' inputs.

    Its cache keeps all tokens in every layer, in sliding ones too (whose masks transformers makes from the config), so that
    any number of tokens can be taken back.
    """

    def __init__(self, target: FrozenTarget) -> None:
        self.target = target
        names = inspect.signature(target.base.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # transformers renamed it
        self._kept: list[Tensor] = []
        self._handles: list[Any] = []
        self.clear()

    def __enter__(self) -> "CachedTarget":
        for layer in self.target.layer_ids:  # ascending, so that the kept ones are in the features' order
            self._handles.append(self.target.layers[layer].register_forward_pre_hook(self._keep, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._kept.append(args[0] if args else kwargs["hidden_states"])

    def clear(self) -> None:
        """Begin a new text."""
        self.length = 0
        self._cache = DynamicCache()

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], num_logits: int) -> tuple[Tensor, Tensor]:
        """Run the next tokens of the text.

        Returns:
            features [n, 3T] of these tokens, and the logits [num_logits, V] of the last ones, in the target's dtype.
        """
        assert self._handles, "a CachedTarget is used in a with block"
        device = self.target.device
        ids_1n = torch.tensor([tokens], dtype=torch.int64, device=device)
        position_1n = torch.arange(self.length, self.length + len(tokens), device=device)[None]
        self._kept.clear()
        result = self.target.base(
            input_ids=ids_1n,
            position_ids=position_1n,
            attention_mask=None,
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        self.length += len(tokens)
        features = torch.cat([hidden[0] for hidden in self._kept], dim=-1)
        return features, self.target.head(result.last_hidden_state[0, len(tokens) - num_logits :])

    def crop(self, length: int) -> None:
        """Take back all but the first `length` tokens."""
        assert 0 <= length <= self.length
        if length < self.length:
            self._cache.crop(length - self.length)
        self.length = length


def end_tokens(target: FrozenTarget) -> frozenset[int]:
    """The tokens at which the target's generation ends, by its config and its generation config."""
    ids: set[int] = set()
    for source in (target.config, getattr(target.model, "generation_config", None)):
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ids)


@torch.no_grad()
def greedy_tokens(target: CachedTarget, prompt: Sequence[int], max_tokens: int, eos: frozenset[int]) -> list[int]:
    """The target's own greedy output, one token a pass: what speculative decoding has to reproduce."""
    target.clear()
    tokens: list[int] = []
    given = prompt
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in eos):
        _, logits_1V = target.extend(given, 1)
        tokens.append(int(logits_1V[0].argmax()))
        given = tokens[-1:]
    return tokens
