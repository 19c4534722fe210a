#!/usr/bin/env python3
"""Draw the planned peak memory of a step over the context length: flat, Algorithm 1, and relay.

Computed from sizes alone, nothing is run: of a recipe's target, only config.json is read. Needs matplotlib (the extra
`report`).
"""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python tools/show_memory.py --out memory.png                     # an 8B-class drafter, without its target
  python tools/show_memory.py recipes/mine.yaml --on cuda:79 --out memory.png
  python tools/show_memory.py recipes/mine.yaml --lengths 2048,8192,32768
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file (default: an 8B-class drafter)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--on", metavar="KIND:GIB", help="the device, as in cuda:79 or cpu:16 (default: this one)")
    parser.add_argument("--lengths", metavar="N,N", help="tokens of a row (default 4096 to 131072, doubling)")
    parser.add_argument("--out", default="memory.png", metavar="FILE.png", help="default memory.png")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.errors import run_tool

    return run_tool("show_memory", lambda: print(run(options)))


def run(options: argparse.Namespace) -> str:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.memory.memory_plan import GIB
    from peagle_train.memory.memory_sizes import parse_device, read_sizes, this_device
    from peagle_train.pictures.memory import LENGTHS, draw_memory, large_drafter
    from peagle_train.pictures.style import load_matplotlib, png_of, write_bytes
    from peagle_train.recipe import load_recipe

    load_matplotlib()  # that it is lacking is told before anything is read
    try:
        lengths = sorted({int(n) for n in options.lengths.split(",")}) if options.lengths else list(LENGTHS)
    except ValueError:
        raise ValueError(f"--lengths is {options.lengths}; give numbers with commas, as in 2048,8192") from None
    device = parse_device(options.on) if options.on else None
    if options.recipe:
        device = device or this_device()
        sizes = read_sizes(load_recipe(options.recipe, options.overrides), device)
        what = f"{Path(options.recipe).stem}, target included"
    else:
        sizes, what = large_drafter(), "a drafter of 4 layers, hidden 4096, bf16 (target not included)"
    if lengths[0] < sizes.num_depths:
        raise ValueError(
            f"--lengths begin at {lengths[0]}; a row has at least cod.num_depths ({sizes.num_depths}) tokens"
        )
    budget = device.budget / GIB if device else 79.0
    title = f"Memory of a step: {what}, K = {sizes.num_depths}"
    write_bytes(Path(options.out), png_of(draw_memory(sizes, lengths, round(budget, 1), title)))
    return f"{options.out}: {title}"


if __name__ == "__main__":
    sys.exit(main())
