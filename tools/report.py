#!/usr/bin/env python3
"""One HTML page about runs, finished or running: results, curves, data, settings; several runs side by side.

The page needs no other file. Needs matplotlib (the extra `report`).
"""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python tools/report.py runs/mine
  python tools/report.py runs/first runs/second --out compared.html
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", default="report.html", metavar="FILE.html", help="default report.html")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.files import run_tool

    return run_tool("report", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.report import write_report

    write_report([Path(name).expanduser() for name in options.runs], Path(options.out))
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
