"""What a run shows while it runs: pace, advice, trackers, about.json; and what the report makes of it."""

import json
import os
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import peagle_train.training.build as build
from peagle_train.__main__ import main
from peagle_train.core.collator import CODCollator
from peagle_train.report import differing_keys, read_run
from peagle_train.training.evaluate import Evaluator
from peagle_train.training.metrics import (
    SETTLED_STEPS,
    Pace,
    Reporter,
    about_machine,
    duration,
)
from tests.helpers import command
from tests.runs import EVALUATED, Tiny, run
from tests.tiny import write_recipe


class Clock:
    """A perf_counter that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def steps(pace: Pace, clock: Clock, count: int, seconds: float, waiting: float) -> None:
    for _ in range(count):
        clock.now += seconds
        pace.wait += waiting
        pace.step([BATCH])


BATCH = CODCollator(16, num_depths=3)([{"input_ids": list(range(12)), "loss_mask": [0] * 5 + [1] * 7}])


def test_a_window_counts_tokens_supervised_ones_and_waiting_of_all_ranks(clock: Clock) -> None:
    pace = Pace(num_processes=2)
    steps(pace, clock, count=4, seconds=0.5, waiting=0.125)
    values = pace.close_window(steps_left=10)
    # 12 tokens, of which 7 are taught: rows 4..10 read them
    assert values["tokens_per_second"] == 2 * 4 * 12 / 2.0
    assert values["supervised_tokens_per_second"] == 2 * 4 * 7 / 2.0
    assert values["loader_wait_share"] == 0.25
    assert values["seconds_left"] == 5.0  # of the first window, as there is no other


def test_the_time_left_is_not_made_of_the_first_window(clock: Clock) -> None:
    pace = Pace()
    steps(pace, clock, 1, seconds=60.0, waiting=0.0)
    assert pace.close_window(99)["seconds_left"] == 60.0 * 99
    steps(pace, clock, 2, seconds=2.0, waiting=0.0)
    with pace.paused():  # an evaluation of an hour
        clock.now += 3600
    steps(pace, clock, 3, seconds=2.0, waiting=0.0)
    values = pace.close_window(3)
    assert values["seconds_left"] == 6.0 and values["tokens_per_second"] == 6.0


@pytest.mark.parametrize(
    ("workers", "waiting", "told"), [(0, 0.2, "raise data.num_workers"), (0, 0.09, ""), (11, 0.2, "")]
)
def test_a_run_that_waits_for_its_loader_is_told_once_and_never_to_take_more_loaders_than_cores(
    workers: int, waiting: float, told: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # a system that has no such thing
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert about_machine(torch.device("cpu"), 1)["machine"]["cores"] == 11
    pace, lines = Pace(num_workers=workers), []
    for window in range(4):
        steps(pace, clock, SETTLED_STEPS, seconds=1.0, waiting=5.0 if window == 0 else waiting)
        pace.close_window(1)
        lines.append(pace.advice())
    assert [line is not None for line in lines] == [False, waiting > 0.1, False, False]
    assert told in str(lines[1]) and ("raise" in str(lines[1])) == bool(told)


def test_a_checkpoint_and_an_evaluation_are_no_part_of_a_runs_pace(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, real_clock, real_evaluate, real_replace = [0.0], time.perf_counter, Evaluator.__call__, os.replace

    def evaluate(self: Evaluator) -> Any:
        lost[0] += 1e9
        return real_evaluate(self)

    def replace(source: Any, destination: Any) -> None:
        lost[0] += 1e9 * ("checkpoint-" in str(destination))
        real_replace(source, destination)

    monkeypatch.setattr(time, "perf_counter", lambda: real_clock() + lost[0])
    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    monkeypatch.setattr(os, "replace", replace)
    settings = {"max_steps": 3, "eval_steps": 1, "save_steps": 1}
    run(tiny(tmp_path, data=EVALUATED, train=settings))
    assert lost[0] >= 6e9
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pace = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    assert len(pace) == 3 and min(pace) > 1e-6


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.4, 187, 90061)] == ["0:00:00", "0:03:07", "1 day, 1:01:01"]


# ---- trackers


class Recording(GeneralTracker):
    """A tracker in Accelerate's own terms that keeps what it is told, and may fail."""

    name, requires_logging_directory = "recording", False

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.fails_at, self.finished = fails_at, False

    @property
    def tracker(self) -> "Recording":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        if step == self.fails_at:
            raise ConnectionError("the service\nis gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def run_with(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train a tiny run of 4 steps whose accelerator has a given tracker; returns the output folder."""

    def go(tracker: Recording) -> Path:
        monkeypatch.setattr(build, "Accelerator", lambda **kwargs: Accelerator(**{**kwargs, "log_with": tracker}))
        run(tiny(tmp_path, data=EVALUATED, train={"max_steps": 4}))
        return tmp_path / "run"

    return go


def test_a_tracker_gets_the_recipe_and_every_number_of_every_line(run_with: Any) -> None:
    tracker = Recording()
    output = run_with(tracker)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.logged] == [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert tracker.config["train.learning_rate"] == 1e-2 and tracker.config["draft.init_from"] == "null"
    assert tracker.logged[1][1]["train/loss"] == lines[1]["loss"]
    assert tracker.logged[0][1]["eval/accuracy/depth_3"] == lines[0]["accuracy"][3]
    assert tracker.finished
    about = json.loads((output / "about.json").read_text())
    assert about["versions"]["torch"] == torch.__version__ and 0 < about["data"]["packing"]["documents"] < 10
    # what the report reads of it
    found = read_run(output)
    assert len(found.train) == 4 and len(found.eval) == 2 and found.summary["state"] == "finished"


def test_a_tracker_that_fails_costs_a_warning_and_no_number(run_with: Any, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Recording(fails_at=2)
    output = run_with(tracker)
    assert [step for step, _ in tracker.logged] == [0, 1]
    warnings = [r.getMessage() for r in caplog.records if "train.log_with" in r.getMessage()]
    assert len(warnings) == 1 and "the service is gone" in warnings[0] and "\n" not in warnings[0]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    recipe = write_recipe(tmp_path, tmp_path / "no-target", tmp_path / "no-rows", tmp_path / "run")
    assert main([str(recipe), "train.log_with=wandb"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "pip install wandb" in error[0] and not (tmp_path / "run").exists()


def test_tensorboard_gets_numbers_alone_in_the_output_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    reporter = Reporter(tmp_path, 9, accelerator)
    reporter.start(0, {"train": {"learning_rate": 1.0, "profile_steps": None, "log_with": "tensorboard"}})
    values = {"step": 3, "num_steps": 9, "recompiles": None, "loss": 2.5, "accuracy": [0.5, 0.25]}
    reporter.record("train", "a line", **values, expected_accepted_length=1.5)
    accelerator.end_training()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = ["loss", "accuracy/depth_0", "accuracy/depth_1", "expected_accepted_length"]
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]


def test_a_resumed_run_continues_in_its_trackers_run_and_a_new_one_does_not(tmp_path: Path) -> None:
    seen = []
    for step in (0, 5, 0):
        reporter = Reporter(tmp_path, 9, Accelerator(log_with=Recording()))
        reporter.start(step, {"train": {"log_with": "wandb"}})
        seen.append(json.loads((tmp_path / "tracker.json").read_text())["id"])
    assert seen[0] == seen[1] != seen[2]


# ---- the report


def write_run(folder: Path, seconds: list[float], cut: bool = False, **setting: Any) -> Path:
    folder.mkdir(parents=True)
    recipe = write_recipe(folder, folder, folder, folder, **setting)
    assert recipe.name == "recipe.yaml"
    shared = {"loss": 2.0, "accuracy": [0.5, 0.25], "expected_accepted_length": 1.6, "supervised": [4, 0]}
    lines: list[dict[str, Any]] = [{"kind": "eval", "step": 0, **shared, "hits": [2, 0], "mass_outside": 0.1}]
    for step, second in enumerate(seconds, start=1):
        speed = {"tokens_per_second": 9.0, "loader_wait_share": 0.0, "peak_memory_bytes": 2**30, "recompiles": None}
        rest = {"num_steps": len(seconds), "learning_rate": 1.0, "grad_norm": 1.0, "seconds": second}
        lines.append({"kind": "train", "step": step, **shared, **speed, **rest})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + ('{"kind": "tr' if cut else ""))
    return folder


def test_time_adds_up_where_a_run_was_resumed_and_a_half_line_is_ignored(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [10.0, 20.0, 5.0, 15.0], cut=True))
    assert run.seconds == 35 and len(run.train) == 4 and run.about == {}


def test_runs_are_compared_by_the_settings_that_differ_and_damage_is_one_line(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / a / "run", [1.0], cod={"num_segments": s}) for a, s in (("x", 2), ("y", 5))]
    runs = [read_run(folder) for folder in folders]
    assert [run.name for run in runs] == [str(folder) for folder in folders]
    assert [values["cod.num_segments"] for values in differing_keys(runs)] == [2, 5]
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "x" / "run" / "metrics.jsonl").write_text('{"kind"\n{"kind": "eval"}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_run(folders[0])


def test_the_page_needs_no_other_file_and_shows_names_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / "<b>", [1.0]), write_run(tmp_path / "c", [float(i) for i in range(1, 40)])]
    out = tmp_path / "page" / "r.html"
    assert command("report", *folders, "--out", out) == 0
    page = out.read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and page.count("data:image/png") == 1
    assert list(out.parent.iterdir()) == [out]


def test_without_matplotlib_a_picture_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, argument in (("report", str(write_run(tmp_path / "run", [1.0]))), ("show-batch", "--example")):
        assert command(name, argument, "--out", tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert "pip install matplotlib" in error and len(error.splitlines()) == 1 and not (tmp_path / "o").exists()
