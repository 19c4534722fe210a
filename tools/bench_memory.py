"""Memory of a training step: planned (peagle_train/memory.py) against measured.

    python tools/bench_memory.py --n 1024,4096 --segments 1,8 --layers 2 --json memory.json

Every configuration of tools/bench_segments.py (modes flat, checkpoint, recompute, relay) runs in a process of its own. The
JSON is that tool's, a list of objects, one a configuration, and in each

    planned_saved_bytes, planned_peak_bytes    what the plan says of saved_bytes and peak_bytes: the most that autograd
                      holds, and the most that a step needs over what is resident before (model, gradients, batch, target
                      outputs)
    saved_ratio, peak_ratio    planned over measured

saved_bytes is exact; peak_bytes is resident memory, with the C library's holes in it and, the smaller the shapes, the more
of what a first step loads.
"""

import argparse
import os
import sys
from typing import Any

from bench_segments import MODES, Bench, Settings, cases_of, run_all
from measure import MIB, format_number, integers, write_json

from peagle_train.config import Cod, Data, Output, Recipe, Target, Train
from peagle_train.files import aligned
from peagle_train.machine import Device
from peagle_train.memory import Sizes, largest_pass, plan_memory, saved_bytes


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


def planned(bench: Bench, row: dict[str, Any]) -> dict[str, Any]:
    """A configuration's plan, and the plan's ratios to what was measured."""
    sizes = sizes_of_bench(bench, row["n"], row["mode"])
    plan = plan_memory(sizes, row["segments"], all_supervised=True)
    # Resident before the step: all but the relay's buffers, which a bench's step makes.
    before = sum(v for k, v in plan.resident.items() if k not in ("keys, values", "their gradients"))
    before += plan.outputs
    found = {
        "saved": max(saved_bytes(sizes, largest_pass(sizes, row["segments"], all_supervised=True))),
        "peak": max(plan.phases[name] for name in ("loss", "backward", "embedding")) - before,
    }
    ratios = {f"{k}_ratio": v / row[f"{k}_bytes"] if row[f"{k}_bytes"] else None for k, v in found.items()}
    return {**{f"planned_{k}_bytes": v for k, v in found.items()}, **ratios}


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [["mode", "n", "S", "layers", "saved MiB", "planned", "ratio", "peak MiB", "planned", "ratio"]]
    for row in rows:
        line = [row["mode"], str(row["n"]), str(row["segments"]), str(row["layers"])]
        for name in ("saved", "peak"):
            line += [format_number(row[key], MIB, 1) for key in (f"{name}_bytes", f"planned_{name}_bytes")]
            line.append(format_number(row[f"{name}_ratio"], 1, 3))
        lines.append(line)
    died = [f"died: {r['mode']} n={r['n']} S={r['segments']}: {r['died']}" for r in rows if r["died"]]
    return "\n".join([aligned(lines, right=True), *died])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--n", type=integers, default=[1024, 4096], help="tokens of the row, several with commas (1024,4096)")
    add("--segments", type=integers, default=[1, 8], help="numbers of segments, several with commas (1,8)")
    add("--layers", type=integers, default=[1, 4], help="layers of the drafter, several with commas (1,4)")
    add("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="bfloat16: by autocast")
    add("--json", help="write the results here")
    arguments = parser.parse_args()
    # Children, whose allocations above 1 MiB then leave no holes: what is measured is what is needed.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(MIB))
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        settings = Settings(layers=layers, dtype=arguments.dtype)
        measured = run_all(settings, cases_of(arguments.n, arguments.segments, MODES), 1, None, None)
        bench = Bench(settings)
        rows += [{**row, **planned(bench, row)} for row in measured]
        if arguments.json:
            write_json(arguments.json, rows)
    print(table_of(rows))
    return 1 if all(row["died"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
