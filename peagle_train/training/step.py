"""What one optimizer step is made of: target and drafter over a micro-batch, the optimizer, the schedule, bad sequences.

Training and evaluation share `BatchRunner`. B: sequences of a micro-batch, K: depths.
"""

import logging
import math
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from peagle_train.config import Recipe, Train
from peagle_train.core.compiled import CompiledDraft, Graphs, compile_layers
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.passes import StepStats, TargetOutputs
from peagle_train.core.plan import Plan, plan_segments
from peagle_train.core.recompute import recompute_step
from peagle_train.core.relay import RelayBuffers, context_chunks, needed_segments, relay_step
from peagle_train.distributed import is_sharded, max_counts, sum_counts
from peagle_train.serving.drafter_io import count_non_finite
from peagle_train.target_model.cache import FIELDS
from peagle_train.target_model.frozen import TargetBase

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@dataclass
class Gradients:
    """What `Trainer.accumulate` finds beside the gradients."""

    stats: StepStats
    """Over all ranks and micro-batches."""
    losses: list[Tensor]
    """Scalar, of each micro-batch of this rank."""
    plans: list[Plan]
    asked: Tensor
    """int64 [1 + stopping signals]: how many ranks were asked to save, and to stop by each signal."""
    asked_to_save: bool
    """Whether this rank was."""


@dataclass
class StepResult:
    gradients: Gradients
    grad_norm: Tensor
    """Scalar, before clipping."""
    learning_rate: float
    applied: bool
    """False: loss or gradient was not finite, and weights and moments are unchanged."""
    save: bool
    """Some rank was asked for a checkpoint."""
    stop: str | None
    """A signal that some rank got."""


def check_flex(train: Train) -> None:
    """What flex attention needs: a compiler for Triton (ValueError), and bfloat16 to be fast (a warning)."""
    missing = []
    if "CC" not in os.environ and not shutil.which("gcc") and not shutil.which("clang"):
        missing.append("a C compiler (gcc or clang, or name one in CC)")
    if not Path(str(sysconfig.get_config_var("INCLUDEPY")), "Python.h").exists():
        missing.append("Python's headers (python3-dev, or conda's python)")
    if missing:
        raise ValueError(
            f"Triton, which compiles the drafter's attention on CUDA, needs {' and '.join(missing)}: install it"
        )
    if train.mixed_precision == "no":
        logger.warning(
            "train.mixed_precision is no: the drafter's attention is an order of magnitude slower on CUDA in %s than in"
            " bfloat16; give train.mixed_precision=bf16",
            train.dtype,
        )


class BatchRunner:
    """Runs the collator's batches; target and drafter are on the accelerator's device."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, target: TargetBase, draft: PEagleDraft) -> None:
        self.recipe, self.accelerator, self.target, self.draft = recipe, accelerator, target, draft
        self.device = accelerator.device
        self.sharded = is_sharded(draft)
        self._backwards_to_come: int | None = None
        self.relay = recipe.train.segment_mode == "relay" and recipe.cod.segments > 1
        self.head_rows = target.head_rows(draft.draft_token_ids).to(self.device)
        self.buffers = RelayBuffers()
        self.runs: PEagleDraft | CompiledDraft = draft
        self.graphs: Graphs | None = None
        if recipe.train.compiles(self.device.type):
            mode = None if recipe.train.compile_mode == "default" else recipe.train.compile_mode
            if self.sharded:
                self.graphs = compile_layers(draft, recipe.train.compile_backend, mode)
            else:
                self.runs = CompiledDraft(draft, recipe.train.compile_backend, mode)
                self.graphs = self.runs.graphs

    def plan(self, batch: Batch) -> Plan:
        """The passes of a batch that is on the host."""
        train, kind = self.recipe.train, self.device.type
        return plan_segments(batch, static=train.pads_passes(kind), pad_context=train.pads_context(kind))

    def run_target(self, batch: Batch) -> TargetOutputs:
        """The target's outputs for a batch on the host; on the device, unless `offload_features`."""
        with record_function("peagle::target"):
            target = self.target.outputs(batch, self.head_rows)
        if self.recipe.train.offload_features and self.device.type == "cuda":
            # Page-locked, or every segment's piece would wait for its copy back.
            held = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in (target.features, target.last_hidden)
            ]
            torch.cuda.current_stream(self.device).synchronize()  # the host cuts pieces out of them
            target.features, target.last_hidden = held
        return target

    def run(
        self,
        batch: Batch,
        plan: Plan,
        scale: Tensor | None,
        is_last: bool = True,
        target: TargetOutputs | None = None,
    ) -> StepStats:
        """Run one micro-batch, which is on the host, and return its sums. With `scale`, also accumulate gradients of
        `loss * scale`.

        A sharded drafter's gradients are reduced once a step, in the last pass of the batch that `is_last`.

        Args:
            target: the batch's `run_target`, if the caller has it already.
        """
        train = self.recipe.train
        if target is None:
            target = self.run_target(batch)
        on_device = {n: t.to(self.device, non_blocking=True) for n, t in batch.items() if n not in FIELDS}
        arguments: dict[str, Any] = {
            "loss": train.loss,
            "chunk_rows": train.chunk_rows(self.device.type),
            "depth_decay": train.depth_decay,
            "plan": plan,
            "scale": 1.0 if scale is None else scale,
        }
        if self.sharded:
            most_a, most_b = self._agree_on_passes(plan, at_least=int(is_last and scale is not None))
            arguments["min_passes"] = (most_a, most_b) if self.relay else most_b
            self._backwards_to_come = most_b if is_last else None
            self.draft.set_requires_gradient_sync(False)  # type: ignore[operator]
        # Autocast's cache would keep a second copy of all weights, whole, until the batch is through.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=not self.sharded)):
            if self.relay:
                backward = None if scale is None else self._backward
                return relay_step(self.runs, on_device, target, buffers=self.buffers, backward=backward, **arguments)
            backward_loss = None if scale is None else self._backward_loss
            return recompute_step(self.runs, on_device, target, backward=backward_loss, **arguments)

    def _agree_on_passes(self, plan: Plan, at_least: int) -> tuple[int, int]:
        """(pass A, pass B) of the rank that needs most: every rank takes part in every all-gather."""
        needed = needed_segments(plan) if self.relay else [s for s in plan.segments if s.supervised.numel()]
        chunks = context_chunks(plan, needed) if self.relay else []
        most_a, most_b = max_counts([len(chunks), max(len(needed), at_least)], self.device)
        return most_a, most_b

    def _backward(self, tensors: Any, gradients: Any) -> None:
        if self.sharded and self._backwards_to_come is not None:
            self._backwards_to_come -= 1
            if self._backwards_to_come == 0:
                self.draft.set_requires_gradient_sync(True)  # type: ignore[operator]
        with torch.autocast(self.device.type, enabled=False), record_function("peagle::backward"):
            torch.autograd.backward(tensors, gradients)

    def _backward_loss(self, loss: Tensor) -> None:
        self._backward([loss], [None])


def add_up(parts: list[StepStats], device: torch.device) -> StepStats:
    """The sums of several micro-batches as one, on the device."""
    return StepStats(
        torch.stack([part.loss for part in parts]).sum(),
        torch.stack([part.hits for part in parts]).sum(0),
        torch.stack([part.totals for part in parts]).sum(0).to(device, non_blocking=True),
    )


def make_optimizer(draft: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW without weight decay on embeddings (decay shrinks rows that are never seen), norms and `mask_hidden`."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.dim() < 2 or name.endswith(("embed_tokens.weight", "mask_hidden"))
            (kept if no_decay else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # one pass over weights and moments, and no tensor beside them: a fifth of the time on a CPU
    )


def learning_rate(train: Train, num_steps: int, step: int) -> float:
    """Of the step after `step`: a warm-up, then linear or cosine to 0 at `num_steps`, or constant."""
    warmup = round(train.warmup_ratio * num_steps)
    if step < warmup:
        return train.learning_rate * (step / warmup)
    if train.schedule == "constant":
        return train.learning_rate
    steps = max(1, num_steps - warmup)
    if train.schedule == "linear":
        return train.learning_rate * max(0.0, (num_steps - step) / steps)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / steps)))


@torch.no_grad()
def has_finite_weights(draft: nn.Module, device: torch.device) -> bool:
    """Whether all of the drafter's weights are finite, over all ranks."""
    own = (p.to_local() if isinstance(p, DTensor) else p for p in draft.parameters())
    return int(sum_counts([sum(map(count_non_finite, own))], device)) == 0


@torch.no_grad()
def bad_sequences(runner: BatchRunner, batch: Batch) -> list[int]:
    """Keys of a micro-batch's sequences whose own loss is not finite; all of them if that cannot be told."""
    keys = batch["row_key"].tolist()
    several = runner.accelerator.num_processes > 1
    if len(keys) == 1 or (several and (runner.sharded or runner.recipe.target.shard)):
        return keys  # where something is sharded, all ranks would have to run the same number of passes
    bad = []
    for i, key in enumerate(keys):
        # The sequence in every place of the batch: the same shapes, so nothing is compiled again.
        alone = {name: tensor[i : i + 1].expand_as(tensor).contiguous() for name, tensor in batch.items()}
        if not bool(torch.isfinite(runner.run(alone, runner.plan(alone), scale=None).loss)):
            bad.append(key)
    return bad or keys
