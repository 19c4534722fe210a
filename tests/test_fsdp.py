"""FSDP2 (`fully_shard` on a CPU mesh, two processes): what is sharded computes, saves and resumes as what is whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.fsdp_run import CASES, alone
from tests.test_distributed import launch
from tests.tiny import make_target, write_recipe, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    result = launch(2, "tests/fsdp_run.py", str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode, case, variant", CASES)
def test_sharded_ranks_with_different_segments_give_one_processs_gradients(
    mode: str, case: str, variant: str, gradients: Path
) -> None:
    ours, theirs = load_file(gradients / f"{mode} {case} {variant}"), alone(case)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert error < (0.05 if "bf16" in variant else 1e-10), (name, float(error))


def test_sharded_targets_states_and_steps_are_what_they_are_when_whole(tmp_path: Path) -> None:
    """What is asserted is in the script, on every rank."""
    folders = [make_target(tmp_path / "untied"), make_target(tmp_path / "tied", tie_word_embeddings=True)]
    rows = write_rows(tmp_path / "rows.jsonl", [30, 32, 28, 31, 32, 29])
    settings = {"gradient_accumulation_steps": 2}
    recipe = write_recipe(
        tmp_path, folders[0], rows, tmp_path / "run", train=settings, data={"eval_sources": [str(rows)]}
    )
    result = launch(3, "tests/sharded_run.py", str(recipe), *map(str, folders))
    assert result.returncode == 0, result.stderr[-3000:]
