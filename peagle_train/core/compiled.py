"""The drafter's passes as compiled graphs: for keys and values alone, with gradients, and for evaluation; one for each of
the few sizes that a static plan has.

No batch should compile anything again.
"""

import logging
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.draft import KV, DraftOutput, Labels, Layer, PEagleDraft
from peagle_train.core.visibility import Visibility

logger = logging.getLogger(__name__)


def _pass(
    draft: PEagleDraft, tables: Any, token: Tensor, position: Tensor, features: Tensor, *more: Any
) -> DraftOutput:
    # Made inside the graph: a Visibility keeps masks, which a graph must not see from outside. Flex's tables come along.
    return draft(token, position, features, Visibility(*tables), *more)


class Graphs(Counter[str]):
    """Graphs compiled, by name."""

    recompiles = 0
    """Those beyond the first of a function, each of which is warned about."""

    def compile(self, function: Any, name: str, backend: Any) -> Callable[..., Any]:
        """`function`, compiled for static shapes and counted as `name`."""
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(backend) if isinstance(backend, str) else backend
        # Code of its own: torch keeps graphs by code object, where a first evaluation would be a recompile of the training.
        function = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        is_compiled = False

        def counted(graph: Any, inputs: Any) -> Any:
            nonlocal is_compiled
            self[name] += 1
            if is_compiled:
                self.recompiles += 1
                logger.warning("the %s pass was compiled again: TORCH_LOGS=recompiles says why", name)
            is_compiled = True
            return inner(graph, inputs)

        return torch.compile(function, fullgraph=True, dynamic=False, backend=counted)


def compile_layers(draft: PEagleDraft, backend: Any = "inductor") -> Graphs:
    """Compile each layer by itself, in place, for drafters that FSDP2 shards: its hooks around a layer's forward, which
    gather the weights, stay outside of the graph. Arguments as `CompiledDraft`'s.
    """
    graphs = Graphs()

    def compiled(layer: Layer, index: int) -> Callable[..., Any]:
        functions: dict[tuple[Any, ...], Callable[..., Any]] = {}

        def forward(x_BNH: Tensor, embeds: Tensor | None, rope: Any, context: Any, visibility: Any, skip: int) -> Any:
            # A graph for each kind of pass, idle ones on a single element among them.
            kind = torch.is_grad_enabled(), tuple(x_BNH.shape), context is None, skip, visibility.first_rollout
            if kind not in functions:
                functions[kind] = graphs.compile(Layer.forward, f"layer {index}'s {kind}", backend)
            return functions[kind](layer, x_BNH, embeds, rope, context, visibility, skip)

        return forward

    for index, layer in enumerate(draft.layers):
        assert isinstance(layer, Layer)
        layer.forward = compiled(layer, index)  # type: ignore[method-assign]
    return graphs


class CompiledDraft:
    """Stands in for a `PEagleDraft` in `relay_step` and `recompute_step`; parameters stay the drafter's.

    Args:
        draft: on its device.
        backend: torch.compile's; "inductor", or "aot_eager" to test. CUDA graphs are no choice: gradients lie in their
            memory, and a step's second backward would overwrite those of the first.
    """

    def __init__(self, draft: PEagleDraft, backend: Any = "inductor") -> None:
        self.draft, self.backend = draft, backend
        self.config, self.dtype, self.mask_token_id = draft.config, draft.dtype, draft.mask_token_id
        self.graphs = Graphs(dict.fromkeys(("keys and values", "training", "evaluation"), 0))
        self._passes: dict[tuple[str, int], Callable[..., Any]] = {}

    def __call__(
        self,
        token: Tensor,
        position: Tensor,
        features: Tensor,
        visibility: Visibility,
        context: list[KV] | None = None,
        keys_values_only: bool = False,
        skip: int = 0,
        labels: Labels | None = None,
    ) -> DraftOutput:
        v, name = visibility, "training" if torch.is_grad_enabled() else "evaluation"
        if keys_values_only:
            name = "keys and values"
        tables: tuple[Any, ...] = (v.start, v.anchor, v.depth, v.context_end)
        tables += (v.num_context, v.num_depth0, v.first_rollout, v.num_depths, v.cut, v.flex)
        key = name, token.shape[1]
        if key not in self._passes:
            self._passes[key] = self.graphs.compile(_pass, name, self.backend)
        more = context, keys_values_only, skip, labels
        return self._passes[key](self.draft, tables, token, position, features, *more)
