"""The alignment contract, stated once: what an element (anchor a, depth d) reads and predicts.

|             | depth 0     | depth d >= 1                                  |
| token       | x_{a+1}     | the mask token                                |
| features    | h_a         | `mask_hidden`                                 |
| position id | column a's  | column a's + d                                |
| label       | y_{a+1}     | y_{a+d+1}, the distribution over x_{a+d+2}    |

`input_ids` and the target's outputs are unshifted; the shift by one happens here and nowhere else. B: rows, L: columns,
N: elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peagle_train.core.cod import drafter_rows
from peagle_train.core.visibility import first_seen


class Elements(NamedTuple):
    """N elements of each of B rows; int64 [B, N] but `supervised`, bool [B, N]. Padding has depth -1."""

    anchor: Tensor
    depth: Tensor
    token: Tensor
    position: Tensor
    start: Tensor
    """First column that the element sees: its document's, or the window's."""
    label: Tensor
    """Column whose last hidden state of the target gives the label: anchor + depth + 1."""
    supervised: Tensor


def gather_elements(
    batch: dict[str, Tensor], columns: slice, mask_token_id: int, window: int | None = None
) -> Elements:
    """The elements in `columns` of the flat batch (a segment is a slice of it)."""
    anchor, depth, supervised = (batch[name][:, columns] for name in ("anchor", "depth", "supervised"))
    return make_elements(batch, anchor, depth, supervised, mask_token_id, window)


def context_elements(batch: dict[str, Tensor], column: Tensor, window: int | None = None) -> Elements:
    """The depth-0 elements of columns, int64 [B, N], unsupervised; a column that is no drafter row is padding."""
    is_row = drafter_rows(batch["document_ids"]).gather(1, column)
    return make_elements(batch, column, torch.where(is_row, 0, -1), torch.zeros_like(is_row), 0, window)


def positions_read(is_supervised: Tensor, document_ids: Tensor, reach: int | None) -> tuple[Tensor, Tensor]:
    """Columns whose features, and those whose last hidden states training reads, whatever is drawn; bool [..., L] both.

    Deeper elements see nothing that the depth-0 element at their position does not see, and have its label.

    Args:
        is_supervised: bool [..., L], see `supervised_rows`. document_ids: int64 [..., L].
        reach: how many columns back an element sees through all layers, D * (N - 1) with a window of N; None: all.
    """
    L = document_ids.shape[-1]
    column = torch.arange(L)
    reader = torch.where(is_supervised, column, L).flip(-1).cummin(-1).values.flip(-1)  # the next supervised row
    is_read = (reader < L) & (document_ids.gather(-1, reader.clamp(max=L - 1)) == document_ids)
    if reach is not None:
        is_read &= reader - column <= reach
    return is_read, is_supervised.roll(1, -1)  # the last column is no row


def make_elements(
    batch: dict[str, Tensor],
    anchor: Tensor,
    depth: Tensor,
    supervised: Tensor,
    mask_token_id: int,
    window: int | None = None,
) -> Elements:
    """Look the contract's columns up for given anchors and depths, int64 [B, N]; `window`: see `first_seen`."""
    last = batch["input_ids"].shape[1] - 1
    real_token = batch["input_ids"].gather(1, (anchor + 1).clamp(max=last))
    base = batch["position_ids"].gather(1, anchor)
    return Elements(
        anchor=anchor,
        depth=depth,
        token=torch.where(depth == 0, real_token, mask_token_id),
        position=base + depth.clamp(min=0),
        start=first_seen(anchor - base, anchor, depth, window),
        label=(anchor + depth + 1).clamp(0, last),
        supervised=supervised,
    )
