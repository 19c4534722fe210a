"""Chunked linear + KL against the naive loss: time and memory, side by side.

    python tools/bench_loss.py --rows 8192 --vocab 32000 --hidden 1024 --json results.json

Methods: `naive` (both models' logits, log_softmax, autograd), `chunked` (core.loss) at several chunk sizes, and
`liger` (liger-kernel, fused linear JSD at beta 0, which is this KL), where that is installed; the head is frozen. Each in a
process of its own, repeats interleaved, medians. peak_bytes is the peak beyond inputs and gradients.
"""

import statistics
import time
from typing import Any

import torch
from measure import MIB, PeakRSS, format_number, read_options, run_in_turns, write_json
from torch import Tensor

from peagle_train.core.loss import chunked_linear_loss
from peagle_train.files import aligned


def one(method: str, chunk_rows: int, rows: int, vocab: int, hidden: int, dtype: str) -> dict[str, float]:
    """One step of one method, in this process."""
    M, V, H = rows, vocab, hidden

    def random(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

    def run(hidden: Tensor, head: Tensor, target_hidden: Tensor, target_head: Tensor) -> Tensor:
        if method == "naive":
            log_q = (hidden @ head.T).float().log_softmax(-1)
            log_p = (target_hidden @ target_head.T).float().log_softmax(-1)
            return (log_p.exp() * (log_p - log_q)).sum()
        if method == "liger":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            function = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk_rows
            )
            return function(hidden, head, target_hidden, target_head, torch.zeros(hidden.shape[0], dtype=torch.long))
        return chunked_linear_loss(hidden, head, target_hidden, target_head, "kl", chunk_rows)[0]

    head, target_head = random(V, H, seed=1) * H**-0.5, random(V, H, seed=2) * H**-0.5
    for n in (8, M):  # the first is the warm-up, which loads libraries
        inputs, target_hidden = random(n, H, seed=3).requires_grad_(), random(n, H, seed=4)
        inputs.grad = torch.zeros_like(inputs)
        with PeakRSS() as peak:
            began = time.perf_counter()
            loss = run(inputs, head, target_hidden, target_head)
            loss.backward()
            seconds = time.perf_counter() - began
    # The gradient of the hidden states is made once more before it is accumulated: that is no logits' fault.
    peak_bytes = max(0, peak.peak_bytes - inputs.numel() * inputs.itemsize)
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "loss": float(loss.detach()),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    shape: dict[str, Any] = {"rows": 8192, "vocab": 32000, "hidden": 1024, "dtype": "float32"}
    options = read_options(__doc__, one, chunks=[256, 384, 512, 1024], repeats=3, **shape)
    shared = {name: getattr(options, name) for name in shape}
    methods = [("naive", 0), *((name, chunk) for name in ("chunked", "liger") for chunk in options.chunks)]
    cases = {f"{name} {chunk or '-'}": {"method": name, "chunk_rows": chunk, **shared} for name, chunk in methods}
    rows, table = list[dict[str, Any]](), []
    for name, (runs, died) in run_in_turns(__file__, cases, options.repeats).items():
        row = {**cases[name], "repeats": options.repeats, "died": died}
        for field in ("seconds", "peak_bytes", "loss", "threads"):
            row[field] = statistics.median(run[field] for run in runs) if runs else None
        for field in ("seconds", "peak_bytes"):
            base = (rows[0] if rows else row)[field]  # naive is first
            row[f"{field}_over_naive"] = row[field] / base if base and runs else None
        rows.append(row)
        cells = [format_number(row["seconds"]), format_number(row["seconds_over_naive"])]
        cells += [format_number(row["peak_bytes"], MIB, 0), format_number(row["peak_bytes_over_naive"], digits=3)]
        table.append([name, *cells, (died or "")[:60]])
    print(aligned([["method, chunk", "seconds", "/naive", "peak MiB", "/naive", ""], *table], right=True))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
