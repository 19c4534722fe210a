"""A drafter's `config.json` in the two formats that engines read, to and from PEagleDraftConfig (DESIGN: on disk).

`eagle3`: a flat Llama config, for vLLM's `--speculative-config`. `speculators`: the layers' config is nested, and the
target and K are in it, for `vllm serve DIR`.
"""

from typing import Any

from peagle_train.core.draft_config import MASK_KEYS, NOT_SAVED, PEagleDraftConfig, mask_tokens_in

EAGLE3, SPECULATORS = "eagle3", "speculators"
FORMATS = (EAGLE3, SPECULATORS)

MAX_SIZE = 2**24
"""Above every size there is: a config.json that says more is damaged, and must not cost memory."""

_LLAMA_KEYS: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
_LLAMA_KEYS += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
_LLAMA_KEYS += ("initializer_range", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id")
_SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")
_OWN_KEYS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "norm_before_residual")

_UNLIKE_OURS = {
    "norm_before_fc": "normalises the features before fc",
    "fc_norm": "normalises each layer's features before fc",
    "norm_output": "hands on normalised hidden states",
    "quantization_config": "is quantised",
    "logit_scale": "scales its logits",
}
"""Keys of other EAGLE-3 drafters which, set, mean a drafter that this project does not have."""


def speculative_tokens_of(raw: dict[str, Any]) -> int | None:
    """K that a speculators config.json says; None where it says none."""
    try:
        tokens = raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None
    return tokens if type(tokens) is int and tokens >= 1 else None


def format_of(raw: dict[str, Any]) -> str:
    """Which of FORMATS a `config.json` is in."""
    return SPECULATORS if "speculators_model_type" in raw else EAGLE3


def layer_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that describes the drafter's Llama layers; ValueError if it is not there."""
    if format_of(raw) == EAGLE3:
        return raw
    nested = raw.get("transformer_layer_config")
    if not isinstance(nested, dict):
        raise ValueError("config.json has speculators_model_type but no transformer_layer_config, a mapping")
    return nested


def mask_token_of(raw: dict[str, Any]) -> int | None:
    """The mask token's id, None where there is none; ValueError where two names of it disagree."""
    found = mask_tokens_in(raw)
    for key, value in found.items():
        if type(value) is not int:
            raise ValueError(f"{key} is {value!r}, not a token id")
    if len(set(found.values())) > 1:
        raise ValueError("the mask token has two ids: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    return next(iter(found.values()), None)


def layer_ids_of(raw: dict[str, Any]) -> Any:
    """The target's feature layers as given, at the top or in `eagle_config`; None where vLLM's default holds."""
    nested = raw.get("eagle_config")
    nested = nested if isinstance(nested, dict) else {}
    return raw.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")


def rope_of(layers: dict[str, Any]) -> dict[str, Any]:
    """What a layers' config says of its rope, in either spelling; `rope_type` is always there."""
    spellings = [layers.get("rope_scaling"), layers.get("rope_parameters")]
    merged = {"rope_theta": layers.get("rope_theta")}
    for spelling in spellings:
        merged |= spelling if isinstance(spelling, dict) else {}
    rope = {key: value for key, value in merged.items() if value is not None}
    return {"rope_type": rope.pop("type", "default"), **rope}


def whole_model(raw: dict[str, Any]) -> str | None:
    """The architecture of a `config.json` that is a language model's own and no drafter's; None for any other."""
    given = raw.get("architectures")
    name = given[0] if isinstance(given, list) and given and isinstance(given[0], str) else ""
    is_model = name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) and "eagle" not in name.lower()
    own = ("draft_vocab_size", "target_hidden_size", "eagle_config", "eagle_aux_hidden_state_layer_ids", *MASK_KEYS)
    is_drafter = any(key in raw for key in own) or bool(mask_tokens_in(raw))
    return name if is_model and format_of(raw) == EAGLE3 and not is_drafter else None


def wrong_types(raw: dict[str, Any]) -> list[str]:
    """Values that cannot be what their key says, before anything computes with them."""
    layers = layer_config(raw)
    found = []
    for part, keys in ((layers, _SIZES), (raw, ("draft_vocab_size", "target_hidden_size"))):
        for key in keys:
            value = part.get(key)
            if value is not None and (type(value) is not int or not 1 <= value < MAX_SIZE):
                found.append(f"{key} is {value!r}, not a size")
    for part, key, kind in (
        (layers, "rope_parameters", dict),
        (layers, "rope_scaling", dict),
        (layers, "layer_types", list),
        (raw, "architectures", list),
        (raw, "norm_before_residual", bool),
    ):
        if part.get(key) is not None and not isinstance(part[key], kind):
            found.append(f"{key} is {part[key]!r}, not a {kind.__name__}")
    theta = rope_of(layers).get("rope_theta", 1.0)
    if not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        found.append(f"rope_theta is {theta!r}, not a positive number")
    return found


def other_kind(raw: dict[str, Any]) -> list[str]:
    """What makes this a drafter of another kind than ours, which engines may well serve; values are of the right types."""
    layers, found = layer_config(raw), []
    kind = raw.get("speculators_model_type", "peagle")
    if kind not in ("peagle", "eagle3"):
        found.append(f"speculators_model_type is {kind!r}; peagle and eagle3 are supported")
    if layers.get("model_type", "llama") != "llama":
        found.append(f"its layers' model_type is {layers['model_type']!r}; only llama layers are supported")
    if any(kind != "full_attention" for kind in layers.get("layer_types") or []):
        found.append("layer_types has other than full_attention; windows are not supported")
    eagle = raw.get("eagle_config")
    eagle = eagle if isinstance(eagle, dict) else {}
    if not eagle.get("use_aux_hidden_state", True):
        found.append("eagle_config.use_aux_hidden_state is false: it reads the last layer, not three")
    for key, meaning in _UNLIKE_OURS.items():
        value = next((part[key] for part in (raw, layers, eagle) if part.get(key)), None)
        if value and not (key == "logit_scale" and value == 1.0):
            found.append(f"{key} is set: it {meaning}")
    rope = rope_of(layers)
    if layers.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0 or "mrope_section" in rope:
        found.append("its rope is partial or multimodal; a drafter here rotates whole heads by one position")
    return found


def misread(raw: dict[str, Any]) -> list[str]:
    """What vLLM would refuse, or read otherwise than it was meant."""
    layers, found = layer_config(raw), []
    if layers.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act is {layers['hidden_act']!r}; vLLM's Llama layers have silu only")
    ids = layer_ids_of(raw)
    if ids is not None:
        whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        if not whole or len(ids) != 3:
            found.append(f"eagle_aux_hidden_state_layer_ids is {ids}: it must name exactly 3 layers of the target")
        elif not ids[0] < ids[1] < ids[2]:
            found.append(
                f"eagle_aux_hidden_state_layer_ids is {ids}: vLLM reads layers in ascending order, whatever is here"
            )
    return found


def unsupported(raw: dict[str, Any]) -> list[str]:
    """Why this folder's drafter cannot be read here."""
    return wrong_types(raw) or [*other_kind(raw), *misread(raw)]


def parse_config(raw: dict[str, Any]) -> PEagleDraftConfig:
    """The drafter's shape from either format. EAGLE-3 ones have no mask token: `ptd_token_id` stays None.

    Raises:
        ValueError: one line, for what this project does not have.
    """
    problems = unsupported(raw)
    if problems:
        raise ValueError("; ".join(problems))
    layers = layer_config(raw)
    fields = {key: layers[key] for key in _LLAMA_KEYS if layers.get(key) is not None}
    fields |= {key: raw[key] for key in _OWN_KEYS if raw.get(key) is not None}
    absent = [
        key for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers") if key not in fields
    ]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}")
    fields["rope_parameters"] = {"rope_theta": 10000.0, **rope_of(layers)}
    fields["eagle_aux_hidden_state_layer_ids"] = layer_ids_of(raw)
    try:
        return PEagleDraftConfig(**fields, ptd_token_id=mask_token_of(raw), pad_token_id=None)
    except Exception as error:  # transformers' strict configs raise types of their own
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def speculators_config(
    config: PEagleDraftConfig, speculative_tokens: int, target: str | None, target_architectures: list[str]
) -> dict[str, Any]:
    """`config.json` in the speculators format.

    Args:
        speculative_tokens: K, what `vllm serve` drafts per step.
        target: the verifier's hub name or folder.
    """
    layers = {key: value for key, value in config.to_dict().items() if value is not None and key not in NOT_SAVED}
    for key in (*_OWN_KEYS, *MASK_KEYS, "architectures", "transformers_version", "dtype"):
        layers.pop(key, None)
    layers["model_type"] = "llama"
    content: dict[str, Any] = {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "draft_vocab_size": config.draft_vocab_size,
        "mask_token_id": config.ptd_token_id,
        "norm_before_residual": config.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "tie_word_embeddings": False,
        "transformer_layer_config": layers,
        "speculators_config": {
            "algorithm": "peagle",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": speculative_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": target_architectures},
        },
    }
    if config.target_hidden_size != config.hidden_size:
        content["target_hidden_size"] = config.target_hidden_size
    return content
