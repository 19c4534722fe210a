"""A row as training sees it, in readable tokens: what is learned, where documents end, what each element reads.

Nothing here decides anything: rows come from `load_training_data`, elements from the collator and from `gather_elements`,
which are what training uses.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import gather_elements
from peagle_train.recipe import Recipe

_LEARNED = ("\x1b[30;42m", "\x1b[30;102m")
"""Black on two greens in turn, so that the borders of tokens can be seen."""
_RESET = "\x1b[0m"
MASK, BEHIND_END = "<mask>", "(behind the end)"


class ShownElement(NamedTuple):
    """One element in readable tokens; its columns are those of the row."""

    anchor: int
    depth: int
    position: int
    reads: str
    """The token that it reads."""
    feature: int | None
    """Column whose features it reads; None: mask_hidden."""
    label: int
    """Column whose distribution of the target it is to match."""
    predicts: str
    """The token that stands behind that column in the document."""
    is_learned: bool


class TokenNames:
    """Readable text of token ids: as decoded alone, leading space included, with everything unprintable escaped."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` may be None: ids are then shown as numbers."""
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._names:
            self._names[token] = self._name(token)
        return self._names[token]

    def _name(self, token: int) -> str:
        if self._tokenizer is None:
            return f"<{token}>"

        def decode(ids: list[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        # Some decoders drop the space at the start of all text: the second of two has its own.
        once, twice = decode([token]), decode([token, token])
        text = twice[len(once) :] if twice.startswith(once) else once
        if not text or "\ufffd" in text:  # part of a character: as the vocabulary writes it
            text = f"<{self._tokenizer.convert_ids_to_tokens(token)}>"
        return escape(text)


def escape(text: str) -> str:
    """The text on one line, without anything that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def show_tokens(row: dict[str, Tensor], names: TokenNames, is_colored: bool) -> str:
    """The tokens of a row by document; learned ones on green, or in [brackets] without colour."""
    lines: list[str] = []
    ids, mask, documents = (row[name].tolist() for name in ("input_ids", "loss_mask", "document_ids"))
    for document, group in groupby(range(len(ids)), key=documents.__getitem__):
        columns = list(group)
        learned = sum(mask[column] for column in columns)
        title = f"--- document {document}: columns {columns[0]} to {columns[-1]}, {learned} tokens learned from ---"
        lines += [f"\x1b[1m{title}{_RESET}" if is_colored else title, ""]
        for column in columns:
            name = names[ids[column]]
            if mask[column]:
                name = f"{_LEARNED[column % 2]}{name}{_RESET}" if is_colored else f"[{name}]"
            lines[-1] += name
            if names[ids[column]].endswith("\\n"):
                lines.append("")
    return "\n".join(line for line in lines if line)


def list_elements(
    row: dict[str, Any], collator: CODCollator, mask_token_id: int, names: TokenNames, anchors: Iterable[int]
) -> list[ShownElement]:
    """The elements of these anchors that training draws for the row, by anchor and depth."""
    batch = collator([row])
    elements = gather_elements(batch, slice(0, batch["depth"].shape[1]), mask_token_id)
    documents, ids = batch["document_ids"][0].tolist(), batch["input_ids"][0].tolist()
    wanted = set(anchors)
    shown = []
    for anchor, depth, token, position, _, label, is_learned in zip(*(values[0].tolist() for values in elements)):
        if depth < 0 or anchor not in wanted:
            continue
        is_inside = label + 1 < len(documents) and documents[label + 1] == documents[label]
        shown.append(
            ShownElement(
                anchor=anchor,
                depth=depth,
                position=position,
                reads=names[token] if depth == 0 else MASK,
                feature=anchor if depth == 0 else None,
                label=label,
                predicts=names[ids[label + 1]] if is_inside else BEHIND_END,
                is_learned=is_learned,
            )
        )
        assert depth == 0 or token == mask_token_id
    return sorted(shown)


def show_elements(elements: Sequence[ShownElement], row: dict[str, Tensor], names: TokenNames) -> str:
    """A table of elements."""
    ids = row["input_ids"].tolist()
    table = [
        ("anchor", "depth", "position", "reads token", "and features", "predicts", "from the target at", "learned")
    ]
    for e in elements:
        feature = "mask_hidden" if e.feature is None else f"of column {e.feature} '{names[ids[e.feature]]}'"
        predicts = e.predicts if e.predicts == BEHIND_END else f"'{e.predicts}'"
        target = f"column {e.label} '{names[ids[e.label]]}'"
        reads = e.reads if e.depth else f"'{e.reads}'"
        learned = "yes" if e.is_learned else "no"
        table.append((str(e.anchor), str(e.depth), str(e.position), reads, feature, predicts, target, learned))
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def default_anchors(row: dict[str, Any], collator: CODCollator, at_most: int = 6) -> list[int]:
    """The first anchors of the row that training drafts from."""
    batch = collator([row])
    return sorted(set(batch["anchor"][batch["depth"] > 0].tolist()))[:at_most]


def show_row(
    recipe: Recipe,
    number: int,
    *,
    epoch: int = 0,
    is_held_out: bool = False,
    with_elements: bool = False,
    anchors: Sequence[int] = (),
    is_colored: bool = False,
) -> str:
    """Row `number` of a recipe's training rows, or of its held-out ones, as text.

    Raises:
        ValueError: no such row or anchor, and whatever `load_training_data` finds wrong.
    """
    from peagle_train.data.training_data import load_training_data
    from peagle_train.training.build import choose_mask_token, load_tokenizer, make_collator, target_vocab_size
    from peagle_train.training.evaluate import EVAL_SEED

    tokenizer = load_tokenizer(recipe)
    vocab_size = target_vocab_size(recipe)
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, vocab_size)
    report: list[str] = []
    data = load_training_data(recipe, tokenizer, vocab_size, mask_token_id, report.append)
    rows, which = (data.eval_rows, "held-out rows") if is_held_out else (data.train_rows, "training rows")
    if not 0 <= number < len(rows):
        allowed = f"; give 0 to {len(rows) - 1}" if len(rows) else ""
        raise ValueError(f"--row {number}: there are {len(rows)} {which}{allowed}")
    row = rows[epoch, number]
    length, supervised = row["input_ids"].numel(), int(row["loss_mask"].sum())
    documents = row["document_ids"].unique().numel()
    names = TokenNames(tokenizer)
    lines = [
        *report,
        f"row {number} of {len(rows)} {which}: {length} tokens, {supervised} of them learned from, {documents} documents",
        show_tokens(row, names, is_colored),
    ]
    if with_elements:
        collator = make_collator(recipe, EVAL_SEED if is_held_out else recipe.train.seed)
        wrong = next((anchor for anchor in anchors if not 0 <= anchor < length), None)
        if wrong is not None:
            raise ValueError(f"--anchors {wrong}: the row has columns 0 to {length - 1}")
        chosen = anchors or default_anchors(row, collator)
        elements = list_elements(row, collator, mask_token_id, names, chosen)
        lines += [
            f"--- elements of anchors {', '.join(map(str, chosen))} as drawn in epoch {epoch} (of"
            f" {recipe.cod.num_depths} depths; those that are missing are not drawn) ---",
            show_elements(elements, row, names),
        ]
    return "\n".join(lines)
