"""What only a CUDA device can show, small: `python -m pytest -m gpu`. Needs the trainer's own packages and no network."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peagle_train.__main__ import main
from peagle_train.core.attention import attend
from peagle_train.core.compiled import CompiledDraft
from peagle_train.core.loss import chunked_linear_loss
from peagle_train.core.passes import TargetOutputs, recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, relay_step
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import (
    K,
    L,
    Outcome,
    assert_same,
    distance,
    make_batch,
    make_draft,
    make_rows,
    make_target,
    outcome_of,
)
from tests.test_attention import assert_close, by_hand, make_pass, tensors
from tests.test_loss import error, make_inputs
from tests.tiny import make_target as make_target_folder
from tests.tiny import write_recipe, write_rows

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ROWS = [([150, 57], 40), ([180], 180)]
"""Of attention: lengths of a row's documents, and its first own column; 300 elements or so, over context."""


@pytest.mark.parametrize(
    "rows, skip, heads, head_dim, dtype, tolerance",
    [
        (ROWS, 0, (4, 2), 16, torch.float32, 1e-3),
        (ROWS, 37, (4, 2), 16, torch.float32, 1e-3),
        (ROWS, 37, (8, 2), 128, torch.bfloat16, 3e-2),
        ([([31], 11)], 0, (4, 1), 64, torch.bfloat16, 3e-2),  # under 128 queries, four heads to a key/value head
        ([([31], 0)], 0, (2, 2), 96, torch.bfloat16, 3e-2),
    ],
)
def test_attention_gives_what_loops_give_forward_and_backward(rows, skip, heads, head_dim, dtype, tolerance):
    p = make_pass(rows, K=4, cut=skip)
    v = p.visibility
    v.start, v.anchor, v.depth, v.context_end = (t.to(DEVICE) for t in (v.start, v.anchor, v.depth, v.context_end))
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in tensors(p, *heads, D=head_dim, dtype=dtype)]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]

    def both(inputs: Sequence[Tensor], attention: object) -> list[Tensor]:
        query, *rest = inputs
        out = attention(query[:, :, skip:], (rest[0], rest[1]), (rest[2], rest[3]))  # type: ignore[operator]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
        return [t.cpu() for t in (out, *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True))]

    found = both(inputs, lambda query, own, context: attend(query, own, context, v))
    expected = both(exact, lambda query, own, context: by_hand(p, query, own, context))
    assert_close(found, expected, tolerance)


def relayed(batch: dict[str, Tensor], target: TargetOutputs, target_on: torch.device | str) -> Outcome:
    draft = make_draft(torch.float32, head_dim=16).to(DEVICE)
    given = TargetOutputs(target.features.to(target_on), target.last_hidden.to(target_on), target.head.to(DEVICE))
    on_device = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    found = outcome_of(relay_step, draft, on_device, given, plan=plan_segments(batch), scale=0.1)
    gradients = {name: g.cpu().double() for name, g in found.gradients.items()}
    return Outcome(found.loss.cpu(), found.hits, found.totals, gradients, found.untouched)


def test_a_target_on_the_host_gives_what_one_on_the_device_gives_and_what_the_cpu_gives() -> None:
    rows = make_rows(L, documents=2, batch_size=2)
    batch = make_batch(rows, L, 4, K)
    target = make_target(batch, torch.float32)
    on_host, on_device = (relayed(batch, target, device) for device in ("cpu", DEVICE))
    assert_same(on_host, on_device, 1e-4)
    flat = make_batch(rows, L, 1, K)
    exact = outcome_of(recompute_step, make_draft(head_dim=16), flat, make_target(batch), scale=0.1)
    assert_same(on_host, exact, 1e-2)


@pytest.mark.parametrize("kind", ["kl", "soft_ce"])  # of hard_ce, rounding changes a few labels
def test_the_loss_and_its_gradients_in_bfloat16_are_those_in_float64_to_rounding(kind: str) -> None:
    inputs = make_inputs(rows=131, vocab=997, size=64, target=48, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    given = [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in inputs]
    results = []
    for tensors_ in (given, exact):
        loss, _ = chunked_linear_loss(*tensors_, kind, chunk_rows=50)
        results.append([loss, *torch.autograd.grad(loss * 0.1, tensors_[:2])])
    for found, expected in zip(*results, strict=True):
        assert error(found.detach().cpu(), expected.detach()) <= 3e-2


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["one key to a head", "grouped"])
def test_a_packed_document_gets_the_features_that_it_gets_alone(heads: tuple[int, int]) -> None:
    """Packed rows go through torch.nn.attention.varlen, a document alone through sdpa."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=256, intermediate_size=128, num_hidden_layers=6, initializer_range=0.1,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    target = FrozenTarget(LlamaForCausalLM(config).to(DEVICE, torch.bfloat16))
    lengths = [129, 1, 300, 67]
    ids = torch.randint(61, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    packed = target.features(ids, positions)
    for b in range(2):
        for own_ids, own_positions, *own in zip(
            ids[b].split(lengths), positions[b].split(lengths), *(t[b].split(lengths) for t in packed), strict=True
        ):
            alone = target.features(own_ids[None], own_positions[None])
            for found, expected in zip(own, alone, strict=True):
                assert error(found, expected[0].double()) <= 2e-2


@pytest.mark.parametrize("S", [1, 3])
def test_compiled_passes_give_eager_ones_gradients_in_bfloat16_with_one_graph_a_size(S: int) -> None:
    rows = make_rows(331, documents=3, prompt=0.3)
    flat_batch, batch = make_batch(rows, 331, 1, K), make_batch(rows, 331, S, K)
    target = make_target(batch, torch.float32)
    exact = outcome_of(recompute_step, make_draft(head_dim=16), flat_batch, make_target(batch), scale=0.01)
    draft = make_draft(torch.float32, head_dim=16).to(DEVICE)
    given = TargetOutputs(*(t.to(DEVICE) for t in vars(target).values()))
    on_device = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    compiled, buffers, off = CompiledDraft(draft), RelayBuffers(), []
    for one in (draft, compiled, compiled):
        plan = plan_segments(batch, static=True)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            stats = relay_step(one, on_device, given, plan=plan, buffers=buffers, scale=0.01)
        found = {n: p.grad.cpu().double() for n, p in draft.named_parameters() if p.grad is not None}
        draft.zero_grad()
        assert found.keys() == exact.gradients.keys() and math.isclose(stats.loss, exact.loss, rel_tol=2e-2)
        off.append(distance(found, exact.gradients))
    assert off[0] <= 0.1 * distance({n: g * 0 for n, g in exact.gradients.items()}, exact.gradients)
    assert off[1] <= 1.5 * off[0] and off[2] <= 1.5 * off[0]
    sizes = {s.columns.stop - s.columns.start for s in plan.segments}
    assert compiled.graphs["training"] == len(sizes) and compiled.graphs.recompiles == 0


def test_a_run_continues_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    pytest.importorskip("pydantic", reason="recipes are read by it")
    folder = make_target_folder(tmp_path / "target", hidden_size=128, intermediate_size=64, initializer_range=0.1)
    rows = write_rows(tmp_path / "rows.jsonl", [130, 31, 200, 17, 90, 64, 111, 40], prompt=0.3)
    train = {"dtype": "float32", "mixed_precision": "bf16", "max_steps": 6, "save_steps": 3, "learning_rate": 1e-3}
    recipe = write_recipe(
        tmp_path, folder, rows, tmp_path / "run", train=train, target={"dtype": "bfloat16"}, data={"max_length": 256}
    )

    def losses_after_step_3(*options: str) -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(recipe), *options]) == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train" and line["step"] > 3]

    whole = losses_after_step_3()
    continued = losses_after_step_3("--resume", str(tmp_path / "run" / "checkpoint-3"))
    assert len(whole) == 3 and continued == pytest.approx(whole, rel=5e-3)
