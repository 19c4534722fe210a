"""The BlockMask that is counted from the layout is the one that create_block_mask finds by trying every pair."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from peagle_train.core.flex import BLOCK_SIZE, block_mask_of, block_tables, flex_tables
from peagle_train.core.passes import recompute_step
from peagle_train.core.relay import relay_step
from peagle_train.core.visibility import Visibility
from tests.helpers import make_batch, make_draft, make_rows, make_target, seeded
from tests.test_attention import PASSES, make_pass, named

# ---- the obvious answers


def evaluated_block_mask(visibility: Visibility, skip: int, block_size: int) -> BlockMask:
    B, N = visibility.anchor.shape
    Q, K = N - skip, visibility.num_context + N
    mask_mod = block_mask_of(visibility, skip).mask_mod
    assert torch.equal(create_mask(mask_mod, B, None, Q, K, device="cpu")[:, 0], visibility.dense()[:, skip:])
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


def check(visibility: Visibility, skip: int = 0, block_size: int = BLOCK_SIZE) -> None:
    expected = evaluated_block_mask(visibility, skip, block_size)
    tables = block_tables(visibility, skip, block_size)
    found = BlockMask(expected.seq_lengths, *tables, BLOCK_SIZE=(block_size, block_size), mask_mod=expected.mask_mod)
    assert_same_blocks(found, expected)


# ---- layouts


def flat(lengths: list[int], rows: int = 1, K: int = 5) -> Visibility:
    """Packed documents in one segment."""
    return make_pass([(lengths, 0)] * rows, K=K, ratio=1.0, padding=0).visibility


def loosened(v: Visibility, seed: int) -> Visibility:
    """With sizes that are not as tight as they can be, fewer depth-0 elements, and any numbers in empty slots."""
    g, N = seeded(seed), v.anchor.shape[1]
    is_left_out = (v.depth == 0) & (torch.rand(v.depth.shape, generator=g) < 0.3)
    depth = torch.where(is_left_out, -1, v.depth)
    junk = torch.randint(0, 30, depth.shape, generator=g)
    start, anchor = (torch.where(depth < 0, junk, t) for t in (v.start, v.anchor))
    sizes = v.num_context + 3, min(v.num_depth0 + 2, N), v.first_rollout // 2, v.num_depths + 3
    return Visibility(start, anchor, depth, v.context_end, *sizes)


# ---- it is the same


@pytest.mark.parametrize("name", PASSES)
def test_every_table_is_create_block_masks_whatever_the_layout(name):
    for K, block_size in ((1, 4), (2, 1), (4, 3), (5, 2), (6, 7), (7, 8), (7, 64)):
        tight = named(name, K=K, ratio=0.9).visibility
        N = tight.anchor.shape[1]
        for visibility in (tight, loosened(tight, block_size)):
            check(visibility, 0, block_size)
            check(visibility, N // 3, block_size)
            check(visibility, N - 1, block_size)


AT_AND_AROUND_THE_BLOCK = [([elements + 1], 1) for elements in (1, 2, 127, 128, 129, 257)]
AWKWARD = [([2], 5), ([3], 5), ([3, 1, 1, 2], 5), ([129, 1], 5), ([40, 300, 7, 53], 5)]


@pytest.mark.parametrize(("lengths", "K"), AT_AND_AROUND_THE_BLOCK + AWKWARD)
def test_packed_documents_of_any_length_agree_in_several_rows_and_with_queries_left_out(lengths, K):
    visibility = flat(lengths, rows=2, K=K)
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
