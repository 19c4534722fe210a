"""Time, memory and work of a training step: flat, flat with activation checkpointing, Algorithm 1, relay.

    python tools/bench_segments.py --n 2048,4096 --segments 1,8 --json results.json

Every configuration runs in a process of its own, one step after a tiny warm-up; repeats are interleaved, medians are
reported. Segments = 1 gives `flat` and `checkpoint`, every other number `recompute` (Algorithm 1) and `relay`. The JSON
is a list of objects, one a configuration:

    mode, n, segments, layers   and every other setting
    wall_s, cpu_s     of the step, medians; on CUDA wall_s is by events. runs: each repeat's
    peak_bytes        peak memory over what is resident before the step (model, its gradients, batch, target outputs);
                      the median of resident memory on a CPU, max_memory_allocated on CUDA. peak_method says which
    saved_bytes       the most that autograd holds for backward at any moment, each storage once, parameters and masks
                      not counted; with segments that is the largest segment's. The relay's keys, values and their
                      gradients are not in it but in
    buffer_bytes      (0 for the others)
    flops             of the drafter: matmuls and attention, forward and backward, without the head;
    attention_flops   the attention in it, by visible (query, key) pairs: 4 * pairs * head dim * heads forward, twice
                      that backward, whatever a kernel really goes over;
    head_flops        the loss: both heads' matmuls. Not in flops
    rows              elements that passes run with grad, padding between them included; a checkpoint's second run
                      counts in flops only
    rows_no_grad      elements that passes run without (relay's pass A)
    pass_rows         elements of the largest pass with grad
    attention_pairs, kernel_pairs    pairs seen and, on a CPU, pairs that the blocks handed to the kernel have: with
                      grad and without, once a layer
    loss              summed over the supervised elements: equal for all modes of the same n
    died              null, or why the process ended early; figures it did not come to are null

flops and saved_bytes come from steps of their own after the first timed one, without the attention's kernel.

Resident memory holds the C library's holes, too, which differ from run to run. MALLOC_MMAP_THRESHOLD_=1048576 in the
environment takes most of them out of peak_bytes, and makes the steps slower.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from measure import (
    GIB,
    MIB,
    PeakRSS,
    SavedBytes,
    format_number,
    format_table,
    release_memory,
    run_process,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from peagle_train.core.draft import PEagleDraft
    from peagle_train.core.passes import StepStats, TargetOutputs
    from peagle_train.core.relay import RelayBuffers
    from peagle_train.core.visibility import QueryBlock, Visibility

MODES = ("flat", "checkpoint", "recompute", "relay")
WHOLE_MODES = ("flat", "checkpoint")
ROOT = Path(__file__).resolve().parent.parent
COUNTED: tuple[str, ...] = ("saved_bytes", "buffer_bytes", "flops", "attention_flops", "head_flops")
COUNTED += ("rows", "rows_no_grad", "pass_rows", "attention_pairs", "kernel_pairs")
TIMED = ("wall_s", "cpu_s", "peak_bytes")


@dataclass(frozen=True)
class Settings:
    """What all configurations of a run share; None: chosen from the others."""

    layers: int = 4
    hidden: int = 256
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int = 8192
    depths: int = 8
    ratio: float = 0.8
    ratio_min: float = 0.0
    boundaries: str = "balanced"
    documents: int = 1
    supervised_from: float = 0.0
    chunk_rows: int | None = None
    dtype: str = "float32"
    attention: str = "structured"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def complete(self) -> "Settings":
        heads = self.heads or max(1, self.hidden // 64)
        return dataclasses.replace(
            self,
            intermediate=self.intermediate or 3 * self.hidden,
            heads=heads,
            kv_heads=self.kv_heads or heads,
        )


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
        import torch

        from peagle_train.core.draft import PEagleDraft
        from peagle_train.core.draft_config import PEagleDraftConfig

        self.settings = settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = settings.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if settings.attention == "dense" and self.device.type != "cpu":
            raise ValueError("--attention dense is the CPU's attention without its blocks; it needs --device cpu")
        assert settings.heads is not None and settings.intermediate is not None
        torch.manual_seed(settings.seed)
        draft: Any = PEagleDraft(
            PEagleDraftConfig(
                vocab_size=settings.vocab,
                hidden_size=settings.hidden,
                intermediate_size=settings.intermediate,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                num_key_value_heads=settings.kv_heads,
                head_dim=max(2, settings.hidden // settings.heads // 2 * 2),
                max_position_embeddings=2**20,
                ptd_token_id=settings.vocab - 1,
            )
        )
        # As the trainer does it: weights in float32 at least, 16 bits by autocast.
        self.autocast = settings.dtype in ("bfloat16", "float16")
        self.dtype = getattr(torch, settings.dtype)
        self.draft: PEagleDraft = draft.to(self.device, torch.float32 if self.autocast else self.dtype)
        self.draft.lm_head.weight.requires_grad_(False)

    def row(self, n: int) -> dict[str, Any]:
        """n tokens in `documents` documents of about equal length, the first `supervised_from` of each a prompt."""
        import torch

        s = self.settings
        generator = torch.Generator().manual_seed(s.seed)
        edges = [i * n // s.documents for i in range(s.documents + 1)]
        ids, masks = [], []
        for start, stop in pairwise(edges):
            prompt = round((stop - start) * s.supervised_from)
            ids.append(torch.randint(s.vocab - 1, (stop - start,), generator=generator))
            masks.append([0] * prompt + [1] * (stop - start - prompt))
        # The key names the draw, so that every mode and every S trains on the very same elements.
        return {"input_ids": ids, "loss_mask": masks, "row_key": n}

    def batch(self, n: int, segments: int) -> dict[str, "Tensor"]:
        from peagle_train.core.collator import CODCollator

        s = self.settings
        collator = CODCollator(n, s.depths, s.ratio, s.ratio_min, segments, s.boundaries, seed=s.seed)
        return collator([self.row(n)])

    def target(self, n: int) -> "TargetOutputs":
        import torch

        from peagle_train.core.passes import TargetOutputs

        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        H, V = self.settings.hidden, self.settings.vocab
        # Logits of about unit variance, so that the targets are neither uniform nor one-hot.
        features, last_hidden = (torch.randn(1, n, size, generator=generator) for size in (3 * H, H))
        head = torch.randn(V, H, generator=generator) * H**-0.5
        return TargetOutputs(*(t.to(self.device) for t in (features, last_hidden, head)))

    def step(
        self, mode: str, batch: dict[str, "Tensor"], target: "TargetOutputs", buffers: "RelayBuffers | None"
    ) -> "StepStats":
        """Forward and backward of everything, from the host's batch on; gradients accumulate."""
        import torch

        from peagle_train.core.plan import plan_segments
        from peagle_train.core.recompute import recompute_step
        from peagle_train.core.relay import relay_step

        # Shapes as in the trainer: the same for every segment where something is made and kept for each new one.
        on_cuda = self.device.type == "cuda"
        plan = plan_segments(batch, self.settings.depths, static=on_cuda or self.autocast, pad_context=on_cuda)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        arguments: dict[str, Any] = {
            "num_depths": self.settings.depths,
            "scale": 1.0 / max(1, plan.num_supervised),
            "plan": plan,
        }
        if self.settings.chunk_rows:
            arguments["chunk_rows"] = self.settings.chunk_rows
        self.draft.gradient_checkpointing = mode == "checkpoint"
        casting = torch.autocast(self.device.type, dtype=self.dtype) if self.autocast else nullcontext()
        with casting:
            if mode == "relay":
                return relay_step(self.draft, batch, target, buffers=buffers, backward=self._backward_each, **arguments)
            return recompute_step(self.draft, batch, target, backward=self._backward, **arguments)

    def _backward(self, loss: "Tensor") -> None:
        import torch

        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward(loss)

    def _backward_each(self, tensors: Any, gradients: Any) -> None:
        import torch

        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward(tensors, gradients)

    def warm_up(self, case: Case) -> None:
        """Load what a first step loads, and make the parameters' gradients."""
        from peagle_train.core.relay import RelayBuffers

        n = max(16, 2 * self.settings.depths, 4 * self.settings.documents)
        if self.device.type != "cpu":
            n = case.n  # kernels are compiled shape by shape
        self.step(case.mode, self.batch(n, min(case.segments, n)), self.target(n), RelayBuffers())

    def time(self, case: Case) -> dict[str, Any]:
        """wall_s, cpu_s, peak_bytes and the loss of one step."""
        import torch

        from peagle_train.core.relay import RelayBuffers

        self.warm_up(case)
        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            release_memory()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            baseline, cpu = torch.cuda.memory_allocated(), time.process_time()
            start.record()
            stats = self.step(case.mode, batch, target, RelayBuffers())
            end.record()
            torch.cuda.synchronize()
            wall, cpu = start.elapsed_time(end) / 1e3, time.process_time() - cpu
            peak, method = torch.cuda.max_memory_allocated() - baseline, "max_memory_allocated"
        else:
            with PeakRSS() as rss:
                began, cpu = time.perf_counter(), time.process_time()
                stats = self.step(case.mode, batch, target, RelayBuffers())
                wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            peak, method = rss.peak_bytes, rss.method
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_bytes": peak,
            "peak_method": method,
            "loss": float(stats.loss),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "torch": torch.__version__,
        }

    def count(self, case: Case) -> dict[str, int | None]:
        """Everything that is the same in every repeat: COUNTED."""
        from peagle_train.core.relay import RelayBuffers

        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with work_counted(self.draft, on_cpu=self.device.type == "cpu") as work:
            self.step(case.mode, batch, target, RelayBuffers())
        release_memory()
        buffers = RelayBuffers()

        def buffer_tensors() -> "list[Tensor]":
            return [t for pair in (*buffers.keys_values, *buffers.gradients) for t in pair]

        with (
            attention_without_kernel(),
            SavedBytes(self.draft.parameters(), buffer_tensors) as saved,
        ):
            self.step(case.mode, batch, target, buffers)
        return {
            "saved_bytes": saved.peak_bytes,
            "buffer_bytes": sum(t.untyped_storage().nbytes() for t in buffer_tensors()),
            "flops": work.matmul_flops + work.attention_flops,
            "attention_flops": work.attention_flops,
            "head_flops": work.head_flops,
            "rows": work.rows,
            "rows_no_grad": work.rows_no_grad,
            "pass_rows": work.pass_rows,
            "attention_pairs": work.attention_pairs,
            "kernel_pairs": work.kernel_pairs,
        }


@dataclass
class Work:
    """What a step did; flops of the drafter's matmuls, its attention and its head apart."""

    matmul_flops: int = 0
    attention_flops: int = 0
    head_flops: int = 0
    rows: int = 0
    rows_no_grad: int = 0
    pass_rows: int = 0
    attention_pairs: int = 0
    kernel_pairs: int | None = None


@contextmanager
def work_counted(draft: "PEagleDraft", on_cpu: bool) -> Iterator[Work]:
    """Count the work of what runs in the block; attention gives zeros meanwhile.

    The counter knows nothing of the CPU's flash kernel, and a compiled one does not run under it at all. Attention is
    counted by the pairs instead.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from peagle_train.core import draft as module

    work = Work(kernel_pairs=0 if on_cpu else None)
    counter = FlopCounterMode(display=False)

    class CountedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: "Tensor", forward_flops: int, *keys_values: "Tensor") -> "Tensor":
            ctx.shapes = [query.shape, *(t.shape for t in keys_values)]
            ctx.forward_flops = forward_flops
            work.attention_flops += forward_flops
            B, H, Q, D = query.shape
            return query.new_zeros(B, Q, H * D)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> tuple:
            work.attention_flops += 2 * ctx.forward_flops
            d_query, *d_keys_values = (gradient.new_zeros(shape) for shape in ctx.shapes)
            return d_query, None, *d_keys_values

    def attend(query: "Tensor", own: Any, context: Any, visibility: "Visibility") -> "Tensor":
        _, H, Q, D = query.shape
        pairs = visible_pairs(visibility, Q)
        work.attention_pairs += pairs
        if work.kernel_pairs is not None:
            work.kernel_pairs += block_pairs(visibility, Q, query.dtype.itemsize)
        return CountedAttention.apply(query, 4 * pairs * D * H, *own, *(context or ()))

    original_loss = module.chunked_linear_loss

    def head(*arguments: Any) -> Any:
        before = counter.get_total_flops()
        out = original_loss(*arguments)  # with all its matmuls: the backward only scales
        work.head_flops += counter.get_total_flops() - before
        return out

    def note_rows(_: Any, arguments: tuple) -> None:
        rows = arguments[0].numel()
        if torch.is_grad_enabled():
            work.rows += rows
            work.pass_rows = max(work.pass_rows, rows)
        else:
            work.rows_no_grad += rows

    handle = draft.register_forward_pre_hook(note_rows)
    try:
        with (
            mock.patch.object(module, "attend", attend),
            mock.patch.object(module, "chunked_linear_loss", head),
            counter,
        ):
            yield work
    finally:
        handle.remove()
    work.matmul_flops = counter.get_total_flops() - work.head_flops


def visible_pairs(visibility: "Visibility", num_queries: int) -> int:
    """Pairs (query, key) that the last `num_queries` elements of a pass see.

    A depth-0 element sees the columns of its document up to its own; a deeper one its own rollout's down to itself,
    too, and rollouts are complete.
    """
    import torch

    first = visibility.anchor.shape[1] - num_queries
    start, anchor, depth = (t[:, first:] for t in (visibility.start, visibility.anchor, visibility.depth))
    return int(torch.where(depth >= 0, anchor - start + 1 + depth, 0).sum())


def block_pairs(visibility: "Visibility", num_queries: int, itemsize: int) -> int:
    """Pairs that the CPU's kernel goes over for them."""
    first = visibility.anchor.shape[1] - num_queries
    blocks = [b for b in visibility.blocks(itemsize) if b.q0 >= first]
    keys = [sum(s.stop - s.start for s in (b.context, b.depth0, b.rollout)) for b in blocks]
    return visibility.anchor.shape[0] * sum((b.q1 - b.q0) * k for b, k in zip(blocks, keys))


@contextmanager
def attention_without_kernel() -> Iterator[None]:
    """The package's attention, all that it saves included, with the CPU's kernel giving zeros."""
    import torch

    from peagle_train.core import attention_cpu
    from peagle_train.core.visibility import Visibility

    def flash(query: "Tensor", key: "Tensor", value: "Tensor", **_: Any) -> "tuple[Tensor, Tensor]":
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=wide)

    def flash_backward(
        _: "Tensor", query: "Tensor", key: "Tensor", value: "Tensor", *__: Any, **___: Any
    ) -> "tuple[Tensor, Tensor, Tensor]":
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    with ExitStack() as stack:
        for target, name, value in (
            (attention_cpu, "_flash", flash),
            (attention_cpu, "_flash_backward", flash_backward),
            (Visibility, "block_mask", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def plan_dense_blocks(self: "Visibility", itemsize: int) -> "list[QueryBlock]":
    """In `Visibility._plan_blocks`' place: every block of queries over all keys of the pass, and masks do the rest."""
    from peagle_train.core import visibility as module

    B, N = self.anchor.shape
    every = slice(0, self.num_context), slice(0, self.num_depth0), slice(self.first_rollout, N)
    keys = sum(s.stop - s.start for s in every)
    size = max(1, min(module.QUERY_BLOCK, module.MASK_BLOCK_BYTES // (B * keys * itemsize)))
    edges = sorted({0, min(self.cut, N), N})  # no block straddles the first query of the last layer
    starts = [q for lo, hi in pairwise(edges) for q in range(lo, hi, size)]
    return [module.QueryBlock(q0, q1, *every, slice(0, 0)) for q0, q1 in zip(starts, [*starts[1:], N])]


def run_child(request: str) -> None:
    """Write `{"timed": ...}` and, if asked for, `{"timed": ..., "counted": ...}` to the file that the request names."""
    content = json.loads(request)
    settings, case = Settings(**content["settings"]), Case(**content["case"])
    bench = Bench(settings)
    with ExitStack() as stack:
        if settings.attention == "dense":
            from peagle_train.core.visibility import Visibility

            stack.enter_context(mock.patch.object(Visibility, "_plan_blocks", plan_dense_blocks))
        result: dict[str, Any] = {"timed": bench.time(case)}
        write_json(content["out"], result)  # at once: should the counting die, the timing stands
        if content["count"]:
            result["counted"] = bench.count(case)
            write_json(content["out"], result)


# ---- the parent: starts children, never imports torch


def cases_of(lengths: list[int], segments: list[int], modes: list[str]) -> list[Case]:
    cases = []
    for n in lengths:
        for S in segments:
            allowed = WHOLE_MODES if S == 1 else tuple(m for m in MODES if m not in WHOLE_MODES)
            cases += [Case(mode, n, S) for mode in allowed if mode in modes]
    return cases


def run_case(settings: Settings, case: Case, count: bool, timeout: float | None, limit: int | None) -> dict[str, Any]:
    """One child: its "timed" and "counted" as far as it came, and "died"."""
    # Measured is the package beside this file, installed or not.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if settings.threads:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        request = {"settings": asdict(settings), "case": asdict(case), "count": count, "out": str(out)}
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(request)]
        outcome = run_process(command, timeout=timeout, limit_bytes=limit, environment=environment)
        result = json.loads(out.read_text()) if out.exists() else {}
    return {"timed": None, "counted": None, **result, "died": outcome.died}


def summarize(settings: Settings, case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One object of the JSON out of a configuration's repeats."""
    runs = [r["timed"] for r in results if r["timed"]]
    counted = next((r["counted"] for r in results if r["counted"]), None)
    last = runs[-1] if runs else {}
    medians = {name: statistics.median([run[name] for run in runs]) if runs else None for name in TIMED}
    return {
        **asdict(case),
        **asdict(settings),
        **medians,
        **{name: counted[name] if counted else None for name in COUNTED},
        **{name: last.get(name) for name in ("peak_method", "loss", "torch")},
        **({name: last[name] for name in ("threads", "device")} if last else {}),
        "repeats": len(runs),
        "runs": [{name: run[name] for name in TIMED} for run in runs],
        "died": next((r["died"] for r in results if r["died"]), None),
    }


def run_all(
    settings: Settings,
    cases: list[Case],
    repeats: int,
    timeout: float | None,
    limit: int | None,
    json_path: str | None,
) -> list[dict[str, Any]]:
    """All repeats of all cases, interleaved, so that a slow minute of the machine does not fall on one mode alone."""
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    rows: list[dict[str, Any]] = []
    done = 0
    for repeat in range(repeats):
        for case in cases:
            done += 1
            if any(r["died"] for r in results[case]):
                continue  # it would again
            result = run_case(settings, case, repeat == 0, timeout, limit)
            results[case].append(result)
            said = f"{result['timed']['wall_s']:.2f} s" if result["timed"] else ""
            if result["died"]:
                said += f" died: {result['died']}"
            print(f"[{done}/{repeats * len(cases)}] {case}: {said.strip()}", file=sys.stderr, flush=True)
            rows = [summarize(settings, c, r) for c, r in results.items() if r]
            if json_path:
                write_json(json_path, rows)
    return rows


# ---- output


def flat_of(rows: list[dict[str, Any]], n: int) -> dict[str, Any]:
    return next((r for r in rows if r["mode"] == "flat" and r["n"] == n), {})


def ratio(row: dict[str, Any], base: dict[str, Any], name: str) -> float | None:
    value, against = row.get(name), base.get(name)
    return value / against if value is not None and against else None


def table_of(rows: list[dict[str, Any]]) -> str:
    """One block of lines for each n; "/flat": ratios to flat at the same n."""
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
    header += ["no grad", "buffers MiB", "head GFLOP"]
    lines = []
    for row in sorted(rows, key=lambda r: r["n"]):
        base = flat_of(rows, row["n"])
        line = [row["mode"], str(row["n"]), str(row["segments"])]
        for _, name, unit, digits in columns:
            line += [format_number(row[name], unit, digits), format_number(ratio(row, base, name), 1, 3)]
        line += [
            format_number(row["rows_no_grad"], 1, 0),
            format_number(row["buffer_bytes"], MIB, 1),
            format_number(row["head_flops"], 1e9, 1),
        ]
        lines.append(line)
    text = format_table(header, lines)
    notes = [f"died: {r['mode']} n={r['n']} S={r['segments']}: {r['died']}" for r in rows if r["died"]]
    for n in sorted({r["n"] for r in rows}):
        losses = [r["loss"] for r in rows if r["n"] == n and r["loss"] is not None]
        # float32 sums in other orders differ by far less; elements or labels that differ, by more
        if losses and max(losses) - min(losses) > 1e-3 * abs(max(losses)):
            notes.append(f"BAD: the modes disagree about the loss at n={n}: {min(losses)} to {max(losses)}")
    return "\n".join([text, *notes])


def plot(rows: list[dict[str, Any]], path: str) -> bool:
    """Time and memory, over S for each n and over n for each S; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figures = (("wall_s", 1, "step, s"), ("peak_bytes", GIB, "peak memory, GiB"), ("saved_bytes", GIB, "saved, GiB"))
    lengths, numbers = sorted({r["n"] for r in rows}), sorted({r["segments"] for r in rows})
    figure, axes = pyplot.subplots(2, len(figures), figsize=(5 * len(figures) + 2, 8), squeeze=False)
    colors = {mode: f"C{i}" for i, mode in enumerate(MODES)}
    markers = "osv^D*PXdh"
    for column, (name, unit, title) in enumerate(figures):
        over_s, over_n = axes[0, column], axes[1, column]
        for i, n in enumerate(lengths):
            marker = markers[i % len(markers)]
            for mode in MODES:
                points = [(r["segments"], r[name]) for r in rows if (r["mode"], r["n"]) == (mode, n)]
                points = sorted((s, v / unit) for s, v in points if v is not None)
                if not points:
                    continue
                if mode in WHOLE_MODES:
                    # one pass whatever S is: a level to compare with
                    style = "-" if mode == "flat" else ":"
                    over_s.axhline(points[0][1], color=colors[mode], linestyle=style, linewidth=1)
                over_s.plot(*zip(*points), color=colors[mode], marker=marker, label=f"{mode}, n = {n:,}")
        for i, S in enumerate(numbers):
            marker = markers[i % len(markers)]
            for mode in MODES:
                points = [(r["n"], r[name]) for r in rows if (r["mode"], r["segments"]) == (mode, S)]
                points = sorted((n, v / unit) for n, v in points if v is not None)
                if points:
                    label = mode if mode in WHOLE_MODES else f"{mode}, S = {S}"
                    over_n.plot(*zip(*points), color=colors[mode], marker=marker, label=label)
        for axis, ticks, label in ((over_s, numbers, "segments S"), (over_n, lengths, "tokens n")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(FixedLocator(ticks))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticklabels([f"{t:,}" for t in ticks])
            axis.set_xlabel(label)
            axis.set_ylabel(title)
            axis.grid(True, alpha=0.3)
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            axis.tick_params(axis="y", which="both", labelsize=7)
    for row in axes:  # the curves of a row are the same in each of its axes
        handles = {label: h for axis in row for h, label in zip(*axis.get_legend_handles_labels())}
        row[-1].legend(list(handles.values()), list(handles), loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


# ---- arguments


def integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 1,8") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return sorted(set(values))


def mode_list(text: str) -> list[str]:
    values = text.split(",")
    unknown = [v for v in values if v not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such mode: {', '.join(unknown)}; there are {', '.join(MODES)}")
    return values


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def make_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Settings()
    add("--n", type=integers, default=[2048, 4096], help="tokens of the row, several with commas (2048,4096)")
    add("--segments", type=integers, default=[1, 8], help="numbers of segments, several with commas (1,8)")
    add("--modes", type=mode_list, default=list(MODES), help=f"only these of {','.join(MODES)}")
    add("--repeats", type=positive, default=3, help="processes of each configuration, interleaved (3)")
    add("--json", help="write the results here, after every process")
    add("--png", help="draw the curves here, where matplotlib is installed")
    add("--timeout", type=float, help="seconds after which a configuration counts as died (none)")
    add("--limit-gib", type=float, help="resident memory above which a configuration is ended (none)")
    add("--layers", type=positive, default=default.layers)
    add("--hidden", type=positive, default=default.hidden)
    add("--intermediate", type=positive, help="3 * hidden")
    add("--heads", type=positive, help="hidden / 64, at least 1")
    add("--kv-heads", type=positive, help="as many as heads")
    add("--vocab", type=positive, default=default.vocab, help="of target and drafter")
    add("--depths", type=positive, default=default.depths, help="K")
    add("--ratio", type=float, default=default.ratio, help="r: depth d keeps r**d")
    add("--ratio-min", type=float, default=default.ratio_min, help="floor of that share")
    add("--boundaries", choices=("balanced", "uniform"), default=default.boundaries)
    add("--documents", type=positive, default=default.documents, help="documents in the row, of about equal length")
    add("--supervised-from", type=float, default=default.supervised_from, help="share of each document that is prompt")
    add("--chunk-rows", type=positive, help="rows whose logits exist at a time (the package's own choice)")
    add("--threads", type=positive, help="torch's own choice")
    add("--dtype", choices=("float32", "float64", "bfloat16"), default=default.dtype, help="bfloat16: by autocast")
    add(
        "--attention",
        choices=("structured", "dense"),
        default=default.attention,
        help="dense: every block of queries over all keys of the pass, what plain attention costs on a CPU",
    )
    add("--device", default=default.device, help="cpu, cuda, or auto: cuda where there is one")
    add("--seed", type=int, default=default.seed)
    add("--child", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child)
        return 0
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names}).complete()
    if not 0 <= settings.supervised_from <= 1:
        parser.error("--supervised-from must lie in 0..1")
    if min(arguments.n) < max(settings.depths, max(arguments.segments), settings.documents):
        parser.error("--n must be at least --depths, --documents and every one of --segments")
    cases = cases_of(arguments.n, arguments.segments, arguments.modes)
    if not cases:
        parser.error("nothing to run: segments = 1 gives flat and checkpoint, more give recompute and relay")
    limit = None if arguments.limit_gib is None else int(arguments.limit_gib * GIB)
    rows = run_all(settings, cases, arguments.repeats, arguments.timeout, limit, arguments.json)
    any_row = next((row for row in rows if row["torch"]), rows[-1])
    print(
        f"{settings.layers} layers, hidden {settings.hidden}, vocabulary {settings.vocab}, K {settings.depths}, ratio"
        f" {settings.ratio} (at least {settings.ratio_min}), {settings.documents} document(s), prompt"
        f" {settings.supervised_from:.0%}, {settings.dtype}, {settings.attention} attention, {any_row['device']},"
        f" {any_row['threads']} threads, torch {any_row['torch']}, {platform.machine()}; medians of up to"
        f" {arguments.repeats}"
    )
    print(table_of(rows))
    if arguments.png and not plot(rows, arguments.png):
        print("bench_segments: no PNG, matplotlib is not installed", file=sys.stderr)
    return 1 if all(row["died"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
