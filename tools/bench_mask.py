"""Time and memory of building a BlockMask: counted from the layout, or by create_block_mask, eager and compiled.

    python tools/bench_mask.py --n 2048,8192,32768,131072 --json FILE

One flat segment of CODCollator: n columns, 8 documents, all supervised, K = 8, r = 0.7 with floor 0.2. Every measurement is
a process of its own, and the methods take turns, so that what else runs on the machine meets all of them alike; medians are
shown. That all find the same blocks is tests/test_block_mask.py's.

    seconds      of the second call; of eager's first, which takes long enough to be no different
    compile      how much longer the compiled method's first call takes, with empty caches
    peak         growth of peak resident memory over what was there after imports and inputs, in the first call (compiling
                 included)
"""

import time
from statistics import median
from typing import Any

import torch
from measure import MIB, PeakRSS, format_number, read_options, run_in_turns, write_json
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import gather_elements
from peagle_train.core.flex import block_mask_of
from peagle_train.core.visibility import Visibility
from peagle_train.files import aligned

METHODS = ("direct", "eager", "compiled")
EAGER_LIMIT = 8192
"""Columns beyond which eager create_block_mask needs tens of GB."""
NUM_DOCUMENTS, NUM_DEPTHS, RATIO, RATIO_MIN = 8, 8, 0.7, 0.2
MEASURED = ("seconds", "compile_seconds", "peak_bytes")


def layout(n: int) -> Visibility:
    collator = CODCollator(n, num_depths=NUM_DEPTHS, down_sample_ratio=RATIO, down_sample_ratio_min=RATIO_MIN)
    lengths = [len(part) for part in torch.arange(n).tensor_split(NUM_DOCUMENTS)]
    row = {"input_ids": [[0] * m for m in lengths], "loss_mask": [[1] * m for m in lengths]}
    own = gather_elements(collator([row]), slice(0, collator.capacity), mask_token_id=0)
    count = int((own.depth == 0).sum())
    tables: Any = {"start": own.start, "anchor": own.anchor, "depth": own.depth, "num_depths": NUM_DEPTHS}
    tables |= {"num_depth0": count, "first_rollout": count, "num_context": 0}
    return Visibility(**tables, context_end=torch.zeros(1, dtype=torch.int64))


def measure(method: str, n: int) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    visibility = layout(n)
    evaluate = torch.compile(create_block_mask, dynamic=False) if method == "compiled" else create_block_mask

    def build(visibility: Visibility) -> BlockMask:
        found = block_mask_of(visibility)
        if method == "direct":
            return found
        B, N = visibility.anchor.shape
        return evaluate(found.mask_mod, B, None, N, N, device="cpu")

    def timed() -> tuple[float, BlockMask]:
        began = time.perf_counter()
        mask = build(visibility)
        return time.perf_counter() - began, mask

    if method != "compiled":
        build(layout(256))  # what is loaded on first use is no part of the mask
    with PeakRSS() as rss:
        first, mask = timed()
    second = first if method == "eager" else timed()[0]
    return {
        "seconds": second,
        "compile_seconds": first - second if method == "compiled" else None,
        "peak_bytes": rss.peak_bytes,
        "blocks": int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()),
        "full_blocks": int(mask.full_kv_num_blocks.sum()),
        "elements": visibility.anchor.shape[1],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    options = read_options(__doc__, measure, n=[2048, 8192, 32768, 131072], repeats=3)
    results: list[dict[str, Any]] = []
    for n in options.n:
        cases = {f"{m} n={n}": {"method": m, "n": n} for m in METHODS if m != "eager" or n <= EAGER_LIMIT}
        found = run_in_turns(__file__, cases, options.repeats)
        if dead := [f"{name}: {died}" for name, (_, died) in found.items() if died]:
            raise SystemExit("\n".join(dead))
        for name, (runs, _) in found.items():
            middle = {k: median([r[k] for r in runs]) for k in MEASURED if runs[0][k] is not None}
            results.append({**cases[name], **runs[0], **middle})
        if options.json:
            write_json(options.json, results)
    lines = [["method", "n", "elements", "seconds", "compile s", "peak MiB", "blocks", "full"]]
    for r in results:
        shown = [format_number(r["seconds"], digits=4), format_number(r["compile_seconds"], digits=1)]
        shown += [format_number(r["peak_bytes"], MIB, 1), f"{r['blocks']:,}", f"{r['full_blocks']:,}"]
        lines.append([r["method"], f"{r['n']:,}", f"{r['elements']:,}", *shown])
    print(aligned(lines, right=True))


if __name__ == "__main__":
    main()
