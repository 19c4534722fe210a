"""What a run shows while it runs: pace, trackers, about.json; and what the report makes of it."""

import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import peagle_train.training.build as build
from peagle_train.__main__ import main
from peagle_train.core.collator import CODCollator
from peagle_train.show import differing_keys, read_run
from peagle_train.training.metrics import Pace
from peagle_train.training.trainer import Trainer
from tests.helpers import command
from tests.runs import EVALUATED, run
from tests.tiny import write_recipe

BATCH = CODCollator(16, num_depths=3)([{"input_ids": list(range(12)), "loss_mask": [0] * 5 + [1] * 7}])


def test_a_window_counts_tokens_and_waiting_of_all_ranks_and_no_pause(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace(num_processes=2)
    for _ in range(2):  # the second window starts at 0
        for _ in range(4):
            now[0] += 0.5
            pace.wait += 0.125
            pace.step([BATCH])
            with pace.paused():  # an evaluation of an hour
                now[0] += 3600
        values = pace.numbers(steps_left=10)
        assert values == {"tokens_per_second": 2 * 4 * 12 / 2.0, "loader_wait_share": 0.25, "seconds_left": 5.0}


def test_a_reader_that_has_seen_enough_ends_a_run_as_it_ends_any_command():
    with pytest.raises(BrokenPipeError):
        Trainer.on_main(Mock(), "metrics.jsonl", Mock(side_effect=BrokenPipeError))


# ---- trackers


class Recording(GeneralTracker):
    """A tracker in Accelerate's own terms that keeps what it is told, and may fail."""

    name, requires_logging_directory, tracker = "recording", False, None

    def __init__(self, fails_at: int | None) -> None:
        super().__init__()
        self.logged, self.fails_at, self.finished = list[tuple[int, dict[str, Any]]](), fails_at, False

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the service\nis gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("fails_at", [None, 2])
def test_a_tracker_gets_the_recipe_and_every_number_and_costs_a_warning_where_it_fails(
    fails_at, tmp_path, tiny, monkeypatch, caplog
):
    tracker = Recording(fails_at)
    monkeypatch.setattr(build, "Accelerator", lambda **kwargs: Accelerator(**{**kwargs, "log_with": tracker}))
    run(tiny(tmp_path, data=EVALUATED, train={"max_steps": 4}))
    output = tmp_path / "run"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert [step for step, _ in tracker.logged] == ([0, 1] if fails_at else [0, 1, 2, 3, 4, 4])
    assert tracker.config["train.learning_rate"] == 1e-2 and tracker.config["draft.init_from"] == "null"
    assert tracker.logged[1][1]["train/loss"] == lines[1]["loss"]
    assert tracker.logged[0][1]["eval/accuracy/depth_3"] == lines[0]["accuracy"][3]
    warnings = [r.getMessage() for r in caplog.records if "train.log_with" in r.getMessage()]
    assert tracker.finished != bool(fails_at) and len(warnings) == bool(fails_at)
    assert all("the service is gone" in warning for warning in warnings)
    # what the report reads of it
    found = read_run(output)
    assert 0 < found.about["data"]["packing"]["documents"] < 10
    assert len(found.train) == 4 and len(found.eval) == 2 and found.summary["state"] == "finished"


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    recipe = write_recipe(tmp_path, tmp_path / "no-target", tmp_path / "no-rows", tmp_path / "run")
    assert main([str(recipe), "train.log_with=wandb"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "pip install wandb" in error[0] and not (tmp_path / "run").exists()


# ---- the report


def write_run(folder: Path, *seconds: float, **setting: Any) -> Path:
    folder.mkdir(parents=True)
    write_recipe(folder, folder, folder, folder, **setting)
    shared = {"loss": 2.0, "accuracy": [0.5, 0.25], "expected_accepted_length": 1.6}
    speed = {"tokens_per_second": 9.0, "loader_wait_share": 0.0, "peak_memory_bytes": 2**30, "grad_norm": 1.0}
    lines: list[dict[str, Any]] = [{"kind": "eval", "step": 0, **shared}]
    for step, second in enumerate(seconds, start=1):
        lines.append({"kind": "train", "step": step, "num_steps": 9, "seconds": second, **shared, **speed})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tr')  # it runs
    return folder


def test_runs_are_read_compared_and_shown_on_a_page_that_needs_no_other_file(tmp_path):
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "<b>", 10.0, 20.0, 5.0, 15.0, cod={"num_segments": 2})  # it was resumed
    folders, out = [first, write_run(tmp_path / "c", 1.0, cod={"num_segments": 5})], tmp_path / "page" / "r.html"
    assert [values["cod.num_segments"] for values in differing_keys([*map(read_run, folders)])] == [2, 5]
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)
    assert command("report", *folders, "--out", out) == 0
    page = out.read_text()
    assert "0:00:35" in page and "&lt;b&gt;" in page and "<b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and page.count("data:image/png") == 1
    assert list(out.parent.iterdir()) == [out]


def test_without_matplotlib_a_picture_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", 1.0)
    for name, argument in (("report", run), ("show-batch", run / "recipe.yaml")):
        assert command(name, argument, "--out", tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert "pip install matplotlib" in error and len(error.splitlines()) == 1 and not (tmp_path / "o").exists()
