"""The report's figures: a run is a colour, a depth is a shade."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from peagle_train.pictures.report_runs import Line, Run
from peagle_train.pictures.style import RUNS, depth_colour, load_matplotlib

Figures = dict[str, Any]


def draw_figures(runs: Sequence[Run]) -> Figures:
    """matplotlib figures by title, those alone that the runs have numbers for."""
    load_matplotlib()
    figures: Figures = {
        "Loss": _over_steps_and_time(runs, "loss", "loss (nats an element)", log=True),
        "Expected accepted length": _over_steps_and_time(runs, "expected_accepted_length", "tokens a target pass"),
        "Accuracy by depth": _depths(runs),
    }
    if any(run.train for run in runs):
        figures["Throughput"] = _pair(
            runs,
            [("tokens_per_second", 1, "tokens/s"), ("loader_wait_share", 100, "% of the time waiting for data")],
            second={"tokens_per_second": "supervised_tokens_per_second"},
        )
        figures["Memory and padding"] = _pair(
            runs,
            [("peak_memory_bytes", 2**-30, "peak so far, GiB"), ("padding_share", 100, "% of element slots unused")],
        )
        figures["Optimization"] = _pair(
            runs, [("learning_rate", 1, "learning rate"), ("grad_norm", 1, "gradient norm, unclipped")]
        )
    if any("data" in run.about for run in runs):
        figures["Data"] = _data([run for run in runs if "data" in run.about])
    return figures


def _colours(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, RUNS[i % len(RUNS)]) for i, run in enumerate(runs)]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over up to a 20th of the values (5 at least where there are so many), centred and shorter at the ends."""
    half = max(2, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _curves(
    axes: Any, lines: Sequence[Line], x: str, y: Callable[[Line], float | None], colour: Any, label: str
) -> None:
    """Raw values faint, their running mean on top; of a number that has no noise, the values."""
    points = [(line[x], value) for line in lines if line[x] is not None and (value := y(line)) is not None]
    if not points:
        return
    xs, ys = [x for x, _ in points], [y for _, y in points]
    is_smooth = all(abs(b - a) <= 0.1 * max(map(abs, ys)) for a, b in itertools.pairwise(ys))
    if len(points) >= 12 and not is_smooth:
        axes.plot(xs, ys, color=colour, alpha=0.22, linewidth=0.9)
        ys = smooth(ys)
    axes.plot(xs, ys, color=colour, linewidth=1.7, label=label, marker="o" if len(points) == 1 else None, markersize=4)


def _markers(axes: Any, lines: Sequence[Line], x: str, y: Callable[[Line], float], colour: Any, label: str) -> None:
    points = [(line[x], y(line)) for line in lines if line[x] is not None]
    if points:
        xs, ys = zip(*points)
        joined: Any = (0, (3, 2)) if len(points) > 2 else ""  # a line through two points would promise too much
        style = {"linewidth": 1.1, "marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": joined}
        axes.plot(xs, ys, color=colour, label=label, **style)


def _scale_of_time(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max((line["hours"] for run in runs for line in run.train), default=0.0)
    return (1.0, "hours") if longest >= 2 else (60.0, "minutes") if longest >= 0.05 else (3600.0, "seconds")


def _over_steps_and_time(runs: Sequence[Run], name: str, label: str, log: bool = False) -> Any:
    plt = load_matplotlib()
    figure, both = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained", sharey=True)
    factor, unit = _scale_of_time(runs)
    for axes, x in zip(both, ("step", "time")):
        for run, colour in _colours(runs):
            key = "step" if x == "step" else "time"
            train, held_out = (
                [{**line, "time": None if line["hours"] is None else line["hours"] * factor} for line in lines]
                for lines in (run.train, run.eval)
            )
            _curves(axes, train, key, lambda line: line[name], colour, f"{run.name}, training")
            _markers(axes, held_out, key, lambda line: line[name], colour, f"{run.name}, held out")
        axes.set_xlabel("step" if x == "step" else unit)
    every = [line[name] for run in runs for line in (*run.train, *run.eval)]
    if log and min(every) > 0 and max(every) > 4 * min(every):
        both[0].set_yscale("log")
        _plain_log_ticks(both[0], min(every), max(every))
    both[0].set_ylabel(label)
    both[1].tick_params(labelleft=False)
    _legend(figure, both[0])
    return figure


def _plain_log_ticks(axes: Any, low: float, high: float) -> None:
    steps = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 3, 5)]
    ticks = [t for t in steps if low / 1.1 <= t <= high * 1.1]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _depths(runs: Sequence[Run]) -> Any:
    plt = load_matplotlib()
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(11, 3.5 * rows), layout="constrained", squeeze=False, sharey=True
    )
    cells = [axes for line in grid for axes in line]
    num_depths = max(len(line["accuracy"]) for run in runs for line in (*run.train, *run.eval))
    for axes, run in zip(cells, runs):
        for depth in range(num_depths):
            colour = depth_colour(depth, num_depths)

            def accuracy(line: Line, depth: int = depth) -> float | None:
                is_there = depth < len(line["accuracy"]) and line["supervised"][depth] > 0
                return line["accuracy"][depth] if is_there else None

            _curves(axes, run.train, "step", accuracy, colour, f"depth {depth}")
            held_out = [line for line in run.eval if accuracy(line) is not None]
            _markers(axes, held_out, "step", lambda line: accuracy(line) or 0.0, colour, "_")
        axes.set_title(run.name)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    for axes in cells[len(runs) :]:
        axes.set_visible(False)
    cells[0].set_ylabel("share of elements whose argmax\nis the target's (circles: held out)")
    _legend(figure, cells[0])
    return figure


def _pair(runs: Sequence[Run], panels: Sequence[tuple[str, float, str]], second: dict[str, str] | None = None) -> Any:
    """Panels over steps: (name, factor, label); `second`: of a name, another that is drawn dotted beside it."""
    plt = load_matplotlib()
    figure, both = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for axes, (name, factor, label) in zip(both, panels):
        other = (second or {}).get(name)
        for run, colour in _colours(runs):
            lines = [line for line in run.train if line.get(name) is not None]
            _curves(axes, lines, "step", _scaled(name, factor), colour, run.name)
            points = [(line["step"], line[other] * factor) for line in lines if other and line.get(other) is not None]
            if points:
                axes.plot(*zip(*points), color=colour, linestyle=":", linewidth=1.5, label=f"{run.name}, supervised")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if name != "learning_rate" and axes.lines:
            axes.set_ylim(0, max(1e-9, 1.08 * max(max(line.get_ydata()) for line in axes.lines)))
        axes.set_visible(bool(axes.lines))  # runs of an older version lack some numbers
    _legend(figure, both[0])
    return figure


def _scaled(name: str, factor: float) -> Callable[[Line], float | None]:
    return lambda line: line[name] * factor


def _data(runs: Sequence[Run]) -> Any:
    plt = load_matplotlib()
    figure, three = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    panels = (
        ("piece_lengths", "tokens of a document or piece", 1),
        ("row_fill", "% of a row that is tokens", 100),
        ("supervised_share", "% of a row's tokens to learn from", 100),
    )
    for axes, (name, label, factor) in zip(three, panels):
        for run, colour in _colours(runs):
            found = run.about["data"][name]
            counts, width = found["counts"], found["top"] / len(found["counts"]) * factor
            share = [count / max(1, sum(counts)) * 100 for count in counts]
            edges = [i * width for i in range(len(counts) + 1)]
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(share, edges, color=colour, linewidth=1.2, label=run.name)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    three[0].set_ylabel("% of them")
    _legend(figure, three[0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(8 if len(labels) > 6 else 4, len(labels)))
