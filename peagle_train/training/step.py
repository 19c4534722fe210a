"""What a step and an evaluation are made of: target and drafter over a micro-batch; and the optimizers."""

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
from peagle_train.core.passes import StepStats, TargetOutputs, recompute_step
from peagle_train.core.plan import Plan, plan_segments
from peagle_train.core.relay import RelayBuffers, context_chunks, relay_step
from peagle_train.data.packing import EMPTY_ROW, PackedRows
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import counts_over_ranks, sum_over_ranks
from peagle_train.target_model.frozen import TargetBase
from peagle_train.target_model.ring import Ring
from peagle_train.training.metrics import summary_of

Batch = dict[str, Tensor]
EVAL_SEED = 0  # of the evaluation's COD draw: the same in every run, so that runs can be compared


class BatchRunner:
    """Runs the collator's batches; target and drafter are on the accelerator's device."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, target: TargetBase, draft: PEagleDraft) -> None:
        self.recipe, self.accelerator, self.target, self.draft = recipe, accelerator, target, draft
        self.device = accelerator.device
        self.sharded = any(isinstance(parameter, DTensor) for parameter in draft.parameters())
        self._backwards_to_come: int | None = None
        self.relay = recipe.train.segment_mode == "relay" and recipe.cod.segments > 1
        self.ring: Ring | None = None  # of the target's outputs in training; evaluation asks the target itself
        self.head_rows = target.head_rows(draft.draft_token_ids).to(self.device)
        self.buffers = RelayBuffers()
        self.runs: PEagleDraft | CompiledDraft = draft
        self.graphs: Graphs | None = None
        if recipe.train.compiles(self.device.type):
            if self.sharded:
                self.graphs = compile_layers(draft, recipe.train.compile_backend)
            else:
                self.runs = CompiledDraft(draft, recipe.train.compile_backend)
                self.graphs = self.runs.graphs

    def plan(self, batch: Batch) -> Plan:
        """The passes of a batch that is on the host."""
        train, kind, config = self.recipe.train, self.device.type, self.draft.config
        pads = {"static": train.pads_passes(kind), "pad_context": train.pads_context(kind)}
        return plan_segments(batch, **pads, window=config.sliding_window, layers=config.num_hidden_layers)

    def _run_target(self, batch: Batch, is_training: bool) -> TargetOutputs:
        """The target's outputs for a batch on the host; on the device, unless `offload_features`."""
        source = self.ring if self.ring and is_training else self.target
        with record_function("peagle::target"):
            target = source.outputs(batch, self.head_rows)
        if self.recipe.train.offload_features and self.device.type == "cuda":
            # Page-locked, or every segment's piece would wait for its copy back.
            target.features, target.last_hidden = (
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in (target.features, target.last_hidden)
            )
            torch.cuda.current_stream(self.device).synchronize()  # the host cuts pieces out of them
        return target

    def run(self, batch: Batch, plan: Plan, scale: Tensor | None, is_last: bool = True) -> StepStats:
        """Run one micro-batch, which is on the host, and return its sums. With `scale`, also accumulate gradients of
        `loss * scale`; a sharded drafter's are reduced once a step, in the last pass of the batch that `is_last`.
        """
        train, is_training = self.recipe.train, scale is not None
        target = self._run_target(batch, is_training)
        on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        arguments: dict[str, Any] = {"loss": train.loss, "depth_decay": train.depth_decay, "plan": plan}
        arguments |= {"chunk_rows": train.chunk_rows(self.device.type), "scale": 1.0 if scale is None else scale}
        if self.sharded:
            # Every rank takes part in every all-gather: as many passes everywhere as the rank runs that needs most.
            needed = plan.segments if self.relay else plan.learning
            chunks = context_chunks(plan) if self.relay else []
            passes = [len(chunks), max(len(needed), int(is_last and is_training))]
            most_a, most_b = counts_over_ranks(passes, self.device, largest=True).tolist()
            arguments["min_passes"] = (most_a, most_b) if self.relay else most_b
            self._backwards_to_come = most_b if is_last else None
            self.draft.set_requires_gradient_sync(False)  # type: ignore[operator]
        # Autocast's cache would keep a second copy of all weights, whole, until the batch is through.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=not self.sharded)):
            if self.relay:
                backward = self._backward if is_training else None
                return relay_step(self.runs, on_device, target, buffers=self.buffers, backward=backward, **arguments)
            learn = (lambda loss: self._backward([loss], [None])) if is_training else None
            return recompute_step(self.runs, on_device, target, backward=learn, **arguments)

    def _backward(self, tensors: Any, gradients: Any) -> None:
        if self._backwards_to_come is not None:
            self._backwards_to_come -= 1
            if self._backwards_to_come == 0:
                self.draft.set_requires_gradient_sync(True)  # type: ignore[operator]
        with torch.autocast(self.device.type, enabled=False), record_function("peagle::backward"):
            torch.autograd.backward(tensors, gradients)

    @torch.no_grad()
    def evaluate(self, rows: PackedRows) -> dict[str, Any]:
        """Loss, per-depth accuracy, expected accepted length of held-out sequences, of which each rank takes its share,
        under a fixed draw; in the segments of training, so that it needs no more memory.
        """
        accelerator, size = self.accelerator, self.recipe.train.batch_size
        collator = make_collator(self.recipe, EVAL_SEED, self.device)
        indices = [*range(accelerator.process_index, len(rows), accelerator.num_processes)]
        batches = -(-len(rows) // (size * accelerator.num_processes))  # the same on every rank
        indices += [EMPTY_ROW] * (batches * size - len(indices))
        sums = []
        for first in range(0, len(indices), size):
            batch = collator([rows[0, i] for i in indices[first : first + size]])
            sums.append(self.run(batch, self.plan(batch), scale=None))
        stats = add_up(sums, self.device)
        sum_over_ranks([], also=[stats.loss, stats.hits, stats.totals])
        return {**summary_of(stats), "hits": stats.hits.tolist()}


def add_up(parts: list[StepStats], device: torch.device) -> StepStats:
    """The sums of several micro-batches as one, on the device."""
    return StepStats(
        torch.stack([part.loss for part in parts]).sum(),
        torch.stack([part.hits for part in parts]).sum(0),
        torch.stack([part.totals for part in parts]).sum(0).to(device, non_blocking=True),
    )


def make_optimizers(draft: nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay on embeddings (decay shrinks rows that are never seen), norms and `mask_hidden`; then, if
    the recipe asks for it, Muon for the matrices of `layers` and `fc` (sharded ones as DTensors, which torch gathers).
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (train.weight_decay, 0.0)]
    matrices: list[nn.Parameter] = []
    for name, parameter in draft.named_parameters():
        if not parameter.requires_grad:
            continue
        if train.optimizer == "muon" and parameter.dim() == 2 and name.startswith(("layers.", "fc.")):
            matrices.append(parameter)
        else:
            no_decay = parameter.dim() < 2 or name.endswith(("embed_tokens.weight", "mask_hidden"))
            groups[no_decay]["params"].append(parameter)
    groups, betas = [g for g in groups if g["params"]], (train.adam_beta1, train.adam_beta2)
    # Fused: one pass over weights and moments, and no tensor beside them: a fifth of the time on a CPU.
    adamw = torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon, fused=True)
    if train.optimizer == "adamw":
        return [adamw]
    how: dict[str, Any] = {"weight_decay": train.muon_weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [adamw, torch.optim.Muon(matrices, lr=train.learning_rate, **how)]
