"""Loading a target's folder: what would give wrong features or labels is refused before any weight is read."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peagle_train.core.rope import ROPE_TYPES
from peagle_train.errors import one_line

logger = logging.getLogger(__name__)

UNPACKABLE = ("mamba", "rwkv", "recurrent", "linear_attention", "ssm", "conv", "retention", "xlstm")
"""Words in a config's model or layer types that mean a state runs across document boundaries."""

LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Config fields by which an architecture changes its logits after the head: labels would be wrong."""

_REPORTS = ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A torch dtype, or "auto" (the checkpoint's own). On CPU, auto is bfloat16 where the processor multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return "auto"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_model(
    path: str,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> nn.Module:
    """The causal LM of a Hugging Face folder, on the CPU or as the device map says.

    Raises:
        ValueError: one line, for a folder that is none, a model that is unfit, weights that are not its config's.
    """
    _check_folder(path)
    if trust_remote_code:
        logger.warning("target.trust_remote_code is on: Python code in %s will run", path)
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        refuse_unfit(config.get_text_config())
        _check_size(path, config, trust_remote_code)
        if attn_implementation:
            kwargs["attn_implementation"] = attn_implementation
        if device_map:
            kwargs["device_map"] = device_map
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, **kwargs
        )
    except Exception as error:  # whatever a foreign or corrupt file makes the loaders raise
        raise ValueError(
            f"target.path {path} cannot be loaded: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    model, report = loaded
    bad = [f"{len(report[kind])} {kind.replace('_', ' ')}" for kind in _REPORTS if report.get(kind)]
    if bad:
        raise ValueError(
            f"target.path {path}: its weights do not fit its config ({', '.join(bad)}): wrong or cut files"
        )
    return model


def refuse_unfit(config: Any) -> None:
    """ValueError for targets whose features or labels this project would get wrong."""
    name = getattr(config, "model_type", "?")
    for field in LOGIT_CHANGES:
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise ValueError(f"target {name} has {field} = {value}: it changes logits after the head, unsupported")
    kinds = " ".join([name, *map(str, getattr(config, "layer_types", None) or [])]).lower()
    found = [word for word in UNPACKABLE if word in kinds]
    if found:
        raise ValueError(f"target {name} has {found[0]} layers, whose state runs across packed documents: unsupported")
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [t for t in rope.values() if isinstance(t, dict)]
    for table in tables:
        if table.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"target {name} has rope type {table['rope_type']!r}, whose tables depend on the length of a call, so"
                f" packed and padded rows would differ from serving; supported: {', '.join(ROPE_TYPES)}"
            )


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"target.path {path} is no folder; give a Hugging Face model folder on this machine (a model of the hub has to"
            " be downloaded first)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"target.path {path} has no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"target.path {path} has no .safetensors weights; convert them first")


def _check_size(path: str, config: Any, trust_remote_code: bool) -> None:
    """ValueError where a config describes a far larger model than the weights hold.

    A config.json that lacks its sizes would become billions of random parameters, which no memory holds.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # its weights are packed
    held = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    described = sum(p.numel() for p in model.parameters())
    if described > 2 * held:
        raise ValueError(f"its config describes {described:,} parameters, but its weights hold {held:,}")
