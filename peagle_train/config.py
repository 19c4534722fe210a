"""The recipe: every setting of a training run, in six sections, from YAML and `section.key=value` arguments.

A new setting is a new field: its type hint with its limits and its docstring are all that it takes. pydantic is imported
only when a recipe is read: without it, recipes can be built in Python.
"""

import difflib
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml

from peagle_train.core.rope import rope_mistake, unused_keys
from peagle_train.files import one_line


class RecipeError(ValueError):
    """A mistake in a recipe or another YAML file, told in one line."""


# YAML without its surprises


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """No duplicate keys, octals, base 60, dates or merge keys; `no` and `on` are words; 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", mark)
        return dict(super().construct_mapping(node, deep=deep))


class StrictDumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Quotes every string that any YAML reader, this one included, would take for something else."""


_FLOAT = r"(?!0[0-9])(?=.*[.eE])[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+)(?:[eE][-+]?[0-9]+)?$"
StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$|" + _FLOAT, list("-+.0123456789")),
]:
    for _class in (StrictLoader, StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; a RecipeError that begins with `where` if there is none."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets plain errors through on digits without end, odd tags (!!bool x) and deep nesting.
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or one_line(error)
        raise RecipeError(f"{where}: not valid YAML: {problem}{place}") from None


def read_yaml(path: Path) -> Any:
    """The value that a file holds; a RecipeError that names it if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """`value` as block YAML, in the order of its keys; `parse_yaml` reads it back."""
    return str(yaml.dump(value, Dumper=StrictDumper, sort_keys=False))


def as_override(key: str, value: Any) -> str:
    """What a person types into a shell to get `key` the value; `parse_yaml` reads it back."""
    # Letters stay as they are, but YAML folds what breaks a line in any script.
    letters = json.dumps(value, ensure_ascii=False).isprintable()
    dumped = yaml.dump([value], Dumper=StrictDumper, default_flow_style=True, width=float("inf"), allow_unicode=letters)
    text = str(dumped).strip()[1:-1]
    # of a list's element, as a word alone has an end-of-document mark
    return shlex.quote(f"{key}={text}")


# What a field's hint may ask for


class within:
    """Limits of a number; or what a value becomes, by `convert`, which raises ValueError with what to give instead."""

    def __init__(self, convert: Callable[[Any], Any] | None = None, **limits: float) -> None:
        self.convert, self.limits = convert, limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core.core_schema import no_info_after_validator_function

        schema = {**handler(source), **self.limits}
        return no_info_after_validator_function(self.convert, schema) if self.convert else schema


def _holding(holds: Callable[[Any], bool], words: str) -> within:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"give {words}")
        return value

    return within(check)


MANY = 2**31 - 1  # the largest of what is only counted; what takes memory or time has limits of its own
MAX_ROPE_THETA = 1e15  # beyond it the slowest angles vanish in float32
Count = Annotated[int, within(ge=1, le=MANY)]
Share = Annotated[float, within(ge=0, lt=1)]
Text = Annotated[str, _holding(lambda text: text.strip() != "", "a non-empty string")]
FilePath = Annotated[Text, within(os.path.expanduser)]
_PERCENT = re.compile(r"(100|[0-9]{1,2}(\.[0-9]{1,6})?)%")
Percent = Annotated[str, _holding(_PERCENT.fullmatch, "a count, or a share of at most 100%, as in 1%")]
Plain = dict[str, Any]
Sources = list[Text | dict[str, Any]]
SomeSources = Annotated[Sources, _holding(len, "a non-empty list of files, folders, globs or the word stdlib")]
_DOTTED = _holding(lambda items: all(item[0] == "." for item in items), "a list such as [.py, .jsonl], with the dots")
Extensions = Annotated[list[Text], _DOTTED]
_RISING = "1 to 8 strictly increasing integers >= 0, as in [2, 14, 25]"
Layers = Annotated[list[int], _holding(lambda x: 1 <= len(x) <= 8 and x[0] >= 0 and x == sorted({*x}), _RISING)]
_SPAN = "the first and the last step, as in [5, 8]"
Steps = Annotated[list[int], _holding(lambda x: len(x) == 2 and 1 <= x[0] <= x[1], _SPAN)]

ELSEWHERE = {
    "target.path": ("model model_name_or_path", "base_model", "verifier_name_or_path"),
    "target.dtype": ("torch_dtype", "torch_dtype", ""),
    "target.layer_ids": ("", "", "target_layer_ids"),
    "target.shard": ("device_map", "device_map", ""),
    "data.sources": ("dataset_name train_dataset", "datasets", "data_path"),
    "data.eval_sources": ("eval_dataset", "test_datasets", ""),
    "data.eval_fraction": ("", "val_set_size", "train_data_ratio"),
    "data.max_length": ("max_seq_length", "sequence_len", "total_seq_len"),
    "data.pack": ("packing", "sample_packing", ""),
    "data.prepared": ("", "dataset_prepared_path", ""),
    "data.num_workers": ("dataloader_num_workers", "dataloader_num_workers", ""),
    "data.chat_template": ("chat_template_path", "chat_template_jinja", ""),
    "draft.init_from": ("", "", "from_pretrained"),
    "draft.layer_type": ("", "", "draft_arch"),
    "draft.window": ("", "", "sliding_window"),
    "draft.train_embeddings": ("", "", "embed_requires_grad"),
    "train.epochs": ("num_train_epochs", "num_epochs", ""),
    "train.batch_size": ("per_device_train_batch_size", "micro_batch_size", ""),
    "train.learning_rate": ("", "", "lr"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler_type"),
    "train.warmup_ratio": ("warmup_steps", "warmup_steps", "scheduler_warmup_ratio scheduler_warmup_steps"),
    "train.mixed_precision": ("bf16 fp16", "bf16 fp16", ""),
    "train.loss": ("loss_type", "", "loss_fn"),
    "train.sharding": ("fsdp fsdp_config", "fsdp fsdp_config", "fsdp_shard"),
    "train.compile": ("torch_compile", "torch_compile", ""),
    "train.activation_checkpointing": ("gradient_checkpointing", "gradient_checkpointing", "gradient_checkpointing"),
    "train.log_steps": ("logging_steps", "logging_steps", "log_freq"),
    "train.log_with": ("report_to", "use_wandb use_mlflow", "logger"),
    "train.save_steps": ("save_strategy", "saves_per_epoch", "checkpoint_freq"),
    "train.keep_last": ("save_total_limit", "save_total_limit", ""),
    "train.eval_steps": ("eval_strategy", "evals_per_epoch", ""),
    "output.dir": ("output_dir", "output_dir", "save_path"),
    "peagle-train train RECIPE --resume": ("resume_from_checkpoint", "resume_from_checkpoint auto_resume", ""),
    "peagle-train export --push-to-hub NAME": ("push_to_hub hub_model_id", "hub_model_id", ""),
}
"""What TRL (and transformers), axolotl and speculators call our keys; names that are the same are not in it."""

GONE: dict[str, tuple[list[Any], str]] = {
    "data.max_characters": ([None, 4_000_000], "texts may have any length"),
    "data.max_documents": ([None], "give fewer files, or a split such as train[:1000]"),
    "data.sources.format": (["auto"], "files are read by their names' endings"),
    "data.sources.streaming": ([False], "fetch some of its files (hf download --include), and name their folder"),
    "data.on_rewrite": (["last_turn"], "of a chat that its template rewrites, the last turn is learned"),
    "draft.vocab_from": ([None], "draft.init_from takes another drafter's vocabulary, and its weights"),
    "train.muon_learning_rate": ([2e-3], "Muon's steps are of the size of AdamW's, at train.learning_rate"),
    "draft.embeddings_from_target": ([True], "embeddings are the target's where the drafter has its width"),
    "draft.lm_head_from_target": ([True], "the head is the target's where the drafter has its width"),
    "train.average": ([0.0], "the mean of the last steps' weights was no better than the last step's"),
    "train.compile_mode": (["default"], "set TORCHINDUCTOR_MAX_AUTOTUNE=1 in the environment"),
    "target.device_map": ([None], "take target.shard or target.server"),
}
"""Keys of before: the values with which older runs' recipes may still hold them, and what is said of any other."""


def key_for(name: str) -> str | None:
    """Our dotted key for a key without its section, or for another trainer's; None for a name that nobody has."""
    dotted = [f"{section}.{spec.name}" for section, cls in get_type_hints(Recipe).items() for spec in fields(cls)]
    ours = [key for key in dotted if key.endswith(f".{name}")]
    return next(iter(ours + [key for key, names in ELSEWHERE.items() if name in " ".join(names).split()]), None)


def read_section(cls: type, name: str, values: Mapping[Any, Any]) -> Any:
    """An instance of the dataclass from plain values; RecipeError of one line where they do not fit."""
    from pydantic import ValidationError

    gone = {key: GONE.get(f"{name.partition('[')[0]}.{key}", ([], "")) for key in values}
    values = {key: value for key, value in values.items() if value not in gone[key][0]}
    try:
        read = _model(cls).model_validate(values)
    except ValidationError as error:
        first, leaf = error.errors()[0], error.errors()[0]["loc"][0]
        key = f"{name}[{leaf}]" if isinstance(leaf, int) else f"{name}.{_plain(leaf)}"
        if first["type"] in ("extra_forbidden", "invalid_key"):
            names = [f.name for f in fields(cls)]
            close = difflib.get_close_matches(str(leaf), names, n=1)
            meant = key_for(str(leaf)) if "[" not in name else None  # a source's keys are nobody else's
            meant = meant or (f"{name}.{close[0]}" if close else None)
            hint = f"did you mean {meant}?" if meant else f"{name} has {', '.join(names)}"
            if leaf in gone and gone[leaf][1]:
                hint = f"remove it: {gone[leaf][1]}"
            raise RecipeError(f"{key} is not a key; {hint}") from None
        if first["type"] == "missing":
            raise RecipeError(f"{key} is missing") from None
        words = dict.fromkeys(mistake["msg"] for mistake in error.errors() if mistake["loc"][0] == leaf)
        allowed = ", or ".join(words).replace("Value error, ", "").replace("Input should be", "it should be")
        allowed = allowed.replace("a valid list", "a list, as in [a, b]")
        raise RecipeError(f"{key}: got {_show(first['input'])}; {allowed}") from None
    return cls(**{key: getattr(read, key) for key in read.model_fields_set})


@functools.cache
def _model(cls: type) -> Any:
    from pydantic import create_model

    hints = get_type_hints(cls, include_extras=True)
    is_needed = {spec.name: spec.default is spec.default_factory is MISSING for spec in fields(cls)}
    parts: dict[str, Any] = {key: (hints[key], ... if needed else None) for key, needed in is_needed.items()}
    return create_model(cls.__name__, __config__={"strict": True, "extra": "forbid", "allow_inf_nan": False}, **parts)


def _plain(key: Any) -> str:
    """A key that anyone may have written, in ASCII on one line."""
    return str(key).encode("unicode_escape").decode()[:80]


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else ascii(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


HUB = "hf:"  # in front of a name: it is that of a data set that Hugging Face's `datasets` loads


@dataclass(frozen=True)
class SourceSpec:
    """What a recipe says of one source."""

    path: Text | None = None
    """A file, a folder, a glob, or stdlib."""
    datasets: Text | None = None
    """The name of a data set, for `datasets.load_dataset`. Either this or path."""
    weight: Annotated[float, within(gt=0, le=1000)] = 1.0
    """How often each document comes in an epoch: 2.5 is twice, and once more for the half that their keys choose."""
    split: Text | None = None
    """Of a named data set; null: train."""
    name: Text | None = None
    """The named data set's configuration."""

    def describe(self) -> str:
        return self.path if self.path is not None else f"{HUB}{self.datasets}"


def parse_sources(items: Sequence[str | dict[str, Any]], key: str = "data.sources") -> list[SourceSpec]:
    """Each entry of `key`; RecipeError of one line for what is none."""
    specs: list[SourceSpec] = []
    for number, item in enumerate(items):
        item, where = {"path": item} if isinstance(item, str) else dict(item), f"{key}[{number}]"
        if str(item.get("path")).startswith(HUB) and "datasets" not in item:
            item["datasets"] = item.pop("path").removeprefix(HUB)
        spec = read_section(SourceSpec, where, item)
        if (spec.path is None) == (spec.datasets is None):
            which = "neither" if spec.path is None else "both"
            raise RecipeError(f"{where} has {which} of path and datasets; give one")
        if spec.path is not None and (spec.split or spec.name):
            raise RecipeError(f"{where} has split or name, which are of datasets: give the split's own folder as path")
        specs.append(spec)
    return specs


# The recipe


@dataclass
class Target:
    """The model to draft for."""

    path: FilePath
    """Folder of the target in transformers' format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """What the target computes in; auto is what its files say."""
    layer_ids: Layers | None = None
    """Features are the residual stream entering these 1 to 8 layers; null: (2, n // 2, n - 3) for n layers."""
    chunk_tokens: Count | None = None
    """Tokens that the target is given at a time, over a cache of keys and values; null: a whole batch."""
    cache: FilePath | None = None
    """Folder of `peagle-train cache` to read features from, so that the target need not run; null: run it."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64", "float8_e4m3fn"] = "auto"
    """Dtype of the features there. auto: what the target computes in; float8_e4m3fn: 8 bits and a scale per position."""
    server: list[Text] | Text | None = None
    """URL of a vLLM server that computes the features, or a list of them (see `peagle-train serve-target`)."""
    server_patience: Annotated[float, within(ge=0, le=10**6)] = 600.0
    """Seconds from a server's first failure until the run is saved and stops: time to restart it. A request that takes
    longer (and more than a minute) has failed."""
    prefetch_gib: Annotated[float, within(gt=0, le=10**6)] = 4.0
    """Host memory of a rank, at most, for features requested from servers ahead of use (one micro-batch always is)."""
    reuse: Annotated[int, within(ge=1, le=10**4)] = 1
    """R: features are computed once for R passes over the data (of which `train.epochs` counts each), with draws of their
    own. They go block by block: as many sequences as `ring` holds are trained on R times, then the next ones."""
    ring: Annotated[float, within(gt=0, le=10**7)] | None = None
    """GiB that features kept for `reuse` take on disk at most, over all processes."""
    ring_dir: FilePath | None = None
    """Folder to keep them in, such as a fast disk of the machine's own, or /dev/shm (memory); null: output.dir."""
    attn_implementation: Text | None = None
    """transformers' attention of the target; null: its default. By sdpa packed documents run together, if the model heeds
    their bounds; otherwise one at a time."""
    shard: bool = False
    """Shard the target over all processes (FSDP2), where it does not fit on one device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the target's files."""
    check: bool = True
    """Check at the start that packed documents do not see each other and that features and head agree."""


@dataclass
class Data:
    """The documents to learn from."""

    sources: SomeSources
    """Files, folders, globs, `stdlib` (the running Python's own library), `hf:NAME`, or mappings with `path` or `datasets`,
    and weight, split, name: see `SourceSpec` in config.py."""
    extensions: Extensions = field(default_factory=lambda: [".py", ".txt", ".md", ".jsonl", ".parquet", ".arrow"])
    """Which files of folders are read: .jsonl, .json, .parquet and .arrow as examples, anything else as text."""
    exclude: list[Text] = field(default_factory=list)
    """fnmatch patterns of files to skip, on a file's path below its source, with or without the source's name before it."""
    eval_sources: Sources = field(default_factory=list)
    """Documents to evaluate on, named as in `sources` (but weights are 1). Given, eval_fraction is not used."""
    eval_fraction: Share = 0.02
    """Share of the documents of `sources` that is held out to evaluate on: at least one of several, unless it is 0."""
    max_bad_rows: Annotated[int, within(ge=0, le=MANY)] | Percent = 0
    """Skip at most this many examples (or this share of all, as in 1%) that cannot be trained on, counted by reason; more
    stop the run: a share's after all are read. `peagle-train check-data` counts them."""
    max_eval_rows: Count | None = 64
    """Evaluate on at most this many sequences; null: on all."""
    max_length: Annotated[int, within(ge=2, le=2**22)] = 2048
    """Tokens of a sequence; longer documents are split. At least cod.num_depths."""
    pack: bool = True
    """Several documents to a sequence."""
    prepared: FilePath | None = None
    """Folder that `peagle-train prepare` wrote for this recipe: nothing is read or tokenized again."""
    num_workers: Annotated[int, within(ge=0, le=256)] = 0
    """Loader processes."""
    chat_template: FilePath | None = None
    """A .jinja file to use in place of the tokenizer's own chat template."""
    template_kwargs: Plain | None = None
    """Variables of the chat template, as in {enable_thinking: false}."""


@dataclass
class Draft:
    """The drafter. null stands for the target's own value."""

    num_layers: Annotated[int, within(ge=1, le=128)] = 1
    """Decoder layers."""
    hidden_size: Annotated[int, within(ge=1, le=2**16)] | None = None
    """Width of the drafter."""
    num_attention_heads: Annotated[int, within(ge=1, le=2**10)] | None = None
    """Query heads."""
    num_key_value_heads: Annotated[int, within(ge=1, le=2**10)] | None = None
    """Key and value heads; divides num_attention_heads."""
    head_dim: Annotated[int, within(ge=1, le=2**12)] | None = None
    """Width of a head."""
    intermediate_size: Annotated[int, within(ge=1, le=2**20)] | None = None
    """Width of the feed-forward layers."""
    draft_vocab_size: Annotated[int, within(ge=1, le=2**24)] | None = None
    """Draft only the most frequent tokens; null: the full vocabulary."""
    mask_token_id: Annotated[int, within(ge=0, le=MANY)] | None = None
    """A token that never occurs in text; null: the first id that no token of the tokenizer uses, or that it reserves."""
    max_position_embeddings: Count | None = None
    """Longest context that the drafter serves."""
    rope_theta: Annotated[float, within(gt=1, le=MAX_ROPE_THETA)] | None = None
    """Base of the rotary frequencies."""
    rope_scaling: Plain | None = None
    """Rotary scaling, as in config.json, as in {rope_type: linear, factor: 2}: see core/rope.py for types and keys."""
    train_embeddings: bool = True
    """Train the token embeddings."""
    train_lm_head: bool = False
    """Train the output head."""
    layers_from_target: bool = False
    """Start from the target's last layers and final norm, and from an `fc` that passes its last feature on: of Llama,
    Mistral and Qwen3 without biases, where the drafter's layers have their type and shape."""
    layer_type: Literal["llama", "qwen3"] | None = None
    """Qwen3's layers norm the queries and keys of each head; null: qwen3 for a target of that family, else llama."""
    norm_before_fc: bool = False
    """Norm all features of a position together before `fc`."""
    fc_norm: bool = False
    """Norm the features of each layer before `fc`; not beside norm_before_fc."""
    window: Count | None = None
    """N: an element attends to the last N positions up to its own, as with vLLM's sliding_window; at least cod.num_depths.
    Pays beyond some 10,000 tokens (docs/concepts.md). null: to all of its document."""
    norm_before_residual: bool = False
    """Layer 0's residual is the normed features instead of the raw ones."""
    init_from: FilePath | None = None
    """Folder of an EAGLE-3 or P-EAGLE drafter to start from: its weights, its shape and its draft vocabulary."""

    def trains_head(self, is_targets_width: bool) -> bool:
        """Whether the head is trained: as asked for, or because it starts random, where it cannot be the target's."""
        return self.train_lm_head or not is_targets_width

    @property
    def reach(self) -> int | None:
        """See `positions_read`."""
        return None if self.window is None else self.num_layers * (self.window - 1)


@dataclass
class Cod:
    """Which elements are sampled, and how they are cut into segments."""

    num_depths: Annotated[int, within(ge=1, le=256)] = 8
    """K: tokens drafted in parallel."""
    down_sample_ratio: Annotated[float, within(gt=0, le=1)] = 0.7
    """r: depth d keeps a share r**d of the elements."""
    down_sample_ratio_min: Annotated[float, within(ge=0, le=1)] = 0.2
    """Floor of that share (0: the paper's; 0.2: speculators')."""
    max_anchors: Count | None = None
    """Rollouts start at no more than N anchors of a sequence, drawn anew each epoch; every position keeps its depth 0.
    Fewer elements a sequence, so more text an hour (speculators' default is 512). null: at all anchors."""
    num_segments: Annotated[int, within(ge=1, le=2**16)] | Literal["auto"] = 1
    """S: forward and backward passes that a sequence is cut into; more of them take less memory. auto: the smallest power
    of two that fits the device (see train.memory_margin), which checkpoints then name, so that a resumed run keeps it. At
    most data.max_length."""
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

    epochs: Annotated[int, within(ge=1, le=10**6)] = 1
    """Passes over the data."""
    max_steps: Annotated[int, within(ge=1, le=10**9)] | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: Annotated[int, within(ge=1, le=4096)] = 1
    """Sequences per device and micro-batch."""
    gradient_accumulation_steps: Annotated[int, within(ge=1, le=4096)] = 1
    """Micro-batches per optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon, in steps of AdamW's size, for the matrices of layers and fc; AdamW for all else."""
    learning_rate: Annotated[float, within(gt=0, le=1)] = 1e-4
    """The highest learning rate."""
    muon_weight_decay: Annotated[float, within(ge=0, le=1)] = 0.1
    """Muon's weight decay."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_decay"] = "linear"
    """How the learning rate falls after the warm-up; constant_with_decay: linearly to 0 at the end of the run only."""
    decay_ratio: Annotated[float, within(gt=0, le=1)] = 0.2
    """Share of the steps in which constant_with_decay falls."""
    warmup_ratio: Share = 0.0025
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, within(ge=0, le=1)] = 0.0
    """AdamW's; never on embeddings, norms and mask_hidden."""
    adam_beta1: Share = 0.9
    """AdamW's first momentum."""
    adam_beta2: Share = 0.95
    """AdamW's second momentum."""
    adam_epsilon: Annotated[float, within(ge=1e-30, le=1)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, within(gt=0)] | None = 1.0
    """Clip the gradient's norm; null: never."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the drafter."""
    seed: Annotated[int, within(ge=0, lt=2**63)] = 0
    """Of initial weights, order of the sequences and COD draws."""
    segment_mode: Literal["relay", "recompute"] = "relay"
    """Segments hand on keys, values and their gradients, or each recomputes its past (Algorithm 1)."""
    loss: Literal["kl", "soft_ce", "hard_ce", "tv", "lk"] = "kl"
    """KL(target || draft), cross-entropy with the target's distribution or with its argmax, the chance that a sampled
    draft is refused (tv), or KL turning into that as drafts get better (lk)."""
    depth_decay: Annotated[float, within(gt=0, le=1)] = 1.0
    """g: an element's loss is multiplied by g**depth; below 1, first slots count for more, as in accepted length."""
    loss_chunk_rows: Count | Literal["auto"] = "auto"
    """Rows of logits that exist at a time; auto: 1024 on CUDA, 384 elsewhere."""
    sharding: Literal["auto", "none", "fsdp2"] = "auto"
    """Shard weights, gradients and optimizer states over all processes (FSDP2); auto: if the launch has an FSDP config."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the drafter's passes (torch.compile, static shapes): one graph each, whatever the data; auto: on CUDA."""
    compile_backend: Literal["inductor", "aot_eager"] = "inductor"
    """torch.compile's backend; aot_eager only traces, for tests."""
    profile_steps: Steps | None = None
    """Write a torch profiler trace of these steps, and print where their time goes."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    offload_features: bool = False
    """Keep the target's features in host memory between segments."""
    probe: bool | Literal["auto"] = "auto"
    """Before training, run the step of a full sequence and throw it away: if it fits, all steps do; auto: on CUDA."""
    memory_margin: Share = 0.1
    """Share of the device's memory that cod.num_segments = auto leaves free."""
    log_steps: Count = 10
    """Log every N steps."""
    log_with: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    """A tracker to log to beside metrics.jsonl, which is always written; it has to be installed."""
    eval_steps: Count | None = None
    """Evaluate every N steps; null: only before and after training."""
    save_steps: Count | None = None
    """Save a checkpoint every N steps; null: only the final drafter, and where a run is stopped."""
    keep_last: Count | None = None
    """Keep the newest N checkpoints; null: all."""
    keep_every: Count | None = None
    """Beside those of keep_last, keep every checkpoint whose step is a multiple of this."""
    max_bad_steps: Count = 3
    """Stop when the loss or gradient of N steps in a row is not finite (such a step is never applied)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the drafter's master weights."""

    def chunk_rows(self, kind: str) -> int:
        """`loss_chunk_rows` as a number, on a device of this type."""
        if self.loss_chunk_rows != "auto":
            return self.loss_chunk_rows
        return 1024 if kind == "cuda" else 384

    def compiles(self, kind: str) -> bool:
        """Whether passes are compiled on a device of this type."""
        return self.compile is True or (self.compile == "auto" and kind == "cuda")

    def pads_context(self, kind: str) -> bool:
        """Whether contexts, too, have the same shape in all batches: where each new one makes a graph or a kernel."""
        return self.compiles(kind) or kind == "cuda"

    def pads_passes(self, kind: str) -> bool:
        """Whether passes have the same shapes in all batches: also where oneDNN would keep a bfloat16 primitive for each
        (a run's memory would grow for hundreds of steps).
        """
        return self.pads_context(kind) or self.mixed_precision == "bf16"


@dataclass
class Output:
    """Where results go."""

    dir: FilePath
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
        """RecipeError unless fields that depend on each other agree."""
        target, data, draft, train, cod = self.target, self.data, self.draft, self.train, self.cod
        parse_sources(data.sources)
        rope = draft.rope_scaling
        weighed = any(spec.weight != 1 for spec in parse_sources(data.eval_sources, "data.eval_sources"))
        is_narrow = draft.window and draft.window < cod.num_depths
        is_short, many = data.max_length < cod.num_depths, cod.num_segments != "auto" and cod.segments > data.max_length
        kept, uneven = target.reuse > 1, not train.max_steps and train.epochs % target.reuse
        both = draft.init_from and draft.layers_from_target
        for is_wrong, keys, remedy in (
            (weighed, "data.eval_sources", "remove weight: every document of it is evaluated on once"),
            (is_narrow, "draft.window cod.num_depths", "give at least as many positions"),
            (is_short, "data.max_length cod.num_depths", "give at least as many tokens"),
            (many, "cod.num_segments data.max_length", "give at most as many segments"),
            (kept and not target.ring, "target.reuse target.ring", "give the GiB that features may take"),
            (not kept and target.ring, "target.ring target.reuse", "give more passes, or remove it"),
            (kept and target.cache, "target.reuse target.cache", "remove one: the cache has all features"),
            (kept and target.shard, "target.reuse target.shard", "give target.server, or remove one"),
            (uneven, "train.epochs target.reuse", "give a multiple of it, or train.max_steps"),
            (both, "draft.init_from draft.layers_from_target", "remove one: both bring the layers"),
            (rope and "rope_theta" in rope, "draft.rope_scaling", "rope_theta is a key of its own: draft.rope_theta"),
        ):
            if is_wrong:
                values = [functools.reduce(getattr, key.split("."), self) for key in keys.split()]
                given = ", ".join(f"{key} is {_show(value)}" for key, value in zip(keys.split(), values, strict=True))
                raise RecipeError(f"{given}: {remedy}")
        if rope is not None and (mistake := rope_mistake(rope)):
            raise RecipeError(f"draft.rope_scaling: {mistake}")
        if rope is not None and (unused := unused_keys(rope)):
            given = f"{ascii(unused[0])[:80]}, which rope type {rope['rope_type']} does not have"
            raise RecipeError(f"draft.rope_scaling has {given}")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML file, then apply `section.key=value` overrides (values are YAML; the last of a key counts). A mistake
    is a RecipeError of one line: what was given, what is allowed, what to change.
    """
    sections = get_type_hints(Recipe)
    given = read_yaml(Path(os.path.expanduser(path)))
    if not isinstance(given, dict):
        raise RecipeError(f"the recipe {path} is {_show(given)}; give a mapping of sections: {', '.join(sections)}")
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        name, dot, leaf = key.strip().partition(".")
        if not equals or not dot:
            meant = key_for(key.strip()) or "train.epochs=2"
            raise RecipeError(f"override {override!a}: give section.key=value, as in {meant}")
        changes.setdefault(name, {})[leaf] = parse_yaml(text, f"override {key.strip()}")
    for name in [*given, *changes]:
        if name not in sections:
            near = f"; did you mean {theirs}?" if (theirs := key_for(str(name))) else ""
            raise RecipeError(f"{_plain(name)} is not a section; there are {', '.join(sections)}{near}")
        if given.setdefault(name, {}) is None:  # as a section reads whose every line is commented out
            given[name] = {}
        if not isinstance(given[name], dict):
            raise RecipeError(f"{name}: got {_show(given[name])}; give a mapping of its keys to values")
        given[name].update(changes.get(name, {}))
    recipe = Recipe(**{name: read_section(cls, name, given.get(name, {})) for name, cls in sections.items()})
    recipe.validate()
    return recipe


def with_segments(recipe: Recipe, num_segments: int) -> Recipe:
    return replace(recipe, cod=replace(recipe.cod, num_segments=num_segments))


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back to an equal one."""
    return dump_yaml(asdict(recipe))
