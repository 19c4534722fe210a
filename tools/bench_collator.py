"""How fast the collator is: rows and elements a second in one process, and a loader's wait beside a step's time.

    python tools/bench_collator.py --lengths 2048,8192,32768,131072 --json results.json
    python tools/bench_collator.py --run runs/quickstart

Without --run: rows of one supervised document, packed rows of 8, one worker's work in this process, medians of --repeats.
With --run: the share of its time that a finished run waited for its loader, from its metrics.jsonl.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measure import at_least_one, format_number, format_table, integers, write_json


def measure(length: int, documents: int, segments: int, repeats: int) -> dict[str, Any]:
    """Medians of collating one row of `length` tokens."""
    import torch

    from peagle_train.core.collator import CODCollator

    torch.set_num_threads(1)  # as in a loader's worker
    collator = CODCollator(length, num_depths=8, num_segments=segments)
    columns = torch.arange(length)
    row = {
        "input_ids": columns % 1000,
        "loss_mask": torch.ones(length, dtype=torch.int64),
        "document_ids": columns * documents // length,
    }
    seconds, elements = [], 0
    for epoch in range(repeats + 1):
        began = time.perf_counter()
        batch = collator([{**row, "epoch": epoch}])
        seconds.append(time.perf_counter() - began)
        elements = int((batch["depth"] >= 0).sum())
    median = statistics.median(seconds[1:])  # the first one warms up
    return {
        "length": length,
        "documents": documents,
        "segments": segments,
        "seconds_per_row": median,
        "rows_per_second": 1 / median,
        "elements_per_second": elements / median,
        "tokens_per_second": length / median,
        "nanoseconds_per_element": median / elements * 1e9,
    }


def loader_wait(run: Path) -> dict[str, Any]:
    """Of a finished run: its loader's waits over its steps' time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = [line["loader_wait_share"] for line in lines if line["kind"] == "train"]
    if not shares:
        raise ValueError(f"{run} has no training steps in its metrics.jsonl")
    return {
        "run": run.name,
        "windows": len(shares),
        "loader_wait_share": statistics.median(shares),
        "worst": max(shares),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=integers, default="2048,8192,32768,131072", help="tokens of a row, several with commas"
    )
    parser.add_argument("--segments", type=at_least_one, default=8)
    parser.add_argument("--repeats", type=at_least_one, default=7)
    parser.add_argument("--run", metavar="DIR", help="report a run's wait for its loader instead")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.run:
        try:
            found = loader_wait(Path(options.run))
        except (OSError, ValueError, KeyError) as error:
            print(f"bench_collator: {error}", file=sys.stderr)
            return 2
        print(f"{found['run']}: median {found['loader_wait_share']:.2%}, worst {found['worst']:.2%} of a window's time")
        results = [found]
    else:
        results = [measure(n, d, min(options.segments, n), options.repeats) for n in options.lengths for d in (1, 8)]
        header = ["length", "documents", "rows/s", "tokens/s", "elements/s", "ns/element"]
        fields = ("rows_per_second", "tokens_per_second", "elements_per_second", "nanoseconds_per_element")
        table = [
            [str(r["length"]), str(r["documents"]), *(format_number(r[f], digits=1) for f in fields)] for r in results
        ]
        print(format_table(header, table))
    if options.json:
        write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
