"""Chunked linear + KL against the naive loss: time and memory, side by side.

    python tools/bench_loss.py --rows 8192 --vocab 32000 --hidden 1024 --json results.json

Methods: `naive` (both models' logits, log_softmax, autograd), `chunked` (core.loss) at several chunk sizes, and
`liger` (liger-kernel, fused linear JSD at beta 0, which is this KL), where that is installed; the head is frozen. Each in a
process of its own, repeats interleaved, medians. peak_bytes is the peak beyond inputs and gradients.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from measure import MIB, PeakRSS, at_least_one, format_number, integers, run_child, write_json
from torch import Tensor

from peagle_train.core.loss import chunked_linear_loss
from peagle_train.files import aligned

Method = tuple[str, int]
"""Its name, and rows of a chunk."""


def one(settings: dict[str, Any]) -> dict[str, float]:
    """One step of one method, in this process."""
    dtype = getattr(torch, settings["dtype"])

    def random(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(dtype)

    M, V, H, chunk = (settings[name] for name in ("rows", "vocab", "hidden", "chunk_rows"))

    def run(hidden: Tensor, head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
        if settings["method"] == "naive":
            log_q = (hidden @ head.T).float().log_softmax(-1)
            log_p = (target_hidden @ target_head.T).float().log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum()
        if settings["method"] == "liger":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            function = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk
            )
            return function(hidden, head, target_hidden, target_head, torch.zeros(hidden.shape[0], dtype=torch.long))
        return chunked_linear_loss(hidden, head, target_hidden, target_head, "kl", chunk)[0]

    head, target_head = random(V, H, seed=1) * H**-0.5, random(V, H, seed=2) * H**-0.5
    for rows in (8, M):  # the first is the warm-up, which loads libraries
        hidden, target_hidden = random(rows, H, seed=3).requires_grad_(), random(rows, H, seed=4)
        hidden.grad = torch.zeros_like(hidden)
        with PeakRSS() as peak:
            began = time.perf_counter()
            loss = run(hidden, head, target_hidden, target_head)
            loss.backward()
            seconds = time.perf_counter() - began
    # The gradient of the hidden states is made once more before it is accumulated: that is no logits' fault.
    peak_bytes = max(0, peak.peak_bytes - hidden.numel() * hidden.itemsize)
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "loss": float(loss.detach()),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least_one, default=8192)
    parser.add_argument("--vocab", type=at_least_one, default=32000)
    parser.add_argument("--hidden", type=at_least_one, default=1024)
    parser.add_argument("--chunks", type=integers, default="256,384,512,1024", help="rows of a chunk")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        write_json(options.child[1], one(json.loads(options.child[0])))
        return

    methods: list[Method] = [("naive", 0), *((name, c) for name in ("chunked", "liger") for c in options.chunks)]
    shared = {name: getattr(options, name) for name in ("rows", "vocab", "hidden", "dtype")}
    results: dict[Method, list[dict[str, float]]] = {method: [] for method in methods}
    died: dict[Method, str] = {}
    for name, chunk in methods * options.repeats:
        if (name, chunk) not in died:
            found, ended = run_child(__file__, {**shared, "method": name, "chunk_rows": chunk})
            if ended:
                died[name, chunk] = ended
            else:
                results[name, chunk].append(found)

    rows, table = list[dict[str, Any]](), []
    for (name, chunk), runs in results.items():
        row: dict[str, Any] = {"method": name, "chunk_rows": chunk or None, **shared, "repeats": options.repeats}
        for field in ("seconds", "peak_bytes", "loss", "threads"):
            row[field] = statistics.median(run[field] for run in runs) if runs else None
        for field in ("seconds", "peak_bytes"):
            base = (rows[0] if rows else row)[field]  # naive is first
            row[f"{field}_over_naive"] = row[field] / base if base and runs else None
        row["died"] = died.get((name, chunk))
        rows.append(row)
        cells = [format_number(row["seconds"]), format_number(row["seconds_over_naive"])]
        cells += [format_number(row["peak_bytes"], MIB, 0), format_number(row["peak_bytes_over_naive"], digits=3)]
        table.append([name, str(chunk or "-"), *cells, (row["died"] or "")[:60]])
    print(aligned([["method", "chunk", "seconds", "/naive", "peak MiB", "/naive", ""], *table], right=True))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
