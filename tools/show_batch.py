#!/usr/bin/env python3
"""Draw a sequence's flat batch: who sees whom, and what each segment runs and reads.

It is the batch that training would get in its first epoch, from the recipe's own collator; of the target only the tokenizer
and config.json are read. Needs matplotlib (the extra `report`).
"""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python tools/show_batch.py --example --out batch.png
  python tools/show_batch.py recipes/mine.yaml --row 3 --out batch.png
  python tools/show_batch.py recipes/mine.yaml data.max_length=48 cod.num_segments=3   # small enough for labels
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file; none with --example")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--example", action="store_true", help="two short documents of words, K = 4, S = 3")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="which sequence, from 0 (default 0)")
    parser.add_argument("--out", default="batch.png", metavar="FILE.png", help="default batch.png")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.recipe) == options.example:
        parser.error("give a recipe or --example, and not both")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.files import run_tool

    return run_tool("show_batch", lambda: print(run(options)))


def run(options: argparse.Namespace) -> str:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.config import load_recipe
    from peagle_train.show import write_picture

    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    return f"{options.out}: {write_picture(recipe, options.row, Path(options.out))}"


if __name__ == "__main__":
    sys.exit(main())
