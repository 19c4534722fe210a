"""From a recipe to the parts of a run: tokenizer, documents, draft vocabulary, drafter."""

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from peagle_train.core.attention import uses_flex
from peagle_train.core.block_mask import BLOCK_SIZE
from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft, RMSNorm
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.rope import ROPE_TYPES, rope_mistake, unused_keys, yarn_too_short
from peagle_train.data.vocab import default_mask_token_id, end_of_turn_ids, eos_token_ids
from peagle_train.recipe import MAX_ROPE_THETA, Data, Draft, Recipe
from peagle_train.target.base import TargetBase

logger = logging.getLogger(__name__)


def load_tokenizer(recipe: Recipe) -> Any:
    """The target's own tokenizer, or None where its folder has none (rows of ids need none)."""
    try:
        return AutoTokenizer.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        logger.warning(
            "target.path %s has no usable tokenizer (%s)",
            recipe.target.path,
            str(error).splitlines()[0][:200],
        )
        return None


def target_vocab_size(recipe: Recipe) -> int:
    """V, from the target's config alone; ValueError if its folder has none."""
    try:
        config = AutoConfig.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"target.path {recipe.target.path} has no config that can be read: {reason}") from None
    return int(config.get_text_config().vocab_size)


def choose_mask_token(draft: Draft, tokenizer: Any, vocab_size: int) -> int:
    """The recipe's mask token, or one that the tokenizer provably never produces; ValueError if there is none."""
    if draft.mask_token_id is not None:
        if not 0 <= draft.mask_token_id < vocab_size:
            raise ValueError(
                f"draft.mask_token_id is {draft.mask_token_id}; it must lie in 0..{vocab_size - 1}, the target's vocabulary"
            )
        return draft.mask_token_id
    default = None if tokenizer is None else default_mask_token_id(tokenizer, vocab_size)
    if default is None:
        raise ValueError(
            "draft.mask_token_id is missing and the tokenizer leaves no id of the target's vocabulary provably unused:"
            " give the id of a token that never occurs in your data"
        )
    logger.warning("draft.mask_token_id was not given: %d, the first id that the tokenizer never produces", default)
    return default


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
            "max_position_embeddings is %s, data.max_length %d: the drafter would learn from rows longer than it says to"
            " serve; give draft.max_position_embeddings",
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
        raise ValueError(f"the drafter's shape does not work: {' '.join(str(error).split())}") from error
    made.check_trainable()
    if short := yarn_too_short(rope, served):
        logger.warning("the drafter's rope: %s", short)
    return made


def _rope(draft: Draft, target_config: Any, start: PEagleDraftConfig | None) -> dict[str, Any]:
    """The drafter's rotary table with rope_theta; ValueError, in the words of whoever gave it, for one that cannot be."""
    rope = dict(getattr(target_config, "rope_parameters", None) or {})
    where = "the target's rope"
    if draft.rope_theta is not None or draft.rope_scaling is not None:
        rope = {
            **(draft.rope_scaling or {"rope_type": "default"}),
            "rope_theta": draft.rope_theta or rope.get("rope_theta"),
        }
        where = "draft.init_from's rope" if start else "draft.rope_scaling"
    rope = {key: value for key, value in rope.items() if value is not None}
    mistake = rope_mistake(rope)
    if where == "the target's rope" and (mistake or "rope_theta" not in rope):
        raise ValueError(
            f"the target's rope is {rope or 'none'}, which a drafter cannot have"
            f" ({mistake or 'rope_theta is missing'}): give draft.rope_theta (and draft.rope_scaling with rope_type one of"
            f" {', '.join(ROPE_TYPES)})"
        )
    if mistake:
        raise ValueError(f"{where}: {mistake}")
    if "rope_theta" not in rope:
        raise ValueError("draft.rope_theta is missing, and the target's config has none: give draft.rope_theta")
    theta = rope["rope_theta"]
    if not isinstance(theta, (int, float)) or not 1 < theta <= MAX_ROPE_THETA:
        raise ValueError(f"{where}: rope_theta is {theta!r}; give draft.rope_theta, > 1, <= {MAX_ROPE_THETA:g}")
    # Training would not read them, but they would be in config.json, where an engine may.
    unused = unused_keys(rope)
    if unused:
        logger.warning("%s has %s, which a drafter does not use: left out", where, ", ".join(unused))
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
    with torch.no_grad():
        fits = config.hidden_size == target.hidden_size
        if recipe.draft.embeddings_from_target:
            if fits:
                draft.embed_tokens.weight.copy_(target.embedding_rows())
            else:
                logger.warning("draft.hidden_size is not the target's: embeddings start random, not as the target's")
        if recipe.draft.lm_head_from_target:
            if fits:
                draft.lm_head.weight.copy_(target.head_rows(draft_ids))
            else:
                logger.warning("draft.hidden_size is not the target's: lm_head starts random, and is trained")
    train_head = recipe.draft.train_lm_head or not (fits and recipe.draft.lm_head_from_target)
    draft.lm_head.weight.requires_grad_(train_head)
    draft.embed_tokens.weight.requires_grad_(recipe.draft.train_embeddings)
    draft.gradient_checkpointing = recipe.train.activation_checkpointing
    return draft


def make_collator(recipe: Recipe, seed: int, device: torch.device | None = None) -> CODCollator:
    """`device`: that the drafter trains on, for its attention's blocks."""
    cod = recipe.cod
    return CODCollator(
        recipe.data.max_length,
        cod.num_depths,
        cod.down_sample_ratio,
        cod.down_sample_ratio_min,
        cod.segments,
        cod.boundaries,
        seed=seed,
        capacity_multiple=BLOCK_SIZE if device and uses_flex(device) else 1,
    )


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
