"""One self-contained HTML page about runs, finished or not: results, curves, data and settings, side by side.

matplotlib is an optional extra, imported where something is drawn.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from peagle_train.config import dump_yaml, read_yaml
from peagle_train.files import write_bytes
from peagle_train.training.checkpoint import MARKER
from peagle_train.training.metrics import ABOUT, duration

Line = dict[str, Any]

PANELS = (
    ("loss", 1, "loss, nats per element"),
    ("expected_accepted_length", 1, "expected accepted length"),
    ("tokens_per_second", 1, "tokens/s"),
    ("loader_wait_share", 100, "waiting for data, % of the time"),
    ("grad_norm", 1, "gradient norm, unclipped"),
)
"""Key of a line of metrics.jsonl, factor, title; the first two have held-out values, too."""
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #20262d; max-width: 1080px; margin: 2em auto; padding: 0 1.2em; }
img { width: 100%; } table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .28em 1.2em .28em 0; border-bottom: 1px solid #e3e7ea; vertical-align: top; }
pre { background: #f5f7f8; padding: .8em 1em; overflow-x: auto; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Run:
    """The content of one output folder."""

    name: str  # the folder as given
    train: list[Line]
    eval: list[Line]
    skipped: list[Line]  # steps that were not applied
    summary: Line  # run.json
    about: Line  # about.json
    recipe: dict[str, dict[str, Any]]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page. ValueError for a folder without a run, or without matplotlib."""
    runs = [read_run(folder) for folder in folders]
    title = html.escape(", ".join(run.name for run in runs))
    image = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(draw(runs)).decode()}">'
    recipes = (f"<summary>{html.escape(r.name)}</summary><pre>{html.escape(dump_yaml(r.recipe))}</pre>" for r in runs)
    sections = {
        "Result": _table(runs, [_result(run) for run in runs]),
        "Curves": f"<p>Lines: training. Circles: held out.</p>{image}",
        "Data": _table(runs, [run.about.get("data", {}).get("packing", {}) for run in runs]),
        "Settings that differ": _table(runs, differing_keys(runs)),
        "Recipes": "".join(f"<details>{recipe}</details>" for recipe in recipes),
    }
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections.items() if content)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{CSS}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n'
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page.encode())


def read_run(folder: Path) -> Run:
    """ValueError unless the folder holds a run with at least one number. An unfinished last line is ignored."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {path.name} in it; give a recipe's output.dir")
    lines: dict[str, list[Line]] = {"train": [], "eval": [], "skipped": []}
    for text in path.read_bytes().split(b"\n")[:-1]:
        line = json.loads(text)
        lines[line["kind"]].append(line)
    if not lines["train"] and not lines["eval"]:
        raise ValueError(f"{path} holds no numbers yet")
    files = [folder / name for name in (MARKER, ABOUT)]
    summary, about = (json.loads(path.read_bytes()) if path.exists() else {} for path in files)
    return Run(str(folder), **lines, summary=summary, about=about, recipe=read_yaml(folder / "recipe.yaml"))


def differing_keys(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run, the settings that differ between runs, as `section.key`."""
    flat = [{f"{s}.{k}": v for s, values in run.recipe.items() for k, v in values.items()} for run in runs]
    keys = sorted({key for one in flat for key in one})
    different = [key for key in keys if any(one.get(key) != flat[0].get(key) for one in flat)]
    return [{key: one.get(key) for key in different} for one in flat]


def _result(run: Run) -> dict[str, Any]:
    state = run.summary.get("state", "unknown")
    found = {
        "state": "running or killed" if state == "started" else state,
        "step": max(line["step"] for line in (*run.train, *run.eval)),
        "steps not applied": len(run.skipped),
    }
    if run.eval:
        first, last = run.eval[0], run.eval[-1]
        for name, key in (("accepted length", "expected_accepted_length"), ("loss", "loss")):
            found[f"{name}, held out"] = f"{first[key]:.3f} -> {last[key]:.3f} (step {last['step']})"
        found["accuracy by depth, held out"] = " ".join(f"{share:.2f}" for share in last["accuracy"])
        found["target mass outside the draft vocabulary"] = f"{last['mass_outside']:.2%}"
    if run.train:
        seconds = [0.0, *(line["seconds"] for line in run.train)]  # which start at 0 again where a run was resumed
        found |= {
            "steps in all": run.train[-1]["num_steps"],
            "time": duration(sum(b - a if b >= a else b for a, b in pairwise(seconds))),
            "tokens/s, median": f"{median(line['tokens_per_second'] for line in run.train):,.0f}",
            "peak memory": f"{max(line['peak_memory_bytes'] for line in run.train) / 2**30:.2f} GiB",
        }
    return found


def _table(runs: Sequence[Run], columns: Sequence[dict[str, Any]]) -> str:
    """A column for each run, a row for each key that any has; nothing without keys."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [["", *(run.name for run in runs)], *([key, *(str(c.get(key, "")) for c in columns)] for key in keys)]
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>" if keys else ""


def draw(runs: Sequence[Run]) -> bytes:
    """All curves on one PNG: a run is a colour."""
    plt = load_matplotlib()
    figure, grid = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    by_depth, *others = grid.flat
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        shares = (run.eval or run.train)[-1]["accuracy"]
        by_depth.plot(range(len(shares)), shares, color=colour, marker="o", label=run.name)
        by_depth.set(title="accuracy by depth, latest", xlabel="depth", ylim=(0, 1))
        for axes, (name, factor, title) in zip(others, PANELS):
            points = [(line["step"], line[name] * factor) for line in run.train if line.get(name) is not None]
            axes.plot(*zip(*points), color=colour, marker="o" if len(points) == 1 else None)
            held_out = [(line["step"], line[name]) for line in run.eval if name in line]
            axes.plot(*zip(*held_out), color=colour, marker="o", markerfacecolor="white", linestyle=":")
            axes.set(title=title, xlabel="step")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=4)
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")
    return data.getvalue()


def load_matplotlib() -> Any:
    """matplotlib.pyplot, without a display, in this project's style; ValueError that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib (the extra peagle-train[report])") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use("seaborn-v0_8-whitegrid")
    return pyplot
