"""Chunked linear + KL against the naive loss: time and memory, side by side.

    python tools/bench_loss.py --rows 8192 --vocab 32000 --hidden 1024 --json results.json

Methods: `naive` (both models' logits, log_softmax, autograd), `chunked` (core.loss) at several chunk sizes, and
`liger` (liger-kernel, fused linear JSD at beta 0, which is this KL), where that is installed. Each in a process of
its own, repeats interleaved, medians. peak_bytes is the peak beyond inputs and gradients.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import MIB, PeakRSS, at_least_one, format_number, format_table, integers, run_process, write_json


def one(settings: dict[str, Any], out: Path) -> None:
    """One step of one method, in this process."""
    import torch
    from torch import Tensor

    from peagle_train.core.loss import chunked_linear_loss

    device = torch.device(settings["device"])
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])

    def random(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    M, V, H = settings["rows"], settings["vocab"], settings["hidden"]

    def naive(hidden: Tensor, head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
        log_q = (hidden @ head.T).float().log_softmax(-1)
        log_p = (target_hidden @ target_head.T).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    def run(hidden: Tensor, head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
        if settings["method"] == "naive":
            return naive(hidden, head, target_hidden, target_head)
        if settings["method"] == "liger":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            function = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=settings["chunk"]
            )
            return function(hidden, head, target_hidden, target_head, torch.zeros(hidden.shape[0], dtype=torch.long))
        return chunked_linear_loss(hidden, head, target_hidden, target_head, "kl", settings["chunk"])[0]

    head, target_head = random(V, H, seed=1) * H**-0.5, random(V, H, seed=2) * H**-0.5
    head.requires_grad_(settings["train_head"])
    for rows in (8, M):  # the first is the warm-up, which loads libraries
        hidden = random(rows, H, seed=3).requires_grad_()
        target_hidden = random(rows, H, seed=4)
        hidden.grad = torch.zeros_like(hidden)
        if settings["train_head"]:
            head.grad = torch.zeros_like(head)
        if device.type == "cuda":
            torch.cuda.synchronize()
            baseline = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with PeakRSS() as peak:
            began = time.perf_counter()
            loss = run(hidden, head, target_hidden, target_head)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    peak_bytes = torch.cuda.max_memory_allocated() - baseline if device.type == "cuda" else peak.peak_bytes
    # The gradient of the hidden states is made once more before it is accumulated: that is no logits' fault.
    peak_bytes = max(0, peak_bytes - hidden.numel() * hidden.itemsize)
    write_json(out, {"seconds": seconds, "peak_bytes": peak_bytes, "loss": float(loss.detach())})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least_one, default=8192)
    parser.add_argument("--vocab", type=at_least_one, default=32000)
    parser.add_argument("--hidden", type=at_least_one, default=1024)
    parser.add_argument(
        "--chunks", type=integers, default="256,384,512,1024", help="rows of a chunk, several with commas"
    )
    parser.add_argument("--train-head", action="store_true", help="the head is trained (default: frozen)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=at_least_one, default=2)
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("SETTINGS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(json.loads(options.one[0]), Path(options.one[1]))
        return 0

    methods = [("naive", 0), *((method, c) for method in ("chunked", "liger") for c in options.chunks)]
    shared = {
        name: getattr(options, name) for name in ("rows", "vocab", "hidden", "dtype", "device", "threads", "train_head")
    }
    results: dict[tuple[str, int], list[dict[str, float]]] = {m: [] for m in methods}
    died: dict[tuple[str, int], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        for _ in range(options.repeats):
            for method, chunk in methods:
                if (method, chunk) in died:
                    continue
                settings = json.dumps({**shared, "method": method, "chunk": chunk})
                ended = run_process([sys.executable, __file__, "--one", settings, str(out)])
                if ended:
                    died[method, chunk] = ended
                else:
                    results[method, chunk].append(json.loads(out.read_text()))

    def median(key: tuple[str, int], field: str) -> float | None:
        return statistics.median(r[field] for r in results[key]) if results[key] else None

    rows, table = [], []
    for method, chunk in methods:
        key = (method, chunk)
        row: dict[str, Any] = {"method": method, "chunk_rows": chunk or None, **shared, "repeats": options.repeats}
        for field in ("seconds", "peak_bytes", "loss"):
            row[field] = median(key, field)
        for field in ("seconds", "peak_bytes"):
            base = median(("naive", 0), field)
            row[f"{field}_over_naive"] = row[field] / base if base and row[field] is not None else None
        row["died"] = died.get(key)
        rows.append(row)
        cells = [format_number(row["seconds"]), format_number(row["seconds_over_naive"])]
        cells += [format_number(row["peak_bytes"], MIB, 0), format_number(row["peak_bytes_over_naive"], digits=3)]
        table.append([method, str(chunk or "-"), *cells, (row["died"] or "")[:60]])
    print(format_table(["method", "chunk", "seconds", "/naive", "peak MiB", "/naive", ""], table))
    if options.json:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
