"""peagle_train: train P-EAGLE drafters at long context in bounded memory.

Names are looked up on first use, so that importing the package costs nothing and the collator brings only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peagle_train.cod import generate_cod_sample_indices
    from peagle_train.collator import CODCollator
    from peagle_train.draft import PEagleDraft
    from peagle_train.draft_config import PEagleDraftConfig
    from peagle_train.loss import chunked_linear_loss
    from peagle_train.partition import assign_cod_segments, balanced_boundaries, segment_capacity
    from peagle_train.recipe import Recipe, load_recipe
    from peagle_train.relay import RelayBuffers, relay_step
    from peagle_train.segments import TargetOutputs, recompute_step
    from peagle_train.target import FrozenTarget

_HOMES = {
    "CODCollator": "collator",
    "FrozenTarget": "target",
    "PEagleDraft": "draft",
    "PEagleDraftConfig": "draft_config",
    "Recipe": "recipe",
    "RelayBuffers": "relay",
    "TargetOutputs": "segments",
    "assign_cod_segments": "partition",
    "balanced_boundaries": "partition",
    "chunked_linear_loss": "loss",
    "generate_cod_sample_indices": "cod",
    "load_recipe": "recipe",
    "recompute_step": "segments",
    "relay_step": "relay",
    "segment_capacity": "partition",
}

__all__ = [
    "CODCollator",
    "FrozenTarget",
    "PEagleDraft",
    "PEagleDraftConfig",
    "Recipe",
    "RelayBuffers",
    "TargetOutputs",
    "assign_cod_segments",
    "balanced_boundaries",
    "chunked_linear_loss",
    "generate_cod_sample_indices",
    "load_recipe",
    "recompute_step",
    "relay_step",
    "segment_capacity",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"peagle_train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'peagle_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
