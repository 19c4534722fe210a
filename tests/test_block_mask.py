"""The BlockMask that is counted from the layout is the one that create_block_mask finds by trying every pair."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import gather_elements
from peagle_train.core.flex import BLOCK_SIZE, block_mask_of, block_tables, flex_tables, visible_pairs
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import relay_step
from peagle_train.core.visibility import Visibility, first_seen
from tests.helpers import make_batch, make_draft, make_rows, make_target

# ---- the obvious answers


def counted_pairs(visibility: Visibility, skip: int, block_size: int) -> Tensor:
    """[B, X, Y] by adding up the dense mask."""
    dense = visibility.dense()[:, skip:]
    B, Q, K = dense.shape
    X, Y = -(-Q // block_size), -(-K // block_size)
    padded = torch.nn.functional.pad(dense, (0, Y * block_size - K, 0, X * block_size - Q))
    return padded.view(B, X, block_size, Y, block_size).sum((2, 4))


def evaluated_block_mask(visibility: Visibility, skip: int, block_size: int) -> BlockMask:
    B, N = visibility.anchor.shape
    Q, K = N - skip, visibility.num_context + N
    mask_mod = block_mask_of(visibility, skip).mask_mod
    return create_block_mask(mask_mod, B, None, Q, K, device="cpu", BLOCK_SIZE=(block_size, block_size))


TABLES = ("kv", "full_kv", "q", "full_q")


def lists_of(mask: BlockMask, name: str) -> list[list[list[int]]]:
    """Table `name` as one list of blocks for each row of the batch and each row of blocks."""
    counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == indices.shape[:3] and counts.shape[1] == 1
    assert indices.is_contiguous() and counts.is_contiguous()
    # A kernel may fetch one index too many, so what lies after the count must still be a block.
    assert ((indices >= 0) & (indices < indices.shape[-1])).all()
    rows = zip(counts[:, 0], indices[:, 0], strict=True)
    return [[i[:c].tolist() for c, i in zip(cs.tolist(), ins, strict=True)] for cs, ins in rows]


def assert_same_blocks(found: BlockMask, expected: BlockMask) -> None:
    for name in TABLES:
        assert lists_of(found, name) == lists_of(expected, name), name
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert found.shape == expected.shape
    assert found.seq_lengths == expected.seq_lengths
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE


def check(visibility: Visibility, skip: int = 0, block_size: int = BLOCK_SIZE) -> BlockMask:
    pairs = visible_pairs(visibility, skip, block_size)
    assert pairs.dtype == torch.int32
    assert torch.equal(pairs.long(), counted_pairs(visibility, skip, block_size))
    expected = evaluated_block_mask(visibility, skip, block_size)
    tables = block_tables(visibility, skip, block_size)
    found = BlockMask(expected.seq_lengths, *tables, BLOCK_SIZE=(block_size, block_size), mask_mod=expected.mask_mod)
    assert_same_blocks(found, expected)
    return found


# ---- layouts


def layout_of_row(rng: random.Random, K: int, context_as_slots: bool) -> tuple[list[tuple[int, int, int]], int]:
    """One row's (start, anchor, depth) slots and its context_end: packed documents, cut into what lies before a segment,
    the segment, and what lies after it."""
    starts: list[int] = []
    for _ in range(rng.randint(1, 4)):
        starts += [len(starts)] * rng.randint(1, 12)
    L = len(starts)
    rows = [p for p in range(L - 1) if starts[p] == starts[p + 1]]
    first = rng.choice([0, rng.randint(0, L)])
    last = rng.choice([L, rng.randint(first, L)])

    def junk() -> tuple[int, int, int]:
        return rng.randint(0, L), rng.randint(0, L), -1

    slots = []
    if context_as_slots:  # Algorithm 1 runs the columns before the segment again
        slots += [(starts[p], p, 0 if p in rows else -1) for p in range(first)]
        slots += [junk() for _ in range(rng.randint(0, 3))]
    keeps_holes = rng.random() < 0.3
    for p in range(first, last):
        if p in rows:
            slots.append((starts[p], p, 0))
        elif keeps_holes:
            slots.append((starts[p], p, -1))
    if rng.random() < 0.3:  # static shapes: rollouts begin at a fixed slot
        slots += [junk() for _ in range(rng.randint(0, 5))]
    for p in rows:
        if first <= p + 1 < last:  # a rollout follows its depth-1 element
            slots += [(starts[p], p, d) for d in range(1, rng.choice([1, rng.randint(1, K), K]))]
    slots += [junk() for _ in range(rng.choice([0, 0, rng.randint(0, 9)]))]
    return slots, 0 if context_as_slots else first


def build(
    rows: list[tuple[list[tuple[int, int, int]], int]], K: int, rng: random.Random, window: int | None = None
) -> Visibility:
    """Pad the rows to one length; M, P and the others are as tight as they can be, or not."""
    N = max(1, *(len(slots) for slots, _ in rows))
    table = torch.tensor([slots + [(0, 0, -1)] * (N - len(slots)) for slots, _ in rows])
    start, anchor, depth = (table[:, :, i].contiguous() for i in range(3))
    columns = torch.arange(N)
    num_depth0 = int(torch.where(depth == 0, columns + 1, 0).max())
    first_rollout = int(torch.where(depth > 0, columns, N).min())
    context_end = torch.tensor([end for _, end in rows])
    return Visibility(
        first_seen(start, anchor, depth, window),
        anchor,
        depth,
        context_end,
        num_context=int(context_end.max()) + rng.choice([0, 0, rng.randint(0, 9)]),
        num_depth0=rng.choice([num_depth0, rng.randint(num_depth0, N)]),
        first_rollout=rng.choice([first_rollout, rng.randint(0, first_rollout)]),
        num_depths=K + rng.choice([0, 0, 3]),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Visibility:
    rng = draw(st.randoms(use_true_random=False))
    K, B, context_as_slots = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.booleans())
    window = draw(st.none() | st.integers(K, 40))
    return build([layout_of_row(rng, K, context_as_slots) for _ in range(B)], K, rng, window)


def flat(lengths: list[int], pad: int = 0, rows: int = 1, elements: int | None = None) -> Visibility:
    """The collator's batch of packed documents in one segment, or its first `elements` slots."""
    K = 8
    collator = CODCollator(max(sum(lengths) + pad, K), num_depths=K)
    documents, masks = [list(range(n)) for n in lengths], [[1] * n for n in lengths]
    batch = collator([{"input_ids": documents, "loss_mask": masks, "epoch": b} for b in range(rows)])
    own = gather_elements(batch, slice(0, elements or collator.capacity), 0)
    M = int((own.depth == 0).sum(1).max())
    tables = (t.clone(memory_format=torch.contiguous_format) for t in (own.start, own.anchor, own.depth))
    return Visibility(*tables, torch.zeros(rows, dtype=torch.int64), 0, M, M, K)


# ---- it is the same


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64]), st.floats(0, 1))
def test_every_table_is_create_block_masks_whatever_the_layout(visibility, block_size, share):
    N = visibility.anchor.shape[1]
    check(visibility, 0, block_size)
    check(visibility, int(share * (N - 1)), block_size)


@pytest.mark.parametrize("elements", [1, 2, 127, 128, 129, 257, 509])
def test_lengths_at_and_around_the_block_agree(elements):
    mask = check(flat([61, 2, 97], elements=elements))
    assert mask.seq_lengths == (elements, elements) and mask.shape == (1, 1, elements, elements)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 1, 2], [129, 1], [40, 300, 7, 53]])
def test_packed_documents_of_awkward_lengths_agree_in_several_rows_and_with_queries_left_out(lengths):
    visibility = flat(lengths, pad=5, rows=2)
    for skip in {0, 1, 128, 129} & {*range(visibility.anchor.shape[1])}:
        check(visibility, skip)


# ---- the shapes of the passes


@pytest.mark.parametrize(
    ("step", "S", "window"),
    [(recompute_step, 1, 5), (recompute_step, 3, None), (relay_step, 3, 20), (relay_step, 7, 5)],
)
def test_every_pass_of_a_step_agrees(step, S, window):
    """Flat, Algorithm 1 and relay, both passes: [segment x (context + segment)], with rows that start and end apart."""
    rows = make_rows(61, documents=3, batch_size=3, prompt=0.3, padding=7)
    batch = make_batch(rows, 61, S)
    draft, recorded = make_draft(num_hidden_layers=1, sliding_window=window), list[Visibility]()
    draft.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments[3]))
    step(draft, batch, make_target(batch), backward=None)
    assert len(recorded) >= min(S, 2)
    assert S == 1 or any(v.num_context if step is relay_step else v.cut for v in recorded)
    for visibility in recorded:
        for block_size in (8, BLOCK_SIZE):
            check(visibility, 0, block_size)
            if visibility.cut:
                check(visibility, visibility.cut, block_size)


def test_block_mask_of_leaves_skipped_queries_out_and_makes_nothing_that_a_pass_has_already():
    visibility = flat([90, 80])
    assert_same_blocks(block_mask_of(visibility, 7), evaluated_block_mask(visibility, 7, BLOCK_SIZE))
    assert block_mask_of(visibility, 7).seq_lengths == (visibility.anchor.shape[1] - 7, visibility.anchor.shape[1])
    visibility.flex = {7: flex_tables(visibility, 7)}
    assert block_mask_of(visibility, 7).kv_indices is visibility.flex[7].blocks[1]


# ---- answers by hand


def depth0_only(n: int, **changes: Any) -> Visibility:
    column = torch.arange(n)[None]
    settings = {"num_context": 0, "num_depth0": n, "first_rollout": n, "num_depths": 8, **changes}
    zero = torch.zeros_like(column)
    return Visibility(zero, column, settings.pop("depth", zero), torch.zeros(1, dtype=torch.int64), **settings)


def test_one_document_of_depth_0_is_a_causal_triangle_whose_inner_blocks_are_full_but_one_that_the_end_cuts_off():
    mask = check(depth0_only(4 * BLOCK_SIZE))
    assert lists_of(mask, "kv") == lists_of(mask, "q") == [[[0], [1], [2], [3]]]
    assert lists_of(mask, "full_kv") == [[[], [0], [0, 1], [0, 1, 2]]]
    assert lists_of(mask, "full_q") == [[[1, 2, 3], [2, 3], [3], []]]
    mask = check(depth0_only(3 * BLOCK_SIZE - 1))
    assert lists_of(mask, "full_kv") == [[[], [0], []]] and lists_of(mask, "kv") == [[[0], [1], [0, 1, 2]]]


def test_queries_that_see_nothing_have_no_blocks_and_context_that_a_row_lacks_is_seen_by_nobody():
    mask = check(depth0_only(300, depth=torch.full((1, 300), -1)))
    assert all(lists_of(mask, name) == [[[]] * 3] for name in TABLES)
    visibility = depth0_only(40, num_context=500)
    check(visibility)
    assert visible_pairs(visibility)[0, 0, :3].sum() == 0


# ---- on devices


def test_nothing_reads_a_value():
    """On the meta device there are no values to read, so a wait for the device would be an error."""
    start, anchor, depth = torch.zeros(3, 2, 600, dtype=torch.int64, device="meta")
    context_end = torch.zeros(2, dtype=torch.int64, device="meta")
    shapes = [t.shape for t in block_tables(Visibility(start, anchor, depth, context_end, 200, 600, 0, 8), 3)]
    assert shapes == [(2, 1, 5), (2, 1, 5, 7)] * 2 + [(2, 1, 7), (2, 1, 7, 5)] * 2


@pytest.mark.gpu
def test_on_a_gpu_the_tables_are_the_same_and_nothing_waits_for_it():
    visibility = flat([300, 500], rows=2)
    expected = flex_tables(visibility)
    for name in ("start", "anchor", "depth", "context_end"):
        setattr(visibility, name, getattr(visibility, name).cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = flex_tables(visibility)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for f, e in zip((*found.rule, *found.blocks), (*expected.rule, *expected.blocks), strict=True):
        assert torch.equal(f.cpu(), e)
