"""FSDP2 (`fully_shard` on a CPU mesh, two processes): sharded gradients are those of one process."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fsdp_run import alone
from tests.test_distributed import launch


@pytest.mark.parametrize("case", ["short", "nothing supervised"])
@pytest.mark.parametrize("mode", ["relay", "recompute"])
def test_sharded_ranks_with_different_segments_give_one_processs_gradients(
    mode: str, case: str, tmp_path: Path
) -> None:
    result = launch(2, "tests/fsdp_run.py", mode, case, str(tmp_path / "gradients"))
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = load_file(tmp_path / "gradients"), alone(case)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-10, (name, float(error))
