"""What this process has of its machine. Needs the standard library alone."""

import os
import resource
import sys


def cores() -> int:
    """Cores that this process may use; on macOS, all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_ram() -> int:
    """The most bytes of RAM that this process has held since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
