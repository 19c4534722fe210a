"""What training sees: a sequence in readable tokens, what each of its elements reads, and its flat batch as a picture.

Sequences come from `load_training_data`, elements from the collator and `gather_elements`, as in training.
N: elements of a sequence.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.config import Recipe, with_segments
from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import Elements, gather_elements
from peagle_train.core.passes import visibility_of
from peagle_train.data.training_data import load_training_data, make_collator
from peagle_train.data.vocab import choose_mask_token, load_tokenizer, target_vocab_size
from peagle_train.files import aligned, write_bytes
from peagle_train.report import load_matplotlib, png_of
from peagle_train.training.evaluate import EVAL_SEED

MASK, PAST_END = "<mask>", "(past the end)"
HEADER = ("anchor", "depth", "position id", "token", "features at", "predicts", "the target's label at", "learned")
MAX_ELEMENTS, LABELLED = 4096, 72  # more than a picture can show; up to this many elements or positions have labels
DOCUMENTS, GREY, DARK = ("#a9c9ea", "#f6c592", "#b5dcae", "#d9b8e3"), "#c9ced4", "#20262d"
EXAMPLE = (
    ("sky blue ?", "air scatters blue light far more than red light ."),
    ("2 + 2 ?", "the sum of two and two is four ."),
)
"""(question, answer) of two documents, a word a token."""


def load_sequence(recipe: Recipe, number: int, is_held_out: bool = False) -> tuple[dict[str, Any], Any, int, list[str]]:
    """Sequence `number` of a recipe's training or held-out data, the tokenizer, the mask token, and lines about the data.
    ValueError: no such sequence, or the recipe's data cannot be loaded.
    """
    vocab_size, lines = target_vocab_size(recipe), list[str]()
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.trust_remote_code)
    mask_token_id = choose_mask_token(recipe.draft, recipe.data, tokenizer, vocab_size)
    data = load_training_data(recipe, tokenizer, vocab_size, mask_token_id, lines.append)
    rows, which = (data.eval_rows, "held-out") if is_held_out else (data.train_rows, "training")
    if not 0 <= number < len(rows):
        allowed = f"; give 0 to {len(rows) - 1}" if len(rows) else ""
        raise ValueError(f"--row {number}: there are {len(rows)} {which} sequences{allowed}")
    sequence = rows[0, number]
    tokens, learned = sequence["input_ids"].numel(), int(sequence["loss_mask"].sum())
    title = f"sequence {number} of {len(rows)} {which} sequences: {tokens} tokens, {learned} of them learned, "
    lines.append(f"{title}{sequence['document_ids'].unique().numel()} documents")
    return sequence, tokenizer, mask_token_id, lines


def _collator(recipe: Recipe, is_held_out: bool = False) -> CODCollator:
    if recipe.cod.num_segments == "auto":
        raise ValueError("cod.num_segments is auto: give the number, as in cod.num_segments=4")
    return make_collator(recipe, EVAL_SEED if is_held_out else recipe.train.seed)


def token_names(tokenizer: Any) -> Callable[[int], str]:
    """Text of token ids as decoded alone, anything unprintable escaped; without a tokenizer, the ids."""

    @cache
    def name(token: int) -> str:
        if tokenizer is None:
            return f"<{token}>"
        # Some decoders drop the space at the start of all text: the second of two has its own.
        once, twice = (
            str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for ids in ([token], [token, token])
        )
        text = twice[len(once) :] if twice.startswith(once) else once
        if not text or "\ufffd" in text:  # part of a character: as the vocabulary writes it
            text = f"<{tokenizer.convert_ids_to_tokens(token)}>"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

    return name


# As text


def show_sequence(
    recipe: Recipe, number: int, is_held_out: bool = False, with_elements: bool = False, anchors: Sequence[int] = ()
) -> str:
    """A sequence's tokens; `with_elements` or `anchors`, also what the elements of these anchors (default: the first few)
    read and predict. ValueError: no such sequence or anchor, or the recipe's data cannot be loaded.
    """
    sequence, tokenizer, mask_token_id, lines = load_sequence(recipe, number, is_held_out)
    name, length = token_names(tokenizer), sequence["input_ids"].numel()
    lines.append(show_tokens(sequence, name))
    if with_elements or anchors:
        if not all(0 <= anchor < length for anchor in anchors):
            raise ValueError(f"--anchors {list(anchors)}: the sequence has positions 0 to {length - 1}")
        whole = with_segments(recipe, 1)  # segments change no element
        elements = list_elements(sequence, _collator(whole, is_held_out), mask_token_id, name)
        chosen = anchors or sorted({anchor for anchor, depth, *_ in elements if depth})[:6]
        lines.append(f"--- elements drawn in epoch 0, of {recipe.cod.num_depths} depths ---")
        table = [HEADER, *([str(cell) for cell in row] for row in elements if row[0] in chosen)]
        lines.append(aligned(table))
    return "\n".join(lines)


def show_tokens(sequence: dict[str, Tensor], name: Callable[[int], str]) -> str:
    """The tokens by document; learned ones in [brackets]."""
    ids, mask, documents = (sequence[key].tolist() for key in ("input_ids", "loss_mask", "document_ids"))
    lines: list[str] = []
    for document, group in groupby(range(len(ids)), key=documents.__getitem__):
        positions = list(group)
        learned = sum(mask[i] for i in positions)
        where = f"positions {positions[0]} to {positions[-1]}"
        lines.append(f"--- document {document}: {where}, {learned} tokens learned ---")
        marked = ((name(ids[i]), mask[i]) for i in positions)
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


def write_picture(recipe: Recipe | None, number: int, out: Path) -> str:
    """Draw the flat batch of a recipe's training sequence, or of the example; returns its title. ValueError: matplotlib is
    missing, cod.num_segments is auto, or no such sequence.
    """
    load_matplotlib()  # its absence is reported before anything is read
    if recipe is None:
        sequence, words = example_sequence()
        collator = CODCollator(len(words), num_depths=4, down_sample_ratio=0.8, num_segments=3, seed=1)
        title = f"the example: {len(words)} tokens, {len(EXAMPLE)} documents"
    else:
        collator = _collator(recipe)
        sequence, tokenizer, _, (*_, title) = load_sequence(recipe, number)
        words = list(map(token_names(tokenizer), sequence["input_ids"].tolist()))
    title += f"; K = {collator.num_depths}, S = {collator.num_segments}"
    window = recipe.draft.window if recipe else None
    if window:
        title += f", window {window}"
    figure = draw_batch(collator([sequence]), collator.num_depths, words, list(sequence["loss_mask"]), title, window)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, png_of(figure))
    return title


def example_sequence() -> tuple[dict[str, Any], list[str]]:
    """A sequence for the collator, and its tokens as words."""
    words, mask, documents = [], [], []
    for number, texts in enumerate(EXAMPLE):
        for is_answer, text in enumerate(texts):
            tokens = text.split()
            words += tokens
            mask += [is_answer] * len(tokens)
            documents += [number] * len(tokens)
    return {"input_ids": range(len(words)), "loss_mask": mask, "document_ids": documents, "row_key": 0}, words


def visible_elements(
    batch: dict[str, Tensor], num_depths: int, window: int | None = None
) -> tuple[Elements, Tensor, Tensor]:
    """Of a batch of one sequence: elements, their segments int64 [N], and who sees whom, bool [N, N] (queries, keys)."""
    real = (batch["depth"][0] >= 0).nonzero().flatten()
    if not 0 < real.numel() <= MAX_ELEMENTS:
        what = f"the sequence has {real.numel()} elements; a picture shows 1 to {MAX_ELEMENTS}"
        raise ValueError(f"{what}: change data.max_length, as in data.max_length=64")
    flat = {**batch, **{name: batch[name][:, real] for name in ("anchor", "depth", "supervised", "segment_ids")}}
    elements = gather_elements(flat, slice(None), 0, window)
    # no order is assumed: any slot may hold a depth-0 element or a deeper one
    visible_NN = visibility_of(elements, num_depths, M=real.numel(), first_rollout=0).dense()[0]
    return elements, flat["segment_ids"][0], visible_NN


def draw_batch(
    batch: dict[str, Tensor],
    num_depths: int,
    words: Sequence[str],
    is_taught: Sequence[int],
    title: str,
    window: int | None = None,
) -> Any:
    """A matplotlib figure: who sees whom on the left, what each segment runs and reads on the right.

    batch: CODCollator's, of one sequence. words: its tokens. is_taught: its loss mask.
    """
    plt = load_matplotlib()
    from matplotlib.colors import to_rgb

    elements, segment_N, visible_NN = visible_elements(batch, num_depths, window)
    documents, anchor_N, depth_N = batch["document_ids"][0], elements.anchor[0], elements.depth[0]
    of_depth = plt.colormaps["viridis"](torch.linspace(0.02, 0.88, num_depths).numpy())
    colours = [
        to_rgb(of_depth[depth] if depth else DOCUMENTS[document % len(DOCUMENTS)])
        for depth, document in zip(depth_N.tolist(), documents[anchor_N].tolist())
    ]
    used, N = sorted(set(segment_N.tolist())), len(colours)
    figure = plt.figure(figsize=(12.6, 6.6), layout="constrained")
    figure.suptitle(f"{title}\n", x=0.01, ha="left")
    left, right = figure.add_gridspec(1, 2, width_ratios=[1.0, 1.12])

    axes = figure.add_subplot(left)
    image = torch.where(visible_NN[:, :, None], torch.tensor(colours)[None].expand(N, N, 3), torch.ones(3))
    axes.imshow(image.numpy(), interpolation="nearest", extent=(0, N, N, 0))
    axes.set(title="Who sees whom", ylabel="queries: anchor + depth", xlabel="keys: anchor + depth")
    axes.set(xticks=[], yticks=[])
    for edge in ((segment_N[1:] != segment_N[:-1]).nonzero().flatten() + 1).tolist():
        axes.axhline(edge, color=DARK, linewidth=1.1)
        axes.axvline(edge, color=DARK, linewidth=1.1)
    if N <= LABELLED:
        labels, middles = [f"{a}+{d}" for a, d in zip(anchor_N.tolist(), depth_N.tolist())], [i + 0.5 for i in range(N)]
        axes.set_yticks(middles, labels, fontsize=6)
        axes.set_xticks(middles, labels, fontsize=6, rotation=90)

    below = right.subgridspec(len(used), 1)
    tokens = int((documents >= 0).sum())
    starts = (documents[1:tokens] != documents[: tokens - 1]).nonzero().flatten() + 1
    for i, s in enumerate(used):
        axes, own_N = figure.add_subplot(below[i]), segment_N == s
        drawn = (own_N | visible_NN[own_N].any(0)).nonzero().flatten().tolist()
        bottoms = (depth_N[drawn] - 0.42).tolist()
        shades = [colours[n] if own_N[n] else GREY for n in drawn]
        axes.bar((anchor_N + depth_N)[drawn].tolist(), height=0.84, width=0.9, bottom=bottoms, color=shades)
        for start in starts.tolist():
            axes.axvline(start - 0.5, color=DARK, linewidth=0.8, linestyle="--")
        axes.set(xlim=(-0.6, tokens - 0.4), ylim=(-0.6, num_depths - 0.4), xticks=[], yticks=range(num_depths))
        axes.set(ylabel=f"segment {s}\ndepth" if len(used) <= 8 else str(s))
        if i == 0:
            axes.set_title("What each segment runs (colours) and reads (grey)")
    axes.set_xlabel("position: anchor + depth (bold: learned tokens)")
    if tokens <= LABELLED:
        axes.set_xticks(range(tokens), [word[:10] for word in words], rotation=90, fontsize=8)
        for label, taught in zip(axes.get_xticklabels(), is_taught):
            label.set_fontweight("bold" if taught else "normal")
    for axes in figure.axes:
        axes.grid(False)
    names = ["depth 0 (by document)", *(f"depth {d}" for d in range(1, num_depths)), "another segment's, read"]
    shades = [DOCUMENTS[0], *of_depth[1:], GREY]
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades]
    figure.legend(handles, names, loc="outside lower center", ncols=8)
    return figure
