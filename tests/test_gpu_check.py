"""tools/gpu_check.py, as far as a CPU shows: what it counts, and that no stage keeps the next from running."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peagle_train.core.collator import CODCollator
from tests.helpers import ENVIRONMENT, ROOT
from tools import gpu_check
from tools.gpu_check import STAGES, Stage, by_kind, run_stages
from tools.gpu_parts import DRAFTER_8B, Check, make_batch, make_recipe, model_flops, shape_of

MISSING_THERE = ("datasets", "pydantic")
"""Packages that a borrowed GPU machine lacks."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In it, Python cannot import them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {MISSING_THERE}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_packages_that_a_gpu_machine_lacks(environment: dict[str, str]) -> None:
    for name in MISSING_THERE:
        assert "ModuleNotFoundError" in python(environment, "-c", f"import {name}").stderr
    marked = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    options = ["-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    found = python(environment, "-m", "pytest", *options, *marked)
    assert found.returncode == 0, found.stdout[-3000:]
    names = [line for line in found.stdout.splitlines() if "::" in line]
    assert len([name for name in names if name.startswith("tests/test_gpu.py::")]) >= 10


@pytest.mark.slow
def test_stages_run_without_the_packages_that_a_gpu_machine_lacks(environment: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    result = python(environment, "tools/gpu_check.py", "--dry", "--stages", "6", "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split(":")[0].split() == ["6", "flex"]
    (stage,) = json.loads(output.read_text())
    assert stage["status"] == "ok" and stage["rows"] and stage["versions"] and stage["machine"] and stage["date"]


def test_a_long_sequence_takes_the_operations_that_the_design_counts() -> None:
    check = Check(dry=True)
    batch = make_batch(check, DRAFTER_8B, make_recipe(check, DRAFTER_8B, 8192, 4))
    assert int((batch["depth"] >= 0).sum()) == 34_071
    assert model_flops(DRAFTER_8B, batch) == pytest.approx(219e12, rel=0.0025)


def test_operations_of_three_tokens_are_those_counted_by_hand() -> None:
    """(0, 0), (1, 0) and (0, 1), which see 1, 2 and 2 elements; matrices of 24 + 4 + 18 weights, fc of 12, heads of 10."""
    batch = CODCollator(3, num_depths=2, down_sample_ratio=1.0, num_segments=2)(
        [{"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}]
    )
    shape = shape_of(hidden=2, inner=3, layers=1, heads=1, kv=1, head_dim=2, vocab=9, draft=5)
    assert model_flops(shape, batch) == 6 * 46 * 3 + 4 * 12 * 2 + 6 * 10 * 3 + 12 * 2 * 5


KERNELS = {
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN": "matmul",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "matmul",
    "triton_tem_fused_flex_attention_2": "flex forward",
    "triton_tem_fused_flex_attention_backward_7": "flex backward",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>": "optimizer",
    "Memcpy DtoD (Device -> Device)": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "copy",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": "norm, elementwise",
    "triton_poi_fused__to_copy_mul_silu_5": "norm, elementwise",
    "triton_red_fused_amax_argmax_exp_sub_9": "loss",
}


def test_kernels_are_told_apart_by_name_and_the_losss_by_where_they_run() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": 10.0 * i, "dur": 2000.0} for i, name in enumerate(KERNELS)
    ]
    for event in events:
        assert by_kind([event], ["kernel"]) == {KERNELS[event["name"]]: (2.0, 1)}, event["name"]
    events += [
        {"ph": "X", "cat": "gpu_user_annotation", "name": "peagle::loss", "ts": 1000.0, "dur": 50.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "ts": 1010.0, "dur": 9.0},
    ]
    for ts in (999.0, 1000.0, 1049.0, 1050.0):  # before, first, last, behind
        events.append({"ph": "X", "cat": "kernel", "name": "elementwise_kernel", "ts": ts, "dur": 1000.0})
        events.append({"ph": "X", "cat": "kernel", "name": "nvjet_tst", "ts": ts, "dur": 1000.0})
    found = by_kind(events, ["kernel"])
    assert found["loss"] == (2.0 + 2.0, 3) and found["norm, elementwise"] == (4.0 + 2.0, 4)
    assert found["matmul"] == (4.0 + 4.0, 6) and next(iter(found)) == "matmul"


def raises(check: Check) -> None:
    check.note(before=1)
    raise RuntimeError("no kernel\nimage is available")


def hangs(check: Check) -> None:
    check.note(before=2)
    print("tuning", flush=True)
    subprocess.run(["sleep", "600"])


def is_wrong(check: Check) -> None:
    check.note(off=0.5, ok=False)


def works(check: Check) -> None:
    check.note(device=str(check.device), ok=True)


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_is_recorded_with_its_last_line_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = [raises, hangs, is_wrong, works]
    stages = [Stage(i, function, 60 if function is not hangs else 15) for i, function in enumerate(functions)]
    began = time.monotonic()
    assert not run_stages(stages, Check(dry=True), tmp_path / "gpu.json")
    assert time.monotonic() - began < 250  # whatever a hanging stage has started ends with it
    failed, hung, wrong, worked = json.loads((tmp_path / "gpu.json").read_text())
    assert failed["status"] == "failed" and failed["error"].endswith("image is available")
    assert failed["rows"] == [{"before": 1}] and any("RuntimeError: no kernel" in line for line in failed["log"])
    assert hung["status"] == "out of time" and hung["error"].endswith("tuning") and hung["rows"] == [{"before": 2}]
    assert wrong["status"] == "failed" and wrong["rows"] == [{"off": 0.5, "ok": False}]
    assert worked["status"] == "ok" and worked["rows"] == [{"device": "cpu", "ok": True}]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(functions) and all(line.split()[0] == str(i) for i, line in enumerate(lines))


def test_the_table_at_the_top_is_that_of_the_stages_and_one_gpu_takes_less_than_nine_minutes() -> None:
    assert gpu_check.__doc__ is not None
    rows = re.findall(r"^\| +(\d+) (\w+) +\| +(\d+) s \|", gpu_check.__doc__, flags=re.MULTILINE)
    assert rows == [(str(stage.number), stage.function.__name__, str(stage.seconds)) for stage in STAGES]
    assert sum(stage.seconds for stage in STAGES if stage.number <= gpu_check.ONE_GPU) < 9 * 60


@pytest.mark.parametrize("arguments", [["--dry", "--stages", "1,12"], ["--gpus", "99"], ["--stages", "10"]])
def test_what_cannot_be_run_is_refused_with_what_can(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["--stages", "10"]:  # of a single GPU
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and ("give fewer, or --dry" in error or "give numbers of 1.." in error)
