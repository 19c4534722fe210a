#!/usr/bin/env python
"""Bring another's EAGLE-3 or P-EAGLE drafter into this project's names, to start a run from it or to check it."""

import argparse
import sys
from pathlib import Path

EPILOG = """Reads vLLM's EAGLE-3 names (also midlayer.* and model.*) and the speculators format, one file or shards; never
pickle. What an EAGLE-3 drafter lacks is filled in, and said: embeddings and head from the target, mask_hidden at random.
A recipe can name such a folder directly: draft.init_from=FOLDER. Exit code: 0; 2 for a user's mistake.

examples:
  python tools/import.py hub/some-peagle-drafter --out start
  python tools/import.py hub/some-eagle3-drafter --target models/my-llm --mask-token-id 128011 --out start
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="the drafter's folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or an empty one")
    parser.add_argument("--target", metavar="DIR", help="the target's folder, for embeddings and head")
    parser.add_argument("--mask-token-id", type=int, metavar="N", help="where the drafter has none")
    parser.add_argument("--seed", type=int, default=0, help="of mask_hidden where the drafter has none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.files import run_tool

    return run_tool("import.py", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.serving.start import import_drafter

    done = import_drafter(
        Path(options.folder),
        Path(options.out),
        target=Path(options.target) if options.target else None,
        mask_token_id=options.mask_token_id,
        seed=options.seed,
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"imported to {done.folder}")


if __name__ == "__main__":
    sys.exit(main())
