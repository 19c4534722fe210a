"""What this process has of its machine."""

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
GPUS = {"a100": (79, 312), "h100": (79, 989), "h200": (139, 989), "b200": (178, 2250)}
"""GiB that a process sees, and TFLOP/s in dense bfloat16, by the makers' data sheets (SXM, 80, 80, 141 and 180 GB)."""


def cores() -> int:
    """Cores that this process may use: by its affinity, and by its control group's share of time; on macOS, all."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
        return min(count, -(-quota // period))
    except (OSError, ValueError):  # as in `available_ram`
        return count


def peak_ram() -> int:
    """The most bytes of RAM that this process has held since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_ram() -> int:
    """Bytes of RAM that this process holds."""
    return psutil.Process().memory_info().rss


def available_ram() -> int:
    """Bytes that processes can still get: of the machine, or of the control group if that allows less."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(available, max(0, limit - used))
    except (OSError, ValueError):  # no control group, one of another kind, or one without a limit
        return available


@dataclass(frozen=True)
class Device:
    """What one process has to itself."""

    kind: str  # cuda or cpu
    budget: int  # bytes, those that this process holds already included
    world_size: int = 1

    def __str__(self) -> str:
        what = "CUDA memory" if self.kind == "cuda" else "RAM"
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{processes}, {self.budget / GIB:.1f} GiB of {what} each"


def parse_device(text: str) -> Device:
    """`cuda:79`, `cpu:16` (GiB for each process), `cuda:79x8` (8 processes); ValueError for anything else."""
    found = re.fullmatch(r"(cuda|cpu):(\d+(?:\.\d+)?)(?:x([1-9]\d*))?", text)
    if not found or float(found[2]) == 0:
        raise ValueError(f"--on {text}: give KIND:GIB or KIND:GIBxPROCESSES, as in cuda:79, cpu:16 or cuda:79x8")
    return Device(found[1], int(float(found[2]) * GIB), int(found[3] or 1))
