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
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any
from unittest import mock

import torch
from measure import (
    MIB,
    PeakRSS,
    SavedBytes,
    at_least_one,
    format_number,
    integers,
    release_memory,
    run_child,
    write_json,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peagle_train.core import attention
from peagle_train.core import draft as draft_module
from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import StepStats, TargetOutputs, recompute_step
from peagle_train.core.plan import plan_segments
from peagle_train.core.relay import RelayBuffers, relay_step
from peagle_train.core.visibility import Visibility
from peagle_train.files import aligned

MODES = ("flat", "checkpoint", "recompute", "relay")
WHOLE_MODES = ("flat", "checkpoint")
COUNTED: tuple[str, ...] = ("saved_bytes", "buffer_bytes", "flops", "attention_flops", "head_flops")
COUNTED += ("rows", "rows_no_grad", "attention_pairs")
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
        """wall_s, cpu_s, peak_bytes and the loss of one step."""
        n = max(16, 2 * self.settings.depths)  # of a step that loads what a first one loads, and makes gradients
        self.step(case.mode, self.batch(n, min(case.segments, n)), self.target(n), RelayBuffers())
        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with PeakRSS() as rss:
            began, cpu = time.perf_counter(), time.process_time()
            stats = self.step(case.mode, batch, target, RelayBuffers())
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        timed = {"wall_s": wall, "cpu_s": cpu, "peak_bytes": rss.peak_bytes, "loss": float(stats.loss)}
        return {**timed, "threads": torch.get_num_threads()}

    def count(self, case: Case) -> dict[str, int]:
        """Everything that is the same in every repeat: COUNTED."""
        batch, target = self.batch(case.n, case.segments), self.target(case.n)
        with work_counted(self.draft) as work:
            self.step(case.mode, batch, target, RelayBuffers())
        release_memory()
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
    """Count the work of what runs in the block; attention gives zeros meanwhile.

    The counter knows nothing of the CPU's flash kernel, and a compiled one does not run under it at all. Attention is
    counted by the pairs instead.
    """
    work = dict.fromkeys(("flops", "attention_flops", "head_flops", "rows", "rows_no_grad", "attention_pairs"), 0)
    counter = FlopCounterMode(display=False)

    class CountedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, forward_flops: int, *keys_values: Tensor) -> Tensor:
            ctx.shapes = [query.shape, *(t.shape for t in keys_values)]
            ctx.forward_flops = forward_flops
            work["attention_flops"] += forward_flops
            B, H, Q, D = query.shape
            return query.new_zeros(B, Q, H * D)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple:
            work["attention_flops"] += 2 * ctx.forward_flops
            d_query, *d_keys_values = (gradient.new_zeros(shape) for shape in ctx.shapes)
            return d_query, None, *d_keys_values

    def attend(query: Tensor, own: Any, context: Any, visibility: Visibility) -> Tensor:
        _, H, Q, D = query.shape
        pairs = visible_pairs(visibility, Q)
        work["attention_pairs"] += pairs
        return CountedAttention.apply(query, 4 * pairs * D * H, *own, *(context or ()))

    original_loss = draft_module.chunked_linear_loss

    def head(*arguments: Any) -> Any:
        before = counter.get_total_flops()
        out = original_loss(*arguments)  # with all its matmuls: the backward only scales
        work["head_flops"] += counter.get_total_flops() - before
        return out

    def note_rows(_: Any, arguments: tuple) -> None:
        work["rows" if torch.is_grad_enabled() else "rows_no_grad"] += arguments[0].numel()

    with (
        draft.register_forward_pre_hook(note_rows),
        mock.patch.object(draft_module, "attend", attend),
        mock.patch.object(draft_module, "chunked_linear_loss", head),
        counter,
    ):
        yield work
    work["flops"] = counter.get_total_flops() - work["head_flops"] + work["attention_flops"]


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


def measure(settings: dict[str, Any], case: dict[str, Any], count: bool, out: str) -> None:
    """Write `{"timed": ...}` and, if asked for, `{"timed": ..., "counted": ...}`."""
    bench = Bench(Settings(**settings))
    result: dict[str, Any] = {"timed": bench.time(Case(**case))}
    write_json(out, result)  # at once: should the counting die, the timing stands
    if count:
        write_json(out, {**result, "counted": bench.count(Case(**case))})


# ---- the parent: starts children


def cases_of(lengths: list[int], segments: list[int], modes: list[str]) -> list[Case]:
    return [
        Case(mode, n, S)
        for n in lengths
        for S in segments
        for mode in MODES
        if mode in modes and (mode in WHOLE_MODES) == (S == 1)
    ]


def summarize(settings: Settings, case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One object of the JSON out of a configuration's repeats."""
    runs = [r["timed"] for r in results if r["timed"]]
    counted = next((r["counted"] for r in results if r["counted"]), {})
    return {
        **asdict(case),
        **asdict(settings),
        **(runs[-1] if runs else {"loss": None}),
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
            given = {"settings": asdict(settings), "case": asdict(case), "count": repeat == 0}
            found, died = run_child(__file__, given, timeout)
            result = {"timed": None, "counted": None, **found, "died": died}
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
    return "\n".join([aligned([[*header, "no grad", "buffers MiB"], *lines], right=True), *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--n", type=integers, default=[2048, 4096], help="tokens of the sequence, several with commas (2048,4096)")
    add("--segments", type=integers, default=[1, 8], help="numbers of segments, several with commas (1,8)")
    add("--modes", nargs="+", choices=MODES, default=MODES, help="only these")
    add("--repeats", type=at_least_one, default=3, help="processes of each configuration, interleaved (3)")
    add("--json", help="write the results here, after every process")
    add("--timeout", type=float, help="seconds after which a configuration counts as died (none)")
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        add(name, type=type(field.default), default=field.default, help=f"a setting ({field.default})")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.child:
        measure(**json.loads(o.child[0]), out=o.child[1])
        return 0
    settings = Settings(**{field.name: getattr(o, field.name) for field in fields(Settings)})
    if min(o.n) < max(settings.depths, *o.segments):
        parser.error("--n must be at least --depths and every one of --segments")
    cases = cases_of(o.n, o.segments, o.modes)
    if not cases:
        parser.error("nothing to run: segments = 1 gives flat and checkpoint, more give recompute and relay")
    rows = run_all(settings, cases, o.repeats, o.timeout, o.json)
    print(", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    print(table_of(rows))
    return 1 if all(row["died"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
