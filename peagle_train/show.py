"""What training sees: a sequence in readable tokens, what each of its elements reads, and its flat batch as a picture.

Sequences come from `load_training_data`, elements from the collator and `gather_elements`, as in training.
N: elements of a sequence.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import Recipe, with_segments
from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import Elements, gather_elements
from peagle_train.core.passes import visibility_of
from peagle_train.data.training_data import encoder_of, load_training_data, make_collator
from peagle_train.files import aligned
from peagle_train.report import load_matplotlib

MASK, PAST_END = "<mask>", "(past the end)"
HEADER = ("anchor", "depth", "position id", "token", "features at", "predicts", "the target's label at", "learned")
MAX_ELEMENTS, LABELLED = 4096, 72  # more than a picture can show; up to this many positions have labels
DOCUMENTS, GREY, DARK = ("#a9c9ea", "#f6c592", "#b5dcae", "#d9b8e3"), "#c9ced4", "#20262d"


def load_sequence(recipe: Recipe, number: int) -> tuple[dict[str, Any], Any, int, list[str]]:
    """Sequence `number` of a recipe's training data, the tokenizer, the mask token, and lines about the data. ValueError:
    no such sequence, or the recipe's data cannot be loaded.
    """
    encoder, lines = encoder_of(recipe), list[str]()
    rows = load_training_data(encoder, lines.append).train_rows
    if not 0 <= number < len(rows):
        raise ValueError(f"--row {number}: there are {len(rows)} training sequences; give 0 to {len(rows) - 1}")
    sequence = rows[0, number]
    tokens, learned = sequence["input_ids"].numel(), int(sequence["loss_mask"].sum())
    title = f"sequence {number} of {len(rows)} training sequences: {tokens} tokens, {learned} of them learned, "
    lines.append(f"{title}{sequence['document_ids'].unique().numel()} documents")
    return sequence, encoder.tokenizer, encoder.mask_token_id, lines


def token_name(tokenizer: Any, token: int) -> str:
    """A token's text as decoded alone, anything unprintable escaped; without a tokenizer, its id."""
    if tokenizer is None:
        return f"<{token}>"
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:  # part of a character: as the vocabulary writes it
        text = f"<{tokenizer.convert_ids_to_tokens(token)}>"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# As text


def show_sequence(recipe: Recipe, number: int, with_elements: bool = False) -> str:
    """A sequence's tokens; `with_elements`, also what its elements read and predict. ValueError: see `load_sequence`."""
    sequence, tokenizer, mask_token_id, lines = load_sequence(recipe, number)
    name = partial(token_name, tokenizer)
    lines.append(show_tokens(sequence, name))
    if with_elements:
        collator = make_collator(with_segments(recipe, 1), recipe.train.seed)  # segments change no element
        lines.append(f"--- elements drawn in epoch 0, of {recipe.cod.num_depths} depths ---")
        elements = list_elements(sequence, collator, mask_token_id, name)
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
        assert depth == 0 or token == mask_token_id
        reads = (MASK, "mask_hidden") if depth else (f"'{name(token)}'", at(anchor))
        is_inside = documents[label + 1 : label + 2] == [documents[label]]
        predicts = f"'{name(ids[label + 1])}'" if is_inside else PAST_END
        rows.append((anchor, depth, position_id, *reads, predicts, at(label), "yes" if is_learned else "no"))
    return sorted(rows)


# As a picture


def visible_elements(batch: dict[str, Tensor], window: int | None = None) -> tuple[Elements, Tensor, Tensor]:
    """Of a batch of one sequence: elements, their segments int64 [N], and who sees whom, bool [N, N] (queries, keys)."""
    num_depths = batch["supervised_per_depth"].shape[1]
    real = (batch["depth"][0] >= 0).nonzero().flatten()
    if not 0 < real.numel() <= MAX_ELEMENTS:
        what = f"the sequence has {real.numel()} elements; a picture shows 1 to {MAX_ELEMENTS}"
        raise ValueError(f"{what}: change data.max_length, as in data.max_length=64")
    flat = {**batch, **{name: batch[name][:, real] for name in ("anchor", "depth", "supervised", "segment_ids")}}
    elements = gather_elements(flat, slice(None), 0, window)
    # no order is assumed: any slot may hold a depth-0 element or a deeper one
    visible_NN = visibility_of(elements, num_depths, M=real.numel(), first_rollout=0).dense()[0]
    return elements, flat["segment_ids"][0], visible_NN


def write_picture(recipe: Recipe, number: int, out: Path) -> str:
    """Draw what each segment of a training sequence's flat batch runs and reads; returns the picture's title. ValueError:
    matplotlib is missing, cod.num_segments is auto, or see `load_sequence` and `visible_elements`.
    """
    plt = load_matplotlib()  # its absence is reported before anything is read
    if recipe.cod.num_segments == "auto":
        raise ValueError("cod.num_segments is auto: give the number, as in cod.num_segments=4")
    collator, window = make_collator(recipe, recipe.train.seed), recipe.draft.window
    sequence, tokenizer, _, (*_, title) = load_sequence(recipe, number)
    num_depths, tokens = collator.num_depths, sequence["input_ids"].numel()
    title += f"; K = {num_depths}, S = {collator.num_segments}{f', window {window}' if window else ''}"
    batch = collator([sequence])
    elements, segment_N, visible_NN = visible_elements(batch, window)
    documents, anchor_N, depth_N = batch["document_ids"][0], elements.anchor[0], elements.depth[0]
    of_depth = plt.colormaps["viridis"](torch.linspace(0.02, 0.88, num_depths).numpy())
    colours = [
        of_depth[depth] if depth else DOCUMENTS[document % len(DOCUMENTS)]
        for depth, document in zip(depth_N.tolist(), documents[anchor_N].tolist())
    ]
    used = sorted(set(segment_N.tolist()))
    figure, grid = plt.subplots(len(used), figsize=(12.6, 6.6), layout="constrained", squeeze=False)
    figure.suptitle(f"{title}\n", x=0.01, ha="left")
    starts = (documents[1:tokens] != documents[: tokens - 1]).nonzero().flatten() + 1
    for axes, s in zip(grid.flat, used):
        own_N = segment_N == s
        drawn = (own_N | visible_NN[own_N].any(0)).nonzero().flatten().tolist()
        bottoms = (depth_N[drawn] - 0.42).tolist()
        shades = [colours[n] if own_N[n] else GREY for n in drawn]
        axes.bar((anchor_N + depth_N)[drawn].tolist(), height=0.84, width=0.9, bottom=bottoms, color=shades)
        for start in starts.tolist():
            axes.axvline(start - 0.5, color=DARK, linewidth=0.8, linestyle="--")
        axes.set(xlim=(-0.6, tokens - 0.4), ylim=(-0.6, num_depths - 0.4), xticks=[], yticks=range(num_depths))
        axes.set(ylabel=f"segment {s}\ndepth" if len(used) <= 8 else str(s))
        axes.grid(False)
    grid[0, 0].set_title("What each segment runs (colours) and reads (grey)")
    axes.set_xlabel("position: anchor + depth (bold: learned tokens)")
    if tokens <= LABELLED:
        words = [token_name(tokenizer, token)[:10] for token in sequence["input_ids"].tolist()]
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
