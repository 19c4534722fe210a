"""A run's new drafter: from the target's shape, or from another drafter (`draft.init_from`, EAGLE-3 or P-EAGLE).

Another's drafter brings its shape, its rope and its draft vocabulary; what the recipe says about them must agree. What an
EAGLE-3 drafter lacks is the target's or, mask_hidden, random.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import MAX_ROPE_THETA, Data, Draft, Output, Recipe, RecipeError, Target, Train, read_section
from peagle_train.core.cod import seeded
from peagle_train.core.draft import PEagleDraft, RMSNorm
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.rope import rope_mistake, unused_keys
from peagle_train.data.vocab import end_of_turn_ids, eos_token_ids
from peagle_train.files import one_line
from peagle_train.serving.drafter_io import DrafterFiles, check_fit, read_config, read_drafter
from peagle_train.serving.formats import parse_config
from peagle_train.target_model.frozen import PLAIN, FrozenTarget, TargetBase
from peagle_train.target_model.loading import read_tensors

logger = logging.getLogger(__name__)

SHAPE = (
    "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size draft_vocab_size layer_type"
    " norm_before_fc fc_norm norm_before_residual"
).split()
"""Fields of the recipe's draft section that the drafter fills where they are null, and must agree with elsewhere."""


# From another drafter


def read_start(recipe: Recipe, target: TargetBase) -> tuple[DrafterFiles | None, Recipe]:
    """The drafter that the recipe starts from, None if it names none, and the recipe, in which that drafter fills what the
    draft section leaves open. ValueError where target or recipe do not fit it.
    """
    if recipe.draft.init_from is None:
        return None, recipe
    files = read_drafter(recipe.draft.init_from)
    config, where = files.config, f"draft.init_from {recipe.draft.init_from}"
    check_fit(config, target, where)
    if config.hidden_size != target.hidden_size and (lacking := [n for n in files.missing if n != "mask_hidden"]):
        raise RecipeError(f"{where} has no {lacking[0]}, and the target's does not fit width {config.hidden_size}")
    rope = dict(config.rope_parameters or {})
    brought = {key: getattr(config, key) for key in SHAPE}
    brought |= {"num_layers": config.num_hidden_layers, "rope_theta": rope.pop("rope_theta", None)}
    brought["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if config.ptd_token_id is not None:
        brought["mask_token_id"] = config.ptd_token_id
    for key, value in brought.items():
        mine = getattr(recipe.draft, key)
        if mine is not None and mine != value:
            remedy = f"give draft.{key}={json.dumps(value)}, or another drafter"
            raise RecipeError(f"draft.{key} is {mine}, but {where} has another: {remedy}")
    brought["window"] = window = recipe.draft.window or config.sliding_window
    if window and window < recipe.cod.num_depths:
        raise RecipeError(f"the window of {where} is {window}: give a cod.num_depths of at most that")
    return files, replace(recipe, draft=replace(recipe.draft, **brought))


def with_start(recipe: Recipe, for_data: bool = False) -> Recipe:
    """The recipe with the mask token and the window of the drafter that it starts from, of which config.json alone is read:
    they decide which data is bad, which features are kept and which elements see each other. `for_data`: the mask token
    is enough; where the recipe has one, nothing is read, and the drafter need not be on this machine.
    """
    draft = recipe.draft
    if draft.init_from is None or (for_data and draft.mask_token_id is not None):
        return recipe
    try:
        config = parse_config(read_config(Path(draft.init_from)))
    except ValueError as error:
        raise RecipeError(f"draft.init_from {draft.init_from}: {error}") from error
    token = config.ptd_token_id if draft.mask_token_id is None else draft.mask_token_id
    return replace(recipe, draft=replace(draft, mask_token_id=token, window=draft.window or config.sliding_window))


def copy_start(files: DrafterFiles, draft: PEagleDraft, say: Callable[[str], object]) -> None:
    """Copy a drafter's weights into one that `make_draft` has made like it; says what it lacks, which stays as it is."""
    draft.load_state_dict(files.tensors, strict=False)
    kept = {"mask_hidden": "random", "embed_tokens.weight": "the target's", "lm_head.weight": "the target's"}
    notes = [f"; it has no {name.removesuffix('.weight')}: {kept[name]}" for name in files.missing]
    say(f"started from {files.folder}{''.join(notes)}")


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
    rope = _rope(draft, config)
    served = own("max_position_embeddings")
    if served < recipe.data.max_length:
        logger.warning("draft.max_position_embeddings is %s: sequences are longer than what the drafter serves", served)
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
            rope_parameters=rope,
            ptd_token_id=mask_token_id,
            eagle_aux_hidden_state_layer_ids=target.layer_ids,
            layer_type=draft.layer_type or ("qwen3" if config.model_type.startswith("qwen3") else "llama"),
            sliding_window=draft.window,
            pad_token_id=None,
            **{name: getattr(draft, name) for name in ("norm_before_fc", "fc_norm", "norm_before_residual")},
            bos_token_id=getattr(config, "bos_token_id", None),
            eos_token_id=getattr(config, "eos_token_id", None),
            attention_bias=start is not None and start.attention_bias,
            mlp_bias=start is not None and start.mlp_bias,
        )
    except Exception as error:  # transformers' strict configs raise types of their own
        raise ValueError(f"the drafter's shape does not work: {one_line(error)}") from error
    made.check_trainable()
    return made


def _rope(draft: Draft, target_config: Any) -> dict[str, Any]:
    """The drafter's rotary table with rope_theta, the target's unless the recipe has one; ValueError where it has none."""
    rope = dict(getattr(target_config, "rope_parameters", None) or {})
    if draft.rope_theta is not None or draft.rope_scaling is not None:
        theta = draft.rope_theta or rope.get("rope_theta")
        rope = {**(draft.rope_scaling or {"rope_type": "default"}), "rope_theta": theta}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta, mistake = rope.get("rope_theta", "missing"), rope_mistake(rope)
    if not isinstance(theta, (int, float)) or not 1 < theta <= MAX_ROPE_THETA:
        mistake = mistake or f"rope_theta is {theta}; it must be > 1, <= {MAX_ROPE_THETA:g}"
    if mistake:
        raise ValueError(f"the drafter's rope (given or the target's): {mistake}; give draft.rope_theta, rope_scaling")
    # Training would not read them, but they would be in config.json, where an engine may.
    if unused := unused_keys(rope):
        logger.warning("the drafter's rope has %s, which a drafter does not use: dropped", ", ".join(unused))
    return {key: value for key, value in rope.items() if key not in unused}


@torch.no_grad()
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
    if fits := (config.hidden_size == target.hidden_size):
        draft.embed_tokens.weight.copy_(target.embedding_rows())
        draft.lm_head.weight.copy_(target.head_rows(draft_ids))
    else:
        logger.warning("draft.hidden_size is not the target's: embeddings and lm_head start random, lm_head is trained")
    if recipe.draft.layers_from_target:
        copy_layers(draft, target, Path(recipe.target.path))
    draft.lm_head.weight.requires_grad_(recipe.draft.trains_head(fits))
    draft.embed_tokens.weight.requires_grad_(recipe.draft.train_embeddings)
    draft.gradient_checkpointing = recipe.train.activation_checkpointing
    return draft


COPYABLE = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}
"""Families whose layers compute what a drafter's of this type do with the same weights. Others scale their residuals
(Granite), multiply by 1 + weight in their norms (Gemma) or have biases (Qwen2)."""


def copy_layers(draft: PEagleDraft, target: TargetBase, folder: Path) -> None:
    """Copy the target's last layers and its final norm. Layer 0 gets its original's weights for the features; its weights
    for the token embeddings stay random. `fc` starts as the identity on the last feature plus a quarter of its random
    weights. ValueError where the drafter's layers cannot hold the target's.
    """
    H, own, theirs, mine = draft.config.hidden_size, draft.state_dict(), target.config, draft.config
    first = theirs.num_hidden_layers - len(draft.layers)
    has_biases = getattr(theirs, "attention_bias", False) or getattr(theirs, "mlp_bias", False)
    is_same = COPYABLE.get(theirs.model_type) == mine.layer_type and theirs.hidden_act == "silu" and not has_biases
    if not is_same or first < 0 or mine.num_attention_heads != theirs.num_attention_heads:
        layers = f"{theirs.num_hidden_layers} {theirs.model_type} layers of {theirs.num_attention_heads} heads"
        wanted = f"{len(draft.layers)} {mine.layer_type} layers of {mine.num_attention_heads} heads"
        able = f"those of {', '.join(COPYABLE)} without biases can be"
        raise ValueError(f"draft.layers_from_target: the target's {layers} cannot be copied to {wanted} ({able})")
    sources = {"norm.weight": "norm.weight"}
    for name in own:
        if name.startswith("layers.") and name != "layers.0.input_layernorm.weight":  # the embeddings' norm
            number, _, rest = name.removeprefix("layers.").partition(".")
            sources[name] = f"layers.{first + int(number)}.{rest.replace('hidden_norm', 'input_layernorm')}"
    found = read_tensors(folder, set(sources.values()))
    for name, source in sources.items():
        reads_both = name in [f"layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"]
        place, tensor = own[name][:, H:] if reads_both else own[name], found[source]
        if tensor.dtype not in PLAIN or tensor.shape != place.shape:  # quantised, or another shape
            given = f"the target's {source} is {tensor.dtype} of {[*tensor.shape]}, the drafter's of {[*place.shape]}"
            raise ValueError(f"draft.layers_from_target: {given}: remove it, or give the drafter the target's shape")
        place.copy_(tensor)
    draft.fc.weight.mul_(0.25)[:, -H:].add_(torch.eye(H, dtype=draft.fc.weight.dtype))


def new_drafter(
    target: TargetBase | str | Path,
    mask_token_id: int,
    draft_token_ids: Tensor | None = None,
    *,
    seed: int = 0,
    **draft: Any,
) -> PEagleDraft:
    """A new drafter for a loop of your own, made as for a run of a recipe: on the CPU, in float32. Shape, embeddings and
    frozen head are the target's unless `draft` says otherwise; the other weights are drawn from `seed`.

    target: a `FrozenTarget`, or the folder of one in transformers' format.
    mask_token_id: a token that never occurs in your data.
    draft_token_ids: int64 [Vd], ascending, the target's tokens that are drafted; None: all.
    draft: keys of a recipe's draft section, such as num_layers=4, window=2048 (docs/keys.md).

    ValueError: a key or value is wrong, or the target has no such shape.
    """
    if isinstance(target, (str, Path)):
        target = FrozenTarget.load(str(target))
    V = target.vocab_size
    ids = torch.arange(V) if draft_token_ids is None else draft_token_ids.cpu()
    if not ids.numel() or not 0 <= int(ids[0]) <= int(ids[-1]) < V or bool((ids[1:] <= ids[:-1]).any()):
        raise ValueError(f"draft_token_ids must be distinct ids of 0..{V - 1}, ascending")
    if others := sorted(draft.keys() & {"draft_vocab_size", "init_from"}):
        raise ValueError(f"{', '.join(others)}: for recipes alone; give draft_token_ids")
    given = {**draft, "mask_token_id": mask_token_id, "draft_vocab_size": ids.numel()}
    section, data = read_section(Draft, "draft", given), Data([], max_length=1)  # lengths are the caller's affair
    recipe = Recipe(Target(target.config._name_or_path), data, Output(""), section, train=Train(seed=seed))
    return make_draft(recipe, target, mask_token_id, ids)


@torch.no_grad()
def draw_weights(draft: PEagleDraft, seed: int) -> None:
    """Initial weights from (seed, tensor name): neither the order of creation nor any other generator matters."""
    norms = {f"{name}.weight" for name, module in draft.named_modules() if isinstance(module, RMSNorm)}
    for name, parameter in draft.named_parameters():
        if name in norms:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=draft.config.initializer_range, generator=seeded("weights", seed, name))
