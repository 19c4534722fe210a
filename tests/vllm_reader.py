"""How vLLM reads and runs a P-EAGLE drafter, restated in plain torch functions: shares no code with the package.

After vLLM's `llama_eagle3.py` (names, fused projections, residuals, d2t), its EAGLE proposer with `parallel_drafting`
(shifted tokens, mask slots, positions), its rotary tables, and its reading of the two config formats. float32, one request.
n: tokens that the target has run, F = 3T, H: the drafter's hidden size, V: the target's vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

REGISTRY = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "PEagleDraftModel", "PeagleLlamaForCausalLM"}
STACKED = [
    (".q_proj", ".qkv_proj", 0),
    (".k_proj", ".qkv_proj", 1),
    (".v_proj", ".qkv_proj", 2),
    (".gate_proj", ".gate_up_proj", 0),
    (".up_proj", ".gate_up_proj", 1),
]


@dataclass
class Loaded:
    """A drafter as vLLM holds it."""

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    """`model.layers.0.self_attn.qkv_proj.weight`, ..., `lm_head.weight`, `draft_id_to_target_id`."""
    mask_token: int
    mask_hidden: Tensor
    """[H], already through fc."""
    num_speculative_tokens: int | None
    """What a speculators config says."""


def read_config(folder: Path) -> tuple[dict[str, Any], int | None]:
    """The flat config that the model classes see, and K where the file says it."""
    raw = json.loads((folder / "config.json").read_text())
    if "speculators_model_type" not in raw:
        architecture = raw["architectures"][0]
        if not (architecture.startswith("Eagle3") or architecture.endswith("Eagle3")):
            architecture = f"Eagle3{architecture}"
        assert raw["model_type"] == "llama" and architecture in REGISTRY, architecture
        return raw, None
    assert raw["speculators_model_type"] == "peagle"
    flat = dict(raw["transformer_layer_config"])
    flat["draft_vocab_size"] = raw.get("draft_vocab_size")
    if raw.get("target_hidden_size") is not None:
        flat["target_hidden_size"] = raw["target_hidden_size"]
    flat["norm_before_residual"] = raw.get("norm_before_residual", False)
    assert flat.get("model_type", "llama") == "llama"
    flat["pard_token"] = raw["mask_token_id"]
    method = raw["speculators_config"]["proposal_methods"][0]
    assert raw["speculators_config"]["verifier"]["name_or_path"]
    return flat, method["speculative_tokens"]


def parameter_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the model classes allocate."""
    H, V, Vd = c["hidden_size"], c["vocab_size"], c.get("draft_vocab_size") or c["vocab_size"]
    D = c.get("head_dim") or H // c["num_attention_heads"]
    A, G, I = c["num_attention_heads"], c["num_key_value_heads"], c["intermediate_size"]  # noqa: E741
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, H),
        "model.fc.weight": (H, 3 * c.get("target_hidden_size", H)),
        "model.norm.weight": (H,),
        "lm_head.weight": (Vd, H),
    }
    if Vd != V:
        shapes["draft_id_to_target_id"] = (Vd,)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj.weight": ((A + 2 * G) * D, 2 * H if i == 0 else H),
            f"{layer}.self_attn.o_proj.weight": (H, A * D),
            f"{layer}.mlp.gate_up_proj.weight": (2 * I, H),
            f"{layer}.mlp.down_proj.weight": (H, I),
            f"{layer}.input_layernorm.weight": (H,),
            f"{layer}.post_attention_layernorm.weight": (H,),
            f"{layer}.hidden_norm.weight": (H,),  # every layer has one, the first uses it
        }
        if c.get("attention_bias"):
            shapes |= {f"{layer}.self_attn.qkv_proj.bias": ((A + 2 * G) * D,), f"{layer}.self_attn.o_proj.bias": (H,)}
    return shapes


def load(folder: Path, target: dict[str, Tensor] | None = None) -> Loaded:
    """Load as vLLM does; AssertionError or KeyError where vLLM would fail. `target`: embed_tokens, lm_head to share."""
    config, tokens = read_config(folder)
    parts: dict[str, dict[int, Tensor]] = {}
    mask_hidden = None
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "t2d" in name:
                continue
            if "d2t" in name:
                name = name.replace("d2t", "draft_id_to_target_id")
            elif "mask_hidden" in name:
                mask_hidden = tensor.view(1, -1)
                continue
            elif "lm_head" not in name:
                name = "model." + name
            name, shard = name.replace("midlayer.", "layers.0."), 0
            for part, fused, index in STACKED:
                if part in name:
                    name, shard = name.replace(part, fused), index
                    break
            parts.setdefault(name, {})[shard] = tensor if tensor.dtype == torch.int64 else tensor.float()
    assert mask_hidden is not None, "mask_hidden not found in weights"
    shapes = parameter_shapes(config)
    parameters: dict[str, Tensor] = {}
    for name, by_shard in parts.items():
        value = torch.cat([by_shard[i] for i in sorted(by_shard)])
        if name not in shapes:
            raise KeyError(f"there is no module or parameter named {name}")
        assert tuple(value.shape) == shapes[name], f"{name}: {tuple(value.shape)}, not {shapes[name]}"
        parameters[name] = value
    if "draft_id_to_target_id" not in parameters:
        parameters["draft_id_to_target_id"] = torch.zeros(shapes["lm_head.weight"][0], dtype=torch.int64)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in parameters:
            assert target is not None
            parameters[name] = target[name.removeprefix("model.")]
    absent = {name for name in shapes.keys() - parameters.keys() if not name.endswith("hidden_norm.weight")}
    assert not absent, absent
    mask_token = (config.get("dflash_config") or {}).get("mask_token_id")
    for key in ("mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id"):
        mask_token = config.get(key) if mask_token is None else mask_token
    assert mask_token is not None
    fc = parameters["model.fc.weight"]
    return Loaded(config, parameters, mask_token, fc @ mask_hidden[0].float(), tokens)


def propose(drafter: Loaded, tokens_n: Tensor, next_token: int, features_nF: Tensor, K: int) -> Tensor:
    """Logits of the K slots over the target's vocabulary, [K, V], -inf where the drafter has no token.

    Args:
        tokens_n: int64, the tokens that the target has run; next_token: the one that it sampled.
        features_nF: the target's, of these tokens.
    """
    parameters, n = drafter.parameters, tokens_n.numel()
    input_ids = torch.cat([tokens_n[1:], torch.tensor([next_token] + [drafter.mask_token] * (K - 1))])
    fused = features_nF @ parameters["model.fc.weight"].T
    hidden = torch.cat([fused, drafter.mask_hidden.expand(K - 1, -1)])
    positions = torch.arange(n + K - 1)
    assert int(input_ids.max()) < drafter.config["vocab_size"]
    output = run(drafter, input_ids, positions, hidden)[n - 1 :]
    logits = output @ parameters["lm_head.weight"].T
    targets = torch.arange(logits.shape[1]) + parameters["draft_id_to_target_id"]
    full = torch.full((K, drafter.config["vocab_size"]), float("-inf"))
    full[:, targets] = logits
    return full


def run(drafter: Loaded, input_ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
    """The model's forward under plain causal attention, [N, H] after the last norm."""
    c, weights = drafter.config, drafter.parameters
    embeds = weights["model.embed_tokens.weight"][input_ids]
    residual: Tensor | None = None
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"

        def norm(x: Tensor, name: str, layer: str = layer) -> Tensor:
            return rms_norm(x, weights[f"{layer}.{name}.weight"], c["rms_norm_eps"])

        if i == 0:
            normed = norm(hidden, "hidden_norm")
            residual = normed if c.get("norm_before_residual", False) else hidden
            hidden = torch.cat([norm(embeds, "input_layernorm"), normed], dim=-1)
        else:
            assert residual is not None
            residual = hidden + residual
            hidden = norm(residual, "input_layernorm")
        residual = attention(c, weights, layer, positions, hidden) + residual
        hidden = norm(residual, "post_attention_layernorm")
        gate, up = (hidden @ weights[f"{layer}.mlp.gate_up_proj.weight"].T).chunk(2, dim=-1)
        hidden = (torch.nn.functional.silu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    assert residual is not None
    return rms_norm(hidden + residual, weights["model.norm.weight"], c["rms_norm_eps"])


def attention(c: dict[str, Any], weights: dict[str, Tensor], layer: str, positions: Tensor, hidden: Tensor) -> Tensor:
    A, G = c["num_attention_heads"], c["num_key_value_heads"]
    D = c.get("head_dim") or c["hidden_size"] // A
    qkv = hidden @ weights[f"{layer}.self_attn.qkv_proj.weight"].T + weights.get(f"{layer}.self_attn.qkv_proj.bias", 0)
    query, key, value = qkv.split([A * D, G * D, G * D], dim=-1)
    cos, sin = rotary_tables(c, D, positions)
    query, key = (rotate(x.unflatten(-1, (-1, D)), cos, sin) for x in (query, key))
    value = value.unflatten(-1, (G, D))
    N, out = hidden.shape[0], []
    for a in range(A):
        g = a // (A // G)
        scores = query[:, a] @ key[:, g].T / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
        out.append(scores.softmax(-1) @ value[:, g])
    flat = torch.cat(out, dim=-1)
    return flat @ weights[f"{layer}.self_attn.o_proj.weight"].T + weights.get(f"{layer}.self_attn.o_proj.bias", 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x_NAD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX style: the halves of a head are the pairs."""
    one, two = x_NAD.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def rotary_tables(c: dict[str, Any], D: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [N, D / 2], of vLLM's rotary classes."""
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
    base, kind, factor = rope["rope_theta"], rope.get("rope_type", "default"), rope.get("factor", 1.0)
    frequency = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    scale, time = 1.0, positions.float()
    if kind == "linear":
        time = time / factor
    elif kind == "llama3":
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        length = 2 * math.pi / frequency
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = (1 - smooth) * frequency / factor + smooth * frequency
        frequency = torch.where(length < high, frequency, torch.where(length > low, frequency / factor, between))
    elif kind == "yarn":
        original = rope["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = math.floor(dimension(32)), math.ceil(dimension(1))
        low, high = max(low, 0), min(high, D - 1)
        ramp = ((torch.arange(D // 2) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        frequency = frequency / factor * ramp + frequency * (1 - ramp)
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    else:
        assert kind == "default", kind
    angle = time[:, None] * frequency
    return angle.cos() * scale, angle.sin() * scale
