"""One self-contained HTML page about runs, and its figures as PNG files beside it."""

import base64
import html
from pathlib import Path
from typing import Any

from peagle_train.pictures.report_figures import draw_figures
from peagle_train.pictures.report_runs import Line, Run, differing_keys, read_runs
from peagle_train.pictures.style import png_of, write_bytes
from peagle_train.strict_yaml import dump_yaml
from peagle_train.training.pace import duration

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #20262d; background: #fff; max-width: 1080px; margin: 2em auto;
       padding: 0 1.2em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.12em; margin: 1.9em 0 .5em; }
img { width: 100%; height: auto; display: block; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28em .9em .28em 0; border-bottom: 1px solid #e3e7ea; vertical-align: top; }
th { font-weight: 600; } td + td, th + th { padding-left: .6em; }
pre { background: #f5f7f8; padding: .8em 1em; overflow-x: auto; font-size: 13px; } summary { cursor: pointer; }
.note { color: #5b6670; }
"""


def write_report(folders: list[Path], out: Path) -> list[Path]:
    """Write the page and `<its name>-<figure>.png` beside it; returns the paths, the page first.

    Raises:
        ValueError: a folder without a run, or matplotlib is not installed.
    """
    runs = read_runs(folders)
    images = {title: png_of(figure) for title, figure in draw_figures(runs).items()}
    paths = [out]
    for title, data in images.items():
        paths.append(out.with_name(f"{out.stem}-{title.lower().replace(' ', '-')}.png"))
        write_bytes(paths[-1], data)
    write_bytes(out, page(runs, images).encode())
    return paths


def page(runs: list[Run], images: dict[str, bytes]) -> str:
    """The page's HTML; it needs no other file."""
    title = html.escape(", ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1>", '<p class="note">peagle_train</p>', "<h2>Result</h2>", _results(runs)]
    parts += [
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}">'
        for name, data in images.items()
    ]
    if any("data" in run.about for run in runs):
        parts += [
            "<h2>What the data is</h2>",
            _table(runs, {key: [_cell(v) for v in vs] for key, vs in _data(runs).items()}),
        ]
    if len(runs) > 1:
        different = {key: [_cell(v) for v in values] for key, values in differing_keys(runs).items()}
        parts += ["<h2>Settings that differ</h2>", _table(runs, different) if different else "<p>None.</p>"]
    versions = {key: values for key, values in _versions(runs).items() if any(values)}
    if versions:
        parts += ["<h2>Versions and machine</h2>", _table(runs, versions)]
    parts += ["<h2>Recipe</h2>"]
    for run in runs:
        text = html.escape(dump_yaml(run.recipe))
        parts.append(f"<details><summary>{html.escape(run.name)}, all settings</summary><pre>{text}</pre></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head><body>{"".join(parts)}</body></html>\n'
    )


def _results(runs: list[Run]) -> str:
    def change(run: Run, name: str, digits: int) -> str:
        if not run.eval:
            return "not evaluated"
        first, last = run.eval[0][name], run.eval[-1][name]
        return f"{first:.{digits}f} &rarr; <b>{last:.{digits}f}</b> (step {run.eval[-1]['step']})"

    table = {
        "state": [_state(run) for run in runs],
        "steps": [f"{_last(run)['step']} of {run.train[-1]['num_steps'] if run.train else '?'}" for run in runs],
        "time": [duration(run.train[-1]["hours"] * 3600) if run.train else "" for run in runs],
        "accepted length, held out": [change(run, "expected_accepted_length", 3) for run in runs],
        "loss, held out": [change(run, "loss", 3) for run in runs],
        "accuracy by depth, held out": [_shares(run.eval[-1]["accuracy"]) if run.eval else "" for run in runs],
        "target mass outside the draft vocabulary": [f"{run.eval[-1]['mass_outside']:.2%}" if run.eval else ""
                                                     for run in runs],
        "tokens/s, median": [_median(run, "tokens_per_second", "{:,.0f}") for run in runs],
        "waiting for data, median": [_median(run, "loader_wait_share", "{:.1%}") for run in runs],
        "peak memory": [f"{max(line['peak_memory_bytes'] for line in run.train) / 2**30:.2f} GiB" if run.train else ""
                        for run in runs],
        "recompiles": [str(run.train[-1]["recompiles"] or 0) if run.train else "" for run in runs],
        "steps not applied": [str(len(run.skipped)) for run in runs],
    }  # fmt: skip
    return _table(runs, table)


def _state(run: Run) -> str:
    state = str(run.summary.get("state", "unknown"))
    return html.escape("running, or ended without a word" if state == "started" else state)


def _last(run: Run) -> Line:
    return max((*run.train, *run.eval), key=lambda line: line["step"])


def _shares(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _median(run: Run, name: str, form: str) -> str:
    values = sorted(line[name] for line in run.train if line.get(name) is not None)
    return form.format(values[len(values) // 2]) if values else ""


def _data(runs: list[Run]) -> dict[str, list[Any]]:
    found = [run.about.get("data") or {} for run in runs]

    def spread(one: dict[str, Any], name: str, form: str) -> str:
        values = one.get(name)
        return (
            ", ".join(f"{q} {form.format(values[q])}" for q in ("p10", "p50", "p90", "p99", "p100")) if values else ""
        )

    table: dict[str, list[Any]] = {
        key.replace("_", " "): [one.get("packing", {}).get(key, "") for one in found]
        for key in ("documents", "pieces", "split_documents", "rows", "tokens", "supervised", "lost_at_splits")
    }
    table["tokens of a piece"] = [spread(one, "piece_lengths", "{:,.0f}") for one in found]
    table["fill of a row"] = [spread(one, "row_fill", "{:.1%}") for one in found]
    table["supervised share of a row"] = [spread(one, "supervised_share", "{:.1%}") for one in found]
    return table


def _versions(runs: list[Run]) -> dict[str, list[str]]:
    flat = [{**run.about.get("versions", {}), **run.about.get("machine", {})} for run in runs]
    return {key: [_cell(one.get(key, "")) for one in flat] for key in dict.fromkeys(k for one in flat for k in one)}


def _cell(value: Any) -> str:
    return html.escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _table(runs: list[Run], rows: dict[str, list[str]]) -> str:
    """`rows`: by their names, each run's cell as HTML."""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    lines = [f"<tr><th></th>{head}</tr>"] if head else []
    for name, cells in rows.items():
        lines.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
