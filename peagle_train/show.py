"""What people look at: one HTML page about runs, and what training sees of a sequence, as text and as a picture.

A page is self-contained; its runs may be finished or not. Sequences come from `load_training_data`, elements from the
collator and `gather_elements`, as in training. matplotlib is an optional extra, imported where something is drawn.
N: elements of a sequence.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import Recipe, dump_yaml, read_yaml, with_segments
from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import gather_elements
from peagle_train.core.passes import visibility_of
from peagle_train.data.encode import Encoder
from peagle_train.data.training_data import encoder_of, load_training_data, make_collator
from peagle_train.files import aligned, write_bytes
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
MASK, PAST_END = "<mask>", "(past the end)"
HEADER = ("anchor", "depth", "position id", "token", "features at", "predicts", "the target's label at", "learned")
MAX_ELEMENTS, LABELLED = 4096, 72  # more than a picture can show; up to this many positions have labels
DOCUMENTS, GREY = ("#a9c9ea", "#f6c592", "#b5dcae", "#d9b8e3"), "#c9ced4"


# Runs


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
        raise ValueError(f"{folder} holds no run: there is no {path.name}; give a recipe's output.dir")
    lines: dict[str, list[Line]] = {"train": [], "eval": [], "skipped": []}
    for line in map(json.loads, path.read_bytes().split(b"\n")[:-1]):
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


# Sequences


def load_sequence(recipe: Recipe, number: int) -> tuple[dict[str, Any], Encoder, str]:
    """Sequence `number` of a recipe's training data, its encoder, and a line about it; prints those about the data.
    ValueError: no such sequence, or the recipe's data cannot be loaded.
    """
    encoder = encoder_of(recipe)
    rows = load_training_data(encoder).train_rows
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: there are {len(rows)} training sequences; give 0 to {len(rows) - 1}")
    sequence = rows[0, number]
    tokens, learned = sequence["input_ids"].numel(), int(sequence["loss_mask"].sum())
    title = f"sequence {number} of {len(rows)} training sequences: {tokens} tokens, {learned} of them learned, "
    return sequence, encoder, f"{title}{sequence['document_ids'].unique().numel()} documents"


def token_name(tokenizer: Any, token: int) -> str:
    """A token's text as decoded alone, anything unprintable escaped; without a tokenizer, its id."""
    if tokenizer is None:
        return f"<{token}>"
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:  # part of a character: as the vocabulary writes it
        text = f"<{tokenizer.convert_ids_to_tokens(token)}>"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def show_sequence(recipe: Recipe, number: int, with_elements: bool = False) -> str:
    """A sequence's tokens; `with_elements`, also what its elements read and predict. ValueError: see `load_sequence`."""
    sequence, encoder, title = load_sequence(recipe, number)
    name = partial(token_name, encoder.tokenizer)
    lines = [title, show_tokens(sequence, name)]
    if with_elements:
        collator = make_collator(with_segments(recipe, 1), recipe.train.seed)  # segments change no element
        lines.append(f"--- elements drawn in epoch 0, of {recipe.cod.num_depths} depths ---")
        elements = list_elements(sequence, collator, encoder.mask_token_id, name)
        lines.append(aligned([HEADER, *([str(cell) for cell in element] for element in elements)]))
    return "\n".join(lines)


def show_tokens(sequence: dict[str, Tensor], name: Callable[[int], str]) -> str:
    """The tokens by document; learned ones in [brackets]."""
    ids, mask, documents = (sequence[key].tolist() for key in ("input_ids", "loss_mask", "document_ids"))
    lines: list[str] = []
    for document, group in groupby(range(len(ids)), key=documents.__getitem__):
        own = list(group)
        learned = sum(mask[i] for i in own)
        lines.append(f"--- document {document}: positions {own[0]} to {own[-1]}, {learned} tokens learned ---")
        marked = ((name(ids[i]), mask[i]) for i in own)
        shown = ((f"[{text}]" if taught else text) + "\n" * text.endswith("\\n") for text, taught in marked)
        lines.append("".join(shown).rstrip("\n"))
    return "\n".join(lines)


def list_elements(
    sequence: dict[str, Any], collator: CODCollator, mask_token_id: int, name: Callable[[int], str]
) -> list[tuple[int, int, int, str, str, str, str, str]]:
    """The elements that training draws for the sequence, by anchor and depth, in the columns of HEADER."""
    batch = collator([sequence])
    elements = gather_elements(batch, slice(None), mask_token_id)
    documents, ids = batch["document_ids"][0].tolist(), batch["input_ids"][0].tolist()

    def at(position: int) -> str:
        return f"{position} '{name(ids[position])}'"

    rows = []
    for anchor, depth, token, position_id, _, label, is_learned in zip(*(values[0].tolist() for values in elements)):
        if depth < 0:
            continue
        reads = (MASK, "mask_hidden") if depth else (f"'{name(token)}'", at(anchor))
        is_inside = documents[label + 1 : label + 2] == [documents[label]]
        predicts = f"'{name(ids[label + 1])}'" if is_inside else PAST_END
        rows.append((anchor, depth, position_id, *reads, predicts, at(label), "yes" if is_learned else "no"))
    return sorted(rows)


def visible_elements(batch: dict[str, Tensor], window: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a batch of one sequence: its elements' anchors, depths and segments, int64 [N], and who sees whom, bool [N, N]
    (queries, keys).
    """
    real = (batch["depth"][0] >= 0).nonzero().flatten()
    if not 0 < (count := real.numel()) <= MAX_ELEMENTS:
        what = f"the sequence has {count} elements; a picture shows 1 to {MAX_ELEMENTS}"
        raise ValueError(f"{what}: change data.max_length, as in data.max_length=64")
    num_depths, by_element = batch["supervised_per_depth"].shape[1], ("anchor", "depth", "supervised", "segment_ids")
    # without padding, of which a long data.max_length has far more than fits into a table of pairs
    batch = batch | {name: batch[name][:, real] for name in by_element}
    # no order is assumed: any slot may hold a depth-0 element or a deeper one
    visibility = visibility_of(gather_elements(batch, slice(None), 0, window), num_depths, M=count, first_rollout=0)
    anchor_N, depth_N, segment_N = (batch[name][0] for name in ("anchor", "depth", "segment_ids"))
    return anchor_N, depth_N, segment_N, visibility.dense()[0]


def write_picture(recipe: Recipe, number: int, out: Path) -> str:
    """Draw what each segment of a training sequence's flat batch runs and reads; returns the picture's title. ValueError:
    matplotlib is missing, cod.num_segments is auto, or see `load_sequence` and `visible_elements`.
    """
    plt = load_matplotlib()  # its absence is reported before anything is read
    if recipe.cod.num_segments == "auto":
        raise ValueError("cod.num_segments is auto: give the number, as in cod.num_segments=4")
    collator, window = make_collator(recipe, recipe.train.seed), recipe.draft.window
    sequence, encoder, title = load_sequence(recipe, number)
    num_depths, tokens = collator.num_depths, sequence["input_ids"].numel()
    title += f"; K = {num_depths}, S = {collator.num_segments}"
    if window:
        title += f", window {window}"
    batch = collator([sequence])
    anchor_N, depth_N, segment_N, visible_NN = visible_elements(batch, window)
    of_depth = plt.colormaps["viridis"](torch.linspace(0.02, 0.88, num_depths).numpy())
    colours = [
        of_depth[depth] if depth else DOCUMENTS[document % len(DOCUMENTS)]
        for depth, document in zip(depth_N.tolist(), batch["document_ids"][0, anchor_N].tolist())
    ]
    used = sorted(set(segment_N.tolist()))
    figure, grid = plt.subplots(len(used), figsize=(12.6, 6.6), layout="constrained", squeeze=False)
    figure.suptitle(f"{title}\n", x=0.01, ha="left")
    for axes, s in zip(grid.flat, used):
        own_N = segment_N == s
        drawn = (own_N | visible_NN[own_N].any(0)).nonzero().flatten().tolist()
        bottoms = (depth_N[drawn] - 0.42).tolist()
        shades = [colours[n] if own_N[n] else GREY for n in drawn]
        axes.bar((anchor_N + depth_N)[drawn].tolist(), height=0.84, width=0.9, bottom=bottoms, color=shades)
        axes.set(xlim=(-0.6, tokens - 0.4), ylim=(-0.6, num_depths - 0.4), xticks=[], yticks=range(num_depths))
        axes.set(ylabel=f"segment {s}\ndepth" if len(used) <= 8 else str(s))
        axes.grid(False)
    grid[0, 0].set_title("What each segment runs (colours) and reads (grey)")
    axes.set_xlabel("position: anchor + depth (bold: learned tokens)")
    if tokens <= LABELLED:
        words = [token_name(encoder.tokenizer, token)[:10] for token in sequence["input_ids"].tolist()]
        axes.set_xticks(range(tokens), words, rotation=90, fontsize=8)
        for label, taught in zip(axes.get_xticklabels(), sequence["loss_mask"]):
            label.set_fontweight("bold" if taught else "normal")
    names = ["depth 0 (by document)", *(f"depth {d}" for d in range(1, num_depths)), "another segment's, read"]
    shades = [DOCUMENTS[0], *of_depth[1:], GREY]
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades]
    figure.legend(handles, names, loc="outside lower center", ncols=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", bbox_inches="tight")
    return title
