"""What training needs of a target, whether its outputs are computed (`FrozenTarget`) or read (`CachedTarget`).

V: draft vocabulary, T: the target's hidden size.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from peagle_train.core.segments import TargetOutputs


class TargetBase(ABC):
    """A target that is only ever read."""

    config: Any
    """transformers' config of its text model."""
    layer_ids: list[int]
    """The three layers whose *input* is a feature, ascending."""

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """Tokens that end the target's answers, ascending."""

    @abstractmethod
    def embedding_rows(self) -> Tensor:
        """[vocabulary, T], the input embeddings. Every rank must call it where the target is sharded."""

    @abstractmethod
    def head_weight(self) -> Tensor:
        """[vocabulary, T], in the target's dtype; may lie on the CPU."""

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """[V, T], the head's rows of the given tokens."""
        weight = self.head_weight()
        return weight[token_ids.to(weight.device)]

    def expect(self, batch: dict[str, Tensor]) -> None:
        """`outputs` will be asked for this very batch soon: begin to read what it needs, if anything is read."""
        return

    @abstractmethod
    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        """What a step needs of the target for a collator's batch, on the device of `head_rows`.

        Args:
            batch: on the host; on a device it costs a wait.
        """

    @abstractmethod
    def check(self) -> None:
        """ValueError where features or labels are not what training takes them for."""


def default_layer_ids(num_layers: int) -> list[int]:
    """(2, n // 2, n - 3), vLLM's default; (2, 3, 4) at n = 6, where that names a layer twice and vLLM would read only two
    features. ValueError below.
    """
    if num_layers < 6:
        raise ValueError(
            f"the target has {num_layers} layers, too few for the default feature layers (2, n // 2, n - 3): give"
            " target.layer_ids, three ascending ids"
        )
    return [2, num_layers // 2, max(num_layers - 3, num_layers // 2 + 1)]
