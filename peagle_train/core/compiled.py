"""The drafter's passes as compiled graphs: one for keys and values alone, one with gradients, one for evaluation.

Each has a function of its own, because torch.compile keeps its graphs by function: a first evaluation would otherwise count
as a recompile of the training step. Shapes are static (a static plan), so that no batch ever compiles anything again.
"""

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.draft import KV, DraftOutput, Labels, PEagleDraft
from peagle_train.core.visibility import Visibility

logger = logging.getLogger(__name__)


def _keys_values_pass(draft: PEagleDraft, *arguments: Any) -> DraftOutput:
    return _call(draft, True, *arguments)


def _training_pass(draft: PEagleDraft, *arguments: Any) -> DraftOutput:
    return _call(draft, False, *arguments)


def _evaluation_pass(draft: PEagleDraft, *arguments: Any) -> DraftOutput:
    return _call(draft, False, *arguments)


def _call(
    draft: PEagleDraft,
    keys_values_only: bool,
    token: Tensor,
    position: Tensor,
    features: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int, int],
    flex: dict[int, Any],
    context: list[KV] | None,
    skip: int,
    labels: Labels | None,
) -> DraftOutput:
    # Made inside the graph: a Visibility keeps masks, which a graph must not see from outside. Flex's tables come along.
    visibility = Visibility(*tables, *sizes, flex)
    return draft(token, position, features, visibility, context, keys_values_only, skip, labels)


def failed_guard(function: Any) -> str:
    """The guard for which `function` is being compiled again, in torch's words and one line."""
    from torch._dynamo.utils import guard_failures  # torch has no public place for it

    reasons = guard_failures.get(function.__code__, [])
    return " ".join(reasons[-1].split()) if reasons else "that TORCH_LOGS=recompiles shows"


class CompiledDraft:
    """Stands in for a `PEagleDraft` in `relay_step` and `recompute_step`; parameters stay the drafter's.

    Args:
        draft: on its device.
        backend: torch.compile's; "inductor", or "aot_eager" to test.
        mode: torch.compile's, e.g. "max-autotune-no-cudagraphs". Not one with CUDA graphs: gradients lie in their memory,
            and a step's second backward would overwrite those of the first.
    """

    def __init__(self, draft: PEagleDraft, backend: Any = "inductor", mode: str | None = None) -> None:
        self.draft = draft
        self.graphs = {"keys and values": 0, "training": 0, "evaluation": 0}
        if backend != "inductor":
            mode = None
        self._passes = {
            "keys and values": self._compile(_keys_values_pass, "keys and values", backend, mode),
            "training": self._compile(_training_pass, "training", backend, mode),
            "evaluation": self._compile(_evaluation_pass, "evaluation", backend, mode),
        }

    def _compile(self, function: Any, name: str, backend: Any, mode: str | None) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(backend) if isinstance(backend, str) else backend
        options = torch._inductor.list_mode_options(mode) if mode else {}
        # Code of its own: torch keeps graphs by code object, so that another CompiledDraft's would be searched, too.
        function = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)

        def counted(graph: Any, inputs: Any) -> Any:
            self.graphs[name] += 1
            if self.graphs[name] > 1:
                logger.warning(
                    "the %s pass was compiled again (graph %d), because of the guard %s",
                    name,
                    self.graphs[name],
                    failed_guard(function),
                )
            if options:
                from torch._inductor.compile_fx import compile_fx

                return compile_fx(graph, inputs, config_patches=options)
            return inner(graph, inputs)

        return torch.compile(function, fullgraph=True, dynamic=False, backend=counted)

    @property
    def recompiles(self) -> int:
        """Graphs compiled beyond the first of each pass."""
        return sum(max(0, count - 1) for count in self.graphs.values())

    @property
    def mask_token_id(self) -> int:
        return self.draft.mask_token_id

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    @property
    def config(self) -> Any:
        return self.draft.config

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
        name = "keys and values" if keys_values_only else "training" if torch.is_grad_enabled() else "evaluation"
        v = visibility
        sizes = (v.num_context, v.num_depth0, v.first_rollout, v.num_depths, v.cut)
        tables = (v.start, v.anchor, v.depth, v.context_end)
        return self._passes[name](self.draft, token, position, features, tables, sizes, v.flex, context, skip, labels)
