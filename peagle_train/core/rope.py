"""Rotary scaling of a drafter: which keys each rope type has, and what they may be.

Imports nothing, so that a recipe is checked at once. A table is what config.json calls rope_scaling or rope_parameters.
"""

from collections.abc import Mapping
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rope types whose tables do not depend on the length of a call, so that a segment rotates as the whole row does."""

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
}

LIMITS: dict[str, tuple[float, float]] = {
    "factor": (1, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
    "original_max_position_embeddings": (1, 2**31 - 1),
}
"""Least and largest value of a key: beyond them angles vanish, overflow or run backwards."""


def rope_mistake(rope: Mapping[str, Any]) -> str | None:
    """What is wrong with a table's type or values, and what is allowed, in words; None if nothing is.

    Says nothing of keys that the type does not have (see `unused_keys`).
    """
    rope_type = rope.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        given = f"is {_show(rope_type)}" if "rope_type" in rope else "is missing"
        return (
            f"rope_type {given}; give one of {', '.join(ROPE_TYPES)} (tables of other types depend on the length of a"
            " call: segments would differ from the whole sequence)"
        )
    for key in REQUIRED[rope_type]:
        if key not in rope:
            return f"{key} is missing; rope type {rope_type} takes {', '.join(REQUIRED[rope_type])}"
    for key in _keys(rope_type):
        if key in rope and (allowed := _not_allowed(key, rope[key])):
            return f"{key} is {_show(rope[key])}; give {allowed}"
    for low, high, values in (
        ("low_freq_factor", "high_freq_factor", (1, 4)),
        ("beta_slow", "beta_fast", (1, 32)),  # what readers take where one is not given
    ):
        if {low, high} & set(_keys(rope_type)) and not rope.get(low, values[0]) < rope.get(high, values[1]):
            return f"{low} is {rope.get(low, values[0])}, {high} {rope.get(high, values[1])}; give a smaller {low}"
    return None


def yarn_too_short(rope: Mapping[str, Any], positions: int) -> str | None:
    """Words for positions that vLLM's yarn table lacks and reads past its end; None if there are none.

    Args:
        rope: a table without mistakes. positions: max_position_embeddings.
    """
    if rope.get("rope_type") != "yarn":
        return None
    original, factor = rope.get("original_max_position_embeddings", positions), rope["factor"]
    if positions <= original * factor:
        return None
    return (
        f"max_position_embeddings is {positions}, but vLLM's yarn table ends at original_max_position_embeddings * factor ="
        f" {original} * {factor:g} = {original * factor:g}: serve at most that length, or train with a larger factor"
    )


def unused_keys(rope: Mapping[str, Any]) -> list[str]:
    """Keys that the table's type does not have; rope_theta is no part of a type, but may stand beside it in config.json."""
    known = {"rope_type", "rope_theta", *_keys(rope.get("rope_type"))}
    return [key for key in rope if key not in known]


def _keys(rope_type: Any) -> tuple[str, ...]:
    return (*REQUIRED.get(rope_type, ()), *OPTIONAL.get(rope_type, ()))


def _not_allowed(key: str, value: Any) -> str:
    """What the key's value has to be, if it is not that."""
    if key == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    low, high = LIMITS[key]
    is_whole = key == "original_max_position_embeddings"
    is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
    if is_number and low <= value <= high:
        return ""
    return f"{'an integer' if is_whole else 'a number'} of {low:g} to {high:g}"


def _show(value: Any) -> str:
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
