"""Print a sequence of a recipe's data as training sees it: tokens, which are learned, where documents end.

    python tools/show_row.py RECIPE --row 3 [section.key=value ...]
    python tools/show_row.py RECIPE --row 3 --elements [--anchors 17,18,40]

Learned tokens are green on a terminal, in [brackets] elsewhere. --elements adds what each element (anchor, depth) of some
anchors reads and predicts.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, as for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--row", type=int, required=True, metavar="N", help="which sequence, from 0")
    parser.add_argument("--held-out", action="store_true", help="of the held-out sequences")
    parser.add_argument("--elements", action="store_true", help="what elements read and predict, too")
    parser.add_argument("--anchors", type=numbers, metavar="A,B,...", help="whose elements (default: the first few)")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="whose draw of elements (default: 0)")
    parser.add_argument("--no-color", action="store_true", help="brackets on a terminal, too")
    options = parser.parse_intermixed_args()
    from peagle_train.files import run_tool

    return run_tool("show_row", lambda: print(run(options)))


def run(options: argparse.Namespace) -> str:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.config import load_recipe
    from peagle_train.show import show_sequence

    return show_sequence(
        load_recipe(options.recipe, options.overrides),
        options.row,
        epoch=options.epoch,
        is_held_out=options.held_out,
        with_elements=options.elements or options.anchors is not None,
        anchors=options.anchors or (),
        is_colored=sys.stdout.isatty() and not options.no_color and not os.environ.get("NO_COLOR"),
    )


if __name__ == "__main__":
    sys.exit(main())
