"""Checkpoints on disk: whole or not there, whatever happens while they are written; damage is seen; old ones go."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import peagle_train.training.checkpoint as files
from peagle_train.files import ECHO_SECONDS, Signals
from tests.runs import in_child

ROLES = ("config.json", "model.safetensors", "optimizer.state", "state.json", "recipe.yaml")


def fill(folder: Path) -> None:
    for role in ROLES:
        (folder / role).write_bytes(role.encode() * 3)


def die_at(call: int) -> None:
    """SIGKILL this process at its call-th use of the file system, before it happens."""
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


def test_a_kill_at_any_moment_of_a_save_leaves_only_whole_checkpoints(tmp_path):
    for step in (1, 2, 3):
        files.write_checkpoint(tmp_path / "start", step, fill)
    found = set()
    for call in range(1, 200):
        output = tmp_path / f"killed-{call}"
        shutil.copytree(tmp_path / "start", output)

        def save(output: Path = output, call: int = call) -> None:
            die_at(call)
            files.write_checkpoint(output, 4, fill)
            files.prune(output, keep_last=2, keep_every=None)

        code = in_child(save)
        found.add(tuple(files.step_of(path) for path in files.list_checkpoints(output)))
        for path in files.list_checkpoints(output):
            files.verify_checkpoint(path)
        files.clean_up(output)
        assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # between the name and the removal, and between two removals, too
    assert found == {(3, 2, 1), (4, 3, 2, 1), (4, 3, 2), (4, 3)} and call > 20


@pytest.mark.parametrize("role", [*ROLES, files.MANIFEST])
def test_a_file_that_is_cut_changed_or_missing_is_seen(role, tmp_path):
    folder = files.write_checkpoint(tmp_path, 7, fill)
    (folder / "note.txt").write_text("mine")  # no harm
    files.verify_checkpoint(folder)
    path = folder / role
    content = path.read_bytes()
    changed = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in range(len(content))]
    for wrong in [content[:-1], b"", *changed, None]:
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        # what is wrong with the manifest may look like the fault of a file that it lists
        with pytest.raises(ValueError, match="checkpoint-7" if role == files.MANIFEST else role):
            files.verify_checkpoint(folder)


def test_a_checkpoint_of_another_format_or_under_another_steps_name_is_refused(tmp_path):
    folder = files.write_checkpoint(tmp_path, 7, fill)
    manifest = json.loads((folder / files.MANIFEST).read_text())
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert described == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(manifest["files"]) == set(ROLES)
    folder = folder.rename(tmp_path / "checkpoint-8")
    for changes in ({}, {"step": 8, "format": 1}):  # format 1 is that of version 0.1.0
        (folder / files.MANIFEST).write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(ValueError, match="format 2"):
            files.verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(None, None, range(5, 12)), (1, None, [11]), (3, None, [9, 10, 11]), (1, 3, [6, 9, 11]), (9, 2, range(5, 12))],
)
def test_the_newest_checkpoints_and_those_of_every_nth_step_are_kept(last, every, kept, tmp_path):
    for name in ("checkpoint-200", "checkpoint-0300", "checkpoint-old", ".checkpoint-400.partial"):
        (tmp_path / name).mkdir()  # these are none
    for step in range(5, 12):  # 9, 10: the newest by number, not by name
        files.write_checkpoint(tmp_path, step, fill)
        files.prune(tmp_path, last, every)
    assert [files.step_of(p) for p in files.list_checkpoints(tmp_path)] == [*kept][::-1]
    assert len(list(tmp_path.iterdir())) == len(kept) + 4


def test_a_folder_in_which_a_process_trains_is_refused_to_others(tmp_path):
    files.write_checkpoint(tmp_path, 7, fill)
    recipe: Any = SimpleNamespace(output=SimpleNamespace(dir=tmp_path))

    def refused() -> None:
        with pytest.raises(ValueError, match="in use"):
            files.lock_output(tmp_path)
        with pytest.raises(ValueError, match="in use"):  # long before, when it finds out where to resume
            files.open_resume(recipe, "")

    with files.lock_output(tmp_path):
        assert in_child(refused) == 0
    assert in_child(lambda: files.lock_output(tmp_path)) == 0


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    def twice(first: int, second: int, later: float = 0.0) -> int:
        def body() -> None:
            with Signals() as signals:
                os.kill(os.getpid(), first)
                assert signals.stop
                monkeypatch.setattr("time.monotonic", lambda: 1e9 + later)
                os.kill(os.getpid(), second)

        monkeypatch.setattr("time.monotonic", lambda: 1e9)
        return in_child(body)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert twice(signal.SIGTERM, signal.SIGINT) == 128 + signal.SIGINT
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # which passes on what its processes have got already
    assert twice(signal.SIGTERM, signal.SIGTERM) == 0
    assert twice(signal.SIGTERM, signal.SIGTERM, later=ECHO_SECONDS) == 128 + signal.SIGTERM
