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


def test_a_failure_in_the_forward_is_the_only_traceback_and_ends_a_rank_that_hears_no_signal(
    recipe: Path, tmp_path: Path
) -> None:
    code, lines = failing("stuck", recipe, tmp_path / "run")
    assert code == 1
    assert [line for line in lines if "Traceback" in line] == lines[:1]
    assert lines[-2:] == [
        "RuntimeError: no such kernel (rank 1)",
        "peagle_train: rank 0 stops because rank 1 has failed; its message is above",
    ]


def test_data_that_fails_in_a_loaders_process_comes_before_what_the_waiting_rank_has_to_say(
    recipe: Path, tmp_path: Path
) -> None:
    code, lines = failing("data", recipe, tmp_path / "run", "data.num_workers=1")
    assert code == 1 and lines[0].startswith("Traceback")
    rest = lines[lines.index("OSError: the disk is gone (rank 1)") + 1 :]
    assert len(rest) <= 1 and all(line.startswith("peagle_train: rank 0 stops") for line in rest)


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
