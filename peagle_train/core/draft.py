"""PEagleDraft: the drafter, in the tensor names that vLLM's EAGLE-3 loader expects.

Layer 0 reads [token embedding, features] (2H wide); the layers above are plain Llama or Qwen3 layers; `lm_head` maps to the
draft vocabulary. B: rows, N: elements of a pass, M: leading slots that hold depth-0 elements, Q: queries of the last layer,
H: hidden size, T: the target's hidden size, F: features of its layers, D: head dim, A: query heads, G: key/value heads.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, rotate_half

from peagle_train.core.attention import attend
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.loss import Loss, chunked_linear_loss
from peagle_train.core.visibility import Causal, Visibility

KV = tuple[Tensor, Tensor]
"""Keys (rotated) and values of one layer, [B, G, n, D] each."""


class Labels(NamedTuple):
    """`rows`, then `chunked_linear_loss`'s arguments. m: supervised elements, V: draft vocabulary, T: the target's size."""

    rows: Tensor | None
    """int64 [m], the supervised elements among the B * Q of the last layer, flattened; None: all, see `counted`."""
    target_hidden: Tensor
    """[m, T], the target's last hidden state of each one's label column."""
    target_head: Tensor
    """[V, T], the target's head rows of the draft vocabulary."""
    loss: Loss = "kl"
    chunk_rows: int = 384
    counted: Tensor | None = None
    """bool [m], the supervised ones among `rows`; None: all of them."""
    weight: Tensor | None = None
    """[m], what each one's loss is multiplied by; None: one."""


class DraftOutput(NamedTuple):
    hidden: Tensor | None
    """[B, Q, H] after `norm`, before `lm_head`."""
    keys_values: list[KV]
    """Each layer's, of all N elements."""
    loss: Tensor | None
    """Scalar, summed over the supervised elements; None without labels."""
    hits: Tensor | None
    """bool [m], whether the argmax agrees with the target's within the draft vocabulary."""


class RMSNorm(nn.Module):
    """Llama's, computed in float32 or wider (transformers' casts float64 down); the result is in the input's dtype.

    In bfloat16 the weight is rounded, as autocast rounds all others, and as it is served.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # torch's own, on CUDA, keeps its input as it is and a number a row; autocast would make a wide copy of it.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: PEagleDraftConfig, input_size: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        bias, query_size = config.attention_bias, config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        is_qwen3, eps = config.layer_type == "qwen3", config.rms_norm_eps
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps) if is_qwen3 else nn.Identity() for _ in range(2))

    def keys_values(self, x_BNI: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        key, value = (p(x_BNI).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return _rotate(self.k_norm(key).transpose(1, 2), rope), value.transpose(1, 2)

    def forward(
        self, x_BQI: Tensor, rope: tuple[Tensor, Tensor], own: KV, context: KV | None, visibility: Visibility | Causal
    ) -> Tensor:
        query = self.q_norm(self.q_proj(x_BQI).unflatten(-1, (-1, self.head_dim)))
        return self.o_proj(attend(_rotate(query.transpose(1, 2), rope), own, context, visibility))


class Layer(nn.Module):
    """A Llama or Qwen3 layer; the fused one takes the token embeddings too and attends over [embedding, features]."""

    def __init__(self, config: PEagleDraftConfig, fused: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, 2 * size if fused else size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        if fused:
            self.hidden_norm = RMSNorm(size, eps)
        self.fused = fused
        self.norm_before_residual = config.norm_before_residual

    def forward(
        self,
        x_BNH: Tensor,
        embeds_BNH: Tensor | None,
        rope: tuple[Tensor, Tensor],
        context: KV | None,
        visibility: Visibility | Causal,
        skip: int = 0,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns (hidden states of the elements from `skip` on, or None if none is left; keys; values of all N)."""
        if self.fused:
            assert embeds_BNH is not None
            normed = self.hidden_norm(x_BNH)
            if self.norm_before_residual:
                x_BNH = normed
            normed = torch.cat([self.input_layernorm(embeds_BNH), normed], dim=-1)
        else:
            normed = self.input_layernorm(x_BNH)
        key, value = self.self_attn.keys_values(normed, rope)
        if skip == x_BNH.shape[1]:
            return None, key, value
        if skip:
            x_BNH, normed, rope = x_BNH[:, skip:], normed[:, skip:], (rope[0][:, skip:], rope[1][:, skip:])
        x_BNH = x_BNH + self.self_attn(normed, rope, (key, value), context, visibility)
        return x_BNH + self.mlp(self.post_attention_layernorm(x_BNH)), key, value


class PEagleDraft(PreTrainedModel):
    """A P-EAGLE drafter.

    Parameters: `embed_tokens` [V, H], `fc` [H, F], `mask_hidden` [1, 1, F], `layers.*`, `norm`, `lm_head` [Vd, H];
    `input_norm` [F] or `fc_norm.*` [T] if the config has them.
    Buffers: `d2t` int64 [Vd], offsets (target id = i + d2t[i]); `t2d` bool [V]. None with the full vocabulary, where vLLM
    knows no such tensors.
    """

    config_class = PEagleDraftConfig
    config: PEagleDraftConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]  # noqa: RUF012 (an instance variable in transformers)
    supports_gradient_checkpointing = True

    def __init__(self, config: PEagleDraftConfig) -> None:
        super().__init__(config)
        config.check_trainable()
        assert config.draft_vocab_size is not None and config.target_hidden_size is not None
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.input_norm = RMSNorm(config.feature_size, eps) if config.norm_before_fc else nn.Identity()
        normed = range(config.num_aux_hidden_states or 0) if config.fc_norm else ()
        self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in normed)
        self.fc = nn.Linear(config.feature_size, size, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, config.feature_size))
        self.layers = nn.ModuleList(Layer(config, fused=i == 0) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.rotary_emb = self.make_rotary(config)
        self.d2t: Tensor | None
        self.t2d: Tensor | None
        offsets = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        listed = torch.arange(config.vocab_size) < config.draft_vocab_size
        pruned = config.draft_vocab_size < config.vocab_size
        self.register_buffer("d2t", offsets if pruned else None)
        self.register_buffer("t2d", listed if pruned else None)
        self.gradient_checkpointing = False  # set by transformers' switch, whose name depends on its version
        self.post_init()

    @staticmethod
    def make_rotary(config: PEagleDraftConfig) -> LlamaRotaryEmbedding:
        """The rotary tables' module; its buffer is in no checkpoint, so it must be made on a real device."""
        return LlamaRotaryEmbedding(config)

    @property
    def mask_token_id(self) -> int:
        assert self.config.ptd_token_id is not None
        return self.config.ptd_token_id

    @property
    def draft_token_ids(self) -> Tensor:
        """int64 [Vd]: the target's ids of the draft vocabulary, ascending."""
        ids = torch.arange(self.lm_head.out_features, device=self.lm_head.weight.device)
        return ids if self.d2t is None else ids + self.d2t

    def set_draft_vocab(self, draft_token_ids: Tensor) -> None:
        """Fill d2t and t2d from the target's ids of the draft vocabulary, int64 [Vd], ascending and distinct."""
        assert draft_token_ids.shape == (self.lm_head.out_features,)
        assert bool((draft_token_ids[1:] > draft_token_ids[:-1]).all()), "draft ids must ascend"
        if self.d2t is not None and self.t2d is not None:
            self.d2t.copy_(draft_token_ids - torch.arange(draft_token_ids.numel()))
            self.t2d.zero_()[draft_token_ids] = True

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        features: Tensor,
        visibility: Visibility | Causal,
        context: list[KV] | None = None,
        keys_values_only: bool = False,
        skip: int = 0,
        labels: Labels | None = None,
    ) -> DraftOutput:
        """Run one pass over N elements.

        Args:
            token: int64 [B, N], the token that each element reads (the mask token where depth > 0).
            position: int64 [B, N], rotary positions.
            features: [B, M, F], the target's features of the first M = visibility.num_depth0 slots (anything where
                such a slot holds no depth-0 element; those and all later slots read `mask_hidden`).
            visibility: who sees whom; `Causal` where the drafter serves (see `peagle_train.decoding.generate`).
            context: each layer's rotated keys and values of the P context columns; None where P = 0.
            keys_values_only: the last layer computes keys and values and nothing else; hidden states are None.
            skip: the first `skip` elements drop out of the last layer once their keys and values are known.
            labels: what to compute the loss against. Inside forward, so that sharded weights are whole here.
        """
        x_BNH = self._fused_features(features, visibility.depth)
        embeds_BNH = self.embed_tokens(token).to(x_BNH.dtype)
        rope = self.rotary_emb(x_BNH, position)  # cos and sin, [B, N, D]
        if keys_values_only:
            skip = token.shape[1]
        keys_values: list[KV] = []
        hidden: Tensor | None = x_BNH
        for i, layer in enumerate(self.layers):
            embeds = embeds_BNH if i == 0 else None
            of_context = context[i] if context else None
            left_out = skip if i == len(self.layers) - 1 else 0
            arguments = (hidden, embeds, rope, of_context, visibility, left_out)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden, key, value = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, key, value = layer(*arguments)
            keys_values.append((key, value))
        if hidden is None:
            return DraftOutput(None, keys_values, None, None)
        hidden = self.norm(hidden)
        if labels is None:
            return DraftOutput(hidden, keys_values, None, None)
        with nullcontext() if torch.compiler.is_compiling() else record_function("peagle::loss"):
            learned = hidden.flatten(0, 1) if labels.rows is None else hidden.flatten(0, 1)[labels.rows]
            loss, hits = chunked_linear_loss(learned, self.lm_head.weight, *labels[1:])
        return DraftOutput(hidden, keys_values, loss, hits)

    def _fused_features(self, features_BMF: Tensor, depth_BN: Tensor) -> Tensor:
        """fc of the features where depth is 0, fc of `mask_hidden`, computed once, everywhere else: [B, N, H]."""
        B, N = depth_BN.shape
        M = features_BMF.shape[1]
        device_type = features_BMF.device.type
        autocast = torch.is_autocast_enabled(device_type)  # which leaves float64 as it is
        features_BMF = features_BMF.to(torch.get_autocast_dtype(device_type) if autocast else self.fc.weight.dtype)
        is_depth0_BM1 = (depth_BN[:, :M] == 0)[:, :, None]
        # Zeros where they are not read: a nan there would pass through fc's weight gradient as 0 * nan.
        fused_BMH = self._fuse(features_BMF.masked_fill(~is_depth0_BM1, 0))
        mask_H = self._fuse(self.mask_hidden)[0, 0]
        return torch.cat([torch.where(is_depth0_BM1, fused_BMH, mask_H), mask_H.expand(B, N - M, -1)], dim=1)

    def _fuse(self, features_BMF: Tensor) -> Tensor:
        features_BMF = self.input_norm(features_BMF)
        if self.fc_norm:
            parts = zip(self.fc_norm, features_BMF.chunk(len(self.fc_norm), dim=-1), strict=True)
            features_BMF = torch.cat([norm(part_BMT) for norm, part_BMT in parts], dim=-1)
        return self.fc(features_BMF)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own also makes the rotary tables again, which from_pretrained leaves uninitialised.
        super()._init_weights(module)
        if isinstance(module, PEagleDraft):
            # Not zeros: hidden_norm of a zero vector has gradients of size 1 / sqrt(eps).
            init.normal_(module.mask_hidden, std=self.config.initializer_range)


def _rotate(x_BAND: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table[:, None] for table in rope)
    return x_BAND * cos + rotate_half(x_BAND) * sin
