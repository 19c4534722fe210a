"""Strict sections: plain values read into dataclasses by their type hints, each mistake one clear line.

Machinery of `recipe.py`; knows nothing of its fields. A field's type hint says what is allowed: `int`,
`float`, `bool`, `str`, `list[int]`, `list[str]`, `list[str | dict[str, Any]]`, `dict[str, Any]` or `Literal[...]`, each
with or without `| None`, or a plain type and a word, as in `int | Literal["auto"]`. `option` adds limits or a rule.
"""

import difflib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peagle_train.strict_yaml import YamlError, dump_line, parse_yaml

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
