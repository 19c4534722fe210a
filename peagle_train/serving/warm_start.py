"""A run that starts from another drafter (`draft.init_from`): EAGLE-3 or P-EAGLE, in either format.

The drafter brings its shape, its rope and its draft vocabulary; what the recipe says of them must agree with it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peagle_train.core.draft import PEagleDraft
from peagle_train.recipe import Draft, Recipe, RecipeError
from peagle_train.serving.drafter_files import DrafterFiles, read_drafter
from peagle_train.target.base import TargetBase, default_layer_ids

SHAPE = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "draft_vocab_size",
)
"""Fields of the recipe's draft section that take the drafter's value where they are null."""


@dataclass
class Start:
    """A drafter that fits a recipe and its target."""

    files: DrafterFiles
    recipe: Recipe
    """A copy of the recipe, in which the drafter fills what the draft section leaves open."""


def read_start(recipe: Recipe, target: TargetBase) -> Start | None:
    """The drafter that the recipe starts from; None where it names none.

    Raises:
        ValueError: one line that names the key, where the recipe or the target does not fit the drafter.
    """
    if recipe.draft.init_from is None:
        return None
    files = read_drafter(recipe.draft.init_from)
    config, where = files.config, f"draft.init_from {recipe.draft.init_from}"
    for theirs, mine, name in (
        (config.vocab_size, target.vocab_size, "vocabulary"),
        (config.target_hidden_size, target.hidden_size, "hidden size"),
    ):
        if theirs != mine:
            raise RecipeError(f"{where} drafts for a target of {name} {theirs}, but this target's is {mine}")
    read = config.eagle_aux_hidden_state_layer_ids or default_layer_ids(target.num_layers)
    if list(read) != target.layer_ids:
        given = f"this run reads {target.layer_ids}: give target.layer_ids={list(read)}"
        raise RecipeError(f"{where} reads layers {list(read)} of its target, {given}")
    lost = [name for name in files.missing if name != "mask_hidden"]
    if lost and config.hidden_size != target.hidden_size:
        raise RecipeError(f"{where} lacks {', '.join(lost)}, and the target's do not fit: their hidden sizes differ")
    filled = copy.deepcopy(recipe)
    for key in SHAPE:
        _agree(filled.draft, key, getattr(config, key), where)
    _agree(filled.draft, "num_layers", config.num_hidden_layers, where)
    _agree(filled.draft, "norm_before_residual", config.norm_before_residual, where)
    if config.ptd_token_id is not None:
        _agree(filled.draft, "mask_token_id", config.ptd_token_id, where)
    rope = dict(config.rope_parameters or {})
    _agree(filled.draft, "rope_theta", rope.pop("rope_theta", None), where)
    _agree(filled.draft, "rope_scaling", None if rope.get("rope_type", "default") == "default" else rope, where)
    return Start(files, filled)


def _agree(draft: Draft, key: str, theirs: Any, where: str) -> None:
    """Fill a null field with the drafter's value; RecipeError where it says something else."""
    mine = getattr(draft, key)
    if mine is None:
        setattr(draft, key, theirs)
    elif mine != theirs:
        value = "null" if theirs is None else str(theirs).lower() if isinstance(theirs, bool) else theirs
        raise RecipeError(
            f"draft.{key} is {mine}, but {where} has {value}: give draft.{key}={value}, or another drafter"
        )


@torch.no_grad()
def copy_start(
    files: DrafterFiles, draft: PEagleDraft, target: TargetBase, say: Callable[[str], object] = print
) -> None:
    """Copy a drafter's weights into a new one of its shape; what it lacks is the target's. Says what came from where."""
    state = draft.state_dict()
    for name, tensor in files.tensors.items():
        if name not in ("d2t", "t2d"):
            state[name].copy_(tensor)
    notes = list(files.notes)
    if "mask_hidden" in files.missing:
        notes.append("it has no mask_hidden (an EAGLE-3 drafter's), which starts random")
    if "embed_tokens.weight" in files.missing:
        state["embed_tokens.weight"].copy_(target.embedding_rows())
        notes.append("it has no embed_tokens: the target's")
    if "lm_head.weight" in files.missing:
        state["lm_head.weight"].copy_(target.head_rows(files.draft_token_ids))
        notes.append("it has no lm_head: the target's")
    served, mine = files.config.max_position_embeddings, draft.config.max_position_embeddings
    if served != mine:
        notes.append(f"max_position_embeddings was {served}, is {mine} now")
    say(f"started from {files.folder} ({files.format})" + "".join(f"; {note}" for note in notes))
