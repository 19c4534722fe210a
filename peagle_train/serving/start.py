"""A run's new drafter: from the target's shape, or from another drafter (`draft.init_from`, EAGLE-3 or P-EAGLE).

Another's drafter brings its shape, its rope and its draft vocabulary; what the recipe says about them must agree.
`import_drafter` writes one in this project's names instead, completed to a P-EAGLE drafter.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import MAX_ROPE_THETA, Data, Draft, Recipe, RecipeError
from peagle_train.core.draft import PEagleDraft, RMSNorm
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.rope import ROPE_TYPES, rope_mistake, unused_keys, yarn_too_short
from peagle_train.data.vocab import end_of_turn_ids, eos_token_ids
from peagle_train.files import one_line
from peagle_train.serving.drafter_io import DrafterFiles, expected_shapes, read_drafter, read_tensors, tensor_files
from peagle_train.serving.export import Export, check_new, write_drafter
from peagle_train.target_model.frozen import TargetBase
from peagle_train.target_model.loading import default_layer_ids

logger = logging.getLogger(__name__)

SHAPE = (
    "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size draft_vocab_size norm_before_residual"
).split()
"""Fields of the recipe's draft section that the drafter fills where they are null, and must agree with elsewhere."""


# From another drafter


def import_drafter(
    source: Path, out: Path, *, target: Path | None = None, mask_token_id: int | None = None, seed: int = 0
) -> Export:
    """Write a drafter of either format and any of the known names as `model.safetensors` and `config.json` of our own.

    Args:
        source: a drafter's folder. out: a folder that does not exist yet, or an empty one.
        target: the target's folder, for embeddings and head where the drafter has none.
        mask_token_id: needed where the drafter has none.
        seed: of `mask_hidden` where the drafter has none.

    Raises:
        ValueError: one line; nothing is written then.
    """
    check_new(out)
    files = read_drafter(source)
    notes, config = list(files.notes), files.config
    if config.ptd_token_id is None:
        if mask_token_id is None:
            raise ValueError(f"{source} has no mask token: give --mask-token-id, a token that never occurs in text")
        config.mask_token_id = config.pard_token = config.ptd_token_id = mask_token_id
        config.check_trainable()
        notes.append(f"the mask token is {mask_token_id}, as given")
    elif mask_token_id not in (None, config.ptd_token_id):
        raise ValueError(f"--mask-token-id is {mask_token_id}, but {source} was trained with {config.ptd_token_id}")
    dtype = files.tensors["fc.weight"].dtype
    if "mask_hidden" in files.missing:
        shape = expected_shapes(config)["mask_hidden"]
        random = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * config.initializer_range
        files.tensors["mask_hidden"] = random.to(dtype)
        notes.append("mask_hidden was drawn at random (an EAGLE-3 drafter has none): train before serving")
    lost = [name for name in files.missing if name != "mask_hidden"]
    if lost and target is None:
        raise ValueError(f"{source} lacks {', '.join(lost)}, which are the target's: give --target DIR")
    for name in lost:
        assert target is not None
        files.tensors[name] = _of_target(target, name, files).to(dtype)
        notes.append(f"{name} is the target's")
    return Export(out, write_drafter(out, config, files.tensors), notes)


def _of_target(target: Path, name: str, files: DrafterFiles) -> Tensor:
    """The embeddings, or the head's rows of the draft vocabulary, from a target's folder; ValueError if they do not fit."""
    try:
        where = tensor_files(target)
        found = [n for n in where if f".{n}".endswith(f".{name}")]
        if not found and name == "lm_head.weight":  # tied
            found = [n for n in where if f".{n}".endswith(".embed_tokens.weight")]
        if len(found) != 1:
            raise ValueError(f"{len(found)} of its tensors end in {name}")
        tensor = read_tensors(target, {found[0]: where[found[0]]})[found[0]]
    except (ValueError, OSError) as error:
        raise ValueError(f"--target {target} cannot be read: {one_line(error)}") from None
    if tensor.shape[0] != files.config.vocab_size:
        raise ValueError(f"{target} has {tensor.shape[0]} tokens, the drafter is for {files.config.vocab_size}")
    tensor = tensor[files.draft_token_ids] if name == "lm_head.weight" else tensor
    shape = expected_shapes(files.config)[name]
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} of {target} is {list(tensor.shape)}; the drafter's is {list(shape)}")
    return tensor


@dataclass
class Start:
    """A drafter that fits a recipe and its target."""

    files: DrafterFiles
    recipe: Recipe
    """A copy of the recipe, in which the drafter fills what the draft section leaves open."""


def read_start(recipe: Recipe, target: TargetBase) -> Start | None:
    """The drafter that the recipe starts from; None if it names none.

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
    layers = list(config.eagle_aux_hidden_state_layer_ids or default_layer_ids(target.num_layers))
    if layers != target.layer_ids:
        given = f"this run reads {target.layer_ids}: give target.layer_ids={layers}"
        raise RecipeError(f"{where} reads layers {layers} of its target, {given}")
    lost = [name for name in files.missing if name != "mask_hidden"]
    if lost and config.hidden_size != target.hidden_size:
        raise RecipeError(f"{where} lacks {', '.join(lost)}, and the target's do not fit: their hidden sizes differ")
    rope = dict(config.rope_parameters or {})
    brought = {key: getattr(config, key) for key in SHAPE}
    brought |= {"num_layers": config.num_hidden_layers, "rope_theta": rope.pop("rope_theta", None)}
    brought["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if config.ptd_token_id is not None:
        brought["mask_token_id"] = config.ptd_token_id
    for key, value in brought.items():
        mine = getattr(recipe.draft, key)
        if mine is not None and mine != value:
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            raise RecipeError(
                f"draft.{key} is {mine}, but {where} has {text}: give draft.{key}={text}, or another drafter"
            )
    return Start(files, replace(recipe, draft=replace(recipe.draft, **brought)))


@torch.no_grad()
def copy_start(
    files: DrafterFiles, draft: PEagleDraft, target: TargetBase, say: Callable[[str], object] = print
) -> None:
    """Copy a drafter's weights into a new one of its shape; what it lacks is the target's. Prints what came from where."""
    state = draft.state_dict()
    for name, tensor in files.tensors.items():
        if name not in ("d2t", "t2d"):
            state[name].copy_(tensor)
    notes = list(files.notes)
    for name in files.missing:
        if name == "mask_hidden":
            notes.append("it has no mask_hidden (an EAGLE-3 drafter's), which starts random")
        else:
            rows = target.embedding_rows() if "embed" in name else target.head_rows(files.draft_token_ids)
            state[name].copy_(rows)
            notes.append(f"it has no {name.removesuffix('.weight')}: the target's")
    served, mine = files.config.max_position_embeddings, draft.config.max_position_embeddings
    if served != mine:
        notes.append(f"max_position_embeddings was {served}, is {mine} now")
    say(f"started from {files.folder} ({files.format})" + "".join(f"; {note}" for note in notes))


# A new drafter


def always_drafted(tokenizer: Any, target: TargetBase, mask_token_id: int, data: Data | None = None) -> list[int]:
    """Special and end tokens (of configs, tokenizer and chat template), which a pruned draft vocabulary keeps whatever
    their frequency. The template is that of `data`, if it gives one.
    """
    ids = {*target.eos_token_ids(), *eos_token_ids(tokenizer), *end_of_turn_ids(tokenizer, data)}
    ids |= set(getattr(tokenizer, "all_special_ids", None) or [])
    return sorted(i for i in ids if 0 <= i < target.vocab_size and i != mask_token_id)


def make_draft_config(
    recipe: Recipe, target: TargetBase, mask_token_id: int, start: PEagleDraftConfig | None = None
) -> PEagleDraftConfig:
    """The drafter's shape: what the recipe leaves open is the target's. `start`: the drafter that it starts from."""
    draft, config = recipe.draft, target.config

    def own(name: str, *fallbacks: Any) -> Any:
        for value in (getattr(draft, name, None), getattr(config, name, None), *fallbacks):
            if value is not None:
                return value
        raise ValueError(f"the target's config has no {name}; give draft.{name}")

    heads = own("num_attention_heads")
    rope = _rope(draft, config, start)
    served, length = own("max_position_embeddings"), recipe.data.max_length
    if served < length:
        logger.warning(
            "max_position_embeddings is %s, data.max_length %d: sequences are longer than the drafter says it serves; give"
            " draft.max_position_embeddings",
            served,
            length,
        )
    try:
        made = PEagleDraftConfig(
            vocab_size=target.vocab_size,
            draft_vocab_size=draft.draft_vocab_size or target.vocab_size,
            hidden_size=own("hidden_size"),
            target_hidden_size=target.hidden_size,
            intermediate_size=own("intermediate_size", 4 * own("hidden_size")),
            num_hidden_layers=draft.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=own("num_key_value_heads", heads),
            head_dim=own("head_dim", own("hidden_size") // heads),
            max_position_embeddings=served,
            rms_norm_eps=(start.rms_norm_eps if start else getattr(config, "rms_norm_eps", None)) or 1e-6,
            attention_bias=start is not None and start.attention_bias,
            mlp_bias=start is not None and start.mlp_bias,
            rope_parameters=rope,
            ptd_token_id=mask_token_id,
            eagle_aux_hidden_state_layer_ids=target.layer_ids,
            norm_before_residual=draft.norm_before_residual,
            bos_token_id=getattr(config, "bos_token_id", None),
            eos_token_id=getattr(config, "eos_token_id", None),
            pad_token_id=None,
        )
    except Exception as error:  # transformers' strict configs raise types of their own
        raise ValueError(f"the drafter's shape does not work: {one_line(error)}") from error
    made.check_trainable()
    if short := yarn_too_short(rope, served):
        logger.warning("the drafter's rope: %s", short)
    return made


def _rope(draft: Draft, target_config: Any, start: PEagleDraftConfig | None) -> dict[str, Any]:
    """The drafter's rotary table with rope_theta; ValueError, naming who gave it, for one that a drafter cannot have."""
    rope, where = dict(getattr(target_config, "rope_parameters", None) or {}), "the target's rope"
    if draft.rope_theta is not None or draft.rope_scaling is not None:
        theta = draft.rope_theta or rope.get("rope_theta")
        rope = {**(draft.rope_scaling or {"rope_type": "default"}), "rope_theta": theta}
        where = "draft.init_from's rope" if start else "draft.rope_scaling"
    rope = {key: value for key, value in rope.items() if value is not None}
    theta, mistake = rope.get("rope_theta", "missing"), rope_mistake(rope)
    if not isinstance(theta, (int, float)) or not 1 < theta <= MAX_ROPE_THETA:
        mistake = mistake or f"rope_theta is {theta}; it must be > 1, <= {MAX_ROPE_THETA:g}"
    if mistake:
        raise ValueError(
            f"{where}: {mistake}; give draft.rope_theta (and draft.rope_scaling with rope_type one of"
            f" {', '.join(ROPE_TYPES)})"
        )
    # Training would not read them, but they would be in config.json, where an engine may.
    if unused := unused_keys(rope):
        logger.warning("%s has %s, which a drafter does not use: dropped", where, ", ".join(unused))
    return {key: value for key, value in rope.items() if key not in unused}


def make_draft(
    recipe: Recipe, target: TargetBase, mask_token_id: int, draft_ids: Tensor, start: PEagleDraftConfig | None = None
) -> PEagleDraft:
    """A new drafter on the CPU, in float32 or float64: weights drawn from the recipe's seed, then the target's copied."""
    config = make_draft_config(recipe, target, mask_token_id, start)
    with torch.device("meta"):
        draft = PEagleDraft(config)
    draft = draft.to(getattr(torch, recipe.train.dtype)).to_empty(device="cpu")
    # Buffers that no checkpoint holds (the rotary table) are only right if made on a real device.
    draft.rotary_emb = PEagleDraft.make_rotary(config)
    draw_weights(draft, recipe.train.seed)
    draft.set_draft_vocab(draft_ids)
    fits = config.hidden_size == target.hidden_size
    with torch.no_grad():
        if fits and recipe.draft.embeddings_from_target:
            draft.embed_tokens.weight.copy_(target.embedding_rows())
        if fits and recipe.draft.lm_head_from_target:
            draft.lm_head.weight.copy_(target.head_rows(draft_ids))
    if not fits and (recipe.draft.embeddings_from_target or recipe.draft.lm_head_from_target):
        logger.warning("draft.hidden_size is not the target's: embeddings and lm_head start random, lm_head is trained")
    draft.lm_head.weight.requires_grad_(recipe.draft.trains_head(fits))
    draft.embed_tokens.weight.requires_grad_(recipe.draft.train_embeddings)
    draft.gradient_checkpointing = recipe.train.activation_checkpointing
    return draft


@torch.no_grad()
def draw_weights(draft: PEagleDraft, seed: int) -> None:
    """Initial weights from (seed, tensor name), so that they depend neither on the order of creation nor on any
    generator that others use.
    """
    norms = {f"{name}.weight" for name, module in draft.named_modules() if isinstance(module, RMSNorm)}
    for name, parameter in draft.named_parameters():
        if name in norms:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            key = hashlib.sha256(f"weights,{seed},{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            parameter.normal_(std=draft.config.initializer_range, generator=generator)
