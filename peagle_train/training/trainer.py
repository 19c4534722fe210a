"""The training loop, on top of everything else: rows in, drafter out, on one process or many."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from peagle_train.config import Recipe, dump_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.plan import padding_share
from peagle_train.core.segments import StepStats
from peagle_train.data.packing import PackedRows
from peagle_train.data.sampler import StepBatchSampler
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import (
    agree,
    clip_gradients,
    from_main,
    full_weights,
    same_on_all_ranks,
    shard,
    sum_counts,
    sum_over_ranks,
    wants_sharding,
)
from peagle_train.files import NonFiniteWeights, RunStopped
from peagle_train.memory import memory_explained, probe_step
from peagle_train.target_model.cache import fingerprint as target_fingerprint
from peagle_train.target_model.frozen import TargetBase
from peagle_train.training.checkpoint import (
    MARKER,
    Checkpoint,
    last_checkpoint,
    remove_set_aside,
    save_checkpoint,
    save_drafter,
    set_schedule,
    take_up_output,
    write_json,
)
from peagle_train.training.evaluate import Evaluator
from peagle_train.training.guard import Guard, diverged, skip_step
from peagle_train.training.metrics import (
    ABOUT,
    Pace,
    Reporter,
    StepProfiler,
    about_machine,
    accuracies,
    eval_line,
    expected_accepted_length,
    peak_memory_bytes,
    train_line,
)
from peagle_train.training.signals import STOPPING, Signals, is_lost_worker, leave_to_parent
from peagle_train.training.step import Batch, BatchRunner, make_optimizer, make_scheduler


class StepDropped(Exception):
    """A signal came between two micro-batches; the step has not been."""


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
        target: TargetBase,
        draft: PEagleDraft,
        train_rows: PackedRows,
        eval_rows: PackedRows,
    ) -> None:
        self.target_fingerprint = target_fingerprint(recipe.target.path)  # now, while it is what was loaded
        # Reading and tokenizing may have taken one rank minutes longer than another: no collective before this.
        agree(
            {
                "recipe": dump_recipe(recipe),
                "set of rows to train on": train_rows.fingerprint(),
                "set of held-out rows": eval_rows.fingerprint(),
                "draft vocabulary": str(draft.draft_token_ids.tolist()),
                "target": self.target_fingerprint,
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
            shard(draft, draft.layers, self.device, train.mixed_precision == "bf16")
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
        self.collator = make_collator(recipe, train.seed, self.device)
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
        self.profiler = StepProfiler(train.profile_steps if accelerator.is_main_process else None, self.folder)
        self.pace = Pace(accelerator.num_processes, recipe.data.num_workers)
        self.about: dict[str, Any] = about_machine(self.device, accelerator.num_processes)
        self.signals = Signals()
        self.guard = Guard(self.folder, train.max_bad_steps)
        self._agreed_stop: str | None = None  # the signal's name, whichever rank got it
        self._agreed_save = False
        self._following: list[Batch] = []  # the next step's micro-batches
        # The run's state beside the drafter's: see run_checkpoint.py, which saves it and puts it back.
        self.step = 0
        self.saved_step: int | None = None
        self.before: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.resumed: Checkpoint | None = None
        self.seconds_before, self._started = 0.0, time.perf_counter()

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Train, evaluating before and after; returns the summary that is also written to `run.json`.

        Raises:
            ValueError: the output folder cannot be used.
            RunStopped: the run had to stop, with a line that says why and how to go on.
        """
        self.reporter = Reporter(self.folder, self.num_steps, self.accelerator, self.step)
        lock = take_up_output(self)
        self.on_main(f"{ABOUT} could not be written", lambda: write_json(self.folder / ABOUT, self.about))
        self.reporter.start_tracker(self.step, asdict(self.recipe))
        steps = self._steps()
        try:
            with memory_explained(self.recipe, self._where), self.signals:
                self._probe()
                return self._run(steps)
        except (RuntimeError, OSError, EOFError) as error:
            if not is_lost_worker(error):
                raise
            raise RunStopped(
                f"a loader process was killed (short of memory?); {last_checkpoint(self.folder)}"
            ) from error
        finally:
            steps.close()  # ends its loader processes, which answer to no signal
            self.reporter.close()
            if lock is not None:
                lock.close()

    def _where(self) -> str:
        return f"out of memory in step {self.step + 1} of {self.num_steps} ({last_checkpoint(self.folder)})"

    def _probe(self) -> None:
        asked = self.recipe.train.probe
        if asked is True or (asked == "auto" and self.device.type == "cuda"):
            self.reporter.say(probe_step(self))

    def _run(self, steps: Iterator[list[Batch]]) -> dict[str, Any]:
        if self.resumed is None:
            self.before = self.evaluate("held-out before training")
        self._started = time.perf_counter()
        while not self._is_asked_to_stop():
            batches = next(steps, None)
            if batches is None:
                return self._finish()
            try:
                self._optimizer_step(batches)
            except StepDropped:
                self.optimizer.zero_grad(set_to_none=True)
                break
            self._log_evaluate_save()
        path = save_checkpoint(self)
        summary = {
            "state": "stopped",
            "signal": self.signals.stop or self._agreed_stop,
            "steps": self.step,
            "checkpoint": path.name,
        }
        self._write_marker(summary)
        return summary

    def _finish(self) -> dict[str, Any]:
        seconds = self.seconds()
        after = self.evaluate("held-out after training")
        self.save(self.folder / "final")
        summary = {
            "state": "finished",
            "drafter": "final",
            "steps": self.step,
            "epochs": self.recipe.train.epochs,
            "max_steps": self.recipe.train.max_steps,
            "train_seconds": seconds,
            "before": self.before,
            "after": after,
            "best": self.best,
        }
        self._write_marker(summary)
        self.on_main("old checkpoints could not be removed", lambda: remove_set_aside(self.folder))
        return summary

    def on_main(self, failing: str, action: Callable[[], object]) -> None:
        """Let the main process write something; RunStopped on every rank, with `failing`, where that does not work."""
        failure = ""
        if self.accelerator.is_main_process:
            try:
                action()
            except OSError as error:
                failure = f"{failing}: {error}; {last_checkpoint(self.folder)}"
            except NonFiniteWeights as error:
                failure = f"{failing}: {error}: {diverged(self)}"
        failure = from_main(failure)  # no collective: a slow disk must not be a time-out
        if failure:
            raise RunStopped(failure)

    def seconds(self) -> float:
        """Spent in training, over all of the run's parts."""
        return self.seconds_before + time.perf_counter() - self._started

    def _is_asked_to_stop(self) -> bool:
        """Whether the run shall end here: what the ranks agreed on in their last step, or this only process's signals."""
        if self.accelerator.num_processes == 1:
            return self.signals.stop is not None
        return self._agreed_stop is not None

    def _steps(self) -> Generator[list[Batch], None, None]:
        """Each optimizer step's micro-batches, on the host.

        A step's supervised elements are counted before its first pass, so all of its draws are here at once, and those of
        the next step; a cache's features, hundreds of times as large, are read one micro-batch ahead.
        """
        loader = DataLoader(
            self.train_rows,
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            num_workers=self.recipe.data.num_workers,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # not the global one: that would count how often a run was resumed
            pin_memory=self.device.type == "cuda",
        )
        self.pace.restart()
        iterator, self._following = iter(loader), []

        def draw() -> list[Batch]:
            return [next(iterator) for _ in range(self.recipe.train.gradient_accumulation_steps)]

        try:
            for step in range(self.step + 1, self.num_steps + 1):
                self.profiler.before(step)
                started = time.perf_counter()
                with record_function("peagle::loader wait"):
                    batches = self._following or draw()
                    self._following = draw() if step < self.num_steps else []
                self.pace.waited(time.perf_counter() - started)
                yield batches
                table = self.profiler.after(step, is_last=step == self.num_steps)
                if table:
                    self.reporter.say(table)
        finally:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()  # not left to garbage collection: a traceback would keep them alive

    # ---- a step

    def accumulate(self, batches: list[Batch]) -> StepStats:
        """Gradients of one optimizer step over all ranks and micro-batches, normalised by its supervised elements.

        Afterwards every rank holds the same gradients and the same sums.
        """
        plans = self._plans = [self.runner.plan(batch) for batch in batches]
        # What signals asked of any rank travels with the count: no collective of its own, and no wait.
        supervised = sum(p.num_supervised for p in plans)
        self._own_save = self.signals.save
        stops = [self.signals.stop == number.name for number in STOPPING]
        count, *self._asked = sum_counts([supervised, self._own_save, *stops], self.device)
        # FSDP averages over ranks where we want the sum; a step with nothing supervised has gradient 0, not nan.
        wide = torch.promote_types(self.draft.dtype, torch.float32)
        scale = (self.accelerator.num_processes if self.runner.sharded else 1) / count.clamp(min=1).to(wide)
        sums = []
        for i, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            if i > 0 and self._is_asked_to_stop():
                raise StepDropped  # who asks may not wait for all of a long step; it is done again from its start
            for coming in [*batches, *self._following][i + 1 : i + 2]:
                self.target.expect(coming)
            sums.append(self.runner.run(batch, plan, scale, is_last=i == len(batches) - 1))
        stats = StepStats(
            torch.stack([s.loss for s in sums]).sum(),
            torch.stack([s.hits for s in sums]).sum(0),
            torch.stack([s.totals for s in sums]).sum(0).to(self.device, non_blocking=True),
        )
        self._own_losses = [s.loss for s in sums]
        with record_function("peagle::reduce"):
            sum_over_ranks([] if self.runner.sharded else self.trained, also=[stats.loss, stats.hits, stats.totals])
        return stats

    def _optimizer_step(self, batches: list[Batch]) -> None:
        stats = self.accumulate(batches)
        limit = self.recipe.train.max_grad_norm
        self._grad_norm = clip_gradients(self.trained, math.inf if limit is None else limit)
        # The step's one wait for the device: a non-finite step must not reach the weights.
        is_finite = torch.isfinite(self._grad_norm) & torch.isfinite(stats.loss)
        applied, save, *stops = (bool(x) for x in torch.stack([is_finite.long(), *self._asked]).tolist())
        self._agreed_stop = next((number.name for number, asked in zip(STOPPING, stops, strict=True) if asked), None)
        self._agreed_save = save
        self.learning_rate = self.scheduler.get_last_lr()[0]  # this step's, before the schedule goes on
        with record_function("peagle::optimizer"):
            if applied:
                self.optimizer.step()
                self.scheduler.step()
            else:
                set_schedule(self.scheduler, self.step + 1)  # its own step() would warn that the optimizer's is missing
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pace.step(batches)
        self.reporter.step()
        self._stats = stats if applied else None
        self.guard.in_a_row = 0 if applied else self.guard.in_a_row + 1
        if not applied:
            skip_step(self, batches, self._own_losses)

    # ---- logging, evaluation, saving

    def _log_evaluate_save(self) -> None:
        train = self.recipe.train
        last = self.step == self.num_steps
        if (self.step % train.log_steps == 0 or self.step == 1 or last) and self._stats is not None:
            self._log(self._stats)
        if train.eval_steps and self.step % train.eval_steps == 0 and not last:
            with self.pace.paused():
                self.evaluate(f"held-out at step {self.step}")
        # Behind the evaluation, so that whoever goes on from here need not repeat it.
        is_due = train.save_steps is not None and self.step % train.save_steps == 0 and not last
        if self._is_asked_to_save() or is_due:
            with self.pace.paused():
                save_checkpoint(self)

    def _is_asked_to_save(self) -> bool:
        if self.accelerator.num_processes == 1:
            self._own_save = self._agreed_save = self.signals.save
        if self._own_save:  # not one that came since: the others do not know of it yet
            self.signals.save = False
        return self._agreed_save

    def _log(self, stats: StepStats) -> None:
        hits, totals = stats.hits.tolist(), stats.totals.tolist()
        accuracy = accuracies(hits, totals)
        values = {
            "step": self.step,
            "num_steps": self.num_steps,
            "loss": float(stats.loss) / max(1, sum(totals)),
            "accuracy": accuracy,
            "expected_accepted_length": expected_accepted_length(accuracy),
            "supervised": totals,
            "learning_rate": self.learning_rate,
            "grad_norm": float(self._grad_norm),
            "padding_share": padding_share(self._plans),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            **self.pace.close_window(self.num_steps - self.step),
            "recompiles": None if self.runner.graphs is None else self.runner.graphs.recompiles,
            "seconds": time.perf_counter() - self.reporter.start_time,
        }
        self.record("train", train_line(values), **values)
        if advice := self.pace.advice():
            self.reporter.say(advice)

    def evaluate(self, title: str) -> dict[str, Any] | None:
        """Held-out loss, accuracies and expected accepted length over all ranks; None without held-out rows."""
        values = self.evaluator()
        if values is not None:
            self.record("eval", eval_line(title, values), step=self.step, **values)
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
            self.save(self.folder / folder, {"best.json": json.dumps(self.best)})
        self.on_main("best.json could not be written", lambda: write_json(self.folder / "best.json", self.best))

    def save(self, path: Path, extra: dict[str, str] | None = None) -> None:
        """Write the drafter as vLLM loads it, and further files; every rank must call it."""
        state = full_weights(self.draft)
        texts = {"recipe.yaml": dump_recipe(self.recipe), **(extra or {})}
        self.on_main(f"{path} could not be written", lambda: save_drafter(path, self.draft.config, state, texts))

    def _write_marker(self, summary: dict[str, Any]) -> None:
        self.on_main(f"{MARKER} could not be written", lambda: write_json(self.folder / MARKER, summary))

    def record(self, kind: str, line: str, **values: Any) -> None:
        self.on_main("metrics.jsonl could not be written", lambda: self.reporter.record(kind, line, **values))
