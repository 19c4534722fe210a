"""Planned peak memory of a step over the context length: flat, Algorithm 1 and relay (`memory_plan.plan_memory`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peagle_train.memory.memory_plan import GIB, Sizes, allowed_segments, plan_memory
from peagle_train.pictures.style import DARK, RUNS, load_matplotlib

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
METHODS = (
    ("flat", "flat, S = 1", 1, False),
    ("recompute", "Algorithm 1, S = 16", 16, False),
    ("relay 16", "relay, S = 16", 16, True),
    ("relay 64", "relay, S = 64", 64, True),
)
"""Key, label, segments, whether it is relay."""


def large_drafter() -> Sizes:
    """An 8B-class drafter: 4 layers of hidden 4096, K = 8, r = 0.8, bf16 autocast over float32 masters, on CUDA.

    The target's own weights and forward are not in it: they depend on where it runs.
    """
    sizes = Sizes(
        batch_size=1,
        length=LENGTHS[-1],
        num_depths=8,
        ratio=0.8,
        ratio_min=0.0,
        boundaries="balanced",
        hidden=4096,
        target_hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        layers=4,
        vocab=128256,
        draft_vocab=32000,
        parameters=0,
        trained=0,
        compute_bytes=2,
        on_cuda=True,
        static=True,
    )
    trained = sizes.linear_weights + sizes.vocab * sizes.hidden
    return replace(sizes, parameters=trained + sizes.draft_vocab * sizes.hidden, trained=trained)


def peaks(sizes: Sizes, lengths: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """(context length, bytes of the fullest phase) by the methods' keys; a row shorter than its segments has none."""
    found: dict[str, list[tuple[int, int]]] = {}
    for key, _, segments, is_relay in METHODS:
        cases = (replace(sizes, length=length, relay=is_relay) for length in lengths)
        found[key] = [(s.length, plan_memory(s, segments).peak) for s in cases if allowed_segments(s, [segments])]
    return found


def draw_memory(sizes: Sizes, lengths: Sequence[int], budget_gib: float | None, title: str) -> Any:
    """A matplotlib figure; `budget_gib`: what a device has."""
    plt = load_matplotlib()
    figure, axes = plt.subplots(figsize=(8.4, 4.9), layout="constrained")
    found = peaks(sizes, lengths)
    for (key, label, _, _), colour in zip(METHODS, RUNS):
        if not found[key]:
            continue
        n, byte_counts = zip(*found[key])
        gib = [count / GIB for count in byte_counts]
        axes.plot(n, gib, color=colour, marker="o", markersize=4, linewidth=2)
        number = f"{gib[-1]:.0f}" if gib[-1] >= 10 else f"{gib[-1]:.1f}"
        axes.annotate(f" {label}: {number} GiB", (n[-1], gib[-1]), color=colour, va="center", fontsize=9, xytext=(4, 0),
                      textcoords="offset points", annotation_clip=False)  # fmt: skip
    if budget_gib:
        axes.axhline(budget_gib, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(lengths[0], budget_gib * 1.05, f"a device of {budget_gib:g} GiB", fontsize=8.5, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    top = max((count for points in found.values() for _, count in points), default=GIB) / GIB
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if t <= top * 2]
    low = min((count for points in found.values() for _, count in points), default=GIB) / GIB
    ticks = [t for t in ticks if t >= low / 2]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("planned peak, GiB")
    axes.set_title(title)
    return figure
