#!/usr/bin/env python3
"""Time and memory of building a BlockMask: counted from the layout, or by create_block_mask, eager and compiled.

    python tools/bench_mask.py [--n 2048,8192,32768,131072] [--repeats 3] [--device cpu] [--json FILE]

One flat segment of CODCollator: n columns, 8 documents, all supervised, K = 8, r = 0.7 with floor 0.2. Every measurement is
a process of its own, and the methods take turns, so that what else runs on the machine meets all of them alike; medians are
shown. All methods must find the same blocks, or the bench fails.

    seconds      of the second call; of eager's first, which takes long enough to be no different
    compile      how much longer the compiled method's first call takes, with empty caches
    peak         growth of peak resident memory over what was there after imports and inputs, in the first call (compiling
                 included). On CUDA: the most that tensors held, over the inputs
    again        the same in the second call
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import GIB, MIB, PeakRSS, at_least_one, format_number, format_table, integers, run_process, write_json

# torch is imported where it is used, so that --help answers at once
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from peagle_train.core.visibility import Visibility

METHODS = ("direct", "eager", "compiled")
EAGER_LIMIT = 8192
"""Columns beyond which eager create_block_mask needs tens of GB."""
NUM_DOCUMENTS, NUM_DEPTHS, RATIO, RATIO_MIN = 8, 8, 0.7, 0.2


def inputs(n: int) -> dict[str, Any]:
    import torch

    from peagle_train.core.collator import CODCollator
    from peagle_train.core.elements import gather_elements

    collator = CODCollator(n, num_depths=NUM_DEPTHS, down_sample_ratio=RATIO, down_sample_ratio_min=RATIO_MIN)
    lengths = [len(part) for part in torch.arange(n).tensor_split(NUM_DOCUMENTS)]
    row = {"input_ids": [[0] * m for m in lengths], "loss_mask": [[1] * m for m in lengths]}
    own = gather_elements(collator([row]), slice(0, collator.capacity), mask_token_id=0)
    count = int((own.depth == 0).sum())
    tables = {name: getattr(own, name).clone() for name in ("start", "anchor", "depth")}
    return {**tables, "num_depth0": count, "first_rollout": count}


def visibility_of(given: dict[str, Any], device: str) -> Visibility:
    import torch

    from peagle_train.core.visibility import Visibility

    tables = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    context_end = torch.zeros(1, dtype=torch.int64, device=device)
    return Visibility(**tables, context_end=context_end, num_context=0, num_depths=NUM_DEPTHS)


# ---- one measurement, in a process of its own


class Watch:
    """Seconds and peak memory of a `with` block."""

    seconds: float
    peak_bytes: int

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._rss = PeakRSS()

    def __enter__(self) -> Watch:
        import torch

        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            self._rss.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        if self._on_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        if self._on_cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._held
        else:
            self._rss.__exit__(*exception)
            self.peak_bytes = self._rss.peak_bytes


def measure(method: str, path: str, device: str) -> dict[str, Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    from peagle_train.core.flex import block_mask_of

    visibility, small = visibility_of(torch.load(path), device), visibility_of(inputs(256), device)
    evaluate = torch.compile(create_block_mask, dynamic=False) if method == "compiled" else create_block_mask

    def build(visibility: Visibility) -> BlockMask:
        found = block_mask_of(visibility)
        if method == "direct":
            return found
        B, N = visibility.anchor.shape
        return evaluate(found.mask_mod, B, None, N, N, device=device)

    if method != "compiled":
        build(small)  # what is loaded on first use is no part of the mask
    with Watch(device) as first:
        mask = build(visibility)
    second = None
    if method != "eager":
        del mask
        with Watch(device) as second:
            mask = build(visibility)
    return {
        "seconds": second.seconds if second else first.seconds,
        "compile_seconds": first.seconds - second.seconds if second and method == "compiled" else None,
        "peak_bytes": first.peak_bytes,
        "peak_bytes_again": second.peak_bytes if second else None,
        "blocks": int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()),
        "full_blocks": int(mask.full_kv_num_blocks.sum()),
        "elements": visibility.anchor.shape[1],
        "threads": torch.get_num_threads(),
        "digest": digest(mask),
    }


def digest(mask: BlockMask) -> str:
    """Of all tables, without what lies beyond the counts."""
    import torch

    found = hashlib.sha256()
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        is_counted = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        for table in (counts, torch.where(is_counted, indices, -1)):
            found.update(table.cpu().contiguous().numpy().astype("<i4").tobytes())
    return found.hexdigest()


# ---- all of them


def bench(sizes: list[int], methods: list[str], repeats: int, device: str, json_path: str | None) -> list[dict]:
    import torch

    results: list[dict[str, Any]] = []
    for n in sizes:
        ran = [m for m in methods if m != "eager" or n <= EAGER_LIMIT]
        runs: dict[str, list[dict]] = {method: [] for method in ran}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.pt"
            torch.save(inputs(n), path)
            for repeat in range(repeats):
                for method in ran:
                    runs[method].append(run_one(method, path, device, Path(folder) / f"{method}{repeat}"))
        digests = {run["digest"] for several in runs.values() for run in several}
        assert len(digests) <= 1, f"n = {n}: the methods do not find the same blocks"
        results += [middle(method, n, several) for method, several in runs.items()]
        if json_path:
            write_json(json_path, results)
        print(f"n = {n:,}: {', '.join(ran)} done, all tables equal", file=sys.stderr, flush=True)
    return results


def run_one(method: str, path: Path, device: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    out = folder / "result.json"
    command = [sys.executable, __file__, "--one", method, "--inputs", str(path), "--device", device, "--json", str(out)]
    # Caches of its own: an earlier process's would hide the compile time.
    ended = run_process(command, environment={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")})
    if ended.died:
        raise SystemExit(f"{method} failed: {ended.died}")
    return json.loads(out.read_text())


def middle(method: str, n: int, runs: list[dict]) -> dict[str, Any]:
    """One object of medians."""
    result: dict[str, Any] = {"method": method, "n": n}
    for name in runs[0]:
        values = [run[name] for run in runs]
        is_measured = name.startswith(("seconds", "compile", "peak")) and values[0] is not None
        result[name] = median(values) if is_measured else values[0]
    return result


def report(results: list[dict]) -> str:
    header = ["method", "n", "elements", "seconds", "compile s", "peak MiB", "again MiB", "blocks", "full"]
    rows = [
        [
            r["method"],
            f"{r['n']:,}",
            f"{r['elements']:,}",
            format_number(r["seconds"], digits=4),
            format_number(r["compile_seconds"], digits=1),
            format_number(r["peak_bytes"], MIB, 1),
            format_number(r["peak_bytes_again"], MIB, 1),
            f"{r['blocks']:,}",
            f"{r['full_blocks']:,}",
        ]
        for r in results
    ]
    lines = [format_table(header, rows), ""]
    by_key = {(r["method"], r["n"]): r for r in results}

    def target(text: str, value: float, is_met: bool) -> None:
        lines.append(f"{'met   ' if is_met else 'MISSED'}  {text}: {value:,.1f}")

    direct, eager, compiled = (by_key.get((method, 8192)) for method in METHODS)
    if direct and eager:
        faster, leaner = eager["seconds"] / direct["seconds"], eager["peak_bytes"] / max(1, direct["peak_bytes"])
        target("n = 8,192: times faster than eager, at least 150", faster, faster >= 150)
        target("n = 8,192: times leaner than eager, at least 50", leaner, leaner >= 50)
    if direct and compiled:
        faster = compiled["seconds"] / direct["seconds"]
        target("n = 8,192: times faster than compiled, at least 2", faster, faster >= 2)
    if largest := by_key.get(("direct", 131072)):
        target("n = 131,072: MiB, under 1,024", largest["peak_bytes"] / MIB, largest["peak_bytes"] < GIB)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=integers, default="2048,8192,32768,131072", help="columns, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the results here, as a list of objects")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        write_json(given.json, measure(given.one, given.inputs, given.device))
        return
    methods = given.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    print(report(bench(given.n, methods, given.repeats, given.device, given.json)))


if __name__ == "__main__":
    main()
