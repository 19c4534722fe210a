"""tools/gpu_check.py, as far as a CPU shows: what it counts, and that no stage keeps the next from running."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from peagle_train.core.collator import CODCollator
from tests.helpers import ROOT
from tools.gpu_check import run_stages
from tools.gpu_parts import DRAFTER_8B, Check, make_batch, make_recipe, model_flops, shape_of

MISSING_THERE = ("datasets", "pydantic")
"""Packages that a borrowed GPU machine lacks."""


@pytest.mark.slow
def test_without_the_packages_that_a_gpu_machine_lacks_tests_run_after_a_stage_that_takes_too_long(
    tmp_path, monkeypatch, capsys
):
    halted = f"import sys; sys.modules.update(dict.fromkeys({MISSING_THERE}))"
    (tmp_path / "sitecustomize.py").write_text(halted)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for name in MISSING_THERE:
        found = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
        assert "ModuleNotFoundError" in found.stderr
    assert not run_stages({8: 0.5, 2: 300}, Check(dry=True, gpus=2), tmp_path / "gpu.json")
    late, tests = json.loads((tmp_path / "gpu.json").read_text())
    assert late["status"] == "failed" and late["error"] == "took more than 0.5 s" and late["rows"] == []
    assert tests["status"] == "ok" and tests["rows"][0]["failed"] == [], tests
    skipped = re.search(r"(\d+) skipped", tests["rows"][0]["pytest"])  # there is no GPU
    assert torch.cuda.is_available() or (skipped is not None and int(skipped[1]) >= 10)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["8", "2"]


def test_a_long_sequence_takes_the_operations_that_the_design_counts():
    check = Check(dry=True)
    batch = make_batch(check, DRAFTER_8B, make_recipe(check, DRAFTER_8B, 8192, 4))
    assert int((batch["depth"] >= 0).sum()) == 34_071
    assert model_flops(DRAFTER_8B, batch) == pytest.approx(219e12, rel=0.0025)


def test_operations_of_three_tokens_are_those_counted_by_hand():
    """(0, 0), (1, 0) and (0, 1), which see 1, 2 and 2 elements; matrices of 24 + 4 + 18 weights, fc of 12, heads of 10."""
    row = {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1]}
    batch = CODCollator(3, num_depths=2, down_sample_ratio=1.0, num_segments=2)([row])
    shape = shape_of(hidden=2, inner=3, layers=1, heads=1, kv=1, head_dim=2, vocab=9, draft=5)
    assert model_flops(shape, batch) == 6 * 46 * 3 + 4 * 12 * 2 + 6 * 10 * 3 + 12 * 2 * 5
