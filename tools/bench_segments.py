"""Time, memory and work of a training step: flat, flat with activation checkpointing, Algorithm 1, relay.

    python tools/bench_segments.py --n 2048,4096 --segments 1,8 --json results.json

Every configuration runs in a process of its own, one step after a tiny warm-up; repeats are interleaved, medians are
reported. Segments = 1 gives `flat` and `checkpoint`, every other number `recompute` (Algorithm 1) and `relay`. The JSON
is a list of objects, one a configuration:

    mode, n, segments, layers   and every other setting
    wall_s, cpu_s     of the step, medians
    peak_bytes        peak of resident memory over what is there before the step (model, its gradients, batch, target
                      outputs), median
    saved_bytes       the most that autograd holds for backward at any moment, each storage once, parameters and masks
                      not counted; with segments that is the largest segment's. The relay's keys, values and their
                      gradients are not in it but in
    buffer_bytes      (0 for the others)
    planned_saved_bytes, planned_peak_bytes, saved_ratio, peak_ratio
                      what the plan (peagle_train/memory.py) says of the two, and planned over measured
    flops             of the drafter: matmuls and attention, forward and backward, without the heads; attention by visible
                      (query, key) pairs: 4 * pairs * head dim * heads forward, twice that backward, whatever a kernel
                      really goes over
    rows              elements that passes run with grad, padding between them included; a checkpoint's second run
                      counts in flops only
    rows_no_grad      elements that passes run without (relay's pass A)
    died              null, or why the process ended early; figures it did not come to are null

flops and saved_bytes come from steps of their own, without the attention's kernel: they are exact.

Resident memory holds the C library's holes, too, which differ from run to run. MALLOC_MMAP_THRESHOLD_=1048576 in the
environment takes most of them out of peak_bytes, and makes the steps slower. The smaller the shapes, the more of
peak_bytes is what a first step loads.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any
from unittest import mock

import torch
from measure import MIB, PeakRSS, Runs, SavedBytes, format_number, read_options, run_in_turns, write_json
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peagle_train.config import Cod, Data, Output, Recipe, Target, Train
from peagle_train.core import attention
from peagle_train.core import draft as draft_module
from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import StepStats, TargetOutputs, recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, relay_step
from peagle_train.core.visibility import Visibility
from peagle_train.files import aligned, run_tool
from peagle_train.machine import Device
from peagle_train.memory import Sizes, largest_pass, plan_memory, saved_bytes

MODES = ("flat", "checkpoint", "recompute", "relay")
WHOLE_MODES = ("flat", "checkpoint")
COUNTED = ("saved_bytes", "buffer_bytes", "flops", "rows", "rows_no_grad")
TIMED = ("wall_s", "cpu_s", "peak_bytes")


@dataclass
class Settings:
    """What all configurations of a run share, each an option of the command line. 0: chosen from the others."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 0  # 3 * hidden
    heads: int = 0  # hidden / 64, at least 1
    kv_heads: int = 0  # as many as heads
    vocab: int = 8192  # of target and drafter
    window: int = 0  # positions that an element sees; all of its document
    depths: int = 8  # K
    ratio: float = 0.8  # depth d keeps ratio**d
    boundaries: str = "balanced"  # or uniform
    supervised_from: float = 0.0  # share of the sequence that is prompt
    dtype: str = "float32"  # float64; bfloat16 by autocast

    def __post_init__(self) -> None:
        self.intermediate = self.intermediate or 3 * self.hidden
        self.heads = self.heads or max(1, self.hidden // 64)
        self.kv_heads = self.kv_heads or self.heads


@dataclass(frozen=True)
class Case:
    """One configuration."""

    mode: str
    n: int
    segments: int

    def __str__(self) -> str:
        return f"{self.mode} n={self.n} S={self.segments}"


# ---- the child: one configuration, one process


class Bench:
    """A drafter and the steps over it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(0)
        draft = PEagleDraft(
            PEagleDraftConfig(
                vocab_size=settings.vocab,
                hidden_size=settings.hidden,
                intermediate_size=settings.intermediate,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                num_key_value_heads=settings.kv_heads,
                head_dim=max(2, settings.hidden // settings.heads // 2 * 2),
                max_position_embeddings=2**20,
                sliding_window=settings.window or None,
                ptd_token_id=settings.vocab - 1,
            )
        )
        # As the trainer does it: weights in float32 at least, 16 bits by autocast.
        self.autocast = settings.dtype == "bfloat16"
        self.draft: PEagleDraft = draft.to(torch.float64 if settings.dtype == "float64" else torch.float32)
        self.draft.lm_head.weight.requires_grad_(False)

    def batch(self, n: int, segments: int) -> dict[str, Tensor]:
        """One document of n tokens, the first `supervised_from` of them a prompt."""
        s = self.settings
        ids = torch.randint(s.vocab - 1, (n,), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(n) >= round(n * s.supervised_from)).long()
        # The key names the draw, so that every mode and every S trains on the very same elements.
        row = {"input_ids": ids, "loss_mask": mask, "row_key": n}
        return CODCollator(n, s.depths, s.ratio, 0.0, segments, s.boundaries)([row])

    def target(self, n: int) -> TargetOutputs:
        generator = torch.Generator().manual_seed(1)
        H, V = self.settings.hidden, self.settings.vocab
        # Logits of about unit variance, so that the targets are neither uniform nor one-hot.
        features, last_hidden = (torch.randn(1, n, size, generator=generator) for size in (3 * H, H))
        head = torch.randn(V, H, generator=generator) * H**-0.5
        return TargetOutputs(features, last_hidden, head)

    def step(self, mode: str, batch: dict[str, Tensor], target: TargetOutputs, buffers: RelayBuffers) -> StepStats:
        """Forward and backward of everything; gradients accumulate."""
        # Shapes as in the trainer: the same for every segment where something is made and kept for each new one.
        window, layers = self.settings.window or None, self.settings.layers
        plan = plan_segments(batch, static=self.autocast, pad_context=False, window=window, layers=layers)
        arguments: dict[str, Any] = {"plan": plan, "scale": 1.0 / max(1, plan.num_supervised), "backward": _backward}
        self.draft.gradient_checkpointing = mode == "checkpoint"
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            if mode == "relay":
                return relay_step(self.draft, batch, target, buffers=buffers, **arguments)
            return recompute_step(self.draft, batch, target, **arguments)

    def time(self, case: Case) -> dict[str, Any]:
        """TIMED, of one step."""
        n = max(16, 2 * self.settings.depths)  # of a step that loads what a first one loads, and makes gradients
        self.step(case.mode, self.batch(n, min(case.segments, n)), self.target(n), RelayBuffers())
        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with PeakRSS() as rss:
            began, cpu = time.perf_counter(), time.process_time()
            self.step(case.mode, batch, target, RelayBuffers())
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": rss.peak_bytes}

    def count(self, case: Case) -> dict[str, int]:
        """COUNTED: what is the same in every repeat."""
        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with attention_without_kernel(), work_counted(self.draft) as work:
            self.step(case.mode, batch, target, RelayBuffers())
        buffers, own = RelayBuffers(), [*self.draft.parameters()]
        with attention_without_kernel(), SavedBytes(lambda: own + buffer_tensors(buffers)) as saved:
            self.step(case.mode, batch, target, buffers)
        held = sum(t.untyped_storage().nbytes() for t in buffer_tensors(buffers))
        return {"saved_bytes": saved.peak_bytes, "buffer_bytes": held, **work}


def buffer_tensors(buffers: RelayBuffers) -> list[Tensor]:
    return [t for pair in (*buffers.keys_values, *buffers.gradients) for t in pair]


def _backward(*arguments: Any) -> None:
    with torch.autocast("cpu", enabled=False):
        torch.autograd.backward(*arguments)


@contextmanager
def work_counted(draft: PEagleDraft) -> Iterator[dict[str, int]]:
    """Count the work of what runs in the block: attention by its pairs, as the counter does not know its kernels."""
    work = dict.fromkeys(("flops", "rows", "rows_no_grad"), 0)
    counter = FlopCounterMode(display=False)
    attend, loss = draft_module.attend, draft_module.chunked_linear_loss

    def add(flops: int) -> None:
        work["flops"] += flops

    def counted_attend(query: Tensor, own: Any, context: Any, visibility: Visibility) -> Tensor:
        out = attend(query, own, context, visibility)
        _, H, Q, D = query.shape
        flops = 4 * visible_pairs(visibility, Q) * D * H
        add(flops)
        if out.requires_grad:
            out.register_hook(lambda _: add(2 * flops))
        return out

    def uncounted_loss(*arguments: Any) -> Any:
        before = counter.get_total_flops()
        out = loss(*arguments)  # with all its matmuls: the backward only scales
        add(before - counter.get_total_flops())
        return out

    def note_rows(_: Any, arguments: tuple) -> None:
        work["rows" if torch.is_grad_enabled() else "rows_no_grad"] += arguments[0].numel()

    with (
        draft.register_forward_pre_hook(note_rows),
        mock.patch.object(draft_module, "attend", counted_attend),
        mock.patch.object(draft_module, "chunked_linear_loss", uncounted_loss),
        counter,
    ):
        yield work
    add(counter.get_total_flops())


def visible_pairs(visibility: Visibility, num_queries: int) -> int:
    """Pairs (query, key) that the last `num_queries` elements of a pass see.

    A depth-0 element sees the columns of its document up to its own; a deeper one its own rollout's down to itself,
    too, and rollouts are complete.
    """
    first = visibility.anchor.shape[1] - num_queries
    start, anchor, depth = (t[:, first:] for t in (visibility.start, visibility.anchor, visibility.depth))
    return int(torch.where(depth >= 0, anchor - start + 1 + depth, 0).sum())


@contextmanager
def attention_without_kernel() -> Iterator[None]:
    """The package's attention, all that it saves included, with the CPU's kernel giving zeros."""

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=wide)

    def flash_backward(_: Tensor, *inputs: Tensor, **__: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in inputs[:3])  # query, key, value

    with (
        mock.patch.object(attention, "_flash", flash),
        mock.patch.object(attention, "_flash_backward", flash_backward),
        mock.patch.object(Visibility, "block_mask", lambda *_: None),
    ):
        yield


def measure(settings: dict[str, Any], case: dict[str, Any], count: bool = False) -> dict[str, Any]:
    bench = Bench(Settings(**settings))
    return bench.count(Case(**case)) if count else bench.time(Case(**case))


# ---- the plan


def sizes_of_bench(bench: Bench, n: int, mode: str) -> Sizes:
    """The sizes of a bench's steps, whose gradients are there already and whose weights are float32 or wider."""
    s, parameters = bench.settings, list(bench.draft.parameters())
    train: Any = {"gradient_accumulation_steps": 2, "loss_chunk_rows": 384, "compile": False}
    train |= {"mixed_precision": "bf16" if bench.autocast else "no", "activation_checkpointing": mode == "checkpoint"}
    train |= {"segment_mode": "relay" if mode == "relay" else "recompute"}
    train |= {"dtype": "float64" if s.dtype == "float64" else "float32"}
    cod: Any = Cod(s.depths, s.ratio, 0.0, boundaries=s.boundaries)  # type: ignore[arg-type]
    return Sizes(
        Recipe(Target("-"), Data(["-"], max_length=n), Output("-"), cod=cod, train=Train(**train)),
        bench.draft.config,
        Device("cpu", 0),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        target_bytes=4,
    )


def planned(bench: Bench, case: Case) -> dict[str, float]:
    """What the plan says of saved_bytes and peak_bytes."""
    sizes = sizes_of_bench(bench, case.n, case.mode)
    plan = plan_memory(sizes, case.segments, all_supervised=True)
    # Resident before the step: all but the relay's buffers, which a bench's step makes.
    before = sum(v for k, v in plan.resident.items() if k not in ("keys, values", "their gradients"))
    before += plan.outputs
    return {
        "saved": max(saved_bytes(sizes, largest_pass(sizes, case.segments, all_supervised=True))),
        "peak": max(plan.phases[name] for name in ("loss", "backward", "embedding")) - before,
    }


# ---- the parent: starts children


def cases_of(lengths: list[int], segments: list[int], modes: list[str]) -> list[Case]:
    return [
        Case(mode, n, S)
        for n in lengths
        for S in segments
        for mode in MODES
        if mode in modes and (mode in WHOLE_MODES) == (S == 1)
    ]


def summarize(bench: Bench, case: Case, plan: dict[str, float], timed: Runs, counted: Runs) -> dict[str, Any]:
    """One object of the JSON."""
    runs, counts = timed[0], next(iter(counted[0]), {})
    row = {**asdict(case), **asdict(bench.settings), "threads": torch.get_num_threads()}
    row |= {name: statistics.median(run[name] for run in runs) if runs else None for name in TIMED}
    row |= {name: counts.get(name) for name in COUNTED}
    for name, size in plan.items():
        row |= {f"planned_{name}_bytes": size, f"{name}_ratio": over(size, row[f"{name}_bytes"])}
    return row | {"repeats": len(runs), "died": timed[1] or counted[1]}


def over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def table_of(rows: list[dict[str, Any]]) -> str:
    """One block of lines for each n; "/flat": ratios to flat at the same n; "plan": planned over measured."""
    columns = (
        ("wall s", "wall_s", 1, 2),
        ("cpu s", "cpu_s", 1, 2),
        ("peak MiB", "peak_bytes", MIB, 0),
        ("saved MiB", "saved_bytes", MIB, 1),
        ("GFLOP", "flops", 1e9, 1),
        ("rows", "rows", 1, 0),
    )
    header = ["mode", "n", "S"]
    for title, *_ in columns:
        header += [title, "/flat"]
    lines = [[*header, "no grad", "buffers MiB", "peak plan", "saved plan"]]
    for row in sorted(rows, key=lambda r: r["n"]):
        base = next((r for r in rows if (r["mode"], r["n"]) == ("flat", row["n"])), {})
        line = [row["mode"], str(row["n"]), str(row["segments"])]
        for _, name, unit, digits in columns:
            line += [format_number(row[name], unit, digits), format_number(over(row[name], base.get(name)), 1, 3)]
        line += [format_number(row["rows_no_grad"], 1, 0), format_number(row["buffer_bytes"], MIB, 1)]
        lines.append([*line, format_number(row["peak_ratio"]), format_number(row["saved_ratio"])])
    died = [f"died: {Case(r['mode'], r['n'], r['segments'])}: {r['died']}" for r in rows if r["died"]]
    return "\n".join([aligned(lines, right=True), *died])


def main() -> int:
    shape = {field.name: field.default for field in fields(Settings)}
    how = {"modes": ",".join(MODES), "repeats": 3, "timeout": 86400.0}
    options = read_options(__doc__, measure, n=[2048, 4096], segments=[1, 8], **how, **shape)
    bench = Bench(Settings(**{name: getattr(options, name) for name in shape}))
    cases = cases_of(options.n, options.segments, options.modes.split(","))
    plans = [planned(bench, case) for case in cases]
    given = {str(case): {"settings": asdict(bench.settings), "case": asdict(case)} for case in cases}
    timed = run_in_turns(__file__, given, options.repeats, options.timeout)
    to_count = {name: {**settings, "count": True} for name, settings in given.items() if timed[name][1] is None}
    counted = run_in_turns(__file__, to_count, 1, options.timeout)
    rows = [summarize(bench, c, plan, timed[str(c)], counted.get(str(c), ([], None))) for c, plan in zip(cases, plans)]
    if options.json:
        write_json(options.json, rows)
    print(", ".join(f"{name} {value}" for name, value in asdict(bench.settings).items()))
    print(table_of(rows))
    return 1 if all(row["died"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_tool("bench_segments", main))
