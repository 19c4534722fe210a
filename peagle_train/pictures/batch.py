"""A row of the flat batch as a picture: who sees whom on the left, what each segment reads and owns on the right.

Everything that is drawn comes from the package's own collator, elements and visibility. N: elements of the row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.elements import Elements, gather_elements
from peagle_train.core.segments import visibility_of
from peagle_train.pictures.style import DARK, DOCUMENTS, GREY, depth_colour, load_matplotlib

MAX_ELEMENTS = 4096
"""More than a picture can show."""
LABELLED = 72
"""Up to so many elements or columns have labels."""

EXAMPLE = (
    ("sky blue ?", "air scatters blue light far more than red light ."),
    ("2 + 2 ?", "the sum of two and two is four ."),
)
"""(question, answer) of two documents, a word a token."""


def example_row() -> tuple[dict[str, Any], list[str]]:
    """A row for the collator, and its tokens as words."""
    words: list[str] = []
    row: dict[str, list[int]] = {"input_ids": [], "loss_mask": [], "document_ids": []}
    for number, (question, answer) in enumerate(EXAMPLE):
        for text, is_answer in ((question, 0), (answer, 1)):
            tokens = text.split()
            row["loss_mask"] += [is_answer] * len(tokens)
            row["document_ids"] += [number] * len(tokens)
            words += tokens
    row["input_ids"] = list(range(len(words)))
    return {**row, "row_key": 0}, words


def visible_elements(batch: dict[str, Tensor], num_depths: int) -> tuple[Elements, Tensor, Tensor]:
    """The row's elements without padding, their segments int64 [N], and who sees whom, bool [N, N] (queries by keys).

    Args:
        batch: CODCollator's, of one row.
    """
    assert batch["anchor"].shape[0] == 1, "one row at a time"
    real = (batch["depth"][0] >= 0).nonzero().flatten()
    if real.numel() > MAX_ELEMENTS:
        raise ValueError(
            f"the row has {real.numel()} elements, and a picture shows at most {MAX_ELEMENTS}: give a smaller"
            " data.max_length, as in data.max_length=64"
        )
    flat = {**batch, **{name: batch[name][:, real] for name in ("anchor", "depth", "supervised", "segment_ids")}}
    elements = gather_elements(flat, slice(None), mask_token_id=0)
    # no order is assumed: any slot may hold a depth-0 element or a deeper one
    visible = visibility_of(elements, num_depths, M=real.numel(), first_rollout=0).dense()[0]
    return elements, flat["segment_ids"][0], visible


def draw_batch(
    batch: dict[str, Tensor], num_depths: int, words: Sequence[str], is_taught: Sequence[int], title: str
) -> Any:
    """A matplotlib figure. `words`: what to call each token of the row; `is_taught`: its loss mask."""
    plt = load_matplotlib()
    elements, segment_N, visible = visible_elements(batch, num_depths)
    if not visible.numel():
        raise ValueError("the row has no elements: its documents have fewer than 2 tokens")
    used = sorted(set(segment_N.tolist()))
    figure = plt.figure(figsize=(12.6, 6.6), layout="constrained")
    left, right = figure.add_gridspec(1, 2, width_ratios=[1.0, 1.12])
    matrix = figure.add_subplot(left)
    _draw_matrix(matrix, batch, elements, segment_N, visible, num_depths)
    columns = int((batch["document_ids"][0] >= 0).sum())
    below = right.subgridspec(len(used), 1, hspace=0.06)
    for i, s in enumerate(used):
        axes = figure.add_subplot(below[i])
        _draw_segment(axes, batch, elements, segment_N == s, visible, num_depths, columns)
        axes.set_ylabel(f"segment {s}\ndepth" if len(used) <= 8 else str(s))
        if i == 0:
            axes.set_title("What each segment runs (colours) and reads (grey)")
        axes.set_xticks(range(columns) if columns <= LABELLED else [])
        is_last = i == len(used) - 1
        if is_last and columns <= LABELLED:
            labels = [f"{word[:10]}" for word in words[:columns]]
            axes.set_xticklabels(labels, rotation=90, fontsize=8, family="monospace")
            for label, taught in zip(axes.get_xticklabels(), is_taught):
                label.set_fontweight("bold" if taught else "normal")
                label.set_color(DARK if taught else "#7d8790")
        else:
            axes.set_xticklabels([])
        if is_last:
            axes.set_xlabel("column: anchor + depth" + (" (bold: tokens to learn from)" if columns <= LABELLED else ""))
    handles = [plt.Rectangle((0, 0), 1, 1, color=depth_colour(d, num_depths)) for d in range(1, num_depths)]
    names = [f"depth {d}" for d in range(1, num_depths)]
    documents = int(batch["document_ids"].max()) + 1
    shown = [plt.Rectangle((0, 0), 1, 1, color=DOCUMENTS[i]) for i in range(min(documents, len(DOCUMENTS)))]
    told = (
        [f"depth 0, document {i}" for i in range(documents)]
        if documents <= len(DOCUMENTS)
        else ["depth 0 (by document)"]
    )
    figure.legend(
        [*shown[: len(told)], *handles, plt.Rectangle((0, 0), 1, 1, color=GREY)],
        [*told, *names, "another segment's, read"],
        loc="outside lower center",
        ncols=min(8, len(told) + len(names) + 1),
    )
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=11.5)
    return figure


def _colour(batch: dict[str, Tensor], anchor: int, depth: int, num_depths: int) -> Any:
    if depth:
        return depth_colour(depth, num_depths)
    return DOCUMENTS[int(batch["document_ids"][0, anchor]) % len(DOCUMENTS)]


def _draw_matrix(
    axes: Any, batch: dict[str, Tensor], elements: Elements, segment_N: Tensor, visible: Tensor, num_depths: int
) -> None:
    from matplotlib.colors import to_rgb

    anchors, depths = elements.anchor[0].tolist(), elements.depth[0].tolist()
    N = len(anchors)
    colour_N3 = torch.tensor([to_rgb(_colour(batch, a, d, num_depths)) for a, d in zip(anchors, depths)])
    image = torch.where(visible[:, :, None], colour_N3[None].expand(N, N, 3), torch.ones(3))
    axes.imshow(image.numpy(), interpolation="nearest", extent=(0, N, N, 0))
    axes.grid(False)
    edges = (segment_N[1:] != segment_N[:-1]).nonzero().flatten() + 1
    for edge in edges.tolist():
        axes.axhline(edge, color=DARK, linewidth=1.1)
        axes.axvline(edge, color=DARK, linewidth=1.1)
    if N <= LABELLED:
        for line in range(N):
            axes.axhline(line, color="#eef0f2", linewidth=0.4, zorder=3)
            axes.axvline(line, color="#eef0f2", linewidth=0.4, zorder=3)
        labels = [f"{a}+{d}" if d else f"{a}" for a, d in zip(anchors, depths)]
        axes.set_yticks([i + 0.5 for i in range(N)], labels, fontsize=6, family="monospace")
        axes.set_xticks([i + 0.5 for i in range(N)], labels, fontsize=6, family="monospace", rotation=90)
        axes.tick_params(length=0, pad=1.5)
        axes.set_ylabel("queries: anchor + depth")
        axes.set_xlabel("keys: anchor + depth")
    else:
        axes.set_ylabel("queries: elements of the flat batch")
        axes.set_xlabel("keys: elements of the flat batch")
    for s in sorted(set(segment_N.tolist())):
        own = (segment_N == s).nonzero().flatten()
        axes.text(
            float(own.double().mean()) + 0.5,
            -0.7,
            f"segment {s}" if N <= LABELLED else str(s),
            ha="center",
            fontsize=8.5,
        )
    axes.set_title("Who sees whom", pad=22)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _draw_segment(
    axes: Any,
    batch: dict[str, Tensor],
    elements: Elements,
    own_N: Tensor,
    visible: Tensor,
    num_depths: int,
    columns: int,
) -> None:
    from matplotlib.patches import Rectangle

    read_N = visible[own_N].any(0) & ~own_N
    for i, (anchor, depth) in enumerate(zip(elements.anchor[0].tolist(), elements.depth[0].tolist())):
        if not (own_N[i] or read_N[i]):
            continue
        colour = _colour(batch, anchor, depth, num_depths) if own_N[i] else GREY
        axes.add_patch(Rectangle((anchor + depth - 0.45, depth - 0.42), 0.9, 0.84, color=colour, linewidth=0))
    axes.grid(False)
    starts = (batch["document_ids"][0, 1:] != batch["document_ids"][0, :-1]).nonzero().flatten() + 1
    for start in starts.tolist():
        if start < columns:
            axes.axvline(start - 0.5, color="#7d8790", linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(-0.6, num_depths - 0.4)
    axes.set_yticks(range(num_depths), [str(d) for d in range(num_depths)], fontsize=8)
    axes.tick_params(length=0)
