"""FSDP2 (`fully_shard` on a CPU mesh, two processes): what is sharded computes, saves and resumes as what is whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fsdp_run import CASES, alone
from tests.test_distributed import launch
from tests.tiny import make_target

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    result = launch(2, "tests/fsdp_run.py", str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode, case", CASES)
def test_sharded_ranks_with_different_segments_give_one_processs_gradients(
    mode: str, case: str, gradients: Path
) -> None:
    ours, theirs = load_file(gradients / f"{mode} {case}"), alone(case)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-10, (name, float(error))


def test_a_sharded_target_gives_the_same_features_and_a_state_fits_any_sharding(tmp_path: Path) -> None:
    """What is asserted is in the script, on every rank."""
    folders = [make_target(tmp_path / "untied"), make_target(tmp_path / "tied", tie_word_embeddings=True)]
    result = launch(3, "tests/sharded_run.py", *map(str, folders))
    assert result.returncode == 0, result.stderr[-3000:]
