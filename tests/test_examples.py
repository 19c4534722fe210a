"""The loops in recipes/ run as they stand, on a tiny target, and learn; every tool answers --help at once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peagle_train.core.draft import PEagleDraft
from tests.helpers import ENVIRONMENT, ROOT
from tests.tiny import MASK, make_target, write_rows

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "recipes")
    for path in (ROOT / folder).glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)
HEAVY = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy"}


@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer"])
def test_a_loop_of_ones_own_learns_and_leaves_a_drafter(name: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    rows = write_rows(tmp_path / "rows.jsonl", [30, 17, 32, 2, 32], prompt=0.3)
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), str(target), str(rows), str(tmp_path / "out")]
    command += ["--mask-token-id", str(MASK), "--max-length", "32", "--depths", "4", "--segments", "3"]
    command += ["--epochs", "12", "--learning-rate", "0.01"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [float(value) for value in re.findall(r"loss'?:? '?(\d+\.\d+)", result.stdout)]
    losses = losses[: 12 * 5]  # the Trainer ends with a mean of its own
    assert len(losses) >= 12 * 4
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    drafter = PEagleDraft.from_pretrained(tmp_path / "out")
    assert drafter.mask_token_id == MASK and all(t.isfinite().all() for t in drafter.parameters())
    from transformers import AutoModelForCausalLM

    head = AutoModelForCausalLM.from_pretrained(target).lm_head.weight
    # not bit for bit: where the processor multiplies in bfloat16, that is what a target is loaded in
    assert torch.allclose(drafter.lm_head.weight, head.float(), rtol=2**-8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]


def test_the_list_of_scripts_is_not_empty() -> None:
    assert {"tools/bench_loss.py", "tools/bench_mask.py", "recipes/plain_loop.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_with_examples(script: str) -> None:
    run = f"sys.path.insert(0, {str((ROOT / script).parent)!r}); runpy.run_path({script!r}, run_name='__main__')"
    code = f"import runpy, sys\nsys.argv = ['x', '--help']\ntry: {run}\nexcept SystemExit as end: assert not end.code\n"
    code += f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-1500:]
    command = "python -m peagle_train" if script == "-m" else f"python {script}"
    assert "usage:" in result.stdout and command in result.stdout, result.stdout
