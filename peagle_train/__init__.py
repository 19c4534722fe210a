"""peagle_train: train P-EAGLE drafters at long context in bounded memory.

Names are looked up on first use, so that importing the package costs nothing and the collator brings only torch.
"""

# ruff: noqa: F401 (what is imported for type checkers is what `_HOMES` names)
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peagle_train.config import Recipe, load_recipe
    from peagle_train.core.cod import (
        assign_cod_segments,
        balanced_boundaries,
        generate_cod_sample_indices,
        segment_capacity,
    )
    from peagle_train.core.collator import CODCollator
    from peagle_train.core.compiled import CompiledDraft
    from peagle_train.core.draft import PEagleDraft
    from peagle_train.core.draft_config import PEagleDraftConfig
    from peagle_train.core.loss import chunked_linear_loss
    from peagle_train.core.passes import TargetOutputs, recompute_step
    from peagle_train.core.relay import RelayBuffers, relay_step
    from peagle_train.serving.drafter_io import save_drafter
    from peagle_train.serving.start import new_drafter
    from peagle_train.target_model.frozen import FrozenTarget

_HOMES = {
    "CODCollator": "core.collator",
    "CompiledDraft": "core.compiled",
    "FrozenTarget": "target_model.frozen",
    "PEagleDraft": "core.draft",
    "PEagleDraftConfig": "core.draft_config",
    "Recipe": "config",
    "RelayBuffers": "core.relay",
    "TargetOutputs": "core.passes",
    "assign_cod_segments": "core.cod",
    "balanced_boundaries": "core.cod",
    "chunked_linear_loss": "core.loss",
    "generate_cod_sample_indices": "core.cod",
    "load_recipe": "config",
    "new_drafter": "serving.start",
    "recompute_step": "core.passes",
    "relay_step": "core.relay",
    "save_drafter": "serving.drafter_io",
    "segment_capacity": "core.cod",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"peagle_train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'peagle_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
