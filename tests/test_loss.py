"""Chunked linear losses against one row at a time."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peagle_train.core.loss import chunked_linear_loss
from tests import oracles
from tests.helpers import LiveBytes

M, V, H, T = 23, 13, 6, 5
LOSSES = ("kl", "soft_ce", "hard_ce", "tv", "lk")


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    target_hidden: Tensor
    target_head: Tensor


def make_inputs(
    rows: int = M, vocab: int = V, size: int = H, target: int = T, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, size), (vocab, size), (rows, target), (vocab, target)]
    hidden, head, target_hidden, target_head = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
    )
    return Inputs(hidden.requires_grad_(), head.requires_grad_(), target_hidden, target_head)


def naive(inputs: Inputs, kind: str, share: Tensor | float = 1.0) -> tuple[Tensor, list[bool]]:
    """In the inputs' dtype throughout; `share`: what each row counts."""
    rows = [
        oracles.row_loss(inputs.head @ h, inputs.target_head @ t, kind)
        for h, t in zip(inputs.hidden, inputs.target_hidden)
    ]
    return (torch.stack([loss for loss, _ in rows]) * share).sum(), [hit for _, hit in rows]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("all_alike", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 7, 23, 1000])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_gradients_and_hits_are_those_of_one_row_at_a_time_with_or_without_grad(kind, chunk_rows, all_alike):
    inputs, counted, options = make_inputs(seed=11), torch.ones(M, dtype=torch.bool), dict[str, Tensor]()
    share = counted.double()
    if not all_alike:  # rows that are not counted have no loss, no gradient and no hit
        counted = torch.arange(M) % 3 != 1
        weight = torch.rand(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        options, share = {"counted": counted, "weight": weight}, weight * counted
    expected, hits_of_all = naive(inputs, kind, share)
    expected_hits = [hit and counts for hit, counts in zip(hits_of_all, counted.tolist())]
    assert all_alike == (expected_hits == hits_of_all)
    expected_grads = torch.autograd.grad(expected * 0.3, inputs[:2])
    loss, hits = chunked_linear_loss(*inputs, kind, chunk_rows, **options)
    assert loss.shape == () and loss.dtype == torch.float64
    assert error(loss.detach(), expected.detach()) <= 1e-12
    for found, other in zip(torch.autograd.grad(loss * 0.3, inputs[:2]), expected_grads):
        assert found.dtype == torch.float64 and error(found, other) <= 1e-12
    assert hits.dtype == torch.bool and hits.tolist() == expected_hits and 0 < sum(expected_hits) < M
    with torch.no_grad():
        alone, hits = chunked_linear_loss(*inputs, kind, chunk_rows, **options)
    assert torch.equal(alone, loss.detach()) and hits.tolist() == expected_hits and not alone.requires_grad


def test_kl_is_the_default_tv_is_half_the_distance_lk_lies_between_and_others_are_refused():
    inputs = make_inputs(rows=1)
    q, p = ((x @ head.T).softmax(-1) for x, head in ((inputs[0], inputs[1]), (inputs[2], inputs[3])))
    kl, tv, lk = (chunked_linear_loss(*inputs, kind)[0].item() for kind in ("kl", "tv", "lk"))
    assert abs(tv - (p - q).abs().sum().item() / 2) <= 1e-12 and tv < lk < kl == chunked_linear_loss(*inputs)[0].item()
    with pytest.raises(ValueError, match="loss is 'mse'; it must be one of kl, soft_ce, hard_ce, tv, lk"):
        chunked_linear_loss(*inputs, "mse")


@pytest.mark.parametrize("kind", LOSSES)
def test_where_nothing_counts_loss_and_gradients_are_zero_and_extreme_logits_stay_finite(kind):
    for rows in (0, M):
        inputs = make_inputs(rows)
        loss, hits = chunked_linear_loss(*inputs, kind, 3, torch.zeros(rows, dtype=torch.bool) if rows else None)
        d_hidden, d_head = torch.autograd.grad(loss, inputs[:2])
        assert loss.item() == 0 and torch.equal(hits, torch.zeros(rows, dtype=torch.bool))
        assert torch.equal(d_hidden, torch.zeros(rows, H, dtype=torch.float64)) and not d_head.any()
    large = Inputs(*(t.detach() * 100 for t in make_inputs(dtype=torch.float32)))
    large.hidden.requires_grad_(), large.head.requires_grad_()
    loss, _ = chunked_linear_loss(*large, kind)
    assert all(bool(t.isfinite().all()) for t in (loss, *torch.autograd.grad(loss, large[:2])))


def test_a_frozen_head_and_the_target_get_no_gradient_and_change_no_other():
    inputs = make_inputs()
    (expected,) = torch.autograd.grad(chunked_linear_loss(*inputs)[0], [inputs.hidden])
    frozen, *target = inputs.head.detach(), *(t.clone().requires_grad_() for t in inputs[2:])
    loss, _ = chunked_linear_loss(inputs.hidden, frozen, *target, chunk_rows=4)
    assert loss.grad_fn.saved_tensors[1] is None  # not computed and thrown away
    loss.backward()
    assert [t.grad for t in (frozen, *target)] == [None] * 3 and error(inputs.hidden.grad, expected) <= 1e-15
    inputs.hidden.grad = None
    loss, _ = chunked_linear_loss(inputs.hidden.detach(), inputs.head, *inputs[2:])
    loss.backward()
    assert inputs.hidden.grad is None and inputs.head.grad is not None


def test_every_loss_needs_the_memory_of_kl_and_a_shorter_last_chunk_no_more():
    peaks = []
    for kind, rows in [("kl", 32), *((kind, 31) for kind in LOSSES)]:
        inputs = make_inputs(rows, vocab=4096)
        with LiveBytes() as live:
            chunked_linear_loss(*inputs, kind, chunk_rows=16)
        peaks.append(live.peak)
    assert 2 * 16 * 4096 * 8 < min(peaks) and max(peaks) <= peaks[0] + 2**14


LARGE = {"rows": 600, "vocab": 400, "size": 64, "target": 48}


@pytest.mark.parametrize("kind", ["kl", "soft_ce"])  # the others jump where rounding crosses a border
def test_in_bfloat16_it_is_more_accurate_than_the_naive_loss(kind):
    # Small logits, where softmaxes in bfloat16 are worst, and 300 chunks, whose sum would be lost in it.
    low = Inputs(*((t.detach() * 0.1).requires_grad_() for t in make_inputs(**LARGE, dtype=torch.bfloat16)))
    high = Inputs(*(t.detach().double().requires_grad_() for t in low))
    exact, _ = naive(high, kind)
    exact_grads = torch.autograd.grad(exact, high[:2])
    found, _ = chunked_linear_loss(*low, kind, chunk_rows=2)
    found_grads = torch.autograd.grad(found, low[:2])
    rough, _ = naive(low, kind)
    rough_grads = torch.autograd.grad(rough, low[:2])

    assert found.dtype == torch.float32 and {d.dtype for d in found_grads} == {torch.bfloat16}
    assert error(found.detach(), exact.detach()) < min(1e-4, error(rough.detach(), exact.detach()) / 100)
    for one, other, reference in zip(found_grads, rough_grads, exact_grads):
        # Rounding the result alone costs 1.7e-3.
        assert error(one, reference) < min(3e-3, error(other, reference) / 10)


def test_in_bfloat16_the_scale_of_the_loss_is_not_rounded():
    """A third is no bfloat16 number: rounded, it would shift every gradient but the head's, and by 0.2 %."""
    inputs = make_inputs(**LARGE, dtype=torch.bfloat16)
    whole = torch.autograd.grad(chunked_linear_loss(*inputs)[0], inputs[:2])
    third = torch.autograd.grad(chunked_linear_loss(*inputs)[0] / 3, inputs[:2])
    for one, other in zip(whole, third):
        one, other = one.double(), other.double()
        assert abs(float((one * other).sum() / (one * one).sum() * 3 - 1)) < 3e-4


@pytest.mark.parametrize("kind", LOSSES)
def test_autocast_computes_in_bfloat16_and_returns_the_parameters_dtypes(kind):
    inputs = make_inputs(**LARGE, dtype=torch.float32)
    low = Inputs(*(t.detach().bfloat16() for t in inputs))
    low.hidden.requires_grad_(), low.head.requires_grad_()
    expected, expected_hits = chunked_linear_loss(*low, kind)
    expected_grads = torch.autograd.grad(expected, low[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, hits = chunked_linear_loss(*inputs, kind)
        assert (inputs.hidden @ inputs.head.T).dtype == torch.bfloat16  # its own state is as it was
    grads = torch.autograd.grad(loss, inputs[:2])
    assert loss.dtype == torch.float32 and torch.equal(loss.detach(), expected.detach())
    assert torch.equal(hits, expected_hits)
    for found, other in zip(grads, expected_grads):
        assert found.dtype == torch.float32 and torch.equal(found, other.float())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard_ce", "lk"])  # the others are parts of lk
def test_compiled_by_inductor_several_chunks_give_what_eager_ones_give(kind):
    found = []
    for function in (chunked_linear_loss, torch.compile(chunked_linear_loss, fullgraph=True, dynamic=False)):
        inputs = make_inputs()
        loss, hits = function(*inputs, kind, 9)  # two of 9 rows, one of 5
        found.append([loss, hits, *torch.autograd.grad(loss, [inputs.hidden, inputs.head])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
