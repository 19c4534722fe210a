"""Tokenize, mask and pack a recipe's data once, for any number of runs and ranks.

    python tools/prepare_data.py RECIPE [section.key=value ...] --out DIR

Then give `data.prepared: DIR` in the recipe. The folder is whole or not there: after a kill the same command starts over.
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
    options = parser.parse_intermixed_args()
    from peagle_train.files import run_tool

    return run_tool("prepare_data", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.config import as_override, load_recipe
    from peagle_train.data.prepare import prepare_recipe
    from peagle_train.training.metrics import cores

    recipe = load_recipe(options.recipe, options.overrides)
    out = options.out or recipe.data.prepared
    if out is None:
        raise ValueError("no folder given: --out DIR, or data.prepared in the recipe")
    workers = options.workers if options.workers is not None else cores()
    if workers < 1:
        raise ValueError(f"--workers is {workers}; give at least 1")
    made = prepare_recipe(recipe, Path(out).expanduser(), num_workers=workers)
    print("\n".join(made.describe()))
    print(f"prepared: {out}: give {as_override('data.prepared', out)} to train on it")


if __name__ == "__main__":
    sys.exit(main())
