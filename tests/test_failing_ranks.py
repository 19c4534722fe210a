"""A rank that fails takes the run down at once: its own message first, nobody waits for a time-out."""

from pathlib import Path

import pytest

from tests.test_distributed import launch
from tests.tiny import make_target, write_recipe, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    rows = write_rows(folder / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11])
    return write_recipe(folder, make_target(folder / "target"), rows, folder / "run", train={"max_steps": 20})


def failing(where: str, recipe: Path, output: Path, *overrides: str) -> tuple[int, list[str]]:
    """Exit code, and what was written to stderr before torchrun's own summary."""
    result = launch(2, "tests/failing_run.py", where, str(recipe), f"output.dir={output}", *overrides)
    lines = result.stderr.splitlines()
    summary = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    logged = ("peagle_train.", "[rank", "W1", "Loading weights")  # by name of module, by torch, a progress bar
    return result.returncode, [line for line in lines[:summary] if not line.startswith(logged)]


def test_a_failure_in_the_forward_is_the_first_traceback_and_the_only_one(recipe: Path, tmp_path: Path) -> None:
    code, lines = failing("forward", recipe, tmp_path / "run")
    assert code == 1
    assert lines[0].startswith("Traceback")
    assert [line for line in lines if "Traceback" in line] == lines[:1]
    assert lines.index("RuntimeError: no such kernel (rank 1)") > 0
    # The other, which waited in a collective, says in a line who is to blame, if it comes to that.
    rest = lines[lines.index("RuntimeError: no such kernel (rank 1)") + 1 :]
    assert len(rest) <= 1 and all(line.startswith("peagle_train: rank 0 stops") for line in rest)


def test_a_rank_that_hears_no_signal_in_a_collective_without_end_is_taken_down_too(
    recipe: Path, tmp_path: Path
) -> None:
    code, lines = failing("stuck", recipe, tmp_path / "run")
    assert code == 1
    assert "RuntimeError: no such kernel (rank 1)" in lines
    assert lines[-1] == "peagle_train: rank 0 stops because rank 1 has failed; its message is above"


def test_data_that_fails_in_a_loaders_process_names_rank_and_reason(recipe: Path, tmp_path: Path) -> None:
    code, lines = failing("data", recipe, tmp_path / "run", "data.num_workers=1")
    assert code == 1
    assert lines[0].startswith("Traceback") and "OSError: the disk is gone (rank 1)" in lines


def test_a_mistake_on_one_rank_before_the_first_collective_is_one_line_with_that_rank(
    recipe: Path, tmp_path: Path
) -> None:
    code, lines = failing("start", recipe, tmp_path / "run")
    assert code == 1
    assert lines[0] == "peagle_train: error: rows.jsonl cannot be read (rank 1)"
    assert len(lines) <= 2 and all("rank 0 stops" in line for line in lines[1:])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["train.epochs=0", "draft.mask_token_id=61"])
def test_a_mistake_of_all_ranks_is_told_once(recipe: Path, tmp_path: Path, override: str) -> None:
    """The recipe's shows before the processes have met, the other one afterwards."""
    code, lines = failing("nowhere", recipe, tmp_path / "run", override)
    assert code == 1
    assert len(lines) == 1 and lines[0].startswith("peagle_train: error: ") and override.split("=")[0] in lines[0]
