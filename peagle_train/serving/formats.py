"""A drafter's `config.json` in the two formats that engines read, to and from PEagleDraftConfig (DESIGN: on disk).

`eagle3`: a flat Llama or Qwen3 config, for vLLM's `--speculative-config`. `speculators`: the layers' config is nested, and
the target and K are in it, for `vllm serve DIR`.
"""

from typing import Any

from peagle_train.core.draft_config import ARCHITECTURES, MASK_KEYS, NOT_SAVED, PEagleDraftConfig, mask_tokens_in
from peagle_train.files import one_line

EAGLE3, SPECULATORS = "eagle3", "speculators"

MAX_SIZE = 2**24  # above every real size: a config.json with a larger one is damaged, and must not cost memory

_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " max_position_embeddings sliding_window"
).split()
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LLAMA_KEYS = (
    "hidden_act rms_norm_eps initializer_range attention_bias mlp_bias bos_token_id eos_token_id".split() + _SIZES[:-1]
)
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_OWN_KEYS = ("draft_vocab_size", "target_hidden_size", LAYER_IDS, "norm_before_residual", "norm_before_fc", "fc_norm")


def format_of(raw: dict[str, Any]) -> str:
    """Which of the two a `config.json` is in."""
    return SPECULATORS if "speculators_model_type" in raw else EAGLE3


def speculative_tokens_of(raw: dict[str, Any]) -> int | None:
    """K in a speculators config.json; None if there is none."""
    tokens = _at(raw, "speculators_config", "proposal_methods", 0, "speculative_tokens")
    return tokens if type(tokens) is int and tokens >= 1 else None


def target_name_of(raw: dict[str, Any]) -> str | None:
    """The target's name or folder in a speculators config.json; None if there is none."""
    name = _at(raw, "speculators_config", "verifier", "name_or_path")
    return name if isinstance(name, str) else None


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
        layers = layers_of(raw)
        _check(raw, layers)
        fields = {key: layers[key] for key in _LLAMA_KEYS if layers.get(key) is not None}
        fields |= {key: raw[key] for key in _OWN_KEYS if raw.get(key) is not None}
        is_heeded = layers.get("use_sliding_window", layers.get("model_type") != "qwen3")
        has_window = is_heeded and "sliding_attention" in (layers.get("layer_types") or [])
        fields |= {
            "layer_type": layer_type_of(raw),
            "sliding_window": layers.get("sliding_window") if has_window else None,
            "rope_parameters": {"rope_theta": 10000.0, **_rope_of(layers)},
            "pad_token_id": None,
        }
        mask_token = next(iter(mask_tokens_in(raw).values()), None)
        fields |= {LAYER_IDS: layer_ids_of(raw), "ptd_token_id": mask_token}
        # Of these, engines read some where the layers' config is, or in eagle_config.
        norms = {"norm_before_fc": (_at(raw, "eagle_config", "norm_before_fc"),), "fc_norm": (layers.get("fc_norm"),)}
        fields |= {key: bool(raw.get(key) or any(others)) for key, others in norms.items()}
        return PEagleDraftConfig(**fields)
    except Exception as error:  # anything: values are a stranger's, and transformers' strict configs have own types
        raise ValueError(f"config.json: {one_line(error)}") from error


def _rope_of(layers: dict[str, Any]) -> dict[str, Any]:
    """The rope of a layers' config, in either spelling; `rope_type` is always present."""
    merged = {"rope_theta": layers.get("rope_theta")}
    merged |= (layers.get("rope_scaling") or {}) | (layers.get("rope_parameters") or {})
    rope = {key: value for key, value in merged.items() if value is not None}
    return {"rope_type": rope.pop("type", "default"), **rope}


def _check(raw: dict[str, Any], layers: dict[str, Any]) -> None:
    """ValueError for drafters of other kinds, missing keys, wrong types, and what vLLM would refuse or read differently."""
    kind, model_type = raw.get("speculators_model_type", "peagle"), layer_type_of(raw)
    if kind not in ("peagle", "eagle3"):
        raise ValueError(f"speculators_model_type is {kind!r}; peagle and eagle3 are supported")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"its layers' model_type is {model_type!r}; llama and qwen3 are supported")
    if (kinds := {*(layers.get("layer_types") or [])}) not in (set(), {"full_attention"}, {"sliding_attention"}):
        raise ValueError(f"layer_types has {sorted(map(str, kinds))}: all layers must have the same window, or none")
    if _at(raw, "eagle_config", "use_aux_hidden_state") is False:
        raise ValueError("eagle_config.use_aux_hidden_state is false: it reads the last layer alone")
    # norm_output is of no matter: it norms what one pass of an EAGLE-3 drafter gives to its next.
    if raw.get("quantization_config") or layers.get("quantization_config"):
        raise ValueError("quantization_config is set: quantised drafters are not supported")
    if (raw.get("logit_scale") or layers.get("logit_scale") or 1.0) != 1.0:
        raise ValueError("logit_scale is set: it scales its logits, which is not supported")
    rope = _rope_of(layers)
    if layers.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0 or "mrope_section" in rope:
        raise ValueError("its rope is partial or multimodal; a drafter here rotates whole heads by one position")
    # What a Qwen3 config lacks is not derived from what it has, as a Llama's is.
    required = _REQUIRED + (("num_key_value_heads", "head_dim") if model_type == "qwen3" else ())
    if missing := [key for key in required if layers.get(key) is None]:
        raise ValueError(f"{', '.join(missing)} is missing")
    for part, keys in ((layers, _SIZES), (raw, ("draft_vocab_size", "target_hidden_size"))):
        for key in keys:
            value = part.get(key)
            if value is not None and (type(value) is not int or not 1 <= value < MAX_SIZE):
                raise ValueError(f"{key} is {value!r}, not a size")
    masks = mask_tokens_in(raw)
    if any(type(value) is not int for value in masks.values()) or len(set(map(str, masks.values()))) > 1:
        raise ValueError(f"the mask token must be one token id: {', '.join(f'{k} {v!r}' for k, v in masks.items())}")
    if "sliding_attention" in (layers.get("layer_types") or []) and layers.get("sliding_window") is None:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    theta = rope.get("rope_theta", 1.0)
    if not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise ValueError(f"rope_theta is {theta!r}, not a positive number")
    if layers.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {layers['hidden_act']!r}; vLLM's Llama layers have silu only")
    ids = layer_ids_of(raw)
    if ids is not None:
        are_ids = isinstance(ids, list) and 1 <= len(ids) <= 8 and all(type(i) is int and i >= 0 for i in ids)
        if not are_ids or sorted({*ids}) != ids:
            what = "it must name 1 to 8 layers of the target, ascending, in which order vLLM reads them in any case"
            raise ValueError(f"eagle_aux_hidden_state_layer_ids is {ids}: {what}")
    count = raw.get("num_aux_hidden_states") or layers.get("num_aux_hidden_states")
    if count not in (None, len(ids or (2, 0, 0))):
        raise ValueError(f"num_aux_hidden_states is {count!r}, but eagle_aux_hidden_state_layer_ids is {ids}")


def speculators_config(
    config: PEagleDraftConfig, K: int, target: str | None, target_architectures: list[str]
) -> dict[str, Any]:
    """`config.json` in the speculators format.

    speculative_tokens: K, what `vllm serve` drafts per step.
    target: the target's hub name or folder.
    """
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
