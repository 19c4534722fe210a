"""What a run will need, as a table: `--dry-run`, the choice of cod.num_segments = auto, and the words for a device that is
full.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from peagle_train.errors import one_line
from peagle_train.memory.memory_plan import (
    CANDIDATES,
    GIB,
    MemoryPlan,
    Sizes,
    allowed_segments,
    choose_segments,
    plan_memory,
)
from peagle_train.memory.memory_sizes import Device, parse_device, read_sizes, this_device
from peagle_train.recipe import Recipe
from peagle_train.training.peers import from_all


def dry_run(recipe: Recipe, on: str | None = None) -> str:
    """The table of memory by number of segments, and which one fits.

    Args:
        on: plan for this device (see `parse_device`) instead of the one that is here.

    Raises:
        ValueError: for what a recipe and the target's config.json alone show to be wrong.
    """
    device = parse_device(on) if on else this_device()
    sizes = read_sizes(recipe, device)
    return f"planned, not measured: {device}\n" + describe(recipe, sizes, device)


def describe(recipe: Recipe, sizes: Sizes, device: Device) -> str:
    """The table, and the numbers of segments that fit."""
    asked = recipe.cod.num_segments
    numbers = allowed_segments(sizes, sorted({*CANDIDATES, *([] if asked == "auto" else [asked])}))
    margin = recipe.train.memory_margin
    plans = [plan_memory(sizes, S) for S in numbers]
    lines = [table_of(plans, asked)]
    room = f"{device.budget / GIB:.1f} GiB less {margin:.0%}"
    fitting = choose_segments(sizes, device.budget, margin)
    if fitting is None:
        lines.append(f"no number of segments up to {numbers[-1]} fits into {room}: {advice(recipe, sizes)}")
    else:
        lines.append(f"cod.num_segments=auto would be {fitting.num_segments}: the fewest that fit into {room}")
    if asked != "auto":
        peak = plan_memory(sizes, asked).peak
        verdict = (
            "fits" if peak <= device.budget * (1 - margin) else "is close" if peak <= device.budget else "is too much"
        )
        lines.append(f"this recipe: {asked} segments, {peak / GIB:.2f} GiB: {verdict}")
    return "\n".join(lines)


def table_of(plans: Sequence[MemoryPlan], asked: int | str = "auto") -> str:
    """A column for each number of segments, the recipe's own marked; GiB for each device."""
    columns = [f"{p.num_segments}{'*' if p.num_segments == asked else ''}" for p in plans]
    rows = [["GiB a device, by segments", *columns]]
    rows.append(["elements of a segment", *(f"{p.capacity:,}" for p in plans)])
    for group in ("resident", "step"):
        for name in getattr(plans[0], group) | getattr(plans[-1], group):
            values = [getattr(p, group).get(name, 0) for p in plans]
            if any(values):
                rows.append([("" if group == "resident" else "  ") + name, *(f"{v / GIB:.2f}" for v in values)])
    rows.append(["peak", *(f"{p.peak / GIB:.2f}" for p in plans)])
    rows.append(["in", *(p.fullest for p in plans)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def advice(recipe: Recipe, sizes: Sizes) -> str:
    """What else takes less memory, where segments do not do."""
    train, options = recipe.train, []
    if train.mixed_precision == "no" and train.dtype == "float32":
        options.append("train.mixed_precision=bf16")
    if train.segment_mode != "relay":
        options.append("train.segment_mode=relay")
    if train.batch_size > 1:
        options.append("train.batch_size=1")
    if recipe.target.chunk_tokens is None and not recipe.target.cache and sizes.length > 2048:
        options.append("target.chunk_tokens=2048")
    if sizes.on_cuda and not train.offload_features:
        options.append("train.offload_features=true")
    if not recipe.target.cache:
        options.append("target.cache (the target then need not be loaded)")
    if sizes.world_size > 1 and not sizes.sharded:
        options.append("train.sharding=fsdp2")
    options.append("a smaller data.max_length or draft.draft_vocab_size")
    return "try " + ", ".join(options)


def resolve_segments(recipe: Recipe, sizes: Sizes, device: Device) -> tuple[Recipe, str]:
    """The recipe with a number in place of cod.num_segments = auto, the same on every rank, and the line that says so.

    Raises:
        ValueError: on every rank, where no number fits on one of them.
    """
    assert recipe.cod.num_segments == "auto"
    margin = recipe.train.memory_margin
    own = choose_segments(sizes, device.budget, margin)
    none = 2 * CANDIDATES[-1]
    S = max(map(int, from_all(str(own.num_segments if own else none))))
    if S == none:
        raise ValueError(
            f"cod.num_segments is auto, and no number up to {CANDIDATES[-1]} fits ({device}, {margin:.0%} of it left free"
            f" by train.memory_margin; {plan_memory(sizes, allowed_segments(sizes)[-1]).peak / GIB:.1f} GiB planned):"
            f" {advice(recipe, sizes)}; --dry-run shows the table"
        )
    plan = plan_memory(sizes, S)
    line = (
        f"cod.num_segments: auto is {S}: {plan.peak / GIB:.2f} GiB planned of {device.budget / GIB:.2f}"
        f" ({margin:.0%} left free)"
    )
    return replace(recipe, cod=replace(recipe.cod, num_segments=S)), line


def out_of_memory(recipe: Recipe, error: Exception, where: str) -> tuple[str, str]:
    """The table, and the line for a device that was full `where`: what it wanted, and what would fit."""
    wanted = one_line(error).partition(". ")[0][:200]
    try:
        device = this_device()
        sizes = read_sizes(recipe, device)
    except (ValueError, RuntimeError) as failure:  # the first error counts, whatever is wrong with the plan
        return "", f"{where}: {wanted}; no plan can be made: {' '.join(str(failure).split())}"
    asked = recipe.cod.num_segments
    numbers = allowed_segments(sizes)
    S = asked if asked != "auto" else numbers[-1]
    planned = (
        f"{plan_memory(sizes, S).peak / GIB:.2f} GiB were planned for {S} segments, {device.budget / GIB:.2f} are there"
    )
    return describe(recipe, sizes, device), f"{where}: {wanted}; {planned}: {way_out(recipe, sizes, device, S)}"


def way_out(recipe: Recipe, sizes: Sizes, device: Device, num_segments: int) -> str:
    """What to do where that many segments are too much."""
    larger = [n for n in allowed_segments(sizes) if n > num_segments]
    fitting = choose_segments(sizes, device.budget, recipe.train.memory_margin, larger)
    if fitting:
        return f"set cod.num_segments={fitting.num_segments} ({fitting.peak / GIB:.2f} GiB planned)"
    return f"more segments would not do: {advice(recipe, sizes)}"


def refuse_hopeless(recipe: Recipe, device: Device) -> None:
    """ValueError, below the table on stderr, for a run that is planned to take over twice what its device has.

    Loads nothing. Mistakes that make a plan impossible are left to the run, which says where they are.
    """
    S = recipe.cod.num_segments
    if S == "auto":  # `resolve_segments` refuses what does not fit
        return
    logging.disable(logging.WARNING)  # the run gives these warnings itself
    try:
        sizes = read_sizes(recipe, device)
    except (ValueError, RuntimeError):
        return
    finally:
        logging.disable(logging.NOTSET)
    peak = plan_memory(sizes, S).peak
    if peak > 2 * device.budget:
        sys.stderr.write(f"{describe(recipe, sizes, device)}\n")
        raise ValueError(
            f"{peak / GIB:,.1f} GiB are planned for {S} segments, over twice what there is ({device}):"
            f" {way_out(recipe, sizes, device, S)}; --force starts the run all the same"
        )
