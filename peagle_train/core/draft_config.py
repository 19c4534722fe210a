"""PEagleDraftConfig: a Llama or Qwen3 config with the fields that vLLM's EAGLE-3 loader and this trainer read."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from transformers import LlamaConfig

from peagle_train.core.rope import rope_mistake

NOT_SAVED = (
    "_name_or_path chunk_size_feed_forward id2label is_encoder_decoder label2id output_attentions output_hidden_states"
    " problem_type return_dict pretraining_tp"
).split()
"""What transformers puts into every config and no reader of a drafter needs."""

ARCHITECTURES = {
    "llama": ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM"),
    "qwen3": ("Eagle3Qwen3ForCausalLM", "Qwen3ForCausalLM"),
}
"""By layer type, the names under which vLLM's method eagle3 loads such a drafter; the first is written."""

MASK_KEYS = ("dflash_config.mask_token_id", "mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")
"""The mask token's names in a config.json, in the order in which vLLM looks for it; other kinds of drafters have the first
and the third.
"""


def mask_tokens_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json's content gives under each of MASK_KEYS, in their order."""
    nested = config.get("dflash_config")
    named = {**config, MASK_KEYS[0]: nested.get("mask_token_id") if isinstance(nested, dict) else None}
    return {key: named[key] for key in MASK_KEYS if named.get(key) is not None}


class PEagleDraftConfig(LlamaConfig):
    """A drafter's shape, as in its `config.json`.

    `hidden_size`, `num_hidden_layers`, ... are the drafter's own; `vocab_size` is the target's. Beyond Llama's:
    """

    draft_vocab_size: int | None = None
    """Vd, rows of `lm_head`; None is the target's vocabulary."""
    target_hidden_size: int | None = None
    """T, the target's; None is the drafter's hidden size."""
    ptd_token_id: int | None = None
    """The mask token, read by every slot but the first."""
    mask_token_id: int | None = None
    pard_token: int | None = None
    """The same under its other names, of which one is enough: every reader knows one of the three."""
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    """The layers of the target whose *input* is read, ascending; None is (2, n // 2, n - 3)."""
    num_aux_hidden_states: int | None = None
    """How many those are, which is where vLLM's Llama drafter looks first; None: as many as there are ids, or 3."""
    layer_type: Literal["llama", "qwen3"] = "llama"
    """It is config.json's model_type. Qwen3 layers norm each head's queries and keys."""
    norm_before_fc: bool = False
    """Whether an RMSNorm over all features stands before `fc`, `mask_hidden`'s included."""
    fc_norm: bool = False
    """Whether one of each feature layer does."""
    norm_before_residual: bool = False
    """Whether layer 0's residual is the features after `hidden_norm` (True) or before (False)."""
    sliding_window: int | None = None
    """N, positions that an element sees, its own included (`first_seen`); None: all."""
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    """Follow from the window, of which nothing is read without them: Qwen3's configs and vLLM ask for one each."""

    def __post_init__(self, **kwargs: Any) -> None:
        given = [self.mask_token_id, self.pard_token, self.ptd_token_id]
        self.mask_token_id = self.pard_token = self.ptd_token_id = next((t for t in given if t is not None), None)
        super().__post_init__(**kwargs)
        has_window = self.sliding_window is not None
        self.use_sliding_window = has_window or None
        self.layer_types = ["sliding_attention"] * self.num_hidden_layers if has_window else None
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.num_aux_hidden_states is None:
            self.num_aux_hidden_states = len(self.eagle_aux_hidden_state_layer_ids or (2, 0, 0))
        self.architectures = [ARCHITECTURES[self.layer_type][0]]

    @property
    def feature_size(self) -> int:
        """F: numbers that `fc` reads of a position, those of all feature layers."""
        assert self.num_aux_hidden_states is not None and self.target_hidden_size is not None
        return self.num_aux_hidden_states * self.target_hidden_size

    def check_trainable(self) -> None:
        """ValueError for what a drafter cannot be trained or served with."""
        assert self.rope_parameters is not None and self.draft_vocab_size is not None
        assert self.head_dim is not None and self.num_key_value_heads is not None
        self.validate_architecture()  # LlamaConfig's, through which serving reads config.json
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"{heads} must be a multiple of num_key_value_heads ({self.num_key_value_heads})")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm are both true, which speculators refuses: give one")
        if self.layer_type == "qwen3" and (self.attention_bias or self.mlp_bias):
            raise ValueError("attention_bias and mlp_bias must be false: vLLM's Qwen3 layers have no biases")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        if mistake := rope_mistake({"rope_type": "default", **self.rope_parameters}):
            raise ValueError(f"the drafter's rope: {mistake}")
        if self.ptd_token_id is None:
            raise ValueError("mask_token_id is missing; set draft.mask_token_id to a token that never occurs in data")
        if not 0 <= self.ptd_token_id < self.vocab_size:
            allowed = f"0..{self.vocab_size - 1}, the target's vocabulary"
            raise ValueError(f"mask_token_id is {self.ptd_token_id}; it must lie in {allowed}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}; the target's vocabulary has {self.vocab_size}"
            )

    def to_json_string(self, use_diff: bool = True) -> str:
        """All that a reader may need, nothing left to a default that may change; rope in both spellings."""
        content = {k: v for k, v in self.to_dict().items() if v is not None and k not in NOT_SAVED}
        # Of these, save_pretrained writes the class's own, unknown to vLLM.
        content |= {"architectures": [ARCHITECTURES[self.layer_type][0]], "model_type": self.layer_type}
        assert self.rope_parameters is not None
        rope = {k: v for k, v in self.rope_parameters.items() if k != "rope_theta"}
        content["rope_theta"] = self.rope_parameters["rope_theta"]
        content["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return json.dumps(content, indent=2, sort_keys=True) + "\n"
