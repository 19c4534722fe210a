"""The training loop: sequences in, drafter out, on one process or many.

A step whose loss or gradient is not finite is not applied, but counts: the learning rate and the position in the data move
on, so that step n always trains the same sequences at the same rate; weights and moments are unchanged.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from peagle_train import distributed
from peagle_train.config import Recipe, dump_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.passes import StepStats
from peagle_train.core.plan import Plan, padding_share
from peagle_train.data.packing import TrainingData
from peagle_train.data.training_data import StepBatchSampler, make_collator
from peagle_train.files import (
    NonFiniteWeights,
    RunStopped,
    Signals,
    leave_to_parent,
    save_tensors,
    write_bytes,
    write_json,
)
from peagle_train.machine import GIB, available_ram, peak_ram, resident_ram
from peagle_train.memory import memory_explained
from peagle_train.serving.drafter_io import fill_drafter, save_drafter
from peagle_train.target_model.frozen import TargetBase, TargetLost
from peagle_train.target_model.loading import target_fingerprint
from peagle_train.target_model.ring import Ring, block_steps
from peagle_train.training import checkpoint as checkpoints
from peagle_train.training import metrics
from peagle_train.training.step import Batch, BatchRunner, add_up, make_optimizers


class Trainer:
    """One run. `run` does everything; the methods after it are its parts.
    target: frozen, on the accelerator's device. draft: on the CPU; prepared here.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, target: TargetBase, draft: PEagleDraft, data: TrainingData
    ) -> None:
        self.recipe, self.accelerator, self.target, self.draft, self.data = recipe, accelerator, target, draft, data
        self.folder = Path(recipe.output.dir)
        self.device, self.world_size = accelerator.device, accelerator.num_processes
        train, rank = recipe.train, accelerator.process_index
        sizes = len(data.train_rows), train.batch_size, train.gradient_accumulation_steps
        self.sampler = StepBatchSampler(*sizes, rank, self.world_size, train.seed, reuse=recipe.target.reuse)
        if recipe.target.reuse > 1:
            fitting = block_steps(recipe, target, self.sampler.global_batch_size)
            self.sampler.block_steps = min(fitting, self.sampler.steps_per_epoch)
        self.num_steps = self.sampler.num_steps = train.max_steps or train.epochs * self.sampler.steps_per_epoch
        self.must_match = {
            "training data": [len(data.train_rows), data.train_rows.fingerprint()],
            "held-out data": [len(data.eval_rows), data.eval_rows.fingerprint()],
            "sequences of a step": self.sampler.global_batch_size,
            "draft vocabulary": checkpoints.vocabulary_fingerprint(draft.draft_token_ids),
            "mask token": draft.mask_token_id,
            "target's config and weights": target_fingerprint(recipe.target.path),  # now, while it is what was loaded
            **({"steps that target.ring holds": self.sampler.block_steps} if recipe.target.reuse > 1 else {}),
        }
        """What has to be the same on all ranks, and when a run resumes, by the words for it."""
        # Reading and tokenizing may have taken one rank minutes longer than another: no collective before this.
        distributed.agree({"recipe": dump_recipe(recipe), **self.must_match})
        # No DDP around the drafter: gradients are summed once a step (sum_over_ranks), so a rank may run any number of
        # passes. (DDP's reducer would also hold a second copy of the gradients, and can deadlock at exit on gloo.)
        sharded = distributed.check_sharding(train.sharding) and self.world_size > 1
        distributed.same_on_all_ranks(draft if sharded else draft.to(self.device), self.device)
        if sharded:
            distributed.shard(draft, draft.layers, self.device, train.mixed_precision == "bf16")
        self.trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(draft, train)
        self.runner = BatchRunner(recipe, accelerator, target, draft)
        self.collator = make_collator(recipe, train.seed, self.device)
        self.reporter = metrics.Reporter(self.folder, accelerator)
        self.pace, self.signals = metrics.Pace(self.world_size), Signals()
        self.recent: deque[Tensor] = deque(maxlen=metrics.SMOOTHED)
        """int64 [2, K] of the last steps: hits, totals; on the device."""
        self.following: deque[Batch] = deque()
        """Micro-batches after those of this step: at least the next one's, more where the target wants to know of them."""
        # What a checkpoint saves beside weights and moments, and `restore` puts back:
        self.step, self.saved_step, self.bad_in_a_row, self.evaluated = 0, -1, 0, 0
        self.before: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.resumed: checkpoints.Checkpoint | None = None
        self.lock: IO[str] | None = None
        self.seconds_before, self.started = 0.0, time.perf_counter()

    # The run

    def run(self) -> dict[str, Any]:
        """Train, evaluating before and after; returns the summary that is also written to `run.json`. ValueError: the
        output folder is another's. RunStopped: the run had to stop, with a line on why and how to resume.
        """
        self.on_main(f"output.dir {self.folder}", self._take_output)
        self.reporter.start(asdict(self.recipe))
        steps = self.steps()
        try:
            with memory_explained(self.recipe, self._where), self.signals:
                probe = self.recipe.train.probe
                if probe is True or (probe == "auto" and self.device.type == "cuda"):
                    self.reporter.say(self.probe())
                return self._run(steps)
        finally:
            self.target.close()
            steps.close()  # ends its loader processes, which answer to no signal
            if self.lock:
                self.lock.close()

    def _where(self) -> str:
        return f"out of memory in step {self.step + 1} of {self.num_steps} ({checkpoints.last_checkpoint(self.folder)})"

    def _run(self, steps: Generator[list[Batch], None, None]) -> dict[str, Any]:
        if self.recipe.target.reuse > 1:
            self.runner.ring = Ring(self.recipe, self.target, self.accelerator.process_index, self.world_size)
        if self.resumed is None:
            self.before = self.evaluate("held-out before training")
        self.started = time.perf_counter() - self.seconds_before
        try:
            return self._loop(steps)
        except TargetLost as lost:
            if self.world_size > 1:  # the others are in the middle of their step
                raise RunStopped(f"{lost}; {checkpoints.last_checkpoint(self.folder)}") from None
            raise RunStopped(f"{lost}; --resume continues from {self.save_checkpoint().name}") from None

    def _loop(self, steps: Generator[list[Batch], None, None]) -> dict[str, Any]:
        eval_steps, save_steps, agreed = self.recipe.train.eval_steps, self.recipe.train.save_steps, False
        while True:
            with self.pace.paused():
                # Where a run resumes, too: the target may have been lost before it could be.
                if eval_steps and self.step % eval_steps == 0 and self.step not in (self.evaluated, self.num_steps):
                    self.evaluate(f"held-out at step {self.step}")
                # After the evaluation, so that a run that resumes here need not repeat it.
                if save_steps and self.step % save_steps == 0 and 0 < self.step < self.num_steps:
                    self.save_checkpoint()
            # One process obeys its signal at once; several, when all of them know.
            if self.signals.stop if self.world_size == 1 else agreed:
                path = self.save_checkpoint()
                return self._write_marker({"state": "stopped", "steps": self.step, "checkpoint": path.name})
            batches = next(steps, None)
            if batches is None:
                return self._finish()
            agreed = self.take_step(batches)

    def _finish(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        summary = {"state": "finished", "drafter": "final", "steps": self.step, "train_seconds": seconds}
        after = self.evaluate("held-out after training")
        self._save_drafter(self.folder / "final")
        if self.runner.ring:
            self.runner.ring.remove()
        return self._write_marker({**summary, "before": self.before, "after": after, "best": self.best})

    def _write_marker(self, summary: dict[str, Any]) -> dict[str, Any]:
        self.on_main(checkpoints.MARKER, lambda: write_json(self.folder / checkpoints.MARKER, summary))
        return summary

    def on_main(self, what: str, write: Callable[[], object]) -> None:
        """Let the main process write something; on every rank RunStopped if it cannot be written, ValueError if refused."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                write()
            except BrokenPipeError:  # nobody reads what is printed
                raise
            except OSError as error:
                last = checkpoints.last_checkpoint(self.folder)
                failure = RunStopped(f"{what} could not be written: {error}; {last}")
            except NonFiniteWeights as error:
                why = f"the run diverged at train.learning_rate {self.recipe.train.learning_rate:g}: start with a lower one"
                failure = RunStopped(f"{what} could not be written: {error}: {why}")
            except ValueError as error:
                failure = error
        if failure := distributed.from_all(failure)[0]:
            raise failure

    def probe(self) -> str:
        """Run one step on every rank and undo it; returns the line that says what it took on this rank.

        Sequences that are full, supervised throughout and as long as they get need all that any step can need. No weight,
        optimizer state, generator or file changes. torch.OutOfMemoryError: it does not fit, and nor would the run.
        """
        recipe, target, draft = self.recipe, self.target, self.draft
        B, L, on_cuda = recipe.train.batch_size, recipe.data.max_length, self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        ids = torch.randint(target.vocab_size - 1, (L,), generator=torch.Generator().manual_seed(0))
        ids += ids >= draft.mask_token_id  # which no sequence may hold
        row: dict[str, Any] = {"input_ids": ids, "loss_mask": torch.ones_like(ids), "row_key": 0, "epoch": 0}
        if not (recipe.target.cache or recipe.target.server):
            # Sequences of several documents may take a mask of L x L, which a document alone does without.
            position = torch.cat([torch.arange(L - L // 2), torch.arange(L // 2)])
            packed = {"input_ids": ids.expand(B, -1), "position_ids": position.expand(B, -1).contiguous()}
            target.outputs(packed, draft.lm_head.weight)
        # States, AdamW's two and Muon's one, are there in all later steps; in a resumed run, already.
        states: list[Tensor] = []
        for optimizer in self.optimizers:
            stateless = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
            for _ in range(1 + isinstance(optimizer, torch.optim.AdamW)):
                states += map(torch.zeros_like, stateless)
        batch = self.collator([row] * B)
        self.accumulate([batch] * min(2, recipe.train.gradient_accumulation_steps))
        distributed.clip_gradients(self.trained, math.inf)
        del states, batch
        draft.zero_grad()
        peak, total = peak_ram(), available_ram() + resident_ram()
        if on_cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            # What lies outside of the allocator (CUDA's context, other processes), and the most that it ever held.
            held, most = torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
            peak = total - free - held + most
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return f"fits: peak {peak / GIB:.2f} of {total / GIB:.2f} GiB in a full-length step (train.probe)"

    # A step

    def steps(self) -> Generator[list[Batch], None, None]:
        """Each optimizer step's micro-batches, on the host.

        A step's supervised elements are counted before its first pass, so all of its draws are here at once, and those of
        the next step; features, hundreds of times as large, come as far ahead as the target's `expect` lets them.
        """
        train = self.recipe.train
        how: dict[str, Any] = {"worker_init_fn": leave_to_parent, "pin_memory": self.device.type == "cuda"}
        # Not the global generator: that would count how often a run was resumed.
        how |= {"num_workers": self.recipe.data.num_workers, "generator": torch.Generator()}
        loader = DataLoader(self.data.train_rows, batch_sampler=self.sampler, collate_fn=self.collator, **how)
        first, last = train.profile_steps if train.profile_steps and self.accelerator.is_main_process else (0, 0)
        profile: Any = None
        self.pace.restart()
        iterator, following, size = iter(loader), self.following, train.gradient_accumulation_steps
        ahead = max(size, self.target.ahead // train.batch_size)
        try:
            for step in range(self.step + 1, self.num_steps + 1):
                if step == first:
                    profile = torch.profiler.profile()
                    profile.start()
                started = time.perf_counter()
                with record_function("peagle::loader wait"):
                    following.extend(islice(iterator, size + ahead - len(following)))
                    batches = [following.popleft() for _ in range(size)]
                self.pace.wait += time.perf_counter() - started
                yield batches
                if profile and step == min(last, self.num_steps):
                    profile.stop()
                    profile.export_chrome_trace(str(self.folder / "trace.json"))
                    self.reporter.say(metrics.profile_table(profile, step - first + 1))
        finally:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()  # not left to garbage collection: a traceback would keep them alive

    def accumulate(self, batches: list[Batch]) -> tuple[StepStats, list[Plan], Tensor]:
        """Gradients of one optimizer step over all ranks and micro-batches, normalised by its supervised elements. Returns
        its sums, the same on every rank, its plans, and, int64 [1], how many ranks were asked to stop.
        """
        plans = [self.runner.plan(batch) for batch in batches]
        # What a signal asked of any rank travels with the count: no collective of its own, and no wait.
        sums = distributed.counts_over_ranks([sum(p.num_supervised for p in plans), self.signals.stop], self.device)
        # FSDP averages over ranks where we want the sum; a step with nothing supervised has gradient 0, not nan.
        wide = torch.promote_types(self.draft.dtype, torch.float32)
        scale = (self.world_size if self.runner.sharded else 1) / sums[0].clamp(min=1).to(wide)
        parts: list[StepStats] = []
        ring, self.target.waited = self.runner.ring, 0.0
        if ring:
            ring.keeps = self.sampler.comes_again(self.step)
        for i, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            (ring or self.target).expect([*batches[i:], *self.following])
            parts.append(self.runner.run(batch, plan, scale, is_last=i == len(batches) - 1))
        self.pace.wait += self.target.waited
        stats = add_up(parts, self.device)
        with record_function("peagle::reduce"):
            unreduced = [] if self.runner.sharded else self.trained
            distributed.sum_over_ranks(unreduced, also=[stats.loss, stats.hits, stats.totals])
        return stats, plans, sums[1:]

    def take_step(self, batches: list[Batch]) -> bool:
        """One optimizer step, logged; not applied if it is not finite. Returns whether some rank was asked to stop."""
        stats, plans, asked = self.accumulate(batches)
        limit = self.recipe.train.max_grad_norm
        norm = distributed.clip_gradients(self.trained, math.inf if limit is None else limit)
        # The step's one wait for the device: a non-finite step must not reach the weights.
        is_finite = torch.isfinite(norm) & torch.isfinite(stats.loss)
        applied, stop = map(bool, torch.cat([is_finite.long()[None], asked]).tolist())
        rate = self.rate_after(self.step)
        with record_function("peagle::optimizer"):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                if applied:
                    optimizer.step()
            self.draft.zero_grad()
        self.step += 1
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        self.pace.step(batches)
        if not applied:
            self._skip(batches)
            return stop
        self.recent.append(torch.stack([stats.hits, stats.totals]))
        if self.step % self.recipe.train.log_steps == 0 or self.step in (1, self.num_steps):
            self._log(stats, plans, float(norm), rate)
        return stop

    def rate_after(self, step: int) -> float:
        """The learning rate of the step after `step`: a warm-up, then `train.schedule`, to 0 at the end or constant."""
        train, warmup = self.recipe.train, round(self.recipe.train.warmup_ratio * self.num_steps)
        if step < warmup:
            return train.learning_rate * (step / warmup)
        if train.schedule == "constant":
            return train.learning_rate
        steps = max(1, self.num_steps - warmup)
        if train.schedule != "cosine":
            falls = steps if train.schedule == "linear" else min(steps, train.decay_ratio * self.num_steps)
            return train.learning_rate * min(1.0, max(0.0, (self.num_steps - step) / falls))
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / steps)))

    def _skip(self, batches: list[Batch]) -> None:
        """Log a step that was not applied and its sequences; stop the run if it was one too many."""
        own = [key for batch in batches for key in batch["row_key"].tolist() if key]  # 0: of nothing
        keys = [key for rank in distributed.from_all(own) for key in rank]
        line = f"step {self.step}/{self.num_steps} was not applied, as it is not finite: sequences {keys}"
        self._record("skipped", line, step=self.step, sequences=keys)
        bad, most = self.bad_in_a_row, self.recipe.train.max_bad_steps
        if bad < most:
            return
        self.bad_in_a_row = 0  # a run that resumes here counts from 0
        path = self.save_checkpoint()
        raise RunStopped(
            f"{line}, number {bad} in a row (train.max_bad_steps is {most}). The last good weights are in {path}: the same"
            f" command with --resume continues after these sequences, with --resume and a checkpoint of step"
            f" {self.step - bad} or earlier before them"
        )

    # Logging, evaluation, saving

    def _log(self, stats: StepStats, plans: list[Plan], grad_norm: float, learning_rate: float) -> None:
        # Of the device's memory, since the probe, or of RAM, since the process began.
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_ram()
        values = {
            "step": self.step,
            "num_steps": self.num_steps,
            **metrics.summary_of(stats),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "padding_share": padding_share(plans),
            "peak_memory_bytes": peak,
            **self.pace.numbers(self.num_steps - self.step),
            "recompiles": None if self.runner.graphs is None else self.runner.graphs.recompiles,
            "seconds": time.perf_counter() - self.reporter.start_time,
        }
        recent = metrics.accuracies(*torch.stack(list(self.recent)).sum(0).tolist())
        self._record("train", metrics.train_line(values, recent, len(self.recent)), **values)

    def _record(self, kind: str, line: str, **values: Any) -> None:
        self.on_main("metrics.jsonl", lambda: self.reporter.record(kind, line, **values))

    def evaluate(self, title: str) -> dict[str, Any] | None:
        """What `BatchRunner.evaluate` gives, logged, and None without held-out data; the best weights so far are kept."""
        if len(self.data.eval_rows) == 0:
            return None
        values = self.runner.evaluate(self.data.eval_rows)
        self.evaluated = self.step
        self._record("eval", metrics.eval_line(title, values), step=self.step, **values)
        length = values["expected_accepted_length"]
        if self.best is None or length > self.best["expected_accepted_length"]:
            last = self.step == self.num_steps
            folder = None if self.step == 0 else "final" if last else "best"
            self.best = {"step": self.step, "expected_accepted_length": length, "folder": folder}
            if folder:  # before best/: after a kill in between, a resume sees that best/ is of another step
                self.on_main("best.json", lambda: write_json(self.folder / "best.json", self.best))
            if folder == "best":
                self._save_drafter(self.folder / folder)
        return values

    def _save_drafter(self, path: Path) -> None:
        """Write the drafter as vLLM loads it, and the recipe; every rank must call it."""
        state, texts = distributed.full_weights(self.draft), {"recipe.yaml": dump_recipe(self.recipe)}
        self.on_main(str(path), lambda: save_drafter(path, self.draft, state, texts))

    # Checkpoints

    def save_checkpoint(self) -> Path:
        """Save checkpoint-<step>, unless it was saved before, and return it; every rank must call it."""
        path = self.folder / f"checkpoint-{self.step}"
        if self.saved_step == self.step:
            return path
        weights, moments = distributed.full_weights(self.draft), distributed.full_moments(self.draft, self.optimizers)
        state = {
            "step": self.step,
            "bad_steps_in_a_row": self.bad_in_a_row,
            "evaluated": self.evaluated,
            "train_seconds": time.perf_counter() - self.started,
            "before": self.before,
            "best": self.best,
            "lines": {"metrics.jsonl": self.reporter.lines},
            "must_match": self.must_match,
            "versions": checkpoints.versions(),
            "recipe": asdict(self.recipe),
        }

        def fill(folder: Path) -> None:
            fill_drafter(folder, self.draft.config, weights, {"recipe.yaml": dump_recipe(self.recipe)})
            save_tensors(folder / "optimizer.state", moments)
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

        def write() -> None:
            checkpoints.write_checkpoint(self.folder, self.step, fill)
            checkpoints.prune(self.folder, self.recipe.train.keep_last, self.recipe.train.keep_every)

        self.on_main(str(path), write)
        self.saved_step = self.step
        return path

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Make this new trainer the one that was saved; changes no file. ValueError: data or target are not its own, or it
        is after the run's last step.
        """
        folder, state = checkpoint
        # A checkpoint of before says nothing of the mask token.
        if others := [what for what, now in self.must_match.items() if state["must_match"].get(what, now) != now]:
            remedy = (
                "give the same data, target, draft and batch size x accumulation x processes, or another output.dir"
            )
            raise ValueError(f"--resume: not what {folder.name} was trained with: {', '.join(others)}: {remedy}")
        checkpoints.check_steps(folder, self.num_steps)
        weights, moments = (load_file(folder / name) for name in ("model.safetensors", "optimizer.state"))
        distributed.load_full(self.draft, self.optimizers, weights, moments)
        self.step = self.saved_step = self.sampler.start_step = state["step"]
        self.bad_in_a_row, self.evaluated = state["bad_steps_in_a_row"], state.get("evaluated", self.step)
        self.before, self.best, self.seconds_before = state["before"], state["best"], state["train_seconds"]
        self.resumed = checkpoint

    def _take_output(self) -> None:
        """Lock the output folder and make it the run's, as its checkpoint left it."""
        if not self.resumed:  # again: another run may have begun there, and ended, while this one read its data
            checkpoints.check_output(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = checkpoints.lock_output(self.folder)
        if self.resumed:
            checkpoints.clean_up(self.folder)
            if later := checkpoints.remove_later(self.folder, self.step):
                self.reporter.say(f"resume: checkpoints of later steps ({', '.join(map(str, later))}) were removed")
            kept = None
            with suppress(OSError, ValueError):
                kept = json.loads((self.folder / "best.json").read_bytes())
            if self.best and kept != self.best:
                self.best["folder"] = None  # best/ is of a step that was undone, or of another folder's run
            lines = self.resumed.state["lines"]["metrics.jsonl"]
            self.reporter.lines = checkpoints.keep_lines(self.reporter.path, lines)
            self.reporter.say(f"resume: continuing after step {self.step}, from {self.resumed.folder}")
        write_json(self.folder / checkpoints.MARKER, {"state": "started"})
        write_bytes(self.folder / "recipe.yaml", dump_recipe(self.recipe).encode())
        write_json(self.folder / metrics.ABOUT, {"data": {"packing": asdict(self.data.report)}})
