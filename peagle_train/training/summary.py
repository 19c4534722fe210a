"""What a finished run says of itself."""

from pathlib import Path
from typing import Any

from peagle_train.training.checkpoint import MARKER, read_marker


def read_summary(folder: Path) -> str:
    """Where a finished run's drafter is and how good it is; ValueError if there is no finished run."""
    summary = read_marker(folder)
    if not summary:
        raise ValueError(f"{folder} holds no run: its {MARKER} is missing, or is not what a run writes")
    if summary["state"] != "finished":
        raise ValueError(f"{folder} holds a run that has not finished")
    return describe_summary(summary, folder)


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    if summary["state"] == "stopped":
        where = folder / summary["checkpoint"]
        return (
            f"stopped by {summary['signal']} at step {summary['steps']}, saved as {where}: the same command with --resume"
            " goes on from there"
        )
    lines = [f"drafter: {folder / summary['drafter']} ({summary['steps']} steps in {summary['train_seconds']:.0f} s)"]
    before, after = summary["before"], summary["after"]
    if after:
        lines.append(
            f"held-out expected accepted length: {before['expected_accepted_length']:.3f} before,"
            f" {after['expected_accepted_length']:.3f} after training (loss {before['loss']:.3f} -> {after['loss']:.3f})"
        )
    best = summary.get("best")
    if best and best.get("folder") not in (None, "final"):
        lines.append(f"the best was at step {best['step']} ({best['expected_accepted_length']:.3f}): {folder / 'best'}")
    return "\n".join(lines)
