"""Tokenize, mask and pack a recipe's data once, for any number of runs and ranks.

    python tools/prepare_data.py RECIPE [section.key=value ...] --out DIR

Then give `data.prepared: DIR` in the recipe. Killed at any moment, the same command goes on where it stopped, and the
folder becomes the same, byte by byte.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--out", metavar="DIR", help="the folder to make (default: the recipe's data.prepared)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: all cores)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="close a file behind so many tokens")
    options = parser.parse_intermixed_args()
    from peagle_train.errors import run_tool

    return run_tool("prepare_data", lambda: run(options), "; the same command goes on from here")


def run(options: argparse.Namespace) -> None:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.data.preparation import SHARD_TOKENS, prepare_recipe
    from peagle_train.recipe import load_recipe
    from peagle_train.schema import as_override
    from peagle_train.training.about import cores

    recipe = load_recipe(options.recipe, options.overrides)
    out = options.out or recipe.data.prepared
    if out is None:
        raise ValueError("no folder given: --out DIR, or data.prepared in the recipe")
    workers = options.workers if options.workers is not None else cores()
    shard_tokens = options.shard_tokens if options.shard_tokens is not None else SHARD_TOKENS
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f"--workers is {workers} and --shard-tokens is {shard_tokens}; give at least 1")
    made = prepare_recipe(recipe, Path(out).expanduser(), num_workers=workers, shard_tokens=shard_tokens)
    print("\n".join(made.describe()))
    print(f"prepared: {out}: give {as_override('data.prepared', out)} to train on it")


if __name__ == "__main__":
    sys.exit(main())
