#!/usr/bin/env python
"""Export a trained drafter for an engine, or check a drafter's folder, whoever made it."""

import argparse
import sys
from pathlib import Path

EPILOG = """formats:
  eagle3        for vLLM's --speculative-config '{"method": "eagle3", "parallel_drafting": true, ...}' (the default)
  speculators   for `vllm serve DIR`, which finds the target by itself, and for the speculators package

--check without --out checks FOLDER as it is, in either format, and prints a table. An export is always checked before
it is put in its place. Exit code: 0; 1 for a drafter of another kind than this project's (layers that are not Llama's,
windows, ...), which is not judged; 2 for a user's mistake or a folder that an engine would not load.

examples:
  python tools/export.py runs/mine --out drafter
  python tools/export.py runs/mine/best --format speculators --target-name org/my-llm --dtype bfloat16 --out drafter
  python tools/export.py --check drafter
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="a drafter's folder (final, best, checkpoint-N), or a run's")
    parser.add_argument("--out", metavar="DIR", help="where the export goes: a new folder, or an empty one")
    parser.add_argument("--format", choices=["eagle3", "speculators"], default="eagle3")
    parser.add_argument("--check", action="store_true", help="print the table of the check")
    parser.add_argument("--target", metavar="DIR", help="the target's folder; default: the recipe's")
    parser.add_argument("--target-name", metavar="NAME", help="how the files name the target, such as org/my-llm")
    parser.add_argument(
        "--num-speculative-tokens", type=int, metavar="K", help="to serve with; default: the training's"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--licence", "--license", metavar="ID", help="the model card's licence field, e.g. apache-2.0")
    parser.add_argument("--measured", metavar="FILE", help="what tools/evaluate.py --json wrote, for the model card")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.files import run_tool

    return run_tool("export.py", lambda: _check(options) if options.out is None else _export(options))


def _check(options: argparse.Namespace) -> int:
    from peagle_train.serving.drafter_io import check_folder, is_bad, is_judged, table
    from peagle_train.serving.export import find_drafter, read_target_config

    if not options.check:
        raise ValueError("give --out DIR to export, or --check to check the folder")
    folder = find_drafter(Path(options.folder))
    target = read_target_config(Path(options.target)) if options.target else None
    findings = check_folder(folder, target)
    print(table(findings))
    return 2 if is_bad(findings) else 0 if is_judged(findings) else 1


def _export(options: argparse.Namespace) -> int:
    import torch

    from peagle_train.serving.drafter_io import table
    from peagle_train.serving.export import export_drafter

    done = export_drafter(
        Path(options.folder),
        Path(options.out),
        options.format,
        target=Path(options.target) if options.target else None,
        target_name=options.target_name,
        speculative_tokens=options.num_speculative_tokens,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        licence=options.licence,
        measured=Path(options.measured) if options.measured else None,
    )
    if options.check:
        print(table(done.findings))
    else:
        done.notes += [f"{f.what}: {f.detail}" for f in done.findings if f.level == "warn"]
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"exported to {done.folder}; how to serve it is in its README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
