"""Rotary scaling of a drafter: which keys each rope type has, and what they may be.

Imports nothing, so that a recipe is checked at once. A table is what config.json calls rope_scaling or rope_parameters.
"""

from collections.abc import Mapping
from typing import Any

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
"""Rope types whose tables do not depend on the length of a call, so that a segment rotates as the whole row does."""
OF_YARN = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LEAST, MOST = {"factor": 1, "original_max_position_embeddings": 1}, 2**31 - 1


def rope_mistake(rope: Mapping[str, Any]) -> str | None:
    """What is wrong with a table's type or values, and what is allowed, in words; None if nothing is.

    Says nothing of keys that the type does not have (see `unused_keys`).
    """
    rope_type = rope.get("rope_type")
    if not isinstance(rope_type, str) or rope_type not in REQUIRED:
        given = f"is {ascii(rope_type)[:80]}" if "rope_type" in rope else "is missing"
        return (
            f"rope_type {given}; give one of {', '.join(REQUIRED)} (tables of other types depend on the length of a"
            " call: segments would differ from the whole sequence)"
        )
    for key in REQUIRED[rope_type]:
        if key not in rope:
            return f"{key} is missing; rope type {rope_type} takes {', '.join(REQUIRED[rope_type])}"
    for key, value in rope.items():
        least = LEAST.get(key, 0)
        if key in ("rope_type", "rope_theta", "truncate", *unused_keys(rope)):
            continue
        is_number = type(value) in (int, float) and (value or key.startswith("mscale"))
        if not is_number or not least <= value <= MOST:
            allowed = f"of at least {least}" if least else "above 0"
            return f"{key} is {ascii(value)[:80]}; give a number {allowed} and at most {MOST}"
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in rope and high in rope and not rope[low] < rope[high]:
            return f"{low} is {rope[low]}, {high} {rope[high]}; give a smaller {low}"
    return None


def unused_keys(rope: Mapping[str, Any]) -> list[str]:
    """Keys that the table's type does not have; rope_theta is no part of a type, but may stand beside it in config.json."""
    rope_type = rope.get("rope_type")
    known = {"rope_type", "rope_theta", *REQUIRED.get(rope_type, ())}  # type: ignore[arg-type]
    return [key for key in rope if key not in known | ({*OF_YARN, "truncate"} if rope_type == "yarn" else set())]
