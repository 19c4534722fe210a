"""Attention and visibility against loops over who sees whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from peagle_train.core import attention
from peagle_train.core import visibility as visibility_module
from peagle_train.core.attention import attend, attention_op
from peagle_train.core.flex import block_mask_of, flex
from peagle_train.core.passes import recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import relay_step
from peagle_train.core.visibility import Visibility, first_seen
from tests import oracles
from tests.helpers import make_batch, make_draft, make_rows, make_target
from tests.oracles import Who


@dataclass
class Pass:
    """One pass over several rows, with what is said of each of its slots and context columns; None is padding."""

    visibility: Visibility
    queries: list[list[Who | None]]
    context: list[list[Who | None]]
    window: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, N, P"""
        return len(self.queries), len(self.queries[0]), len(self.context[0])

    def visible(self) -> Tensor:
        """bool [B, N, P + N], by the oracle."""
        rows = [oracles.who_sees_whom(q, c + q, self.window) for q, c in zip(self.queries, self.context)]
        return torch.stack(rows)


def make_pass(
    rows: Sequence[tuple[list[int], int]],
    K: int = 4,
    ratio: float = 0.8,
    padding: int = 2,
    cut: int = 0,
    window: int | None = None,
) -> Pass:
    """A pass over the elements from a column on, row by row.

    Each row is (lengths of its documents, first column of the segment): the depth-0 elements left of it are context. The
    queries are depth-0 elements, rollouts, then `padding` slots more than the fullest row needs.
    """
    documents = [[i for i, n in enumerate(lengths) for _ in range(n)] for lengths, _ in rows]
    own = []
    for b, (_, first) in enumerate(rows):
        g = torch.Generator().manual_seed(b)
        mask = [1] * len(documents[b])
        drawn = oracles.draw_packed(mask, documents[b], K, ratio, 0.2, g)
        later = [e for e in drawn if oracles.first_column(e) >= first]
        own.append(sorted(later, key=lambda e: (e[1] > 0, e[0], e[1])))
    N, P = max(map(len, own)) + padding, max(first for _, first in rows)
    anchor, depth = torch.zeros(len(rows), N, dtype=torch.int64), torch.full((len(rows), N), -1)
    start, queries, context = torch.zeros_like(anchor), [], []
    for b, (elements, ids) in enumerate(zip(own, documents)):
        slots = slice(0, len(elements))
        anchor[b, slots], depth[b, slots] = torch.tensor(elements, dtype=torch.int64).reshape(-1, 2).T
        start[b, slots] = torch.tensor([ids.index(ids[a]) for a, _ in elements], dtype=torch.int64)
        queries.append([(ids[a], a, d) for a, d in elements] + [None] * (N - len(elements)))
        readable = [p for p in oracles.drafter_rows(ids) if p < rows[b][1]]
        context.append([(ids[p], p, 0) if p in readable else None for p in range(P)])
    start, num_depth0 = first_seen(start, anchor, depth, window), (depth == 0).sum(1)
    tables = Visibility(
        start=start,
        anchor=anchor,
        depth=depth,
        context_end=torch.tensor([first for _, first in rows]),
        num_context=P,
        num_depth0=int(num_depth0.max()),
        first_rollout=int(num_depth0.min()),
        num_depths=K,
        cut=cut,
    )
    return Pass(tables, queries, context, window)


PASSES = {
    "flat": [([13], 0)],
    "two rows of several documents": [([5, 1, 9], 0), ([2, 11], 0)],
    "behind context": [([23], 11)],
    "behind context that ends inside a document": [([7, 16], 10), ([4, 4, 12], 12)],
    "rows that start at different columns": [([20], 17), ([9, 11], 5), ([20], 0)],
    "a row that has ended": [([17], 9), ([6], 6)],
    "a row of padding alone": [([8], 0), ([1], 0)],
    "nothing but padding": [([9], 8)],
    "one element": [([2], 0)],
    "windows": [([23], 11), ([9, 21], 13)],
}


def named(name: str, **options: Any) -> Pass:
    """One of PASSES."""
    return make_pass(PASSES[name], window=7 if name == "windows" else None, **options)


def tensors(p: Pass, H: int, G: int, D: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Query, own keys and values, context keys and values; the last two empty without context."""
    B, N, P = p.sizes
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, N, D), (B, G, N, D), (B, G, N, D), (B, G, P, D), (B, G, P, D)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(p: Pass, query: Tensor, own: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor]) -> Tensor:
    key, value = (torch.cat(pair, dim=2) for pair in zip(context, own))
    visible = p.visible()[:, -query.shape[2] :]
    return torch.stack([oracles.attention(*row) for row in zip(query, key, value, visible)])


def gradients(out: Tensor, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    if not out.requires_grad:  # the oracle's zeros, where no query sees anything
        return [torch.zeros_like(t) for t in inputs]
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for d, t in zip(found, inputs)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and bool(one.isfinite().all())
        if other.numel():
            difference, scale = (one.double() - other.double()).abs().max(), other.abs().max()
            assert difference.item() <= tolerance * max(1.0, scale.item())


def tiny_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(visibility_module, "QUERY_BLOCK", size)


# Visibility


def blocks_put_together(v: Visibility, dtype: torch.dtype = torch.float64) -> Tensor:
    """The dense mask that the blocks cover; what a block's slices leave out is invisible."""
    B, N = v.anchor.shape
    whole, covered = torch.zeros(B, N, v.num_context + N, dtype=torch.bool), torch.zeros(N, dtype=torch.int64)
    for i, block in enumerate(v.blocks(dtype.itemsize)):
        mask = v.block_mask(i, dtype)
        columns = [*range(block.context.start, block.context.stop)]
        for own in (block.depth0, block.rollout):
            columns += range(v.num_context + own.start, v.num_context + own.stop)
        assert mask.shape == (B, 1, block.q1 - block.q0, len(columns)) and mask.dtype == dtype
        assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
        # A key that two slices share is visible in one of them at most: depth-0 slots are no rollout slots.
        for k, column in enumerate(columns):
            seen = mask[:, 0, :, k] == 0
            assert not (whole[:, block.q0 : block.q1, column] & seen).any()
            whole[:, block.q0 : block.q1, column] |= seen
        covered[block.q0 : block.q1] += 1
    assert (covered == 1).all()
    return whole


@pytest.mark.parametrize("name", PASSES)
def test_dense_masks_and_those_of_blocks_put_together_are_the_slow_one(name, monkeypatch):
    for K, size, dtype, grid in (
        (2, 1, torch.float64, 64),
        (7, 3, torch.float64, 64),
        (4, 512, torch.float64, 64),
        (4, 8, torch.bfloat16, 4),
        (7, 8, torch.bfloat16, 4),
        (1, 512, torch.bfloat16, 64),
    ):
        tiny_blocks(monkeypatch, size)
        monkeypatch.setattr(visibility_module, "GRID", grid)
        p = named(name, K=K, ratio=1.0)
        v = p.visibility
        assert torch.equal(v.dense(), p.visible())
        assert torch.equal(blocks_put_together(v, dtype), p.visible())
        limits = {"context": v.num_context, "depth0": v.num_depth0, "rollout": v.anchor.shape[1]}
        for block in v.blocks(dtype.itemsize):
            assert block.q1 - block.q0 <= size
            for part, limit in limits.items() if dtype == torch.bfloat16 else ():
                keys = getattr(block, part)
                assert keys.start % grid == 0 and (keys.stop % grid == 0 or keys.stop == limit)


@pytest.mark.parametrize(("step", "S", "grid"), [(relay_step, 1, 64), (recompute_step, 3, 64), (relay_step, 1, 1)])
def test_in_bfloat16_attention_gets_few_shapes_whatever_the_documents(step, S, grid, monkeypatch):
    L, draft, shapes, flash = 300, make_draft(dtype=torch.float32), set(), attention._flash

    def recorded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        shapes.add((query.shape, key.shape))
        return flash(query, key, value, **options)

    monkeypatch.setattr(attention, "_flash", recorded)
    monkeypatch.setattr(visibility_module, "GRID", grid)
    for seed in range(10):
        batch = make_batch(make_rows(L, documents=1 + seed % 7, padding=seed % 3, seed=seed), L, S)
        plan = plan_segments(batch, static=True, pad_context=False)
        with torch.autocast("cpu", torch.bfloat16):
            step(draft, batch, make_target(batch, torch.float32), plan=plan, backward=None)
    assert (len(shapes) <= 20) == (grid == 64)  # ten for each pass size, of which S = 3 has few


def test_blocks_shrink_where_their_masks_would_be_large(monkeypatch):
    monkeypatch.setattr(visibility_module, "MASK_BLOCK_BYTES", 8 * 600)
    v = make_pass([([30], 0)]).visibility
    masks = [v.block_mask(i, torch.float64) for i in range(len(v.blocks(8)))]
    assert len(masks) > 10 and max(m.numel() * m.itemsize for m in masks) <= 8 * 600
    for fits, size in ((1, 1), (63, 32), (64, 64), (127, 64), (200, 192)):  # in two-byte types lengths are few
        v = make_pass([([400], 0)], K=1, padding=0).visibility
        keys = v.num_depth0 + visibility_module.QUERY_BLOCK + v.num_depths
        monkeypatch.setattr(visibility_module, "MASK_BLOCK_BYTES", 2 * keys * fits)
        assert {b.q1 - b.q0 for b in v.blocks(2)[:-1]} == {size}


def test_masks_are_kept_until_the_cache_is_full(monkeypatch):
    tiny_blocks(monkeypatch, 8)
    monkeypatch.setattr(visibility_module, "MASK_CACHE_BYTES", 0)
    v = make_pass([([20], 0)]).visibility
    first = v.block_mask(0, torch.float64)
    assert torch.equal(v.block_mask(0, torch.float64), first) and not v._masks
    monkeypatch.setattr(visibility_module, "MASK_CACHE_BYTES", 2**20)
    assert torch.equal(v.block_mask(0, torch.float64), first)
    monkeypatch.setattr(visibility_module, "sees_context", None)  # not asked again
    assert torch.equal(v.block_mask(0, torch.float32), first.float())


def test_a_block_looks_only_at_keys_near_its_rollouts_inside_its_documents_and_within_its_window(monkeypatch):
    p = make_pass([([400, 300], 0)], K=4)
    v = p.visibility
    for block in v.blocks(8):
        if block.q0 >= v.first_rollout:
            assert block.rollout.start == max(v.first_rollout, block.q0 - 2) and block.rollout.stop == block.q1
        real = [w for w in p.queries[0][block.q0 : block.q1] if w]
        depth0 = [w[1] for w in p.queries[0][block.depth0] if w]
        assert (depth0[0], depth0[-1]) == (min(400 * w[0] for w in real), max(w[1] for w in real))
    tiny_blocks(monkeypatch, 8)
    for block in make_pass([([300], 150)], ratio=1.0, window=64, padding=0).visibility.blocks(8):
        assert 0 < sum(part.stop - part.start for part in (block.context, block.depth0)) <= 8 + 64
    v = make_pass([([40], 30)], padding=0).visibility
    for block in v.blocks(8):  # and makes no mask of the context that all of its queries see
        oldest = int(v.anchor[0, block.q0 : block.q1].min())
        assert block.seen == slice(0, min(oldest + 1, 30)) and v._hidden(block).shape[-1] < 30


# Attention


@pytest.mark.parametrize(("H", "G", "size"), [(4, 2, 1), (3, 3, 3), (2, 1, 512)])
@pytest.mark.parametrize("name", PASSES)
def test_attention_its_operator_in_graphs_and_their_gradients_are_the_slow_ones(name, H, G, size, monkeypatch):
    tiny_blocks(monkeypatch, size)
    p = named(name)
    query, *rest = inputs = tensors(p, H, G)
    own, context = (rest[0], rest[1]), (rest[2], rest[3])
    expected = by_hand(p, query, own, context)
    expected_gradients = gradients(expected, inputs)
    for found in (
        attend(query, own, context if p.sizes[2] else None, p.visibility),
        attention_op(p.visibility, query, *own, *context).flatten(2),
    ):
        assert_close([found, *gradients(found, inputs)], [expected, *expected_gradients])


@pytest.mark.parametrize("size", [2, 512])
def test_the_last_layers_queries_may_be_the_last_of_the_pass(size, monkeypatch):
    tiny_blocks(monkeypatch, size)
    p = make_pass([([7, 12], 0), ([15], 0)], cut=7)
    inputs = query, key, value = tensors(p, 4, 2)[:3]
    last = query[:, :, 7:]
    found = attend(last, (key, value), None, p.visibility)
    expected = by_hand(p, last, (key, value), (key[:, :, :0], value[:, :, :0]))
    assert found.shape == (2, p.sizes[1] - 7, 16)
    assert_close([found, *gradients(found, inputs)], [expected, *gradients(expected, inputs)])
    with pytest.raises(AssertionError, match="straddles"):
        attend(query[:, :, 1:], (key, value), None, make_pass([([7, 12], 0), ([15], 0)]).visibility)


def test_gradients_of_many_blocks_are_summed_wider_than_bfloat16(monkeypatch):
    """One value, seen by every query of 500 blocks: sums in bfloat16 would stop growing at 256."""
    tiny_blocks(monkeypatch, 1)
    p = make_pass([([501], 0)], K=1, padding=0)
    _, key, value, *_ = tensors(p, 1, 1, dtype=torch.bfloat16)
    query = torch.zeros_like(key)
    with torch.no_grad():
        key[:, :, 0], key[:, :, 1:] = 0, -1e4
    query = query + 1  # everyone looks at key 0 alone
    out = attend(query, (key, value), None, p.visibility)
    (d_value,) = torch.autograd.grad(out.sum(), [value])
    assert d_value[0, 0, 0].tolist() == [500.0] * 4


@pytest.mark.slow
def test_compiled_flex_on_cpu_gives_what_loops_give():
    skip = 37  # one compilation for both: some queries left out, and context
    p = make_pass([([60, 90], 40), ([150], 0)], K=4, cut=skip)
    query, *rest = (t.detach() for t in tensors(p, 4, 2, D=16, dtype=torch.float32))
    key, value = torch.cat([rest[2], rest[0]], dim=2), torch.cat([rest[3], rest[1]], dim=2)
    block_mask = block_mask_of(p.visibility, skip)
    assert min(block_mask.to_dense().shape[2:]) > 2, "one block would prove nothing"
    with torch.no_grad():
        out = flex(query[:, :, skip:], key, value, block_mask).transpose(1, 2).flatten(2)
    expected = by_hand(p, query[:, :, skip:], (rest[0], rest[1]), (rest[2], rest[3]))
    assert_close([out], [expected], tolerance=1e-5)
