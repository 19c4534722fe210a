"""The training loop, on top of everything else: rows in, drafter out, on one process or many."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from peagle_train.build import make_collator
from peagle_train.checkpoint import MARKER, claim_output, save_drafter, write_json
from peagle_train.data import PackedRows
from peagle_train.distributed import same_on_all_ranks, sum_counts, sum_over_ranks
from peagle_train.draft import PEagleDraft
from peagle_train.evaluate import Evaluator
from peagle_train.metrics import (
    Reporter,
    accuracies,
    eval_line,
    expected_accepted_length,
    peak_memory_bytes,
    train_line,
)
from peagle_train.optim import make_optimizer, make_scheduler
from peagle_train.peers import agree, wait_for_all
from peagle_train.profile import StepProfiler, span
from peagle_train.recipe import Recipe, dump_recipe
from peagle_train.runner import Batch, BatchRunner
from peagle_train.sampler import StepBatchSampler
from peagle_train.segments import StepStats
from peagle_train.sharded import clip_gradients, full_weights, shard, wants_sharding
from peagle_train.target import FrozenTarget


class NonFinite(RuntimeError):
    """A step's loss or gradient is not finite; the step was not applied."""


class Trainer:
    """One run. `run` does everything; the methods below it are its steps, in the order in which they happen.

    Args:
        recipe: the settings. accelerator: made by the caller, who knows the device.
        target: frozen, on the accelerator's device. draft: on the CPU; prepared here.
        train_rows, eval_rows: packed rows; eval_rows may be empty.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        target: FrozenTarget,
        draft: PEagleDraft,
        train_rows: PackedRows,
        eval_rows: PackedRows,
    ) -> None:
        # Reading and tokenizing may have taken one rank minutes longer than another: no collective before this.
        agree(
            {
                "recipe": dump_recipe(recipe),
                "set of rows to train on": train_rows.fingerprint(),
                "set of held-out rows": eval_rows.fingerprint(),
                "draft vocabulary": str(draft.draft_token_ids.tolist()),
            }
        )
        self.recipe, self.accelerator, self.target = recipe, accelerator, target
        self.train_rows = train_rows
        self.folder = Path(recipe.output.dir)
        self.device = accelerator.device
        train = recipe.train

        self.draft = draft
        self.optimizer: Any
        if wants_sharding(train.sharding, accelerator):
            same_on_all_ranks(draft, self.device)
            shard(draft, draft.layers, self.device)
            self.optimizer = make_optimizer(draft, train)
        else:
            # No DDP around it: gradients are summed once a step, by us (sum_over_ranks), so that a rank may run any number
            # of passes. (Its reducer would also hold a second copy of the gradients, and can deadlock at exit on gloo.)
            draft.to(self.device)
            same_on_all_ranks(draft, self.device)
            self.optimizer = accelerator.prepare(make_optimizer(draft, train))
        self.trained = [p for p in self.draft.parameters() if p.requires_grad]
        self.runner = BatchRunner(recipe, accelerator, target, self.draft)
        self.evaluator = Evaluator(self.runner, eval_rows)
        self.collator = make_collator(recipe, train.seed)
        self.sampler = StepBatchSampler(
            len(train_rows),
            train.batch_size,
            train.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            train.seed,
        )
        self.num_steps = train.max_steps or train.epochs * self.sampler.steps_per_epoch
        self.sampler.num_steps = self.num_steps
        self.scheduler = make_scheduler(self.optimizer, train, self.num_steps)
        self.profiler = StepProfiler(train.profile_steps, self.folder, self.device)
        self.step = 0
        self.best: dict[str, Any] | None = None

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train, evaluating before and after; returns the summary that is also written to `run.json`."""
        self._claim_output()
        self.reporter = Reporter(self.folder, self.num_steps, self.accelerator.is_main_process)
        try:
            before = self.evaluate("held-out before training")
            started = time.perf_counter()
            for batches in self._steps():
                self._optimizer_step(batches)
                self._log_save_evaluate()
            seconds = time.perf_counter() - started
            after = self.evaluate("held-out after training")
            self.save(self.folder / "final")
            summary = {
                "state": "finished",
                "drafter": "final",
                "steps": self.step,
                "train_seconds": seconds,
                "before": before,
                "after": after,
                "best": self.best,
            }
            self._write_marker(summary)
            return summary
        finally:
            self.reporter.close()

    def _claim_output(self) -> None:
        failure = ""
        if self.accelerator.is_main_process:
            try:
                claim_output(self.folder)
                (self.folder / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
            except ValueError as error:
                failure = str(error)
        failures = [failure]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(failures, src=0)
        if failures[0]:
            raise ValueError(failures[0])

    def _steps(self) -> Any:
        """Each optimizer step's micro-batches, on the host."""
        loader = DataLoader(
            self.train_rows,
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self._window_start, self._window_tokens, self._waited = time.perf_counter(), 0, 0.0
        iterator = iter(loader)
        for step in range(self.step + 1, self.num_steps + 1):
            self.profiler.before(step)
            started = time.perf_counter()
            with span("loader wait"):
                batches = [next(iterator) for _ in range(self.recipe.train.gradient_accumulation_steps)]
            self._waited += time.perf_counter() - started
            yield batches
            table = self.profiler.after(step, is_last=step == self.num_steps)
            if table:
                self.reporter.say(table)

    # ---- a step

    def accumulate(self, batches: list[Batch]) -> StepStats:
        """Gradients of one optimizer step over all ranks and micro-batches, normalised by its supervised elements.

        Afterwards every rank holds the same gradients and the same sums.
        """
        plans = [self.runner.plan(batch) for batch in batches]
        count = sum_counts([sum(p.num_supervised for p in plans)], self.device)
        # FSDP averages over ranks where we want the sum; a step with nothing supervised has gradient 0, not nan.
        wide = torch.promote_types(self.draft.dtype, torch.float32)
        scale = (self.accelerator.num_processes if self.runner.sharded else 1) / count.clamp(min=1).to(wide)
        sums = []
        for i, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            sums.append(self.runner.run(batch, plan, scale, is_last=i == len(batches) - 1))
        stats = StepStats(
            torch.stack([s.loss for s in sums]).sum(),
            torch.stack([s.hits for s in sums]).sum(0),
            torch.stack([s.totals for s in sums]).sum(0).to(self.device, non_blocking=True),
        )
        self._own_loss = stats.loss.clone()
        with span("reduce"):
            sum_over_ranks([] if self.runner.sharded else self.trained, also=[stats.loss, stats.hits, stats.totals])
        return stats

    def _optimizer_step(self, batches: list[Batch]) -> None:
        stats = self.accumulate(batches)
        limit = self.recipe.train.max_grad_norm
        self._grad_norm = clip_gradients(self.trained, math.inf if limit is None else limit)
        # The step's one wait for the device: a non-finite step must not reach the weights.
        if not bool(torch.isfinite(self._grad_norm) & torch.isfinite(stats.loss)):
            self._stop_non_finite(batches)
        with span("optimizer"):
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._stats = stats
        self.step += 1
        self._window_tokens += sum(int((b["document_ids"] >= 0).sum()) for b in batches)
        self.reporter.step()

    def _stop_non_finite(self, batches: list[Batch]) -> None:
        own = [] if bool(torch.isfinite(self._own_loss)) else [k for b in batches for k in b["row_key"].tolist()]
        keys = [own]
        if self.accelerator.num_processes > 1:
            keys = [None] * self.accelerator.num_processes  # type: ignore[list-item]
            torch.distributed.all_gather_object(keys, own)
        bad = [k for rank_keys in keys for k in rank_keys]
        where = self.folder / f"checkpoint-{self.step}"
        self.save(where)
        raise NonFinite(
            f"loss or gradient is not finite in step {self.step + 1}, rows {bad or 'unknown (only the gradient is not)'}:"
            f" the step was not applied; the weights of step {self.step} are in {where}"
        )

    # ---- logging, evaluation, saving

    def _log_save_evaluate(self) -> None:
        train = self.recipe.train
        last = self.step == self.num_steps
        if self.step % train.log_steps == 0 or self.step == 1 or last:
            self._log()
        if train.save_steps and self.step % train.save_steps == 0 and not last:
            self.save(self.folder / f"checkpoint-{self.step}")
        if train.eval_steps and self.step % train.eval_steps == 0 and not last:
            self.evaluate(f"held-out at step {self.step}")
            self._window_start, self._window_tokens, self._waited = time.perf_counter(), 0, 0.0

    def _log(self) -> None:
        hits, totals = self._stats.hits.tolist(), self._stats.totals.tolist()
        accuracy = accuracies(hits, totals)
        seconds = time.perf_counter() - self._window_start
        values = {
            "step": self.step,
            "num_steps": self.num_steps,
            "loss": float(self._stats.loss) / max(1, sum(totals)),
            "accuracy": accuracy,
            "expected_accepted_length": expected_accepted_length(accuracy),
            "supervised": totals,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "grad_norm": float(self._grad_norm),
            "tokens_per_second": self._window_tokens * self.accelerator.num_processes / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "loader_wait_share": self._waited / seconds,
            "recompiles": self.runner.compiled.recompiles if self.runner.compiled else None,
            "seconds": time.perf_counter() - self.reporter.start_time,
        }
        self.reporter.record("train", train_line(values), **values)
        self._window_start, self._window_tokens, self._waited = time.perf_counter(), 0, 0.0

    def evaluate(self, title: str) -> dict[str, Any] | None:
        """Held-out loss, accuracies and expected accepted length over all ranks; None without held-out rows."""
        values = self.evaluator()
        if values is not None:
            self.reporter.record("eval", eval_line(title, values), step=self.step, **values)
            self._mark_best(values)
        return values

    def _mark_best(self, values: dict[str, Any]) -> None:
        better = self.best is None or values["expected_accepted_length"] > self.best["expected_accepted_length"]
        if not better:
            return
        self.best = {"step": self.step, "expected_accepted_length": values["expected_accepted_length"]}
        if self.step == 0:
            return
        folder = "final" if self.step == self.num_steps else "best"
        self.best["folder"] = folder
        if folder == "best":
            self.save(self.folder / folder)
        if self.accelerator.is_main_process:
            write_json(self.folder / "best.json", self.best)

    def save(self, path: Path) -> None:
        """Write the drafter as vLLM loads it; every rank must call it."""
        state = full_weights(self.draft)
        if self.accelerator.is_main_process:
            save_drafter(path, self.draft.config, state, {"recipe.yaml": dump_recipe(self.recipe)})
        wait_for_all()  # no barrier: a slow disk must not be a time-out

    def _write_marker(self, summary: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            write_json(self.folder / MARKER, summary)
        self.accelerator.wait_for_everyone()
