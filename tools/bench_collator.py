"""How fast the collator is: rows and elements a second, one worker's work in this process.

    python tools/bench_collator.py --lengths 2048,8192,32768,131072 --json results.json

Rows of one supervised document and packed rows of 8, in 8 segments, medians of --repeats.
"""

import statistics
import time
from typing import Any

import torch
from measure import format_number, read_options, write_json

from peagle_train.core.collator import CODCollator
from peagle_train.files import aligned

FIGURES = ("rows_per_second", "tokens_per_second", "elements_per_second", "nanoseconds_per_element")


def measure(length: int, documents: int, repeats: int) -> dict[str, Any]:
    """Medians of collating one row of `length` tokens."""
    torch.set_num_threads(1)  # as in a loader's worker
    collator = CODCollator(length, num_depths=8, num_segments=min(8, length))
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
    figures = (1 / median, length / median, elements / median, median / elements * 1e9)
    return {"length": length, "documents": documents, **dict(zip(FIGURES, figures, strict=True))}


def main() -> None:
    options = read_options(__doc__, measure, lengths=[2048, 8192, 32768, 131072], repeats=7)
    results = [measure(n, documents, options.repeats) for n in options.lengths for documents in (1, 8)]
    header = ["length", "documents", "rows/s", "tokens/s", "elements/s", "ns/element"]
    table = [
        [str(r["length"]), str(r["documents"]), *(format_number(r[f], digits=1) for f in FIGURES)] for r in results
    ]
    print(aligned([header, *table], right=True))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
