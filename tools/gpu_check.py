#!/usr/bin/env python3
"""What a GPU has to show, in one run of under 9 minutes: right, fast, as large as planned. No network, no data, no weights.

    python tools/gpu_check.py [--stages 1,2,3] [--output FILE]    one GPU
    python tools/gpu_check.py --gpus 8                            and the stages for several
    python tools/gpu_check.py --dry                               all of it on a CPU, tiny: shows that the script works

Stages run in this order, each in a process of its own. If one fails or takes too long, its last line and what it measured
before are kept, and the next one runs. After each stage the results so far are written (to tools/results/gpu.json, of
--dry to a temporary file) and one line is printed. Exit status 1 if a stage failed.
"""

# ruff: noqa: E402 (imports after the path is set)

import argparse
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ["HF_HUB_OFFLINE"] = "1"


import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from peagle_train.core.attention import attend
from peagle_train.core.elements import Elements, gather_elements
from peagle_train.core.flex import block_mask_of
from peagle_train.core.flex import flex as attend_by_flex
from peagle_train.core.passes import TargetOutputs, recompute_step, visibility_of
from peagle_train.core.plan import padding_share, plan_segments
from peagle_train.core.visibility import Visibility
from peagle_train.machine import GIB
from peagle_train.target_model.frozen import FrozenTarget
from tools.gpu_parts import (
    DATASHEET,
    DEPTHS,
    DRAFTER_8B,
    DRAFTER_70B,
    NARROW,
    TINY,
    Check,
    GivenTarget,
    Shape,
    Stepper,
    distance,
    free,
    gradients_of,
    make_batch,
    make_draft,
    make_recipe,
    make_target,
    measured,
    model_flops,
    peaks,
    planned_gib,
    seconds_of,
)
from tools.measure import run_process, write_json

ROOM = 79
"""GiB that stage 8 may fill."""


# ---- the stages


def versions(check: Check) -> None:
    """Device, versions, compiler, cuDNN, the rate of a large bfloat16 matrix product."""
    names = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "accelerate")}
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    check.note(python=sys.version.split()[0], **names)
    check.note(compiler=compiler, python_headers=headers, ok=check.dry or bool(compiler and headers))  # Triton's needs
    if not check.dry:
        import triton

        gpu = torch.cuda.get_device_properties(check.device)
        nccl, cudnn = torch.cuda.nccl.version(), torch.backends.cudnn.version()
        check.note(triton=triton.__version__, cuda=torch.version.cuda, cudnn=cudnn, nccl=nccl)
        check.note(
            device=gpu.name, capability=f"{gpu.major}.{gpu.minor}", gib=gpu.total_memory / GIB, ok=gpu.major >= 8
        )
    n = check.pick(8192, 64)
    one, other = torch.randn(2, n, n, device=check.device).bfloat16()
    ms = measured(torch.matmul, one, other, repeats=10)["ms"]
    check.note(matmul=n, ms=ms, tflop_per_s=2 * n**3 / ms / 1e9)


def tests(check: Check) -> None:
    """Pytest -m gpu."""
    files = [
        str(path) for path in sorted((ROOT / "tests").glob("*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout)
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    check.note(pytest=lines[-1] if lines else "", failed=failed, ok=result.returncode == 0)


def correct(check: Check) -> None:
    """bfloat16 gradients against float64: 1 and 3 documents, relay, recompute, compiled; no waits.

    By the distance of all gradients to those of the flat pass in float64 on the CPU.
    """
    shape, length = check.pick((NARROW, 1024), (TINY, 48))
    for documents in check.pick((1, 3), (3,)):
        exact = copy.deepcopy(make_draft(check, shape, length)).to("cpu", torch.float64)
        batch = make_batch(check, shape, make_recipe(check, shape, length, 1), documents)
        given = GivenTarget(check, shape, length).given
        target = TargetOutputs(*(t.to("cpu", torch.float64) for t in vars(given).values()))
        scale = 1 / int(batch["supervised"].sum())
        loss, expected = float(recompute_step(exact, batch, target, scale=scale).loss), gradients_of(exact)
        allowed = 0.05
        ways = ((1, "relay", False), (4, "relay", False), (4, "recompute", False), (4, "relay", True))
        for S, mode, compiled in ways:
            one = Stepper(check, shape, length, S, segment_mode=mode, compile=compiled)
            cut = one.batch(documents=documents)
            loss_off = abs(float(one.accumulate(cut).loss) / loss - 1)
            off = distance(one.gradients(), expected)
            row = {"documents": documents, "S": S, "mode": mode, "compiled": compiled}
            check.note(**row, gradients_off=off, loss_off=loss_off, ok=off <= allowed and loss_off <= 0.01)
            if S == 1:
                allowed = 1.5 * off
            elif not check.dry:
                plan, one_over = one.runner.plan(cut), torch.tensor(scale, device=check.device)
                torch.cuda.set_sync_debug_mode("error")  # where the host waits for the device
                one.runner.run(cut, plan, one_over)
                torch.cuda.set_sync_debug_mode("default")
                check.note(**row, waits=0)
        free()


def step(check: Check) -> None:
    """The drafter's step at 8k by segments: ms, MFU, peak against the plan; with the target.

    Cases are (S, compiled, supervised); what matters most comes first, should time run out.
    """
    cases = [(4, True, 1.0), (4, False, 1.0), (1, True, 1.0), (16, True, 1.0), (1, False, 1.0), (4, True, 0.5)]
    cases += [(2, True, 0.5), (1, True, 0.5), (2, True, 1.0), (8, True, 1.0), (16, False, 1.0), (2, False, 1.0)]
    for i, case in enumerate(cases[: check.pick(len(cases), 2)]):
        _step_of(check, *case, with_target=i == 0)
        free()


def _step_of(check: Check, S: int, compiled: bool, supervised: float, with_target: bool) -> None:
    shape, length = check.pick((DRAFTER_8B, 8192), (TINY, 64))
    one = Stepper(check, shape, length, S, compile=compiled)
    batch = one.batch(supervised=supervised)
    row = {"S": S, "compiled": compiled, "supervised": supervised}
    row["first_s"] = seconds_of(one.step, batch)  # compiles, and makes AdamW's state
    one.step(batch)
    row |= {**measured(one.accumulate, batch), "planned_gib": planned_gib(check, shape, one.recipe)}
    row["optimizer_ms"] = 1e3 * seconds_of(one.update)
    plan = one.runner.plan(batch)
    row["slots_over_elements"] = 1 / (1 - padding_share([plan]))
    if not check.dry:
        flops = model_flops(shape, batch)
        row |= {"tflop": flops / 1e12, "mfu": flops / DATASHEET / row["ms"] * 1e3}
    check.note(**row)
    if with_target:
        one.target = one.runner.target = make_target(check, shape, check.device, check.pick(36, 6))
        batch = one.batch(documents=3)
        one.step(batch)
        row = {"S": S, "compiled": compiled, "with_target": True, **measured(one.step, batch)}
        planned = planned_gib(check, shape, one.recipe, one.target)
        check.note(**row, tokens_per_s=length / row["ms"] * 1e3, planned_gib=planned)


def kernels(check: Check) -> None:
    """Where a step's time on the device goes: its 20 longest kernels."""
    shape, length = check.pick((DRAFTER_8B, 8192), (TINY, 64))
    for compiled in check.pick((True, False), (False,)):
        one = Stepper(check, shape, length, 4, compile=compiled)
        batch = one.batch()
        one.step(batch)
        one.step(batch)
        with torch.profiler.profile() as profile:
            seconds_of(one.step, batch)
        name = check.pick("self_device_time_total", "self_cpu_time_total")  # of a CPU: operators
        found = [(getattr(e, name) / 1e3, e.count, e.key[:80]) for e in profile.key_averages() if getattr(e, name)]
        check.note(
            S=4, compiled=compiled, total_ms=sum(ms for ms, _, _ in found), longest=sorted(found, reverse=True)[:20]
        )
        del one, profile
        free()


FLEX_BLOCKS = ((), (32, 128, 128, 32), (64, 64, 64, 64), (64, 128, 128, 64))
"""M1, N1, M2, N2 of flex attention's backward; none: torch's own."""


def flex(check: Check) -> None:
    """Flex attention alone, with the project's kernel options and others.

    The second segment of 4 and of 2 at 8k: 8,576 and 17,152 elements, after 8,192 columns of context.
    """
    shape, length = check.pick((DRAFTER_8B, 8192), (TINY, 64))
    A, G, D = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    make = partial(torch.randn, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    for S in (4, 2):
        visibility, pairs = second_segment(check, make_batch(check, shape, make_recipe(check, shape, length, S)))
        N = visibility.anchor.shape[1]
        query, key, value = make(1, A, N, D), make(1, G, length + N, D), make(1, G, length + N, D)
        mask = block_mask_of(visibility)
        ways = {"the project's": partial(attend_by_flex, query, key, value, mask)}
        if check.dry:  # a CPU has no backward of flex attention
            context, own = (key[:, :, :length], value[:, :, :length]), (key[:, :, length:], value[:, :, length:])
            ways = {"the project's": partial(attend, query, own, context, visibility)}
        for blocks in () if check.dry else FLEX_BLOCKS:
            options = dict(zip(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), blocks))
            options |= {"bwd_num_warps": 8, "bwd_num_stages": 2} if blocks else {}
            compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
            given = {"block_mask": mask, "enable_gqa": True, "kernel_options": options}
            ways[str(blocks)] = partial(compiled, query, key, value, **given)
        for name, way in ways.items():
            try:
                weight = torch.randn_like(way())
                _backward(way, weight)
            except Exception as error:  # options that do not fit the chip are a result, too
                check.note(elements=N, options=name, error=str(error).strip().splitlines()[-1][:300])
                continue
            forward = measured(way, repeats=5)["ms"]
            backward = measured(_backward, way, weight, repeats=5)["ms"] - forward
            rates = [n * 4 * A * D * pairs / ms / 1e9 for n, ms in ((1, forward), (2.5, backward))]
            check.note(elements=N, options=name, forward_ms=forward, backward_ms=backward, tflop_per_s=rates)
        free()


def _backward(way: Callable[[], Tensor], weight: Tensor) -> None:
    way().backward(weight)


def second_segment(check: Check, batch: dict[str, Tensor]) -> tuple[Visibility, int]:
    """Its tables on the device, and its number of visible pairs."""
    plan = plan_segments(batch, static=True, pad_context=True)
    segment = plan.segments[1]
    own = Elements(*(t.to(check.device) for t in gather_elements(batch, segment.columns, mask_token_id=0)))
    pairs = int((own.anchor - own.start + 1 + own.depth)[own.depth >= 0].sum())
    context = plan.context(segment.context_end, segment.reads_from)
    return visibility_of(own, DEPTHS, segment.num_depth0, segment.first_rollout, context=context), pairs


def target(check: Check) -> None:
    """An 8B target's features: 8k packed, 32k in chunks."""
    shape = check.pick(DRAFTER_8B, TINY)
    model = make_target(check, shape, check.device, check.pick(36, 6)).model
    for length, documents, chunk in check.pick([(8192, 3, None), (8192, 1, None), (32768, 1, 2048)], [(48, 3, 16)]):
        frozen = FrozenTarget(model, chunk_tokens=chunk)
        ids = torch.randint(shape["vocab_size"], (1, length))
        positions = torch.cat([torch.arange(len(part)) for part in torch.arange(length).tensor_split(documents)])[None]
        frozen.features(ids, positions)
        row = {"tokens": length, "documents": documents, "chunk_tokens": chunk}
        row |= measured(frozen.features, ids, positions)
        check.note(**row, tokens_per_s=length / row["ms"] * 1e3)
        free()


def longest(check: Check) -> None:
    """The longest sequence in 79 GiB: relay, flat, recompute.

    From what the plan says fits: on while it does, or back until it does.
    """
    shape = check.pick(DRAFTER_8B, TINY)
    lengths = check.pick([1024 * n for n in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)], [32, 64])
    if not check.dry:
        total = torch.cuda.get_device_properties(check.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM * GIB / total))
    segments = {"relay": lambda n: max(2, n // 2048), "flat": lambda n: 1, "recompute": lambda n: 16}
    for mode, S_of in segments.items():
        train = {"segment_mode": "relay" if mode == "flat" else mode}
        plans = [planned_gib(check, shape, make_recipe(check, shape, n, S_of(n), **train)) for n in lengths]
        i, fits = max(sum(planned <= ROOM for planned in plans) - 1, 0), {}
        while 0 <= i < len(lengths) and i not in fits:
            row = {"mode": mode, "n": lengths[i], "S": S_of(lengths[i]), "planned_gib": plans[i]}
            try:
                row["seconds"] = _one_step(check, shape, row["n"], row["S"], train)
                fits[i] = True
            except torch.OutOfMemoryError:
                fits[i] = False
            check.note(**row, fits=fits[i], **peaks())
            free()
            i += 1 if fits[i] else -1


def _one_step(check: Check, shape: Shape, n: int, S: int, train: dict[str, Any]) -> float:
    one = Stepper(check, shape, n, S, **train)
    moments = [torch.zeros_like(p) for p in one.trained for _ in range(2)]  # as AdamW's, which it has made only later
    seconds = seconds_of(one.accumulate, one.batch())
    del moments
    return seconds


# ---- stages for several GPUs

VARIANTS = (("fsdp2", True), ("none", True), ("fsdp2", False), ("none", False))
"""Sharding, compiled."""


def ranks(check: Check) -> None:
    """Gradients of N ranks against one, replicated and sharded (FSDP2), compiled and eager."""
    on_ranks(check, _gradients_of_ranks)


def large(check: Check) -> None:
    """A drafter of a 70B target on N ranks: ms, tokens per second, each rank's peak."""
    on_ranks(check, _steps_of_ranks)


def on_ranks(check: Check, body: Callable[[Check], None]) -> None:
    """Run it on `check.gpus` processes of one launch, with NCCL between them (dry: gloo)."""
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    method = check.pick("spawn", "fork")  # nothing has run in this process yet
    torch.multiprocessing.start_processes(_rank, (check, body, port), check.gpus, start_method=method)


def _rank(rank: int, check: Check, body: Callable[[Check], None], port: int) -> None:
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": check.gpus, "LOCAL_WORLD_SIZE": check.gpus}
    os.environ |= {name: str(n) for name, n in launch.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if check.dry:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        torch.cuda.set_device(rank)
    Accelerator(cpu=check.dry, mixed_precision="bf16")  # makes the process group
    assert dist.get_world_size() == check.gpus
    body(check if rank == 0 else replace(check, rows=os.devnull))
    dist.destroy_process_group()


def _gradients_of_ranks(check: Check) -> None:
    """Each rank has a sequence of its own; one alone, with all of them, must get the same gradients."""
    shape, length = check.pick((NARROW, 1024), (TINY, 48))
    alone = Stepper(check, shape, length, 4)
    batches = [alone.batch(documents=3, seed=rank) for rank in range(check.gpus)]
    count = torch.tensor(sum(alone.runner.plan(batch).num_supervised for batch in batches), device=check.device)
    for batch in batches:
        alone.accumulate(batch, count)
    expected = alone.gradients()
    for sharding, compiled in VARIANTS:
        row = {"ranks": check.gpus, "sharding": sharding, "compiled": compiled}
        try:
            one = Stepper(check, shape, length, 4, sharding=sharding, compile=compiled)
        except ValueError as refusal:
            check.note(**row, refused=str(refusal))
            continue
        one.accumulate(batches[dist.get_rank()])
        one.reduce()
        off = distance(one.gradients(), expected)
        check.note(**row, gradients_off=off, ok=off <= 0.01)
        free()


def _steps_of_ranks(check: Check) -> None:
    shape, length = check.pick((DRAFTER_70B, 8192), (TINY, 64))
    for sharding, compiled in check.pick(VARIANTS, VARIANTS[2:]):
        row: dict[str, Any] = {"ranks": check.gpus, "sharding": sharding, "compiled": compiled, "S": 4}
        try:
            one = Stepper(check, shape, length, 4, sharding=sharding, compile=compiled)
            batch = one.batch(seed=dist.get_rank())
            row |= {"first_s": seconds_of(one.step, batch), "parameters": sum(p.numel() for p in one.trained)}
            one.step(batch)
            of_ranks: list[Any] = [None] * check.gpus
            dist.all_gather_object(of_ranks, measured(one.step, batch))
            row |= {"ms": max(r["ms"] for r in of_ranks), "planned_gib": planned_gib(check, shape, one.recipe)}
            row |= {name: [r[name] for r in of_ranks] for name in peaks()}
            row["tokens_per_s"] = check.gpus * length / row["ms"] * 1e3
        except (torch.OutOfMemoryError, ValueError) as error:  # on all ranks alike: they do the same work
            row[type(error).__name__] = str(error).splitlines()[0][:200]
        check.note(**row)
        one = batch = None
        free()


# ---- running them

STAGES: dict[int, tuple[Callable[[Check], None], int]] = {
    1: (versions, 25),
    2: (tests, 75),
    3: (correct, 50),
    4: (step, 170),
    5: (kernels, 40),
    6: (flex, 40),
    7: (target, 40),
    8: (longest, 55),
    9: (ranks, 120),
    10: (large, 180),
}
ONE_GPU = 8
"""Stages after this one need several."""


def run_stage(number: int, seconds: float, check: Check) -> dict[str, Any]:
    """In a process of its own; returns its status ("ok", "failed"), the error's line and the rows noted."""
    began, log = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        command = [sys.executable, __file__, "--stages", str(number), "--gpus", str(check.gpus), "--rows", str(rows)]
        died = run_process([*command, *(["--dry"] if check.dry else [])], timeout=seconds, log=log)
        found = [json.loads(line) for line in rows.read_text(encoding="ascii").splitlines()]
    wrong = None if all(row.get("ok", True) for row in found) else "not all rows are ok"
    result: dict[str, Any] = {"stage": number, "name": STAGES[number][0].__name__, "rows": found}
    result |= {"status": "ok", "seconds": round(time.monotonic() - began, 1)}
    if error := died or wrong:
        result |= {"status": "failed", "error": error, "log": log[-40:]}
    return result


def line_of(result: dict[str, Any]) -> str:
    parts = [f"{result['stage']:2d} {result['name']}: {result['status']}, {result['seconds']} s", result.get("error")]
    for row in result["rows"]:
        parts.append(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return " | ".join(filter(None, parts))[:3000]


def run_stages(stages: dict[int, float], check: Check, output: Path) -> bool:
    """One after the other, each for so many seconds at most; the results so far are written after each. Returns whether
    all are ok."""
    results: list[dict[str, Any]] = []
    for number, seconds in stages.items():
        results.append(run_stage(number, seconds, check))
        write_json(output, results)
        print(line_of(results[-1]), flush=True)
    return all(result["status"] == "ok" for result in results)


def main() -> int:
    stages = [
        f"{number:2} {stage.__name__:9} {seconds:3} s  {(stage.__doc__ or '').splitlines()[0]}"
        for number, (stage, seconds) in STAGES.items()
    ]
    about = "\n".join([__doc__ or "", "Stages, and the seconds after which each is ended:", *stages])
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", help="their numbers, as in 1,2,3 (default: all that there are GPUs for)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use (default 1; --dry has 2 processes)")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny shapes; measures nothing")
    parser.add_argument("--output", type=Path, help="file of the results")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # of a stage's own process: where its rows go
    arguments = parser.parse_args()
    if arguments.rows:
        STAGES[int(arguments.stages)][0](Check(arguments.dry, arguments.gpus, arguments.rows))
        return 0
    if not arguments.dry and torch.cuda.device_count() < arguments.gpus:
        parser.error(f"--gpus is {arguments.gpus}, and torch sees {torch.cuda.device_count()}: give fewer, or --dry")
    check = Check(arguments.dry, 2 if arguments.dry else arguments.gpus)
    there = [number for number in STAGES if check.gpus > 1 or number <= ONE_GPU]
    asked = arguments.stages.split(",") if arguments.stages else [str(number) for number in there]
    if unknown := {*asked} - {str(number) for number in there}:
        parser.error(f"--stages has {', '.join(sorted(unknown))}; give numbers of 1..{there[-1]}, as in 1,2,3")
    # A busy machine's seconds say nothing.
    stages = {number: 300 if check.dry else STAGES[number][1] for number in there if str(number) in asked}
    output = arguments.output or ROOT / "tools" / "results" / "gpu.json"
    if check.dry and not arguments.output:
        output = Path(tempfile.mkdtemp(prefix="gpu_check_")) / "gpu.json"
    is_ok = run_stages(stages, check, output)
    print(f"results: {output}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
