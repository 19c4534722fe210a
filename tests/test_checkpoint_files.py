"""Checkpoints on disk: whole or not there, whatever happens while they are written; damage is seen; old ones go."""

import fcntl
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peagle_train.training.checkpoint as checkpoint
import peagle_train.training.checkpoint as files
from peagle_train.config import load_recipe
from peagle_train.files import DamagedCheckpoint
from peagle_train.serving.drafter_io import save_tensors
from peagle_train.training.checkpoint import check_not_in_use, lock_output, open_resume
from peagle_train.training.signals import ECHO_SECONDS, Signals
from tests.tiny import write_recipe

ROLES = ("config.json", "model.safetensors", "optimizer.state", "rng.state", "state.json", "recipe.yaml")


def fill(folder: Path) -> None:
    for role in ROLES:
        (folder / role).write_bytes(role.encode() * 3)


def in_child(function: Callable[[], object]) -> int:
    """Run something that touches files only in a forked process: its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call: int) -> None:
    """SIGKILL this process at its call-th use of the file system, in front of it."""
    left = [call]

    def counted(function: Any) -> Any:
        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call_or_die

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    Path.write_bytes = counted(Path.write_bytes)  # type: ignore[method-assign]


def test_a_kill_at_any_moment_of_a_save_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for step in (1, 2, 3):
        files.write_checkpoint(start, step, fill)
    shutil.copytree(start / "checkpoint-3", start / "set-aside-4")
    found = set()
    for call in range(1, 200):
        output = tmp_path / f"killed-{call}"
        shutil.copytree(start, output)

        def save(output: Path = output, call: int = call) -> None:
            die_at(call)
            files.write_checkpoint(output, 4, fill)
            files.prune(output, keep_last=2, keep_every=None)

        code = in_child(save)
        steps = [files.step_of(path) for path in files.list_checkpoints(output)]
        for path in files.list_checkpoints(output):
            files.verify_checkpoint(path)
        assert steps in ([3, 2, 1], [4, 3, 2, 1], [4, 3, 2], [4, 3]), (call, steps)
        files.clean_up(output)
        assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
        found.add(tuple(steps))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # between the name and the removal, and between two removals, too
    assert found == {(3, 2, 1), (4, 3, 2, 1), (4, 3, 2), (4, 3)} and call > 20


def test_a_kill_while_best_is_replaced_loses_neither_the_old_one_nor_the_new(tmp_path: Path) -> None:
    def writer(text: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            (folder / "is").write_text(text)

        return write

    contents = set()
    for call in range(1, 100):
        output = tmp_path / f"killed-{call}"
        checkpoint.write_folder(output / "best", writer("old"))

        def replace(output: Path = output, call: int = call) -> None:
            die_at(call)
            checkpoint.write_folder(output / "best", writer("new"))

        code = in_child(replace)
        files.clean_up(output)
        assert [path.name for path in output.iterdir()] == ["best"]
        contents.add((output / "best" / "is").read_text())
        if code == 0:
            break
    assert contents == {"old", "new"} and call > 5


@pytest.mark.parametrize("role", [*ROLES, files.MANIFEST])
def test_a_file_that_is_cut_changed_or_gone_is_named(role: str, tmp_path: Path) -> None:
    folder = files.write_checkpoint(tmp_path, 7, fill)
    files.verify_checkpoint(folder)
    path = folder / role
    content = path.read_bytes()
    spoiled = [content[:-1], content[: len(content) // 2], b"", content + b"\n"]
    spoiled += [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in range(len(content))]
    for wrong in spoiled:
        path.write_bytes(wrong)
        with pytest.raises(DamagedCheckpoint, match=role):
            files.verify_checkpoint(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=role):
        files.verify_checkpoint(folder)


def test_what_may_not_be_read_is_said_and_never_taken_for_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for step in (1, 2):
        files.write_checkpoint(output, step, fill)
    checkpoint.write_json(output / checkpoint.MARKER, {"state": "started"})
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tmp_path / "rows.jsonl", Path("run")))
    tmp_path.chmod(0o755)

    def refused(call: Callable[[], object], match: str) -> None:
        def body() -> None:
            os.chdir(tmp_path)
            if os.getuid() == 0:  # who may read everything
                os.setresuid(65534, 65534, 65534)
            with pytest.raises(ValueError, match=match):
                call()

        assert in_child(body) == 0, match

    (output / "checkpoint-2").chmod(0)
    sound = "the one before it is sound: go on from there with --resume run/checkpoint-1"
    refused(lambda: open_resume(recipe, ""), f"checkpoint-2/manifest.json cannot be read: Permission denied.*{sound}")
    output.chmod(0o111)  # names in it may be used, but not listed
    refused(lambda: open_resume(recipe, ""), "output.dir run cannot be read: Permission denied")
    output.chmod(0)
    refused(lambda: open_resume(recipe, ""), "--resume: run/run.json cannot be read: Permission denied")
    refused(lambda: checkpoint.check_output(Path("run")), "output.dir run cannot be read: Permission denied")
    output.chmod(0o755)
    (output / "checkpoint-2").chmod(0o755)
    assert len(files.list_checkpoints(output)) == 2


def test_a_checkpoint_under_another_steps_name_is_damaged_and_a_note_beside_it_is_not(tmp_path: Path) -> None:
    folder = files.write_checkpoint(tmp_path, 7, fill)
    (folder / "note.txt").write_text("mine")
    files.verify_checkpoint(folder)
    folder.rename(tmp_path / "checkpoint-8")
    with pytest.raises(DamagedCheckpoint, match="step 7"):
        files.verify_checkpoint(tmp_path / "checkpoint-8")


def test_what_is_found_are_complete_checkpoints_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path / "nowhere") == []
    for step in (10, 9, 100):
        files.write_checkpoint(tmp_path, step, fill)
    os.utime(tmp_path / "checkpoint-9", (2**32, 2**32))  # a clock that was wrong
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-0300").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / ".checkpoint-400.partial").mkdir()
    assert [path.name for path in files.list_checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-9",
    ]


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(None, None, range(1, 8)), (1, None, [7]), (3, None, [5, 6, 7]), (1, 3, [3, 6, 7]), (9, 2, range(1, 8))],
)
def test_the_newest_checkpoints_and_those_of_every_nth_step_are_kept(
    last: int | None, every: int | None, kept: list[int], tmp_path: Path
) -> None:
    for step in range(1, 8):
        files.write_checkpoint(tmp_path, step, fill)
        removed = files.prune(tmp_path, last, every)
        assert len(removed) <= 1
    assert sorted(files.step_of(p) or 0 for p in files.list_checkpoints(tmp_path)) == list(kept)
    assert len(list(tmp_path.iterdir())) == len(kept)


def moved(folder: Path) -> Path:
    """Move a folder to a bigger disk and leave a link in its place; returns where it is now."""
    there = folder.parent.parent / "disk" / folder.name
    there.parent.mkdir(exist_ok=True)
    folder.rename(there)
    folder.symlink_to(there)
    return there


def test_links_to_moved_folders_are_removed_and_replaced_and_what_they_lead_to_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    for step in (1, 2, 3):
        files.write_checkpoint(output, step, fill)
    there = [moved(output / f"checkpoint-{step}") for step in (1, 3)]
    files.verify_checkpoint(output / "checkpoint-1")
    assert files.prune(output, keep_last=2, keep_every=None) == [1]
    assert f"checkpoint-1 is a link: only the link is removed, {there[0]} stays" in caplog.text
    assert files.set_aside_later(output, 2) == [3]
    files.write_checkpoint(output, 3, fill)
    (output / "set-aside-5").symlink_to(there[1])
    files.remove_set_aside(output)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    # Of a run that was killed: each may be a link as well, and lead nowhere.
    for name in (".checkpoint-9.partial", ".checkpoint-9.deleted", ".best.partial", ".best.old", "best"):
        (output / name).symlink_to(tmp_path / "nowhere" if "checkpoint" in name else there[1])
    checkpoint.write_folder(output / "best", fill)
    files.write_checkpoint(output, 9, fill)
    (output / ".final.old").symlink_to(there[1])
    (output / "final").mkdir()
    files.clean_up(output)
    assert sorted(path.name for path in output.iterdir()) == ["best", *(f"checkpoint-{n}" for n in (2, 3, 9)), "final"]
    assert not any(path.is_symlink() for path in output.iterdir())
    for path in there:
        files.verify_checkpoint(path)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        files.write_checkpoint(tmp_path, step, fill)
    checkpoint.write_folder(tmp_path / "best", fill)
    (tmp_path / "set-aside-3").mkdir()

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        files.write_checkpoint(tmp_path, 3, fill)
        assert files.prune(tmp_path, keep_last=2, keep_every=None) == []
        checkpoint.write_folder(tmp_path / "best", fill)
        files.clean_up(tmp_path)
        files.remove_set_aside(tmp_path)
    for name in ("set-aside-3", "checkpoint-1", ".best.old"):
        assert f"{name} cannot be removed" in caplog.text
    assert [files.step_of(path) for path in files.list_checkpoints(tmp_path)] == [3, 2]
    files.clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoint-2", "checkpoint-3"]


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    files.write_checkpoint(tmp_path, 1, fill)

    def fill_more(folder: Path) -> None:
        (folder / "state.json").write_bytes(bytes(2000))

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            files.write_checkpoint(tmp_path, 2, fill_more)

    assert in_child(save) == 0
    tensors = {"a": torch.zeros(1000)}

    def save_model() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="model"):
            files.write_checkpoint(tmp_path, 2, lambda folder: save_tensors(folder / "model.safetensors", tensors))

    assert in_child(save_model) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    files.verify_checkpoint(tmp_path / "checkpoint-1")


def test_a_folder_in_which_a_process_trains_is_refused_to_others_until_it_dies(tmp_path: Path) -> None:
    told, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = lock_output(tmp_path)
        os.write(told[1], b".")
        os.read(go[0], 1)
        os._exit(0 if lock else 1)
    os.read(told[0], 1)
    for attempt in (check_not_in_use, lock_output):
        with pytest.raises(ValueError, match="in use"):
            attempt(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check_not_in_use(tmp_path)
    lock_output(tmp_path).close()


def test_looking_whether_a_folder_is_in_use_makes_no_file_and_keeps_no_other_look_out(tmp_path: Path) -> None:
    check_not_in_use(tmp_path / "nowhere")
    check_not_in_use(tmp_path)
    assert not list(tmp_path.iterdir())
    lock_output(tmp_path).close()
    with (tmp_path / ".lock").open() as file:
        fcntl.lockf(file, fcntl.LOCK_SH)  # as another rank that looks at the same moment
        assert in_child(lambda: check_not_in_use(tmp_path)) == 0


def test_a_second_signal_ends_the_process_at_once() -> None:
    def twice(first: int, second: int) -> int:
        def body() -> None:
            with Signals() as signals:
                os.kill(os.getpid(), first)
                assert signals.stop == signal.Signals(first).name and not signals.save
                os.kill(os.getpid(), second)

        return in_child(body)

    assert twice(signal.SIGTERM, signal.SIGTERM) == 128 + signal.SIGTERM
    assert twice(signal.SIGTERM, signal.SIGINT) == 128 + signal.SIGINT
    assert twice(signal.SIGINT, signal.SIGUSR1) == 0
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.save and signals.stop is None
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_under_torchrun_a_second_signal_so_soon_is_its_own_and_a_later_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        with Signals() as signals:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert signals.stop == "SIGTERM"
            signals._stopped_at -= ECHO_SECONDS
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert in_child(body) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.count("is taken for torchrun's") == 2


def test_the_manifest_lists_every_file_with_size_and_sha256(tmp_path: Path) -> None:
    import hashlib

    folder = files.write_checkpoint(tmp_path, 7, fill)
    manifest = json.loads((folder / files.MANIFEST).read_text())
    assert set(manifest["files"]) == set(ROLES) and manifest["step"] == 7
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert described == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
