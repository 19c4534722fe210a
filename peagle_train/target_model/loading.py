"""A target's folder: what would give wrong features or labels is refused before any weight is read."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from peagle_train.data.vocab import load_config
from peagle_train.files import one_line

logger = logging.getLogger(__name__)

UNPACKABLE = ("mamba", "rwkv", "recurrent", "linear_attention", "ssm", "conv", "retention", "xlstm")
"""Words in a config's model or layer types that mean a state runs across document boundaries."""

LOGIT_CHANGES = "final_logit_softcapping logit_scale logits_scaling lm_head_multiplier output_multiplier".split()
"""Config fields by which an architecture changes its logits after the head: labels would be wrong."""


def default_layer_ids(num_layers: int) -> list[int]:
    """(2, n // 2, n - 3), vLLM's default; (2, 3, 4) at n = 6, where that names a layer twice. ValueError below."""
    if num_layers < 6:
        what = f"the target's {num_layers} layers are too few for the default feature layers"
        raise ValueError(f"{what}: give target.layer_ids")
    return [2, num_layers // 2, max(num_layers - 3, num_layers // 2 + 1)]


def refuse_unfit(config: Any) -> None:
    """ValueError for targets whose features or labels this project would get wrong."""
    name = getattr(config, "model_type", "?")
    for field in LOGIT_CHANGES:
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise ValueError(f"target {name} has {field} = {value}: it changes logits after the head, unsupported")
    kinds = " ".join([name, *map(str, getattr(config, "layer_types", None) or [])]).lower()
    if found := [word for word in UNPACKABLE if word in kinds]:
        raise ValueError(f"target {name} has {found[0]} layers, whose state runs across packed documents: unsupported")
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [t for t in rope.values() if isinstance(t, dict)]
    for table in tables:
        if (kind := table.get("rope_type")) in ("dynamic", "longrope"):  # whose tables depend on the length of a call
            raise ValueError(f"target {name} has rope type {kind!r}: features would differ from serving, unsupported")


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
    where: Literal["cpu", "disk", "meta"] = "cpu",
) -> Any:
    """A folder's causal LM: on the CPU, on the disk (each weight is read when it is used), or without weights, of which
    the folder may then have none. ValueError, one line, if none fits.
    """
    if trust_remote_code:
        logger.warning("target.trust_remote_code is on: Python code in %s will run", path)
    config = load_config(path, trust_remote_code)
    if not sys.stderr.isatty():
        disable_progress_bar()
    given: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation:  # else what its config.json says
        given["attn_implementation"] = attn_implementation
    try:
        refuse_unfit(config.get_text_config())
        if where == "meta":
            if dtype == "auto":  # where no config names one, bfloat16, as nearly all have it
                dtype = config.get_text_config().dtype or torch.bfloat16
            with torch.device("meta"):
                empty: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **given)
            if (Path(path) / "generation_config.json").is_file():
                empty.generation_config = GenerationConfig.from_pretrained(path)
            return empty
        given |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        given["device_map"] = {"": "disk"} if where == "disk" else None
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **given)
    except Exception as error:  # whatever a foreign or corrupt file makes the loaders raise
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ValueError(f"target.path {path} cannot be loaded: {reason}") from error
    model, report = loaded
    if bad := [f"{len(found)} {kind.replace('_', ' ')}" for kind, found in report.items() if found]:
        raise ValueError(f"target.path {path}: its weights do not fit its config ({', '.join(bad)})")
    return model


def target_fingerprint(folder: str) -> str:
    """sha256 over config.json (without the version of transformers that wrote it) and, of every .safetensors file: name,
    size, header, and 256 blocks of 4 KiB spread evenly over the rest.

    Cheap on the largest target. Training changes nearly every weight, so that another training of the same model shows;
    an edit of a few numbers may fall between the blocks.
    """
    total = hashlib.sha256()
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    total.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name},{size},".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total.update(file.read(min(length, size)))
            for i in range(256):
                file.seek(8 + length + max(0, size - 8 - length - 4096) * i // 255)
                total.update(file.read(4096))
    return total.hexdigest()


def open_tensors(path: Path) -> Any:
    """A .safetensors file, memory-mapped; ValueError, one line, if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({one_line(error, 200)}): fetch or make it again") from None


def stored_tensors(folder: Path) -> dict[str, Any]:
    """By name, the open .safetensors file that holds each of a folder's tensors. ValueError for a damaged one."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_tensors(path)
        found |= dict.fromkeys(file.keys(), file)
    return found


def read_tensors(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Those tensors of a folder. A name stands for itself, or else for the one that ends in it after a dot, or that it ends
    in (GPT-2's files lack the model's prefix); ValueError where there is not exactly one.
    """
    stored, found = stored_tensors(folder), {}
    for name in sorted(names):
        others = (key for key in stored if key.endswith(f".{name}") or name.endswith(f".{key}"))
        keys = [name] if name in stored else [*others]
        if len(keys) != 1:
            raise ValueError(f"target.path {folder} has {len(keys)} tensors {name} in its .safetensors files, not one")
        found[name] = stored[keys[0]].get_tensor(keys[0])
    return found
