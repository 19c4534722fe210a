"""peagle_train: train P-EAGLE drafters at long context in bounded memory.

Names are looked up on first use, so that importing the package costs nothing and the collator brings only torch.
"""

# ruff: noqa: F401 (what is imported for type checkers is what `_MODULES` names)
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

_MODULES = {
    "config": "Recipe load_recipe",
    "core.cod": "assign_cod_segments balanced_boundaries generate_cod_sample_indices segment_capacity",
    "core.collator": "CODCollator",
    "core.compiled": "CompiledDraft",
    "core.draft": "PEagleDraft",
    "core.draft_config": "PEagleDraftConfig",
    "core.loss": "chunked_linear_loss",
    "core.passes": "TargetOutputs recompute_step",
    "core.relay": "RelayBuffers relay_step",
    "serving.drafter_io": "save_drafter",
    "serving.start": "new_drafter",
    "target_model.frozen": "FrozenTarget",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"peagle_train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'peagle_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
