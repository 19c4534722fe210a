"""What a run says while it runs: pace, advice, trackers, about.json; and what the report and the pictures make of it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

import peagle_train.training.pace as pace_module
from peagle_train.__main__ import main
from peagle_train.core.collator import CODCollator
from peagle_train.pictures.batch import visible_elements
from peagle_train.pictures.memory import LENGTHS, large_drafter, peaks
from peagle_train.pictures.report_runs import differing_keys, read_run, read_runs
from peagle_train.recipe import load_recipe
from peagle_train.training.about import about_machine
from peagle_train.training.pace import SETTLED_STEPS, Pace, duration, padding_share
from peagle_train.training.trackers import Tracker, check_tracker, flatten_numbers
from tests.helpers import ENVIRONMENT, ROOT, make_batch, make_rows
from tests.oracles import who_sees_whom
from tests.tiny import make_target, write_recipe, write_rows


class Clock:
    """A perf_counter that goes when it is told to, and processor time that is a share of it."""

    def __init__(self) -> None:
        self.now, self.cpu = 100.0, 3.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace_module, "time", made)
    return made


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def steps(pace: Pace, clock: Clock, count: int, seconds: float, waiting: float, batch: dict[str, torch.Tensor]) -> None:
    for _ in range(count):
        clock.now += seconds
        pace.waited(waiting)
        pace.step([batch])


BATCH = CODCollator(16, num_depths=3)([{"input_ids": list(range(12)), "loss_mask": [0] * 5 + [1] * 7}])


def test_a_window_counts_tokens_supervised_ones_and_waiting_of_all_ranks(clock: Clock) -> None:
    pace = Pace(num_processes=2)
    steps(pace, clock, count=4, seconds=0.5, waiting=0.125, batch=BATCH)
    values = pace.close_window(steps_left=10)
    # 12 tokens, of which 7 are taught: rows 4..10 read them
    assert values["tokens_per_second"] == 2 * 4 * 12 / 2.0
    assert values["supervised_tokens_per_second"] == 2 * 4 * 7 / 2.0
    assert values["loader_wait_share"] == 0.25
    assert values["seconds_left"] == 5.0  # of the first window, as there is no other


def test_the_time_left_is_not_made_of_the_first_window(clock: Clock) -> None:
    pace = Pace()
    steps(pace, clock, 1, seconds=60.0, waiting=0.0, batch=BATCH)
    assert pace.close_window(99)["seconds_left"] == 60.0 * 99
    steps(pace, clock, 5, seconds=2.0, waiting=0.0, batch=BATCH)
    assert pace.close_window(7)["seconds_left"] == 14.0
    steps(pace, clock, 2, seconds=2.0, waiting=0.0, batch=BATCH)
    with pace.paused():  # an evaluation of an hour
        clock.now += 3600
    steps(pace, clock, 3, seconds=2.0, waiting=0.0, batch=BATCH)
    values = pace.close_window(3)
    assert values["seconds_left"] == 6.0 and values["tokens_per_second"] == 6.0


@pytest.mark.parametrize(("waiting", "is_told"), [(0.2, True), (0.09, False)])
def test_a_run_that_waits_for_its_loader_is_told_once(waiting: float, is_told: bool, clock: Clock) -> None:
    pace, said = Pace(num_workers=0), []
    for window in range(4):
        steps(pace, clock, SETTLED_STEPS, seconds=1.0, waiting=5.0 if window == 0 else waiting, batch=BATCH)
        pace.close_window(1)
        said.append(pace.advice())
    told = [line for lines in said for line in lines]
    assert said[0] == [] and len(told) == int(is_told)
    if is_told:
        assert "20%" in told[0] and "raise data.num_workers (now 0" in told[0]


def test_a_system_that_does_not_say_which_cores_a_process_may_use_has_all_of_them(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert about_machine(torch.device("cpu"), 1)["machine"]["cores"] == 11
    pace = Pace(num_workers=3)
    steps(pace, clock, 1, 1.0, 1.0, BATCH)
    pace.close_window(1)
    steps(pace, clock, SETTLED_STEPS, 1.0, 1.0, BATCH)
    pace.close_window(1)
    (advice,) = pace.advice()
    assert "raise data.num_workers (now 3; 11 cores" in advice


def test_more_loaders_than_cores_are_not_advised(clock: Clock) -> None:
    pace = Pace(num_workers=len(os.sched_getaffinity(0)))
    steps(pace, clock, 1, 1.0, 1.0, BATCH)
    pace.close_window(1)
    steps(pace, clock, SETTLED_STEPS, 1.0, 1.0, BATCH)
    pace.close_window(1)
    (advice,) = pace.advice()
    assert "raise" not in advice and "cores" in advice


@pytest.mark.parametrize(
    ("seconds", "waiting", "cpu", "ending"),
    [
        (1.4, 0.0, 0.4, None),
        (2.0, 0.0, 0.4, "other work takes this machine's cores, or the device waits"),
        (2.0, 0.0, 1.0, "train.profile_steps shows which part of a step it is"),
        (2.0, 0.75, 0.5, "raise data.num_workers"),
        (2.0, 0.3, 1.0, "train.profile_steps shows"),  # most of it is not the loader's
    ],
)
def test_a_run_that_gets_slower_says_once_where_the_time_goes(
    seconds: float, waiting: float, cpu: float, ending: str | None, clock: Clock
) -> None:
    pace, told = Pace(), []

    def window(seconds: float, waiting: float, cpu_share: float) -> None:
        for _ in range(SETTLED_STEPS // 2):  # a stretch is two windows
            clock.cpu += seconds * cpu_share
            steps(pace, clock, 1, seconds, waiting, BATCH)
        pace.close_window(1)
        told.extend(line for line in pace.advice() if "a step takes" in line)

    for _ in range(5):
        window(1.0, 0.0, 1.0)
    assert told == []
    for _ in range(6):
        window(seconds, waiting, cpu)
    assert len(told) == int(ending is not None)
    if ending is not None:
        assert ending in told[0] and told[0].startswith("a step takes 2 s, 2.0 times as long as before (1 s)")
        assert f"{waiting / seconds:.0%} of it waiting for data (0% before)" in told[0]
        assert f"{cpu:.0%} of a core's time computing (100% before)" in told[0]


def test_slow_is_said_of_the_fastest_stretch_not_of_the_first(clock: Clock) -> None:
    pace, told = Pace(), []
    for seconds in (9.0, 2.0, 1.0, 2.0):  # the first window is no stretch
        steps(pace, clock, SETTLED_STEPS, seconds, 0.0, BATCH)
        pace.close_window(1)
        told.append(len(pace.advice()))
    assert told == [0, 0, 0, 1]


def test_what_is_done_in_a_pause_counts_neither_as_time_nor_as_computing(clock: Clock) -> None:
    pace = Pace()
    for seconds in (1.0, 1.0, 2.0):
        steps(pace, clock, SETTLED_STEPS, seconds, 0.0, BATCH)
        with pace.paused():
            clock.now, clock.cpu = clock.now + 1000, clock.cpu + 1000
        pace.close_window(1)
    (line,) = pace.advice()
    assert "a step takes 2 s, 2.0 times" in line and "0% of a core's time computing (0% before)" in line


def test_a_checkpoint_and_an_evaluation_are_no_part_of_a_runs_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peagle_train.training.trainer as trainer_module

    inside: list[str] = []
    real_pause, real_save, real_evaluate = Pace.paused, trainer_module.save_checkpoint, trainer_module.Trainer.evaluate
    paused = False

    @contextmanager
    def pause(self: Pace) -> Iterator[None]:
        nonlocal paused
        paused = True
        with real_pause(self):
            yield
        paused = False

    def save(*args: Any) -> Any:
        inside.append(f"save {paused}")
        return real_save(*args)

    def evaluate(self: Any, title: str) -> Any:
        if "at step" in title:
            inside.append(f"evaluate {paused}")
        return real_evaluate(self, title)

    monkeypatch.setattr(Pace, "paused", pause)
    monkeypatch.setattr(Pace, "advice", lambda self: ["slower than a snail"])
    monkeypatch.setattr(trainer_module, "save_checkpoint", save)
    monkeypatch.setattr(trainer_module.Trainer, "evaluate", evaluate)
    said: list[str] = []
    monkeypatch.setattr(trainer_module.Reporter, "say", lambda self, line: said.append(line))
    rows = write_rows(tmp_path / "rows.jsonl", [20, 31, 9, 17])
    recipe = write_recipe(
        tmp_path,
        make_target(tmp_path / "target"),
        rows,
        tmp_path / "run",
        data={"eval_fraction": 0.3},
        train={"max_steps": 3, "eval_steps": 2, "save_steps": 2},
    )
    assert main([str(recipe)]) == 0
    assert "save True" in inside and "save False" not in inside
    assert "evaluate False" not in inside and "slower than a snail" in said


def test_padding_is_counted_over_all_slots() -> None:
    assert padding_share([BATCH, BATCH]) == float((BATCH["depth"] < 0).float().mean())
    assert padding_share([]) == 0.0


def test_durations_are_said_as_people_say_them() -> None:
    said = {0.4: "0 s", 59.4: "59 s", 59.6: "1:00 min", 3599: "59:59 min", 3600: "1:00 h", 90061: "1 d 1 h"}
    assert {seconds: duration(seconds) for seconds in said} == said


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
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train a tiny run of 4 steps whose accelerator has a given tracker; returns the output folder."""
    import peagle_train.training.train as train_module

    def go(tracker: Recording) -> Path:
        target = make_target(tmp_path / "target")
        rows = write_rows(tmp_path / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13], prompt=0.3)
        real = train_module.Accelerator
        monkeypatch.setattr(train_module, "Accelerator", lambda **kwargs: real(**{**kwargs, "log_with": tracker}))
        recipe = write_recipe(
            tmp_path, target, rows, tmp_path / "run", data={"eval_fraction": 0.3}, train={"max_steps": 4}
        )
        assert main([str(recipe)]) == 0
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
    assert about["versions"]["torch"] == torch.__version__
    data = about["data"]
    assert sum(data["piece_lengths"]["counts"]) == data["packing"]["pieces"]
    assert sum(data["row_fill"]["counts"]) == data["packing"]["rows"]
    assert data["row_fill"]["mean"] == pytest.approx(data["packing"]["fill"])
    # what the report reads of it
    run = read_run(output)
    assert len(run.train) == 4 and len(run.eval) == 2 and run.summary["state"] == "finished"


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
    check_tracker(None)


def test_tensorboard_gets_files_in_the_output_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tmp_path, tmp_path / "run"), ["train.log_with=tensorboard"])
    (tmp_path / "run").mkdir()
    accelerator = Accelerator(log_with="tensorboard", project_dir=recipe.output.dir)
    tracker = Tracker(accelerator)
    tracker.start(recipe, 0, {"train": {"learning_rate": 1.0, "profile_steps": None}})
    tracker.log("train", {"step": 3, "loss": 2.5, "accuracy": [0.5, 0.25]})
    accelerator.end_training()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/accuracy/depth_0", "train/accuracy/depth_1"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]


def test_what_is_no_number_is_not_logged() -> None:
    values = {"step": 3, "loss": 1.5, "recompiles": None, "accuracy": [0.5], "num_steps": 9}
    assert flatten_numbers("train", values) == {"train/loss": 1.5, "train/accuracy/depth_0": 0.5}


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


def test_time_goes_on_where_a_run_was_resumed_and_a_half_line_is_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [10.0, 20.0, 5.0, 15.0], cut=True))
    assert [line["hours"] * 3600 for line in run.train] == pytest.approx([10, 20, 25, 35])
    assert run.eval[0]["hours"] == 0.0 and run.about == {}


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / a / "run", [1.0], cod={"num_segments": s}) for a, s in (("x", 2), ("y", 5))]
    runs = read_runs(folders)
    assert [run.name for run in runs] == ["x/run", "y/run"]
    assert differing_keys(runs)["cod.num_segments"] == [2, 5]
    with pytest.raises(ValueError, match="twice"):
        read_runs([folders[0], folders[0]])
    with pytest.raises(ValueError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "x" / "run" / "metrics.jsonl").write_text('{"kind"\n{"kind": "eval"}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_run(folders[0])


def run_tool(name: str, *arguments: str, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys\n{prelude}\nsys.argv = {[name, *arguments]!r}\n"
    code += f"runpy.run_path('tools/{name}', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def test_the_page_needs_no_other_file_and_shows_names_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / "<b>", [1.0]), write_run(tmp_path / "c", [float(i) for i in range(1, 40)])]
    out = tmp_path / "page" / "r.html"
    result = run_tool("report.py", *map(str, folders), "--out", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    page = out.read_text()
    assert "&lt;b&gt;" in page and "<b></th>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    pictures = sorted(path.name for path in out.parent.glob("*.png"))
    assert "r-loss.png" in pictures and len(pictures) == page.count("<img ") == 6
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.parent.glob("*.png"))


@pytest.mark.parametrize("command", [["report.py", "X"], ["show_batch.py", "--example"], ["show_memory.py"]])
def test_without_matplotlib_a_picture_is_one_line_that_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [1.0])
    arguments = [str(folder) if word == "X" else word for word in command[1:]]
    result = run_tool(command[0], *arguments, "--out", str(tmp_path / "o"), prelude="sys.modules['matplotlib'] = None")
    assert result.returncode == 2 and "pip install matplotlib" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "o").exists()


# ---- pictures


@pytest.mark.parametrize(("S", "documents"), [(1, 1), (3, 2), (7, 3)])
def test_the_picture_shows_what_the_oracle_sees(S: int, documents: int) -> None:
    batch = make_batch(make_rows(37, documents=documents), 37, S)
    elements, segment_N, visible = visible_elements(batch, num_depths=5)
    who = list(zip(elements.start[0].tolist(), elements.anchor[0].tolist(), elements.depth[0].tolist()))
    assert len(who) == int((batch["depth"] >= 0).sum()) == segment_N.numel()
    assert torch.equal(visible, who_sees_whom(who, who))
    assert segment_N.tolist() == sorted(segment_N.tolist())


def test_the_example_is_drawn_as_a_small_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "batch.png"
    result = run_tool("show_batch.py", "--example", "--out", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size < 150 * 1024


def test_relay_needs_the_least_memory_at_every_length() -> None:
    found = peaks(large_drafter(), LENGTHS)
    for flat, recompute, relay in zip(found["flat"], found["recompute"], found["relay 16"]):
        assert relay[1] < recompute[1] < flat[1]
    assert [n for n, _ in found["flat"]] == list(LENGTHS)
    assert peaks(large_drafter(), [8])["relay 16"] == []  # fewer columns than segments
