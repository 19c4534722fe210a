"""A rank that fails takes the run down at once: its own message first, nobody waits for a time-out."""

import re
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
    """Exit code, and what the ranks themselves wrote to stderr, without what was logged."""
    result = launch(2, "tests/failing_run.py", where, str(recipe), f"output.dir={output}", *overrides)
    lines = result.stderr.splitlines()
    # torchrun's, which comes last: a traceback of its own and a table.
    end = next((i for i, line in enumerate(lines) if "failed (exitcode" in line), len(lines))
    logged = re.compile(r"peagle_train\.|\[rank|[WE]\d{4} |Writing|Loading|.*Warning")  # ours, torch's, progress bars
    return result.returncode, [line for line in lines[:end] if not logged.match(line)]


def test_data_that_fails_on_one_rank_is_the_only_traceback_and_ends_the_other(recipe: Path, tmp_path: Path) -> None:
    code, lines = failing("data", recipe, tmp_path / "run", "data.num_workers=1")
    assert code == 1 and lines[0].startswith("Traceback")
    rest = lines[lines.index("OSError: the disk is gone (rank 1)") + 1 :]
    assert not any("Traceback" in line for line in rest)
    assert all(line.startswith("peagle_train: ") for line in rest) and len(rest) <= 2


def test_a_mistake_on_one_rank_before_the_first_collective_is_one_line_with_that_rank(
    recipe: Path, tmp_path: Path
) -> None:
    code, lines = failing("start", recipe, tmp_path / "run")
    assert code == 1 and "peagle_train: error: rows.jsonl cannot be read (rank 1)" in lines
    assert not any("Traceback" in line for line in lines) and not (tmp_path / "run").exists()


def test_a_mistake_of_all_ranks_is_told_once(recipe: Path, tmp_path: Path) -> None:
    result = launch(2, "-m", "peagle_train", str(recipe), "train.epochs=0")
    assert result.returncode == 1 and result.stderr.count("peagle_train: error: ") == 1
    assert "train.epochs" in result.stderr and "(rank 0)" in result.stderr
