"""The BlockMask that is counted from the layout is the one that create_block_mask finds by trying every pair."""

import os
import random
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from peagle_train.core.block_mask import BLOCK_SIZE, block_tables, visible_pairs
from peagle_train.core.collator import CODCollator
from peagle_train.core.elements import gather_elements
from peagle_train.core.flex import FlexTables, block_mask_of, flex_tables
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import relay_step
from peagle_train.core.visibility import Visibility, first_seen
from tests.helpers import make_batch, make_draft, make_rows, make_target

COMPILERS = [c for c in (os.environ.get("CXX"), "g++", "clang++") if c]
"""What Inductor needs one of on CPU."""

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


def flat(
    lengths: list[int], K: int = 8, pad: int = 0, rows: int = 1, elements: int | None = None, window: int | None = None
) -> Visibility:
    """The collator's batch of packed documents in one segment, or its first `elements` slots."""
    L = sum(lengths) + pad
    collator = CODCollator(max(L, K), num_depths=K)
    documents = [list(range(n)) for n in lengths]
    masks = [[1] * n for n in lengths]
    batch = collator([{"input_ids": documents, "loss_mask": masks, "epoch": b} for b in range(rows)])
    own = gather_elements(batch, slice(0, elements or collator.capacity), 0, window)
    M = int((own.depth == 0).sum(1).max())
    tables = (t.clone(memory_format=torch.contiguous_format) for t in (own.start, own.anchor, own.depth))
    return Visibility(*tables, torch.zeros(rows, dtype=torch.int64), 0, M, M, K)


# ---- it is the same


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64]), st.floats(0, 1))
def test_every_table_is_create_block_masks_whatever_the_layout(
    visibility: Visibility, block_size: int, share: float
) -> None:
    N = visibility.anchor.shape[1]
    check(visibility, 0, block_size)
    check(visibility, int(share * (N - 1)), block_size)


@pytest.mark.parametrize("elements", [1, 2, 127, 128, 129, 251, 256, 257, 509])
def test_lengths_at_and_around_the_block_agree(elements: int) -> None:
    visibility = flat([61, 2, 97], elements=elements)
    mask = check(visibility)
    assert mask.seq_lengths == (elements, elements)
    assert mask.shape == (1, 1, elements, elements)


@pytest.mark.parametrize("lengths", [[1], [2], [3, 1, 1, 2], [127], [128], [129, 1], [130], [40, 300, 7, 53]])
def test_packed_documents_of_awkward_lengths_agree(lengths: list[int]) -> None:
    check(flat(lengths, pad=5))


@pytest.mark.parametrize("window", [9, 128])
def test_of_long_documents_blocks_beyond_the_window_are_left_out(window: int) -> None:
    counts = []
    for n in (1000, 2000):
        mask = check(flat([n, 300], window=window))
        counts.append(int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()))
    assert counts[1] < 2 * counts[0]


def test_several_rows_of_different_documents_agree() -> None:
    visibility = flat([150, 120], rows=3)
    check(visibility)
    assert (visibility.depth[0] != visibility.depth[1]).any()


@pytest.mark.parametrize("skip", [0, 1, 128, 129, 300])
def test_queries_that_are_left_out_stay_keys(skip: int) -> None:
    mask = check(flat([200, 130]), skip)
    assert mask.kv_indices.shape[3] > mask.kv_indices.shape[2] or skip < BLOCK_SIZE


@pytest.mark.parametrize("K", [2, 130, 131, 260])
def test_rollouts_longer_than_a_block_agree(K: int) -> None:
    """Which nobody trains, but the count of blocks that a rollout reaches into must not be an assumption."""
    slots = [(0, p, 0) for p in range(5)] + [(0, p, d) for p in range(3) for d in range(1, K)]
    check(build([(slots, 0)], K, random.Random(0)))
    check(build([(slots, 0)], K, random.Random(0)), skip=3, block_size=100)


@pytest.mark.parametrize("shift", range(-9, 2))
def test_a_rollout_across_a_block_boundary_is_cut_where_the_boundary_is(shift: int) -> None:
    """One rollout of 8 elements, slot by slot over the edge between two blocks."""
    before = BLOCK_SIZE + shift
    slots = [(0, p, 0) for p in range(before)] + [(0, before - 1, d) for d in range(1, 9)]
    visibility = build([(slots, 0)], 9, random.Random(0))
    mask = check(visibility)
    crosses = before < BLOCK_SIZE < before + 8
    assert (mask.to_dense().numel() > 1) == (before + 8 > BLOCK_SIZE)
    if crosses:
        # The second block's elements see their ancestors in the first, whose elements see nothing of the second.
        assert visible_pairs(visibility)[0, 0, 1] == 0
        deep_in_first = BLOCK_SIZE - before
        deep_in_second = 8 - deep_in_first
        assert visible_pairs(visibility)[0, 1, 0] == deep_in_second * (before + deep_in_first)
        assert visible_pairs(visibility)[0, 1, 1] == deep_in_second * (deep_in_second + 1) // 2


# ---- the shapes of the passes


@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("step", [recompute_step, relay_step])
@pytest.mark.parametrize("S", [1, 3, 7])
def test_every_pass_of_a_step_agrees(step: Callable[..., Any], S: int, window: int | None) -> None:
    """Flat, Algorithm 1 and relay, both passes: [segment x (context + segment)], with rows that start and end apart."""
    rows = make_rows(61, documents=3, batch_size=3, prompt=0.3, padding=7)
    batch = make_batch(rows, 61, S)
    draft, recorded = make_draft(num_hidden_layers=1, sliding_window=window), list[Visibility]()
    draft.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments[3]))
    step(draft, batch, make_target(batch))
    assert len(recorded) >= min(S, 2)
    if S > 1:
        assert any(v.num_context if step is relay_step else v.cut for v in recorded)
    for visibility in recorded:
        for block_size in (8, BLOCK_SIZE):
            check(visibility, 0, block_size)
            if visibility.cut:
                check(visibility, visibility.cut, block_size)


def test_a_relay_segment_over_whole_blocks_of_context_agrees() -> None:
    """Full blocks among the context columns, and columns that only the other row has."""
    rows = []
    for end in (300, 411):
        own = [(40, p, 0) for p in range(end, end + 150)] + [(40, p, d) for p in range(end, end + 60) for d in (1, 2)]
        rows.append((own, end))
    visibility = build(rows, 3, random.Random(3))
    mask = check(visibility)
    assert (mask.full_kv_num_blocks > 0).any()
    assert visibility.num_context >= 411


def test_block_mask_of_leaves_skipped_queries_out_and_makes_nothing_that_a_pass_has_already() -> None:
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


def test_one_document_of_depth_0_is_a_causal_triangle_whose_inner_blocks_are_full() -> None:
    mask = check(depth0_only(4 * BLOCK_SIZE))
    assert lists_of(mask, "kv") == [[[0], [1], [2], [3]]]
    assert lists_of(mask, "full_kv") == [[[], [0], [0, 1], [0, 1, 2]]]
    assert lists_of(mask, "q") == [[[0], [1], [2], [3]]]
    assert lists_of(mask, "full_q") == [[[1, 2, 3], [2, 3], [3], []]]


def test_a_block_that_the_end_cuts_off_is_never_full() -> None:
    mask = check(depth0_only(3 * BLOCK_SIZE - 1))
    assert lists_of(mask, "full_kv") == [[[], [0], []]]
    assert lists_of(mask, "kv") == [[[0], [1], [0, 1, 2]]]


def test_queries_that_see_nothing_have_no_blocks() -> None:
    mask = check(depth0_only(300, depth=torch.full((1, 300), -1)))
    assert mask.kv_num_blocks.sum() == mask.full_kv_num_blocks.sum() == 0
    assert mask.q_num_blocks.sum() == mask.full_q_num_blocks.sum() == 0


def test_a_pass_without_any_depth_0_slot_counts_rollouts_alone() -> None:
    slots = [(0, p, d) for p in range(70) for d in (1, 2, 3)]
    visibility = build([(slots, 0)], 4, random.Random(0))
    visibility.num_depth0 = 0
    check(visibility)
    assert int(visible_pairs(visibility).sum()) == 70 * (1 + 2 + 3)


def test_context_that_a_row_does_not_have_is_seen_by_nobody() -> None:
    visibility = depth0_only(40, num_context=500)
    check(visibility)
    assert visible_pairs(visibility)[0, 0, :3].sum() == 0


# ---- on devices


def tables(start: Tensor, anchor: Tensor, depth: Tensor, context_end: Tensor) -> tuple[Tensor, ...]:
    N = anchor.shape[1]
    return block_tables(Visibility(start, anchor, depth, context_end, 200, N, 0, 8), 3)


def test_nothing_reads_a_value() -> None:
    """On the meta device there are no values to read, so a wait for the device would be an error."""
    arguments = [torch.zeros(2, 600, dtype=torch.int64, device="meta") for _ in range(3)]
    shapes = [t.shape for t in tables(*arguments, torch.zeros(2, dtype=torch.int64, device="meta"))]
    assert shapes == [(2, 1, 5), (2, 1, 5, 7)] * 2 + [(2, 1, 7), (2, 1, 7, 5)] * 2


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_a_compiled_pass_that_is_given_its_tables_attends_as_the_dense_mask_says() -> None:
    """The compiled kernel reads the block tables; eager flex does not."""
    own = flat([150, 260], elements=900)
    query, key, value = torch.randn(3, 1, 2, 900, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def attention(given: FlexTables, *qkv: Tensor) -> Tensor:
        visibility = Visibility(own.start, own.anchor, own.depth, own.context_end, 0, own.num_depth0, 0, 8)
        visibility.flex = {0: given}
        return flex_attention(*qkv, block_mask=block_mask_of(visibility))  # type: ignore[return-value]

    compiled = torch.compile(attention, fullgraph=True, dynamic=False)
    with torch.no_grad():
        found = compiled(flex_tables(own), query, key, value)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=own.dense()[:, None])
    assert (own.depth >= 0).all()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
def test_on_a_gpu_the_tables_are_the_same_and_nothing_waits_for_it() -> None:
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
