"""A drafter's `config.json` in the two formats that engines read, to and from PEagleDraftConfig.

`eagle3`: a flat Llama or Qwen3 config, for vLLM's `--speculative-config`. `speculators`: the layers' config is nested, and
the target and K are in it, for `vllm serve DIR`.
"""

from typing import Any

from peagle_train.core.draft_config import ARCHITECTURES, MASK_KEYS, NOT_SAVED, PEagleDraftConfig, mask_tokens_in
from peagle_train.files import one_line

EAGLE3, SPECULATORS = "eagle3", "speculators"

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (
    *_REQUIRED,
    *"num_key_value_heads head_dim intermediate_size max_position_embeddings sliding_window".split(),
    *"draft_vocab_size target_hidden_size".split(),
)
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_OWN_KEYS = ("draft_vocab_size", "target_hidden_size", LAYER_IDS, "norm_before_residual", "norm_before_fc", "fc_norm")
_LLAMA_KEYS = (
    "intermediate_size num_key_value_heads head_dim max_position_embeddings hidden_act rms_norm_eps initializer_range"
    " attention_bias mlp_bias bos_token_id eos_token_id"
).split()


def format_of(raw: dict[str, Any]) -> str:
    """Which of the two a `config.json` is in."""
    return SPECULATORS if "speculators_model_type" in raw else EAGLE3


def served_as(raw: dict[str, Any]) -> tuple[int | None, str | None]:
    """K, and the target's name or folder, in a speculators config.json; None where there is none."""
    tokens = _at(raw, "speculators_config", "proposal_methods", 0, "speculative_tokens")
    name = _at(raw, "speculators_config", "verifier", "name_or_path")
    return tokens if type(tokens) is int and tokens >= 1 else None, name if isinstance(name, str) else None


def layers_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json about the layers, with which vLLM's reading starts."""
    return raw if format_of(raw) == EAGLE3 else raw.get("transformer_layer_config") or {}


def layer_type_of(raw: dict[str, Any]) -> Any:
    """The model_type of a config.json's layers."""
    return layers_of(raw).get("model_type", "llama")


def layer_ids_of(raw: dict[str, Any]) -> Any:
    """The target's feature layers as given, at the top or in `eagle_config`; None means vLLM's default."""
    return raw.get(LAYER_IDS) or _at(raw, "eagle_config", LAYER_IDS)


def feature_layers_of(raw: dict[str, Any]) -> int:
    """How many feature layers vLLM's drafter takes; a Llama's does not count the ids at the top."""
    layers = layers_of(raw)
    ids = layer_ids_of(raw) if layer_type_of(raw) == "qwen3" else _at(layers, "eagle_config", LAYER_IDS)
    return layers.get("num_aux_hidden_states") or len(ids or (2, 0, 0))


def _at(value: Any, *keys: str | int) -> Any:
    """The value at `keys` in nested mappings and lists; None where one is missing."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def parse_config(raw: dict[str, Any]) -> PEagleDraftConfig:
    """The drafter's shape from either format; of an EAGLE-3 drafter, `ptd_token_id` is None. ValueError: see `_check`."""
    try:
        # Engines read some keys on either level.
        given = {key: value for key, value in {**raw, **layers_of(raw)}.items() if value is not None}
        rope = {"rope_theta": given.get("rope_theta", 10000.0), **given.get("rope_scaling", {})}
        rope = {key: v for key, v in {**rope, **given.get("rope_parameters", {})}.items() if v is not None}
        rope = {"rope_type": rope.pop("type", "default"), **rope}  # of either spelling
        _check(given, rope)
        is_heeded = given.get("use_sliding_window", layer_type_of(raw) != "qwen3")
        has_window = is_heeded and "sliding_attention" in given.get("layer_types", [])
        norms_before = given.get("norm_before_fc") or _at(given, "eagle_config", "norm_before_fc")
        fields = {key: given[key] for key in (*_REQUIRED, *_OWN_KEYS, *_LLAMA_KEYS) if key in given} | {
            LAYER_IDS: layer_ids_of(raw),
            "layer_type": layer_type_of(raw),
            "norm_before_fc": bool(norms_before),
            "ptd_token_id": next(iter(mask_tokens_in(given).values()), None),
            "sliding_window": given.get("sliding_window") if has_window else None,
            "rope_parameters": rope,
            "pad_token_id": None,
        }
        config = PEagleDraftConfig(**fields)
        if config.ptd_token_id is not None:
            config.check_trainable()
        return config
    except Exception as error:  # anything: values are a stranger's, and transformers' strict configs have own types
        raise ValueError(f"config.json: {one_line(error)}") from error


def _check(given: dict[str, Any], rope: dict[str, Any]) -> None:
    """ValueError for drafters of other kinds, missing keys, wrong types, and what vLLM would refuse or read differently.

    given: the keys of both levels, without nulls.
    """
    kind, model_type = given.get("speculators_model_type", "peagle"), layer_type_of(given)
    if kind not in ("peagle", "eagle3"):
        raise ValueError(f"speculators_model_type is {kind!r}; peagle and eagle3 are supported")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"its layers' model_type is {model_type!r}; llama and qwen3 are supported")
    if (kinds := {*given.get("layer_types", [])}) not in (set(), {"full_attention"}, {"sliding_attention"}):
        raise ValueError(f"layer_types has {sorted(map(str, kinds))}: all layers must have the same window, or none")
    if kinds == {"sliding_attention"} and "sliding_window" not in given:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    if _at(given, "eagle_config", "use_aux_hidden_state") is False:
        raise ValueError("eagle_config.use_aux_hidden_state is false: it reads the last layer alone")
    # norm_output is of no matter: it norms what one pass of an EAGLE-3 drafter gives to its next.
    if "quantization_config" in given:
        raise ValueError("quantization_config is set: quantised drafters are not supported")
    if given.get("logit_scale", 1.0) != 1.0:
        raise ValueError("logit_scale is set: it scales its logits, which is not supported")
    if given.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0 or "mrope_section" in rope:
        raise ValueError("its rope is partial or multimodal; a drafter here rotates whole heads by one position")
    # What a Qwen3 config lacks is not derived from what it has, as a Llama's is.
    required = _REQUIRED + (("num_key_value_heads", "head_dim") if model_type == "qwen3" else ())
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{', '.join(missing)} is missing")
    for key in _SIZES:
        # A larger one than any real one is damage, and must not cost memory.
        if key in given and not (type(given[key]) is int and 1 <= given[key] < 2**24):
            raise ValueError(f"{key} is {given[key]!r}, not a size")
    theta = rope["rope_theta"]
    if not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise ValueError(f"rope_theta is {theta!r}, not a positive number")
    masks = mask_tokens_in(given)
    if any(type(value) is not int for value in masks.values()) or len({*masks.values()}) > 1:
        raise ValueError(f"the mask token must be one token id: {', '.join(f'{k} {v!r}' for k, v in masks.items())}")
    if given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {given['hidden_act']!r}; vLLM's Llama layers have silu only")
    ids = layer_ids_of(given) or [0]
    if not all(type(layer) is int and layer >= 0 for layer in ids) or len(ids) > 8 or ids != sorted({*ids}):
        what = "it must name 1 to 8 layers of the target, ascending, in which order vLLM reads them in any case"
        raise ValueError(f"{LAYER_IDS} is {ids}: {what}")


def speculators_config(
    config: PEagleDraftConfig, K: int, target: str | None, target_architectures: list[str]
) -> dict[str, Any]:
    """`config.json` in the speculators format. K: what `vllm serve` drafts per step. target: its hub name or folder."""
    left_out = {*NOT_SAVED, *_OWN_KEYS, *MASK_KEYS, "architectures", "transformers_version", "dtype", "layer_type"}
    layers = {key: value for key, value in config.to_dict().items() if value is not None and key not in left_out}
    layers |= {"fc_norm": True} if config.fc_norm else {}  # where vLLM looks for it
    own = {key: getattr(config, key) for key in _OWN_KEYS}
    if config.target_hidden_size == config.hidden_size:
        del own["target_hidden_size"]
    return {
        **own,
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "mask_token_id": config.ptd_token_id,
        "tie_word_embeddings": False,
        "dtype": str(config.dtype).removeprefix("torch."),
        "transformer_layer_config": {**layers, "model_type": config.layer_type},
        "speculators_config": {
            "algorithm": "peagle",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": K}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": target_architectures},
        },
    }
