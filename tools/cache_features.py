"""Run the target once over a recipe's rows and keep what training needs of it: features and last hidden states.

    python tools/cache_features.py recipes/quickstart.yaml --out features
    python -m peagle_train recipes/quickstart.yaml target.cache=features

Killed, it goes on where it stopped when it is started again, and writes the same bytes on any number of processes:
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 tools/cache_features.py RECIPE --out features
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--out", metavar="DIR", help="where to write; default: the recipe's target.cache")
    parser.add_argument("--shard-mib", type=int, default=512, metavar="N", help="size of a file (default 512)")
    parser.add_argument(
        "--speculators",
        metavar="DIR",
        help="take what speculators left in this folder (hs_*.safetensors) instead of running the target",
    )
    options = parser.parse_intermixed_args(arguments)
    import logging

    from peagle_train.files import run_tool

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    return run_tool("cache_features", lambda: run(options), "; the same command goes on from here")


def run(options: argparse.Namespace) -> None:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.config import load_recipe
    from peagle_train.target_model.cache import write_cache

    recipe = load_recipe(options.recipe, options.overrides)
    print(write_cache(recipe, options.out or recipe.target.cache, options.shard_mib, options.speculators), end="")


if __name__ == "__main__":
    sys.exit(main())
