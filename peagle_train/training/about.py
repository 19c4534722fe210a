"""What a run's output folder says of it beside its recipe and its numbers, in `about.json`: data, versions, machine."""

import os
import platform
from dataclasses import asdict
from typing import Any

import torch

from peagle_train.data.packing import PackedRows, PackReport
from peagle_train.training.run_state import versions

ABOUT = "about.json"
"""In the output folder; written again when a run goes on."""
BINS = 40
"""Of each histogram."""
SAMPLE = 256
"""Rows that are looked into: evenly spaced ones, all of them if there are fewer."""

Histogram = dict[str, Any]


def about_data(rows: PackedRows, report: PackReport, max_length: int) -> dict[str, Any]:
    """Lengths, fill and supervised share of the rows to train on, plain values.

    Args:
        rows: all of them. report: of the same rows.
    """
    layout = rows.layout()
    lengths = layout["piece_lengths"]
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[layout["row_offsets"]]
    fill = (ends[1:] - ends[:-1]) / max_length
    chosen = torch.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().long().unique().tolist()
    shares = torch.tensor([float(rows[i]["loss_mask"].float().mean()) for i in chosen])
    return {
        "packing": asdict(report),
        "max_length": max_length,
        "piece_lengths": histogram(lengths.double(), float(max_length)),
        "row_fill": histogram(fill.double(), 1.0),
        "supervised_share": {**histogram(shares.double(), 1.0), "rows_looked_at": len(chosen)},
    }


def cores() -> int:
    """Those that this process may use; all of the machine where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about_machine(device: torch.device, num_processes: int) -> dict[str, Any]:
    """Versions, and where the run is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": versions(),
        "machine": {
            "device": f"{device.type} ({name})",
            "processes": num_processes,
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(terse=True),
        },
    }


def histogram(values: torch.Tensor, top: float) -> Histogram:
    """Counts of `BINS` equal bins over 0..top, and quantiles. values: float64 [n], n >= 1, none over `top`."""
    ranked = values.sort().values
    quantiles = {f"p{q}": float(ranked[round(q / 100 * (ranked.numel() - 1))]) for q in (0, 10, 50, 90, 99, 100)}
    return {
        "counts": torch.histc(values, BINS, 0.0, top).long().tolist(),
        "top": top,
        "mean": float(values.mean()),
        **quantiles,
    }
