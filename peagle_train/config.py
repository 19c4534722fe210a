"""The recipe: every setting of a training run, in six sections, from YAML and `section.key=value` arguments.

A new setting is a new field: its type hint, `option(...)` limits and docstring are all that it takes.
"""

import difflib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from peagle_train.core.rope import rope_mistake, unused_keys
from peagle_train.files import one_line

# ---- strict_yaml
# YAML without its surprises, for files that people write.


class YamlError(ValueError):
    """Text that is no YAML document, told in one line."""


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """No duplicate keys, octals, base 60, dates or merge keys; `no` and `on` are words; 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"duplicate key {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        values: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return values


class StrictDumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Quotes every string that any YAML reader, this one included, would take for something else."""


_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+)(?:[eE][-+]?[0-9]+)?$")
StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"), list("-+.")),
    ("float", re.compile(rf"(?!0[0-9])(?=.*[.eE]){_NUMBER.pattern}"), list("-+.0123456789")),
]:
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    StrictDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; a YamlError that begins with `where` if there is none."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise YamlError(f"{where}: not valid YAML: {error.problem or error.context}{place}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets plain errors through on digits without end, odd tags (!!bool x) and deep nesting.
        raise YamlError(f"{where}: not valid YAML: {one_line(error)}") from None


def read_yaml(path: Path) -> Any:
    """The value that a file holds; a YamlError that begins with the file's name if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise YamlError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return parse_yaml(text, str(path))


def dump_line(value: Any) -> str:
    """`value` as one line of YAML; `parse_yaml` reads it back."""
    text = str(yaml.dump([value], Dumper=StrictDumper, default_flow_style=True, width=float("inf"), allow_unicode=True))
    return text.strip()[1:-1]  # as an element of a list, so that a word alone has no end-of-document mark


def dump_yaml(value: Any) -> str:
    """`value` as block YAML, in the order of its keys; `parse_yaml` reads it back."""
    return str(yaml.dump(value, Dumper=StrictDumper, sort_keys=False))


# ---- schema
# Strict sections: plain values read into dataclasses by their type hints, each mistake one clear line.
#
# Machinery of `recipe.py`; knows nothing of its fields. A field's type hint says what is allowed: `int`,
# `float`, `bool`, `str`, `list[int]`, `list[str]`, `list[str | dict[str, Any]]`, `dict[str, Any]` or `Literal[...]`, each
# with or without `| None`, or a plain type and a word, as in `int | Literal["auto"]`. `option` adds limits or a rule.

Rule = tuple[Callable[[Any], bool], str]
"""What a value must fulfil, and the same in words: "give <words>"."""


class RecipeError(ValueError):
    """A mistake in a recipe, told in one line."""


def option(
    default: Any = MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    rule: Rule | None = None,
    is_path: bool = False,
) -> Any:
    """A dataclass field with limits. Without a default it must be given. `is_path` expands a leading `~`, and refuses
    what no file can be called.
    """
    limits = {">=": ge, ">": gt, "<=": le, "<": lt}
    metadata = {
        "limits": {sign: limit for sign, limit in limits.items() if limit is not None},
        "rule": rule,
        "is_path": is_path,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_sections(types: Mapping[str, type], raw: Mapping[Any, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """An instance of each section from what a file holds and `section.key=value` overrides."""
    known = [f"{name}.{spec.name}" for name, cls in types.items() for spec in fields(cls)]
    given: dict[str, dict[Any, Any]] = {}
    for name, values in raw.items():
        _check_section_name(name, types, known)
        # A section whose every line is commented out reads as null.
        given[name] = {} if values is None else values
        if not isinstance(given[name], dict):
            raise RecipeError(f"{name}: got {_show(values)}; give a mapping of its keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        name, dot, leaf = key.strip().partition(".")
        if not equals or not dot:
            raise RecipeError(f"override {override!a}: give section.key=value, as in train.epochs=2")
        _check_section_name(name, types, known)
        try:
            given.setdefault(name, {})[leaf] = parse_yaml(text, f"override {key.strip()}")
        except YamlError as error:
            raise RecipeError(str(error)) from None
    return {name: read_section(cls, name, given.get(name, {}), known) for name, cls in types.items()}


def as_override(key: str, value: Any) -> str:
    """What a person types into a shell to get `key` the value."""
    return shlex.quote(f"{key}={dump_line(value)}")


def read_section(cls: type, name: str, values: Mapping[Any, Any], known: list[str]) -> Any:
    """An instance of the dataclass from plain values; `known` are the dotted keys that a wrong one is compared with."""
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            meant = _nearest_key(name, str(key), known)
            raise RecipeError(f"{name}.{key} is not a key; did you mean {meant}?")
    read = {}
    for spec in fields(cls):
        key = f"{name}.{spec.name}"
        if spec.name in values:
            read[spec.name] = check_value(key, values[spec.name], hints[spec.name], spec.metadata)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise RecipeError(f"{key} is missing; give {_allowed(hints[spec.name], spec.metadata)}")
    return cls(**read)


def check_section(section: Any, name: str) -> None:
    """RecipeError unless every field of a section that was built in Python fits its hint and limits."""
    hints = get_type_hints(type(section))
    for spec in fields(section):
        check_value(f"{name}.{spec.name}", getattr(section, spec.name), hints[spec.name], spec.metadata)


def check_value(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` in the type that `hint` names, or a RecipeError that says what was given and what to give."""
    plain, is_nullable = _split_null(hint)
    if value is None and is_nullable:
        return None
    try:
        fitted = _fit(value, plain)
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"{key}: got {_show(value)}; give {_allowed(hint, metadata)}") from None
    rule: Rule | None = metadata.get("rule")
    is_word = isinstance(fitted, str)  # such as auto in a number's place
    is_within = is_word or all(_COMPARE[sign](fitted, limit) for sign, limit in metadata.get("limits", {}).items())
    if not is_within or (rule is not None and not rule[0](fitted)):
        raise RecipeError(f"{key}: got {_show(value)}; give {_allowed(hint, metadata)}")
    return check_path(key, os.path.expanduser(fitted)) if metadata.get("is_path") else fitted


def check_path(key: str, path: str) -> str:
    """`path` itself; RecipeError for one that no file system takes: any look at it would be an OSError."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise RecipeError(f"{key}: got {_show(path)}; give a path that can be written in UTF-8") from None
    if b"\0" in encoded:
        raise RecipeError(f"{key}: got {_show(path)}; give a path without a null character")
    if len(encoded) > MAX_PATH or max(map(len, encoded.split(b"/"))) > MAX_NAME:
        raise RecipeError(
            f"{key}: got {_show(path)}, {len(encoded)} bytes long; give a path of at most {MAX_PATH} bytes, each of its"
            f" folders' names at most {MAX_NAME}"
        )
    return path


MAX_PATH, MAX_NAME = 3800, 255
"""Bytes. Linux takes 4095; what a run writes below its folder needs some of them."""


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda value, limit: value >= limit,
    ">": lambda value, limit: value > limit,
    "<=": lambda value, limit: value <= limit,
    "<": lambda value, limit: value < limit,
}


def _split_null(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    plain = tuple(arg for arg in get_args(hint) if arg is not NoneType)
    return Union[plain], NoneType in get_args(hint)  # noqa: UP007 (of what is known only now)


def _fit(value: Any, hint: Any) -> Any:
    """`value` as `hint`; TypeError, ValueError or OverflowError where it is none."""
    origin = get_origin(hint)
    if origin is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_fit(item, get_args(hint)[0]) for item in value]
    elif origin in (Union, UnionType):
        for arg in get_args(hint):
            try:
                return _fit(value, arg)
            except (TypeError, ValueError, OverflowError):
                continue
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            json.dumps(value, allow_nan=False)  # raises on NaN, on cycles and on what has no plain form
            return value
    elif hint is float:
        # Strings too: to most YAML readers, 1e-4 without a dot is one.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    elif hint is str:
        if isinstance(value, str) and value.strip():
            return value
    else:
        assert hint in (int, bool), f"no rule for fields of type {hint}"
        if type(value) is hint:  # not isinstance: a bool is an int to Python, but not to a reader of recipes
            return value
    raise TypeError


def _allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    plain, is_nullable = _split_null(hint)
    others = ""
    if get_origin(plain) in (Union, UnionType):
        plain, *words_too = get_args(plain)
        others = "".join(f", or {word}" for literal in words_too for word in get_args(literal))
    rule: Rule | None = metadata.get("rule")
    if rule is not None:
        words = rule[1]
    elif get_origin(plain) is Literal:
        words = "one of " + ", ".join(get_args(plain))
    elif get_origin(plain) is list:
        words = "a list of " + {int: "integers", str: "non-empty strings, as in [a, b]"}[get_args(plain)[0]]
    elif get_origin(plain) is dict:
        words = "a mapping of names to finite values"
    else:
        words = _WORDS[plain]
    limits = " and ".join(f"{sign} {limit}" for sign, limit in metadata.get("limits", {}).items())
    return words + (f" {limits}" if limits else "") + others + (", or null" if is_nullable else "")


_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a non-empty string"}


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else ascii(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _check_section_name(name: Any, types: Mapping[str, type], known: list[str]) -> None:
    if name not in types:
        is_key = any(key.partition(".")[2] == name for key in known)
        meant = _nearest_key("", str(name), known) if is_key else _nearest(str(name), types)
        raise RecipeError(f"{name} is not a section; did you mean {meant}?")


def _nearest_key(section: str, key: str, known: list[str]) -> str:
    """The dotted key likely meant: the same name in another section, or the closest in this one."""
    elsewhere = [dotted for dotted in known if dotted.partition(".")[2] == key]
    inside = [dotted for dotted in known if dotted.startswith(f"{section}.")]
    return elsewhere[0] if elsewhere else _nearest(f"{section}.{key}", inside)


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


# ---- source_spec
# One entry of `data.sources`: a string, or a mapping with a weight and more. Knows nothing of what is on the disk.

HUB = "hf:"
"""In front of a name, it is that of a data set that Hugging Face's `datasets` loads."""


@dataclass(frozen=True)
class SourceSpec:
    """What a recipe says of one source."""

    path: str | None = option(None)
    """A file, a folder (of files, or written by `datasets.save_to_disk`), a glob, or stdlib."""
    datasets: str | None = option(None)
    """The name of a data set, for `datasets.load_dataset`. Either this or path."""
    weight: float = option(1.0, gt=0, le=1000)
    """How often each document comes in an epoch: 2.5 is twice, and once more for the half that their keys choose."""
    format: Literal["auto", "text", "jsonl", "json", "parquet", "arrow"] = "auto"
    """What the files are; auto goes by their extension. Given, it also chooses what a folder's files are."""
    split: str | None = option(None)
    """Of a data set that has splits; null: train."""
    name: str | None = option(None)
    """The data set's configuration."""
    streaming: bool = False
    """Never held in memory or on disk as a whole; has to be prepared before training."""

    def describe(self) -> str:
        """The source in the user's own words."""
        return self.path if self.path is not None else f"{HUB}{self.datasets}"


def parse_sources(items: Sequence[str | dict[str, Any]], key: str = "data.sources") -> list[SourceSpec]:
    """Each entry of `key`; RecipeError of one line for what is none."""
    return [_parse(item, f"{key}[{number}]") for number, item in enumerate(items)]


def _parse(item: str | dict[str, Any], key: str) -> SourceSpec:
    if isinstance(item, str):
        item = {"datasets": item.removeprefix(HUB)} if item.startswith(HUB) else {"path": item}
    if isinstance(item.get("path"), str) and item["path"].startswith(HUB) and "datasets" not in item:
        item = {**{name: value for name, value in item.items() if name != "path"}, "datasets": item["path"][len(HUB) :]}
    spec: SourceSpec = read_section(SourceSpec, key, item, [f"{key}.{spec.name}" for spec in fields(SourceSpec)])
    if (spec.path is None) == (spec.datasets is None):
        given = "both path and datasets" if spec.path is not None else "neither path nor datasets"
        raise RecipeError(f"{key} has {given}; give one of them")
    if spec.datasets is not None and spec.format != "auto":
        raise RecipeError(f"{key}.format is {spec.format}, which is of files; leave it out beside datasets")
    return spec


# ---- recipe
# The recipe: every setting of a training run, in six sections, from YAML and `section.key=value` arguments.
#
# A new setting is a new field: its type hint, `option(...)` limits and docstring are all that it takes.

# ruff: noqa: RUF009 (option() makes a dataclass field)


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
