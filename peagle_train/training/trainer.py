"""The training loop: sequences in, drafter out, on one process or many.

A step whose loss or gradient is not finite is not applied, but counts: the learning rate and the position in the data move
on, so that step n always trains the same sequences at the same rate; weights and moments are unchanged.
"""

import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from peagle_train.config import Recipe, dump_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.plan import padding_share
from peagle_train.data.packing import TrainingData
from peagle_train.data.sampler import StepBatchSampler
from peagle_train.data.training_data import make_collator
from peagle_train.distributed import (
    agree,
    check_sharding,
    clip_gradients,
    from_all,
    full_moments,
    full_weights,
    load_full,
    same_on_all_ranks,
    shard,
    sum_counts,
    sum_over_ranks,
)
from peagle_train.ending import STOPPING, Signals, is_lost_worker, leave_to_parent
from peagle_train.files import NonFiniteWeights, RunStopped, write_json, write_text
from peagle_train.memory import memory_explained, probe_step
from peagle_train.serving.drafter_io import check_finite, fill_drafter, save_drafter, save_tensors
from peagle_train.target_model.frozen import TargetBase
from peagle_train.target_model.loading import target_fingerprint
from peagle_train.training import checkpoint as checkpoints
from peagle_train.training.checkpoint import MARKER, Checkpoint, last_checkpoint, tensor_fingerprint
from peagle_train.training.evaluate import Evaluator
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
from peagle_train.training.step import (
    Batch,
    BatchRunner,
    Gradients,
    StepResult,
    add_up,
    bad_sequences,
    has_finite_weights,
    learning_rate,
    make_optimizer,
)

BAD_ROWS = "bad_rows.jsonl"


class StepDropped(Exception):
    """A signal came between two micro-batches; the step was not made."""


class Trainer:
    """One run. `run` does everything; the methods after it are its parts, in the order in which they happen.

    Args:
        recipe: the settings. accelerator: made by the caller, who knows the device.
        target: frozen, on the accelerator's device. draft: on the CPU; prepared here.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, target: TargetBase, draft: PEagleDraft, data: TrainingData
    ) -> None:
        self.target_fingerprint = target_fingerprint(recipe.target.path)  # now, while it is what was loaded
        # Reading and tokenizing may have taken one rank minutes longer than another: no collective before this.
        agree(
            {
                "recipe": dump_recipe(recipe),
                "set of training data": data.train_rows.fingerprint(),
                "set of held-out data": data.eval_rows.fingerprint(),
                "draft vocabulary": str(draft.draft_token_ids.tolist()),
                "target": self.target_fingerprint,
            }
        )
        self.recipe, self.accelerator, self.target, self.draft, self.data = recipe, accelerator, target, draft, data
        self.folder = Path(recipe.output.dir)
        self.device, self.world_size = accelerator.device, accelerator.num_processes
        train = recipe.train
        # No DDP around the drafter: gradients are summed once a step (sum_over_ranks), so a rank may run any number of
        # passes. (DDP's reducer would also hold a second copy of the gradients, and can deadlock at exit on gloo.)
        if check_sharding(train.sharding) and self.world_size > 1:
            same_on_all_ranks(draft, self.device)
            shard(draft, draft.layers, self.device, train.mixed_precision == "bf16")
        else:
            same_on_all_ranks(draft.to(self.device), self.device)
        self.trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(draft, train)
        self.runner = BatchRunner(recipe, accelerator, target, draft)
        self.evaluator = Evaluator(self.runner, data.eval_rows)
        self.collator = make_collator(recipe, train.seed, self.device)
        self.sampler = StepBatchSampler(
            len(data.train_rows),
            train.batch_size,
            train.gradient_accumulation_steps,
            accelerator.process_index,
            self.world_size,
            train.seed,
        )
        self.num_steps = self.sampler.num_steps = train.max_steps or train.epochs * self.sampler.steps_per_epoch
        self.reporter = Reporter(self.folder, self.num_steps, accelerator)
        self.profiler = StepProfiler(train.profile_steps if accelerator.is_main_process else None, self.folder)
        self.pace = Pace(self.world_size, recipe.data.num_workers)
        self.signals = Signals()
        self.following: list[Batch] = []
        """The next step's micro-batches."""
        # What a checkpoint saves beside weights, moments and generators, and `restore` puts back:
        self.step, self.saved_step = 0, -1
        self.bad_in_a_row, self.bad_lines = 0, 0
        self.before: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.resumed: Checkpoint | None = None
        self.seconds_before, self.started = 0.0, time.perf_counter()

    # The run

    def run(self) -> dict[str, Any]:
        """Train, evaluating before and after; returns the summary that is also written to `run.json`.

        Raises:
            ValueError: the output folder cannot be used.
            RunStopped: the run had to stop, with a line on why and how to resume.
        """
        lock = self._take_output()
        self.reporter.start(self.step, asdict(self.recipe))
        steps = self.steps()
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
            self.reporter.bar.close()
            if lock is not None:
                lock.close()

    def _where(self) -> str:
        return f"out of memory in step {self.step + 1} of {self.num_steps} ({last_checkpoint(self.folder)})"

    def _probe(self) -> None:
        asked = self.recipe.train.probe
        if asked is True or (asked == "auto" and self.device.type == "cuda"):
            with suppress(StepDropped):  # a signal: the run then ends before its first step
                parts = self.recipe, self.target, self.draft, self.collator, self.optimizer
                self.reporter.say(probe_step(*parts, accumulate=self.accumulate))

    def _run(self, steps: Generator[list[Batch], None, None]) -> dict[str, Any]:
        if self.resumed is None:
            self.before = self.evaluate("held-out before training")
        self.started = time.perf_counter()
        agreed = None
        # One process obeys its signal at once; several, when all of them know.
        while (stop := self.signals.stop if self.world_size == 1 else agreed) is None:
            batches = next(steps, None)
            if batches is None:
                return self._finish()
            try:
                result = self.take_step(batches)
            except StepDropped:
                self.optimizer.zero_grad(set_to_none=True)
                continue
            agreed = result.stop
            if not result.applied:
                self._skip(batches, result)
            self._log_evaluate_save(result)
        path = self.save_checkpoint()
        return self._write_marker({"state": "stopped", "signal": stop, "steps": self.step, "checkpoint": path.name})

    def _finish(self) -> dict[str, Any]:
        seconds = self.seconds()
        after = self.evaluate("held-out after training")
        self._save_drafter(self.folder / "final")
        summary = self._write_marker(
            {
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
        )
        self.on_main("old checkpoints could not be removed", lambda: checkpoints.remove_set_aside(self.folder))
        return summary

    def _write_marker(self, summary: dict[str, Any]) -> dict[str, Any]:
        self.on_main(f"{MARKER} could not be written", lambda: write_json(self.folder / MARKER, summary))
        return summary

    def on_main(self, failing: str, action: Callable[[], object]) -> None:
        """Let the main process write something; RunStopped on every rank, with `failing`, if that does not work."""
        failure = ""
        if self.accelerator.is_main_process:
            try:
                action()
            except OSError as error:
                failure = f"{failing}: {error}; {last_checkpoint(self.folder)}"
            except NonFiniteWeights as error:
                failure = f"{failing}: {error}: {self._diverged()}"
        if failure := from_all(failure)[0]:
            raise RunStopped(failure)

    def seconds(self) -> float:
        """Spent in training, over all of the run's parts."""
        return self.seconds_before + time.perf_counter() - self.started

    # A step

    def steps(self) -> Generator[list[Batch], None, None]:
        """Each optimizer step's micro-batches, on the host.

        A step's supervised elements are counted before its first pass, so all of its draws are here at once, and those of
        the next step; a cache's features, hundreds of times as large, are read one micro-batch ahead.
        """
        loader = DataLoader(
            self.data.train_rows,
            batch_sampler=self.sampler,
            collate_fn=self.collator,
            num_workers=self.recipe.data.num_workers,
            worker_init_fn=leave_to_parent,
            generator=torch.Generator(),  # not the global one: that would count how often a run was resumed
            pin_memory=self.device.type == "cuda",
        )
        self.pace.restart()
        iterator, self.following = iter(loader), []

        def draw() -> list[Batch]:
            return [next(iterator) for _ in range(self.recipe.train.gradient_accumulation_steps)]

        try:
            for step in range(self.step + 1, self.num_steps + 1):
                self.profiler.before(step)
                started = time.perf_counter()
                with record_function("peagle::loader wait"):
                    batches = self.following or draw()
                    self.following = draw() if step < self.num_steps else []
                self.pace.wait += time.perf_counter() - started
                yield batches
                if table := self.profiler.after(step, is_last=step == self.num_steps):
                    self.reporter.say(table)
        finally:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()  # not left to garbage collection: a traceback would keep them alive

    def accumulate(self, batches: list[Batch]) -> Gradients:
        """Gradients of one optimizer step over all ranks and micro-batches, normalised by its supervised elements.

        Afterwards every rank holds the same gradients and the same sums.
        """
        plans = [self.runner.plan(batch) for batch in batches]
        # What signals asked of any rank travels with the count: no collective of its own, and no wait.
        save, stops = self.signals.save, [self.signals.stop == number.name for number in STOPPING]
        sums = sum_counts([sum(p.num_supervised for p in plans), save, *stops], self.device)
        # FSDP averages over ranks where we want the sum; a step with nothing supervised has gradient 0, not nan.
        wide = torch.promote_types(self.draft.dtype, torch.float32)
        scale = (self.world_size if self.runner.sharded else 1) / sums[0].clamp(min=1).to(wide)
        parts = []
        for i, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            if i > 0 and self.world_size == 1 and self.signals.stop:
                raise StepDropped  # a stop should not wait for all of a long step; it is repeated when the run resumes
            for coming in [*batches, *self.following][i + 1 : i + 2]:
                self.target.expect(coming)
            parts.append(self.runner.run(batch, plan, scale, is_last=i == len(batches) - 1))
        stats = add_up(parts, self.device)
        with record_function("peagle::reduce"):
            sum_over_ranks([] if self.runner.sharded else self.trained, also=[stats.loss, stats.hits, stats.totals])
        return Gradients(stats, [part.loss for part in parts], plans, sums[1:], save)

    def take_step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step; it is not applied if its loss or gradient is not finite."""
        gradients = self.accumulate(batches)
        limit = self.recipe.train.max_grad_norm
        norm = clip_gradients(self.trained, math.inf if limit is None else limit)
        # The step's one wait for the device: a non-finite step must not reach the weights.
        is_finite = torch.isfinite(norm) & torch.isfinite(gradients.stats.loss)
        applied, save, *stops = torch.cat([is_finite.long()[None], gradients.asked]).tolist()
        if gradients.asked_to_save:  # a request that came since is not yet known to the other ranks
            self.signals.save = False
        rate = self.rate_after(self.step)
        with record_function("peagle::optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if applied:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        self.pace.step(batches)
        self.reporter.bar.update(1)
        stop = next((number.name for number, asked in zip(STOPPING, stops, strict=True) if asked), None)
        return StepResult(gradients, norm, rate, bool(applied), bool(save), stop)

    def rate_after(self, step: int) -> float:
        """The learning rate of the step after `step`."""
        return learning_rate(self.recipe.train, self.num_steps, step)

    def _skip(self, batches: list[Batch], result: StepResult) -> None:
        """Log a step that was not applied and its sequences; stop the run if it was one too many.

        If the weights are not finite, no sequence is at fault, and no checkpoint is saved or offered.
        """
        if not has_finite_weights(self.draft, self.device):
            raise RunStopped(
                f"step {self.step} was not applied: the drafter's weights are not finite: {self._diverged()}"
            )
        pairs = zip(batches, result.gradients.losses, strict=True)
        keys = [key for b, loss in pairs if not bool(torch.isfinite(loss)) for key in bad_sequences(self.runner, b)]
        what, found = "loss", from_all(keys)
        if not any(found):  # it cannot be known whose gradient it is
            what, found = "gradient", from_all([key for batch in batches for key in batch["row_key"].tolist()])
        epoch = (self.step - 1) // self.sampler.steps_per_epoch
        entries = [
            {"step": self.step, "epoch": epoch, "rank": rank, "row_key": key, "what": what}
            for rank, keys in enumerate(found)
            for key in keys
            if key  # 0 is a sequence of nothing
        ]
        self.on_main(f"{BAD_ROWS} could not be written", lambda: self._write_bad_rows(entries))
        line = (
            f"{what} is not finite in step {self.step}, sequences {[entry['row_key'] for entry in entries]}: the step was"
            " not applied"
        )
        self._record("skipped", f"step {self.step}/{self.num_steps}  {line}", step=self.step)
        bad, most = self.bad_in_a_row, self.recipe.train.max_bad_steps
        if bad < most:
            return
        self.bad_in_a_row = 0  # a run that resumes here counts from 0
        path = self.save_checkpoint()
        # Not one saved among the bad steps: it has their number, and would stop at once.
        sound = [p for p in checkpoints.list_checkpoints(self.folder) if checkpoints.step_of(p) <= self.step - bad]
        raise RunStopped(
            f"{line}, number {bad} in a row (train.max_bad_steps is {most}), at a learning rate of"
            f" {result.learning_rate:.3g}. The weights of the last good step, all finite, are in {path}: the same command"
            " with --resume continues after these sequences"
            + (f", with --resume {sound[0]} before them" if sound else "")
            + "; if the loss had risen before, start a new run with a lower train.learning_rate"
        )

    def _write_bad_rows(self, entries: list[dict[str, Any]]) -> None:
        with (self.folder / BAD_ROWS).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.bad_lines += len(entries)

    def _diverged(self) -> str:
        train, rate = self.recipe.train, self.rate_after(max(0, self.step - 1))
        return (
            f"the run has diverged at a learning rate of {rate:.3g} (train.learning_rate {train.learning_rate:g},"
            f" train.weight_decay {train.weight_decay:g}): start a new run with a lower one"
        )

    # Logging, evaluation, saving

    def _log_evaluate_save(self, result: StepResult) -> None:
        train = self.recipe.train
        last = self.step == self.num_steps
        if result.applied and (self.step % train.log_steps == 0 or self.step == 1 or last):
            self._log(result)
        if train.eval_steps and self.step % train.eval_steps == 0 and not last:
            with self.pace.paused():
                self.evaluate(f"held-out at step {self.step}")
        # After the evaluation, so that a run that resumes here need not repeat it.
        is_due = train.save_steps is not None and self.step % train.save_steps == 0 and not last
        if result.save or is_due:
            with self.pace.paused():
                self.save_checkpoint()

    def _log(self, result: StepResult) -> None:
        stats = result.gradients.stats
        hits, totals = stats.hits.tolist(), stats.totals.tolist()
        accuracy = accuracies(hits, totals)
        values = {
            "step": self.step,
            "num_steps": self.num_steps,
            "loss": float(stats.loss) / max(1, sum(totals)),
            "accuracy": accuracy,
            "expected_accepted_length": expected_accepted_length(accuracy),
            "supervised": totals,
            "learning_rate": result.learning_rate,
            "grad_norm": float(result.grad_norm),
            "padding_share": padding_share(result.gradients.plans),
            "peak_memory_bytes": peak_memory_bytes(self.device),
            **self.pace.close_window(self.num_steps - self.step),
            "recompiles": None if self.runner.graphs is None else self.runner.graphs.recompiles,
            "seconds": time.perf_counter() - self.reporter.start_time,
        }
        self._record("train", train_line(values), **values)
        if advice := self.pace.advice():
            self.reporter.say(advice)

    def _record(self, kind: str, line: str, **values: Any) -> None:
        self.on_main("metrics.jsonl could not be written", lambda: self.reporter.record(kind, line, **values))

    def evaluate(self, title: str) -> dict[str, Any] | None:
        """Held-out loss, accuracies and expected accepted length over all ranks; None without held-out data."""
        values = self.evaluator()
        if values is None:
            return None
        self._record("eval", eval_line(title, values), step=self.step, **values)
        length = values["expected_accepted_length"]
        if self.best is None or length > self.best["expected_accepted_length"]:
            last = self.step == self.num_steps
            folder = None if self.step == 0 else "final" if last else "best"
            self.best = {"step": self.step, "expected_accepted_length": length, "folder": folder}
            if folder == "best":
                self._save_drafter(self.folder / folder, {"best.json": json.dumps(self.best)})
            if folder:
                self.on_main("best.json could not be written", lambda: write_json(self.folder / "best.json", self.best))
        return values

    def _save_drafter(self, path: Path, extra: dict[str, str] | None = None) -> None:
        """Write the drafter as vLLM loads it, and further files; every rank must call it."""
        state = full_weights(self.draft)
        texts = {"recipe.yaml": dump_recipe(self.recipe), **(extra or {})}
        self.on_main(f"{path} could not be written", lambda: save_drafter(path, self.draft.config, state, texts))

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """Save checkpoint-<step>, unless it was saved before, and return it; every rank must call it."""
        path = self.folder / f"checkpoint-{self.step}"
        if self.saved_step == self.step:
            return path
        weights, moments = full_weights(self.draft), full_moments(self.draft, self.optimizer)
        # Nothing of a run draws from the global generators; a target's own code may.
        own = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        generators = {f"{kind}.{rank}": t for rank, states in enumerate(from_all(own)) for kind, t in states.items()}
        state = {
            "step": self.step,
            "num_steps": self.num_steps,
            "learning_rates": [self.rate_after(self.step)] * len(self.optimizer.param_groups),
            "bad_steps_in_a_row": self.bad_in_a_row,
            "train_seconds": self.seconds(),
            "before": self.before,
            "best": self.best,
            "lines": {"metrics.jsonl": self.reporter.lines, BAD_ROWS: self.bad_lines},
            "must_match": self._must_match(),
            "world_size": self.world_size,
            "versions": checkpoints.versions(),
            "recipe": asdict(self.recipe),
        }

        def fill(folder: Path) -> None:
            fill_drafter(folder, self.draft.config, weights, {"recipe.yaml": dump_recipe(self.recipe)})
            save_tensors(folder / "optimizer.state", moments)
            save_tensors(folder / "rng.state", generators)
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        def write() -> None:
            self.reporter.sync()  # a checkpoint's lines are on disk before it is
            checkpoints.write_checkpoint(self.folder, self.step, fill)
            checkpoints.prune(self.folder, self.recipe.train.keep_last, self.recipe.train.keep_every)

        self.on_main(f"{path} could not be saved", write)
        self.saved_step = self.step
        return path

    def _must_match(self) -> dict[str, Any]:
        """What a run that resumes must find unchanged, by the words for it."""
        rows, held_out, head_rows = self.data.train_rows, self.data.eval_rows, self.runner.head_rows
        return {
            "training data": [len(rows), rows.fingerprint()],
            "held-out data": [len(held_out), held_out.fingerprint()],
            "sequences of a step": self.sampler.global_batch_size,
            "draft vocabulary": tensor_fingerprint(self.draft.draft_token_ids.reshape(1, -1)),
            "target's config and weights": self.target_fingerprint,
            "target's head": [str(head_rows.dtype)[6:], tensor_fingerprint(head_rows)],
        }

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Make this new trainer the one that was saved. Changes no file; returns what the user should know.

        Raises:
            ValueError: data, draft vocabulary, target or the size of a step are not the checkpoint's.
        """
        state, folder = checkpoint.state, checkpoint.folder
        self.sampler.check_global_batch_size(state["must_match"]["sequences of a step"])
        checkpoints.compare_state(state, self._must_match(), self.num_steps, folder.name)
        weights, moments, generators = (
            load_file(folder / name) for name in ("model.safetensors", "optimizer.state", "rng.state")
        )
        check_finite(weights, f"--resume: {folder}'s")
        load_full(self.draft, self.optimizer, weights, moments)
        rank = self.accelerator.process_index
        if f"cpu.{rank}" in generators:
            torch.set_rng_state(generators[f"cpu.{rank}"].clone())
        if f"cuda.{rank}" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators[f"cuda.{rank}"].clone())
        self.step = self.saved_step = self.sampler.start_step = checkpoint.step
        self.bad_in_a_row = state["bad_steps_in_a_row"]
        self.before, self.best, self.seconds_before = state["before"], state["best"], state["train_seconds"]
        self.resumed = checkpoint
        rate = self.rate_after(self.step)
        notes = checkpoint.notes + checkpoints.compare_surroundings(state, self.num_steps, rate, self.world_size)
        if self.best and self.best["folder"] == "best" and not checkpoints.has_best(self.folder, self.best["step"]):
            notes.append(
                f"best/ holds a later step than {self.step}: the drafter of step {self.best['step']}, the best so far, is"
                " gone; the next better one takes its place"
            )
            self.best = {**self.best, "folder": None}
        return notes

    def _take_output(self) -> Any:
        """Make a new output folder the run's, or put one back to where its checkpoint was saved; returns its lock (main).

        Raises:
            ValueError: on every rank, if the folder cannot be used.
        """
        failure, lock = "", None
        if self.accelerator.is_main_process:
            report = self.data.report
            about = about_machine(self.device, self.world_size)
            about["data"] = {"packing": asdict(report), "max_length": self.recipe.data.max_length}
            try:
                if self.resumed is None:
                    checkpoints.check_output(self.folder)
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_json(self.folder / MARKER, {"state": "started"})
                lock = checkpoints.lock_output(self.folder)
                if self.resumed is not None:
                    self._put_back(self.resumed)
                write_text(self.folder / "recipe.yaml", dump_recipe(self.recipe))
                write_json(self.folder / ABOUT, about)
            except ValueError as error:
                failure = str(error)
            except OSError as error:
                failure = f"output.dir {self.folder} cannot be written: {error}"
        if failure := from_all(failure)[0]:
            raise ValueError(failure)
        return lock

    def _put_back(self, checkpoint: Checkpoint) -> None:
        """Undo what an output folder got after the checkpoint, and log it."""
        say = self.reporter.say
        checkpoints.clean_up(self.folder)
        if later := checkpoints.set_aside_later(self.folder, checkpoint.step):
            say(f"resume: checkpoints of later steps ({', '.join(map(str, later))}) are set aside until the run ends")
        lines = {}
        for name, wanted in checkpoint.state["lines"].items():
            dropped, missing = checkpoints.keep_lines(self.folder / name, wanted)
            lines[name] = wanted - missing
            if dropped:
                say(f"resume: {name}: {dropped} lines after step {checkpoint.step} dropped")
            if missing:
                say(f"resume: {name}: {missing} lines that were there at step {checkpoint.step} are missing")
        self.reporter.lines, self.bad_lines = lines["metrics.jsonl"], lines[BAD_ROWS]
        write_json(self.folder / MARKER, {"state": "started"})
        say(f"resume: continuing after step {checkpoint.step}, from {checkpoint.folder}")
