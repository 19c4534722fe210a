"""The loops in recipes/ run as they stand, on a tiny target, and learn; every tool answers --help at once."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peagle_train.core.draft import PEagleDraft
from tests.helpers import ENVIRONMENT, ROOT, command
from tests.tiny import MASK, write_rows

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "recipes")
    for path in (ROOT / folder).glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)
HELP = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    folder = script.rpartition("/")[0]
    sys.path.insert(0, folder)
    sys.argv, out = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    assert "usage:" in out.getvalue() and f"python {script}" in out.getvalue(), out.getvalue()
    heavy = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy"} & set(sys.modules)
    assert not heavy, (script, heavy)
"""


@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer"])
def test_a_loop_of_ones_own_learns_and_leaves_a_drafter(
    name: str, tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [30, 17, 32, 2, 32], prompt=0.3)
    main = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"]
    options = f"--mask-token-id {MASK} --max-length 32 --depths 4 --segments 3 --epochs 12 --learning-rate 0.01"
    assert not main([str(tiny_target), str(rows), str(tmp_path / "out"), *options.split()])
    losses = [float(value) for value in re.findall(r"loss'?:? '?(\d+\.\d+)", capsys.readouterr().out)]
    losses = losses[: 12 * 5]  # the Trainer ends with a mean of its own
    assert len(losses) >= 12 * 4
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    drafter = PEagleDraft.from_pretrained(tmp_path / "out")
    assert command("check", tmp_path / "out") == 0
    assert drafter.mask_token_id == MASK and all(t.isfinite().all() for t in drafter.parameters())
    head = AutoModelForCausalLM.from_pretrained(tiny_target).lm_head.weight
    # not bit for bit: where the processor multiplies in bfloat16, that is what a target is loaded in
    assert torch.allclose(drafter.lm_head.weight, head.float(), rtol=2**-8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]


def test_help_answers_at_once_with_examples() -> None:
    assert {"tools/bench_loss.py", "tools/bench_mask.py", "recipes/plain_loop.py"} <= set(SCRIPTS)
    command = [sys.executable, "-c", HELP, *SCRIPTS]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-1500:]
