"""A job of ranks_run.py: gradients of a drafter sharded by FSDP2's fully_shard on a CPU mesh, whole again, from rank 0."""

from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.core.collator import CODCollator
from peagle_train.core.compiled import compile_layers
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.passes import TargetOutputs, recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import context_chunks, relay_step
from peagle_train.distributed import counts_over_ranks, shard
from peagle_train.serving.start import draw_weights
from tests.helpers import make_config

L, K, S = 48, 5, 6
CASES = [
    ("relay", "short", "eager"),
    ("relay", "nothing supervised", "eager"),
    ("recompute", "nothing supervised", "eager"),
    ("relay", "short", "compiled"),
    ("relay", "short", "bf16"),
]


def make_draft() -> PEagleDraft:
    draft = PEagleDraft(make_config(initializer_range=0.2, layer_type="qwen3", fc_norm=True)).double()
    draw_weights(draft, seed=0)
    draft.embed_tokens.weight.requires_grad_(True)
    return draft


def make_batch(rank: int, case: str) -> tuple[dict[str, Tensor], TargetOutputs]:
    """Rank 1's row is short (fewer segments), or has nothing supervised."""
    n = 48 if rank == 0 else 7 if case == "short" else 40
    mask = torch.ones(n, dtype=torch.int64) if rank == 0 or case == "short" else torch.zeros(n, dtype=torch.int64)
    mask[0] = 0
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 47, (n,), generator=generator)
    batch = CODCollator(L, num_depths=K, down_sample_ratio=0.8, num_segments=S)(
        [{"input_ids": ids, "loss_mask": mask, "row_key": rank}]
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = torch.randn(30, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return batch, TargetOutputs(random(1, L, 36), random(1, L, 12), head)


def sharded(mode: str, case: str, variant: str) -> dict[str, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    bf16, compiled = "bf16" in variant, "compiled" in variant
    draft = make_draft()
    shard(draft.float() if bf16 else draft, draft.layers, torch.device("cpu"), bf16)
    graphs = compile_layers(draft, "aot_eager") if compiled else None
    batch, target = make_batch(rank, case)
    plan = plan_segments(batch, static=compiled)
    count = torch.tensor(float(plan.num_supervised), dtype=torch.float64)
    dist.all_reduce(count)
    for _ in range(2):  # the second step finds buffers and gradients as the first left them
        draft.zero_grad()
        scale = world / count  # FSDP averages over ranks
        if mode == "relay":
            passes = [len(context_chunks(plan)), len(plan.segments)]
            passes_a, passes_b = counts_over_ranks(passes, torch.device("cpu"), largest=True).tolist()
            step = partial(relay_step, min_passes=(passes_a, passes_b))
        else:
            passes = [sum(bool(s.supervised.numel()) for s in plan.segments)]
            most = int(counts_over_ranks(passes, torch.device("cpu"), largest=True))
            step = partial(recompute_step, min_passes=most)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            step(draft, batch, target, scale=scale, plan=plan)
    assert graphs is None or (len(graphs) >= 2 and graphs.recompiles == 0), graphs
    whole = {name: p.grad.full_tensor() for name, p in draft.named_parameters()}  # type: ignore[union-attr]
    return whole


def alone(case: str) -> dict[str, Tensor]:
    """The same two rows on one process, flat passes."""
    draft = make_draft()
    pairs = [make_batch(rank, case) for rank in range(2)]
    count = sum(int(batch["supervised"].sum()) for batch, _ in pairs)
    for batch, target in pairs:
        recompute_step(draft, batch, target, scale=1 / count)
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


def run(folder: str) -> None:
    rank, cpu = dist.get_rank(), torch.device("cpu")
    assert counts_over_ranks([rank, 7], cpu).tolist() == [1, 14]
    # A sum in its place would change no gradient: passes over nothing, which only cost time.
    assert counts_over_ranks([rank, 7], cpu, largest=True).tolist() == [1, 7]
    for mode, case, variant in CASES:
        gradients = sharded(mode, case, variant)
        if dist.get_rank() == 0:
            save_file({name: g.contiguous() for name, g in gradients.items()}, f"{folder}/{mode} {case} {variant}")
