"""The recipe: every setting of a training run, in six sections, from YAML and `section.key=value` arguments.

A new setting is a new field: its type hint, `option(...)` limits and docstring are all that it takes.
"""
# ruff: noqa: RUF009 (option() makes a dataclass field)

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from peagle_train.core.rope import rope_mistake, unused_keys
from peagle_train.data.source_spec import parse_sources
from peagle_train.schema import RecipeError, check_section, option, read_sections
from peagle_train.strict_yaml import YamlError, dump_yaml, read_yaml

MANY = 2**31 - 1
"""The largest of what is only counted; what memory or time is taken for has limits of its own, beyond any use."""

MAX_ROPE_THETA = 1e15
"""Beyond it the slowest angles vanish in float32."""

__all__ = ["MAX_ROPE_THETA", "Recipe", "RecipeError", "dump_recipe", "load_recipe"]


@dataclass
class Target:
    """The model to draft for."""

    path: str = option(is_path=True)
    """Folder of the target in transformers' format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """What the target computes in; auto is what its files say."""
    layer_ids: list[int] | None = option(
        None,
        rule=(
            lambda ids: len(ids) == 3 and 0 <= ids[0] < ids[1] < ids[2],
            "3 strictly increasing integers >= 0, as in [2, 14, 25]",
        ),
    )
    """Features are the residual stream entering these layers; null: (2, n // 2, n - 3) for n layers."""
    chunk_tokens: int | None = option(None, ge=1, le=MANY)
    """Tokens that the target is given at a time, over a cache of keys and values; null: a whole batch."""
    cache: str | None = option(None, is_path=True)
    """Folder of tools/cache_features.py to read features from, so that the target need not run; null: run it."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """What features have in that folder; auto is what the target computes in."""
    attn_implementation: str | None = None
    """transformers' attention of the target; null: its default. Where that is sdpa, and the model heeds documents' bounds,
    packed documents are attended to without transformers' mask of tokens by tokens."""
    shard: bool = False
    """Shard the target over all processes (FSDP2), where it does not fit on one device."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spread the target over the devices that a single process sees (balanced_low_0 leaves room on the first)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the target's files."""
    check: bool = True
    """Check at the start that packed documents do not see each other and that features and head agree.
    The checksums of target.cache are compared in any case."""


@dataclass
class Data:
    """The documents to learn from."""

    sources: list[str | dict[str, Any]] = option(
        rule=(lambda items: len(items) > 0, "a non-empty list of files, folders, globs or the word stdlib")
    )
    """Files, folders, globs, `stdlib` (the running Python's own library), `hf:NAME`, or mappings with `path` or `datasets`,
    and weight, format, split, name, streaming: see `SourceSpec` in source_spec.py."""
    extensions: list[str] = option(
        [".py", ".txt", ".md", ".jsonl", ".parquet", ".arrow"],
        rule=(
            lambda items: all(item.startswith(".") for item in items),
            "a list of file extensions, each with its dot, as in [.py, .jsonl]",
        ),
    )
    """Which files of folders are read: .jsonl, .json, .parquet and .arrow as rows, anything else as text."""
    exclude: list[str] = option([])
    """fnmatch patterns; a file whose path below its source matches one is left out."""
    eval_sources: list[str | dict[str, Any]] = option(
        [], rule=(lambda items: True, "a list of files, folders, globs or the word stdlib")
    )
    """Documents to evaluate on, named as in `sources` (but weights are 1). Given, eval_fraction is not used."""
    eval_fraction: float = option(0.02, ge=0, lt=1)
    """Share of the documents of `sources` that is held out to evaluate on."""
    max_documents: int | None = option(None, ge=1, le=MANY)
    """Stop reading behind so many documents."""
    max_bad_rows: int = option(0, ge=0, le=MANY)
    """Leave out so many rows that cannot be trained on, counted by reason; one more stops the run."""
    max_characters: int | None = option(4_000_000, ge=1, le=MANY)
    """A row of data that holds a longer text is a bad row; null: any length. Text files may have any length."""
    max_eval_rows: int | None = option(64, ge=1, le=MANY)
    """Evaluate on at most so many packed rows; null: on all."""
    max_length: int = option(2048, ge=2, le=2**22)
    """Tokens of a row; longer documents are split."""
    pack: bool = True
    """Several documents to a row."""
    prepared: str | None = option(None, is_path=True)
    """Folder that tools/prepare_data.py wrote for this recipe: nothing is read or tokenized again."""
    num_workers: int = option(0, ge=0, le=256)
    """Loader processes."""
    chat_template: str | None = option(None, is_path=True)
    """A .jinja file to use in place of the tokenizer's own chat template."""
    template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, as in {enable_thinking: false}."""
    on_rewrite: Literal["last_turn", "refuse"] = "last_turn"
    """Chats whose earlier turns the template rewrites (drops their thoughts): learn from the last turn only, or not."""


@dataclass
class Draft:
    """The drafter. null stands for the target's own value."""

    num_layers: int = option(1, ge=1, le=128)
    """Decoder layers."""
    hidden_size: int | None = option(None, ge=1, le=2**16)
    """Width of the drafter."""
    num_attention_heads: int | None = option(None, ge=1, le=2**10)
    """Query heads."""
    num_key_value_heads: int | None = option(None, ge=1, le=2**10)
    """Key and value heads; divides num_attention_heads."""
    head_dim: int | None = option(None, ge=1, le=2**12)
    """Width of a head."""
    intermediate_size: int | None = option(None, ge=1, le=2**20)
    """Width of the feed-forward layers."""
    draft_vocab_size: int | None = option(None, ge=1, le=2**24)
    """Draft only the most frequent tokens; null: the full vocabulary."""
    vocab_from: str | None = option(None, is_path=True)
    """Draft the tokens that another drafter drafts (folder or .safetensors with d2t), instead of the most frequent ones."""
    mask_token_id: int | None = option(None, ge=0, le=MANY)
    """A token that never occurs in text; null: the first id that no token of the tokenizer uses."""
    max_position_embeddings: int | None = option(None, ge=1, le=MANY)
    """Longest context that the drafter serves."""
    rope_theta: float | None = option(None, gt=1, le=MAX_ROPE_THETA)
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """Rotary scaling, as in config.json, as in {rope_type: linear, factor: 2}: see core/rope.py for types and keys."""
    train_embeddings: bool = True
    """Train the token embeddings."""
    train_lm_head: bool = False
    """Train the output head."""
    embeddings_from_target: bool = True
    """Start from the target's embeddings."""
    lm_head_from_target: bool = True
    """Start from the target's head (its rows of the draft vocabulary)."""
    norm_before_residual: bool = False
    """Layer 0's residual is the normed features instead of the raw ones."""
    init_from: str | None = option(None, is_path=True)
    """Folder of an EAGLE-3 or P-EAGLE drafter to start from: its weights, its shape and its draft vocabulary."""


@dataclass
class Cod:
    """Which elements are sampled, and how they are cut into segments."""

    num_depths: int = option(8, ge=1, le=256)
    """K: tokens drafted in parallel."""
    down_sample_ratio: float = option(0.7, gt=0, le=1)
    """r: depth d keeps a share r**d of the elements."""
    down_sample_ratio_min: float = option(0.2, ge=0, le=1)
    """Floor of that share (0: the paper's; 0.2: speculators')."""
    num_segments: int | Literal["auto"] = option(1, ge=1, le=2**16)
    """S: forward and backward passes that a row is cut into; more of them take less memory. auto: the smallest power of two
    that fits the device (see train.memory_margin), which checkpoints then name, so that a resumed run keeps it."""
    boundaries: Literal["balanced", "uniform"] = "balanced"
    """Segments of equal element counts, or of equal lengths (Algorithm 1 as published)."""

    @property
    def segments(self) -> int:
        """`num_segments` as a number; auto must have been resolved."""
        assert self.num_segments != "auto", "cod.num_segments is auto where a number is needed"
        return self.num_segments


@dataclass
class Train:
    """The optimization."""

    epochs: int = option(1, ge=1, le=10**6)
    """Passes over the data."""
    max_steps: int | None = option(None, ge=1, le=10**9)
    """Optimizer steps; overrides `epochs`."""
    batch_size: int = option(1, ge=1, le=4096)
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = option(1, ge=1, le=4096)
    """Micro-batches per optimizer step."""
    learning_rate: float = option(1e-4, gt=0, le=1)
    """The highest learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls behind the warm-up."""
    warmup_ratio: float = option(0.0025, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = option(0.0, ge=0, le=1)
    """AdamW's; never on embeddings, norms and mask_hidden."""
    adam_beta1: float = option(0.9, ge=0, lt=1)
    """AdamW's first momentum."""
    adam_beta2: float = option(0.95, ge=0, lt=1)
    """AdamW's second momentum."""
    adam_epsilon: float = option(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = option(1.0, gt=0)
    """Clip the gradient's norm; null: never."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the drafter."""
    seed: int = option(0, ge=0, lt=2**63)
    """Of initial weights, row order and COD draws."""
    segment_mode: Literal["relay", "recompute"] = "relay"
    """Segments hand on keys, values and their gradients, or each recomputes its past (Algorithm 1)."""
    loss: Literal["kl", "soft_ce", "hard_ce"] = "kl"
    """KL(target || draft), cross-entropy with the target's distribution, or with its argmax."""
    loss_chunk_rows: int | Literal["auto"] = option("auto", ge=1, le=MANY)
    """Rows of logits that exist at a time; auto: 1024 on CUDA, 384 elsewhere."""
    sharding: Literal["auto", "none", "fsdp2"] = "auto"
    """Shard weights, gradients and optimizer states over all processes (FSDP2); auto: if the launch has an FSDP config."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the drafter's passes (torch.compile, static shapes): one graph each, whatever the data; auto: on CUDA."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """torch.compile's backend; aot_eager only traces, for tests."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode; reduce-overhead is refused."""
    profile_steps: list[int] | None = option(
        None,
        rule=(lambda steps: len(steps) == 2 and 1 <= steps[0] <= steps[1], "the first and the last step, as in [5, 8]"),
    )
    """Write a torch profiler trace of these steps, and print where their time goes."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    offload_features: bool = False
    """Keep the target's features in host memory between segments."""
    probe: bool | Literal["auto"] = "auto"
    """Before training, run a full row's step and throw it away, to prove that the largest step fits; auto: on CUDA."""
    memory_margin: float = option(0.1, ge=0, lt=1)
    """Share of the device's memory that cod.num_segments = auto leaves free."""
    log_steps: int = option(10, ge=1, le=MANY)
    """Log every so many steps."""
    log_with: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    """A tracker to log to beside metrics.jsonl, which is always written; it has to be installed."""
    eval_steps: int | None = option(None, ge=1, le=MANY)
    """Evaluate every so many steps; null: only before and after training."""
    save_steps: int | None = option(None, ge=1, le=MANY)
    """Save a checkpoint every so many steps; null: only the final drafter."""
    keep_last: int | None = option(None, ge=1, le=MANY)
    """Keep the newest so many checkpoints; null: all."""
    keep_every: int | None = option(None, ge=1, le=MANY)
    """Beside those of keep_last, keep every checkpoint whose step is a multiple of this."""
    max_bad_steps: int = option(3, ge=1, le=MANY)
    """Stop when the loss or gradient of so many steps in a row is not finite (such a step is never applied)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the drafter's master weights."""

    def chunk_rows(self, kind: str) -> int:
        """`loss_chunk_rows` as a number, on a device of this type."""
        if self.loss_chunk_rows != "auto":
            return self.loss_chunk_rows
        return 1024 if kind == "cuda" else 384


@dataclass
class Output:
    """Where results go."""

    dir: str = option(is_path=True)
    """Folder of logs, checkpoints and the drafter."""


@dataclass
class Recipe:
    """Every setting of a run."""

    target: Target
    data: Data
    output: Output
    draft: Draft = field(default_factory=Draft)
    cod: Cod = field(default_factory=Cod)
    train: Train = field(default_factory=Train)

    def validate(self) -> None:
        """RecipeError unless every field and every pair of fields that depend on each other is allowed."""
        for section in fields(self):
            check_section(getattr(self, section.name), section.name)
        parse_sources(self.data.sources)
        if any(source.weight != 1 for source in parse_sources(self.data.eval_sources, "data.eval_sources")):
            raise RecipeError("data.eval_sources has a weight; every document of it is evaluated on once: leave it out")
        heads, kv_heads = self.draft.num_attention_heads, self.draft.num_key_value_heads
        self._require("data.max_length", ">=", "cod.num_depths", self.data.max_length >= self.cod.num_depths)
        is_cut = self.cod.num_segments == "auto" or self.cod.num_segments <= self.data.max_length
        self._require("cod.num_segments", "<=", "data.max_length", is_cut)
        if heads is not None and kv_heads is not None:
            key = "draft.num_key_value_heads"
            self._require("draft.num_attention_heads", "a multiple of", key, heads % kv_heads == 0)
        if self.draft.rope_scaling is not None:
            _check_rope_scaling(self.draft.rope_scaling)
        if self.target.shard and self.target.device_map:
            raise RecipeError(
                f"target.shard is true, target.device_map is {self.target.device_map}: change one of them to false or null"
            )
        if self.draft.init_from is not None and self.draft.vocab_from is not None:
            raise RecipeError(
                "draft.init_from and draft.vocab_from are both given, and each brings a draft vocabulary: leave one out"
            )
        if self.train.compile_mode == "reduce-overhead":
            raise RecipeError(
                "train.compile_mode is reduce-overhead, whose CUDA graphs would overwrite one segment's gradients with the"
                " next one's: give default or max-autotune-no-cudagraphs"
            )
        if self.train.mixed_precision == "bf16" and self.train.dtype == "float64":
            # Autocast leaves float64 as it is, without a word.
            raise RecipeError("train.mixed_precision is bf16, train.dtype is float64: change one of them")

    def _require(self, first: str, relation: str, second: str, holds: bool) -> None:
        if not holds:
            values = [getattr(getattr(self, key.split(".")[0]), key.split(".")[1]) for key in (first, second)]
            raise RecipeError(
                f"{first} is {values[0]} and {second} is {values[1]}: change one of them so that {first} is"
                f" {relation} {second}"
            )


def _check_rope_scaling(scaling: dict[str, Any]) -> None:
    if "rope_theta" in scaling:
        raise RecipeError("draft.rope_scaling has rope_theta, a setting of its own: give draft.rope_theta instead")
    if mistake := rope_mistake(scaling):
        raise RecipeError(f"draft.rope_scaling: {mistake}")
    if unused := unused_keys(scaling):
        shown = ascii(unused[0])[:80]
        raise RecipeError(f"draft.rope_scaling has {shown}, which rope type {scaling['rope_type']} does not have")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file, then apply `section.key=value` overrides (values are YAML; the last of a key counts).

    A mistake is a RecipeError of one line: what was given, what is allowed, what to change.
    """
    types: dict[str, type] = get_type_hints(Recipe)
    recipe = Recipe(**read_sections(types, _read_mapping(Path(os.path.expanduser(path)), types), overrides))
    recipe.validate()
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back to an equal one."""
    return dump_yaml(asdict(recipe))


def _read_mapping(path: Path, sections: Iterable[str]) -> dict[Any, Any]:
    try:
        raw = read_yaml(path)
    except YamlError as error:
        raise RecipeError(f"the recipe {error}") from None
    if not isinstance(raw, dict):
        given = "empty" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"the recipe {path} is {given}; give a mapping of sections: {', '.join(sections)}")
    return raw
