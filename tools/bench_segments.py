"""Time, memory and work of a training step: flat, flat with activation checkpointing, Algorithm 1, relay.

    python tools/bench_segments.py --n 2048,4096 --segments 1,8 --json results.json

Every configuration runs in a process of its own, one step after a tiny warm-up; repeats are interleaved, medians are
reported. Segments = 1 gives `flat` and `checkpoint`, every other number `recompute` (Algorithm 1) and `relay`. The JSON
is a list of objects, one a configuration:

    mode, n, segments, layers   and every other setting
    wall_s, cpu_s     of the step, medians; on CUDA wall_s is by events
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
    attention_pairs   pairs seen: with grad and without, once a layer
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
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from measure import (
    MIB,
    PeakRSS,
    SavedBytes,
    at_least_one,
    format_number,
    format_table,
    integers,
    release_memory,
    run_process,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from peagle_train.core.draft import PEagleDraft
    from peagle_train.core.passes import StepStats, TargetOutputs
    from peagle_train.core.relay import RelayBuffers
    from peagle_train.core.visibility import Visibility

MODES = ("flat", "checkpoint", "recompute", "relay")
WHOLE_MODES = ("flat", "checkpoint")
ROOT = Path(__file__).resolve().parent.parent
COUNTED: tuple[str, ...] = ("saved_bytes", "buffer_bytes", "flops", "attention_flops", "head_flops")
COUNTED += ("rows", "rows_no_grad", "attention_pairs")
TIMED = ("wall_s", "cpu_s", "peak_bytes")


@dataclass(frozen=True)
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
    ratio: float = 0.8  # depth d keeps ratio**d, and ratio_min at least
    ratio_min: float = 0.0
    boundaries: str = "balanced"  # or uniform
    documents: int = 1  # in the sequence, of about equal length
    supervised_from: float = 0.0  # share of each document that is prompt
    chunk_rows: int = 0  # elements whose logits exist at a time; the package's own choice
    dtype: str = "float32"  # float64; bfloat16 by autocast
    device: str = "auto"  # cpu, cuda
    threads: int = 0  # torch's own choice
    seed: int = 0

    def complete(self) -> "Settings":
        heads = self.heads or max(1, self.hidden // 64)
        intermediate, kv_heads = self.intermediate or 3 * self.hidden, self.kv_heads or heads
        return dataclasses.replace(self, intermediate=intermediate, heads=heads, kv_heads=kv_heads)


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
                sliding_window=settings.window or None,
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
        window, layers = self.settings.window or None, self.settings.layers
        static = on_cuda or self.autocast
        plan = plan_segments(batch, static, pad_context=on_cuda, window=window, layers=layers)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        arguments: dict[str, Any] = {"plan": plan, "scale": 1.0 / max(1, plan.num_supervised)}
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
            peak, method = rss.peak_bytes, "VmHWM"
        where = {"threads": torch.get_num_threads(), "device": str(self.device)}
        timed = {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, "peak_method": method}
        return {**timed, "loss": float(stats.loss), **where}

    def count(self, case: Case) -> dict[str, int]:
        """Everything that is the same in every repeat: COUNTED."""
        from peagle_train.core.relay import RelayBuffers

        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with work_counted(self.draft) as work:
            self.step(case.mode, batch, target, RelayBuffers())
        release_memory()
        buffers = RelayBuffers()

        def buffer_tensors() -> "list[Tensor]":
            return [t for pair in (*buffers.keys_values, *buffers.gradients) for t in pair]

        with attention_without_kernel(), SavedBytes(self.draft.parameters(), buffer_tensors) as saved:
            self.step(case.mode, batch, target, buffers)
        held = sum(t.untyped_storage().nbytes() for t in buffer_tensors())
        return {"saved_bytes": saved.peak_bytes, "buffer_bytes": held, **work}


@contextmanager
def work_counted(draft: "PEagleDraft") -> Iterator[dict[str, int]]:
    """Count the work of what runs in the block; attention gives zeros meanwhile.

    The counter knows nothing of the CPU's flash kernel, and a compiled one does not run under it at all. Attention is
    counted by the pairs instead.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from peagle_train.core import draft as module

    work = dict.fromkeys(("flops", "attention_flops", "head_flops", "rows", "rows_no_grad", "attention_pairs"), 0)
    counter = FlopCounterMode(display=False)

    class CountedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: "Tensor", forward_flops: int, *keys_values: "Tensor") -> "Tensor":
            ctx.shapes = [query.shape, *(t.shape for t in keys_values)]
            ctx.forward_flops = forward_flops
            work["attention_flops"] += forward_flops
            B, H, Q, D = query.shape
            return query.new_zeros(B, Q, H * D)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> tuple:
            work["attention_flops"] += 2 * ctx.forward_flops
            d_query, *d_keys_values = (gradient.new_zeros(shape) for shape in ctx.shapes)
            return d_query, None, *d_keys_values

    def attend(query: "Tensor", own: Any, context: Any, visibility: "Visibility") -> "Tensor":
        _, H, Q, D = query.shape
        pairs = visible_pairs(visibility, Q)
        work["attention_pairs"] += pairs
        return CountedAttention.apply(query, 4 * pairs * D * H, *own, *(context or ()))

    original_loss = module.chunked_linear_loss

    def head(*arguments: Any) -> Any:
        before = counter.get_total_flops()
        out = original_loss(*arguments)  # with all its matmuls: the backward only scales
        work["head_flops"] += counter.get_total_flops() - before
        return out

    def note_rows(_: Any, arguments: tuple) -> None:
        work["rows" if torch.is_grad_enabled() else "rows_no_grad"] += arguments[0].numel()

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
    work["flops"] = counter.get_total_flops() - work["head_flops"] + work["attention_flops"]


def visible_pairs(visibility: "Visibility", num_queries: int) -> int:
    """Pairs (query, key) that the last `num_queries` elements of a pass see.

    A depth-0 element sees the columns of its document up to its own; a deeper one its own rollout's down to itself,
    too, and rollouts are complete.
    """
    import torch

    first = visibility.anchor.shape[1] - num_queries
    start, anchor, depth = (t[:, first:] for t in (visibility.start, visibility.anchor, visibility.depth))
    return int(torch.where(depth >= 0, anchor - start + 1 + depth, 0).sum())


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

    with (
        mock.patch.object(attention_cpu, "_flash", flash),
        mock.patch.object(attention_cpu, "_flash_backward", flash_backward),
        mock.patch.object(Visibility, "block_mask", lambda *_: None),
    ):
        yield


def run_child(request: str) -> None:
    """Write `{"timed": ...}` and, if asked for, `{"timed": ..., "counted": ...}` to the file that the request names."""
    content = json.loads(request)
    bench, case = Bench(Settings(**content["settings"])), Case(**content["case"])
    result: dict[str, Any] = {"timed": bench.time(case)}
    write_json(content["out"], result)  # at once: should the counting die, the timing stands
    if content["count"]:
        result["counted"] = bench.count(case)
        write_json(content["out"], result)


# ---- the parent: starts children, never imports torch


def cases_of(lengths: list[int], segments: list[int], modes: list[str]) -> list[Case]:
    return [
        Case(mode, n, S)
        for n in lengths
        for S in segments
        for mode in MODES
        if mode in modes and (mode in WHOLE_MODES) == (S == 1)
    ]


def run_case(settings: Settings, case: Case, count: bool, timeout: float | None) -> dict[str, Any]:
    """One child: its "timed" and "counted" as far as it came, and "died"."""
    # Measured is the package beside this file, installed or not.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if settings.threads:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        request = {"settings": asdict(settings), "case": asdict(case), "count": count, "out": str(out)}
        command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(request)]
        died = run_process(command, timeout=timeout, environment=environment)
        result = json.loads(out.read_text()) if out.exists() else {}
    return {"timed": None, "counted": None, **result, "died": died}


def summarize(settings: Settings, case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One object of the JSON out of a configuration's repeats."""
    runs = [r["timed"] for r in results if r["timed"]]
    counted = next((r["counted"] for r in results if r["counted"]), {})
    return {
        **asdict(case),
        **asdict(settings),
        **dict.fromkeys(("peak_method", "loss")),
        **(runs[-1] if runs else {}),
        **{name: statistics.median([run[name] for run in runs]) if runs else None for name in TIMED},
        **{name: counted.get(name) for name in COUNTED},
        "repeats": len(runs),
        "died": next((r["died"] for r in results if r["died"]), None),
    }


def run_all(
    settings: Settings, cases: list[Case], repeats: int, timeout: float | None, json_path: str | None
) -> list[dict[str, Any]]:
    """All repeats of all cases, interleaved, so that a slow minute of the machine does not fall on one mode alone."""
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    rows: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for case, earlier in results.items():
            if any(r["died"] for r in earlier):
                continue  # it would again
            result = run_case(settings, case, repeat == 0, timeout)
            earlier.append(result)
            said = f"died: {result['died']}" if result["died"] else f"{result['timed']['wall_s']:.2f} s"
            print(f"[{repeat + 1}/{repeats}] {case}: {said}", file=sys.stderr, flush=True)
            rows = [summarize(settings, c, r) for c, r in results.items() if r]
            if json_path:
                write_json(json_path, rows)
    return rows


# ---- output


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
    lines, notes = [], []
    for row in sorted(rows, key=lambda r: r["n"]):
        same = [r for r in rows if r["n"] == row["n"]]
        base = next((r for r in same if r["mode"] == "flat"), {})
        line = [row["mode"], str(row["n"]), str(row["segments"])]
        for _, name, unit, digits in columns:
            is_known = row[name] is not None and base.get(name)
            ratio = row[name] / base[name] if is_known else None
            line += [format_number(row[name], unit, digits), format_number(ratio, 1, 3)]
        lines.append([*line, format_number(row["rows_no_grad"], 1, 0), format_number(row["buffer_bytes"], MIB, 1)])
        if row["died"]:
            notes.append(f"died: {row['mode']} n={row['n']} S={row['segments']}: {row['died']}")
        losses = [r["loss"] for r in same if r["loss"] is not None]
        # float32 sums in other orders differ by far less; elements or labels that differ, by more
        if row is same[0] and losses and max(losses) - min(losses) > 1e-3 * abs(max(losses)):
            notes.append(f"BAD: the modes disagree about the loss at n={row['n']}: {min(losses)} to {max(losses)}")
    return "\n".join([format_table([*header, "no grad", "buffers MiB"], lines), *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--n", type=integers, default=[2048, 4096], help="tokens of the sequence, several with commas (2048,4096)")
    add("--segments", type=integers, default=[1, 8], help="numbers of segments, several with commas (1,8)")
    add("--modes", nargs="+", choices=MODES, default=MODES, help="only these")
    add("--repeats", type=at_least_one, default=3, help="processes of each configuration, interleaved (3)")
    add("--json", help="write the results here, after every process")
    add("--timeout", type=float, help="seconds after which a configuration counts as died (none)")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        add(name, type=type(field.default), default=field.default, help=f"a setting ({field.default})")
    add("--child", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child:
        run_child(o.child)
        return 0
    settings = Settings(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Settings)}).complete()
    if min(o.n) < max(settings.depths, settings.documents, *o.segments):
        parser.error("--n must be at least --depths, --documents and every one of --segments")
    cases = cases_of(o.n, o.segments, o.modes)
    if not cases:
        parser.error("nothing to run: segments = 1 gives flat and checkpoint, more give recompute and relay")
    rows = run_all(settings, cases, o.repeats, o.timeout, o.json)
    print(", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    print(table_of(rows))
    return 1 if all(row["died"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
