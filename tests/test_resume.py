"""Runs that were stopped continue as if they had not been, bit for bit, or not at all, with a clear line."""

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import peagle_train.training.build as build
import peagle_train.training.trainer as trainer_module
from peagle_train.__main__ import main
from peagle_train.config import load_recipe
from peagle_train.training.checkpoint import check_recipe, open_resume
from tests.runs import EVALUATED, assert_same_run, contents, drafter, last_error, lines, run, same_tensors, stopped
from tests.tiny import write_rows


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny):
    """`whole`: a run with checkpoints 2, 4, 6, 8. `copy` gives the recipe of a copy of the same run in folder / "run",
    stopped after step 5 (checkpoints 2, 4, 5).
    """
    begun = tmp_path_factory.mktemp("begun")
    settings = {"data": EVALUATED, "train": {"max_steps": 9, "save_steps": 2, "eval_steps": 3}}
    run(tiny(begun / "whole", **settings))
    with pytest.MonkeyPatch.context() as patch:
        stopped(tiny(begun / "stopped", **settings), 5, patch)

    def copy(folder: Path) -> Path:
        shutil.copytree(begun / "stopped" / "run", folder / "run")
        return tiny(folder, **settings)

    return SimpleNamespace(whole=begun / "whole" / "run", copy=copy)


@pytest.mark.parametrize("more", [{"schedule": "cosine"}, {"optimizer": "muon"}], ids=["adamw", "muon"])
def test_a_run_that_was_stopped_is_the_run_that_was_not(more, tmp_path, tiny, monkeypatch):
    train = {"max_steps": 4, "eval_steps": 2, "save_steps": 3, "gradient_accumulation_steps": 2, **more}
    sections: dict[str, Any] = {"train": {**train, "batch_size": 2}, "data": {**EVALUATED, "num_workers": 2}}
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    run(tiny(tmp_path / "whole", **sections))
    recipe = tiny(tmp_path / "parts", **sections)
    # where no save was due, and after the last step, before it is evaluated
    for step, arguments in ((2, []), (4, ["--resume"])):
        stopped(recipe, step, monkeypatch, *arguments)
        assert not (parts / "final").exists()
    run(recipe, "--resume")
    assert_same_run(parts, whole)


def test_a_run_continues_from_any_of_its_checkpoints_wherever_they_lie(tmp_path, begun, capsys):
    recipe = begun.copy(tmp_path / "a")
    run(recipe, "--resume")
    assert_same_run(tmp_path / "a" / "run", begun.whole)
    capsys.readouterr()
    given = tmp_path / "a" / "run" / "checkpoint-2"
    written = given.stat().st_ino
    run(recipe, "--resume", str(given))
    assert given.stat().st_ino == written, "it is not written again"
    printed = capsys.readouterr().out
    assert "continuing after step 2" in printed and "later steps (4, 5, 6, 8) were removed" in printed
    assert_same_run(tmp_path / "a" / "run", begun.whole)
    # moved to a bigger disk, and linked
    recipe, output, disk = begun.copy(tmp_path / "b"), tmp_path / "b" / "run", tmp_path / "disk"
    disk.mkdir()
    for step in (2, 4, 5):
        (output / f"checkpoint-{step}").rename(disk / f"checkpoint-{step}")
        (output / f"checkpoint-{step}").symlink_to(disk / f"checkpoint-{step}")
    run(recipe, "--resume", "train.keep_last=1")
    assert_same_run(output, begun.whole)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-8"]
    assert len(list(disk.glob("*/model.safetensors"))) == 3
    # copied elsewhere, alone
    other = tmp_path / "other"
    shutil.copytree(disk / "checkpoint-4", other / "checkpoint-4")
    run(recipe, f"--resume={other / 'checkpoint-4'}", code=2)
    assert f"set output.dir={other}" in last_error(capsys)
    run(recipe, f"--resume={other / 'checkpoint-4'}", f"output.dir={other}")
    assert same_tensors(drafter(other / "final"), drafter(begun.whole / "final"))


def test_a_file_that_cannot_be_written_ends_the_run_with_one_line_and_the_last_checkpoint_continues(
    tmp_path, begun, monkeypatch, capsys
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe, output = begun.copy(tmp_path), tmp_path / "run"
    for function, what, resumed in (
        ("save_tensors", "checkpoint-6 could not be written", "checkpoint-5"),  # its drafter is written before
        ("save_drafter", "final could not be written", "checkpoint-8"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, function, full)
            run(recipe, "--resume", code=1)
        message = last_error(capsys)
        assert what in message and "No space left" in message
        assert f"the last checkpoint is {output / resumed}: the same command with --resume" in message
        assert not [*output.glob(".checkpoint-*")]
    run(recipe, "--resume")
    assert_same_run(output, begun.whole)


def test_a_finished_run_says_so_and_writes_nothing_and_a_named_checkpoint_trains_on(tmp_path, begun, capsys):
    recipe, output = begun.copy(tmp_path), tmp_path / "run"
    shutil.rmtree(output)
    shutil.copytree(begun.whole, output)
    before = contents(output)
    capsys.readouterr()
    run(recipe, "--resume", "train.max_steps=12")
    printed = capsys.readouterr().out
    assert "finished run: nothing to do" in printed and contents(output) == before
    assert str(output / "checkpoint-8") in printed
    run(recipe, "--resume", "train.learning_rate=1.0", code=2)
    assert "trained with other settings: train.learning_rate 0.01 -> 1.0" in last_error(capsys)
    (output / "final" / "recipe.yaml").write_text("train: 3")
    run(recipe, "--resume", code=2)
    assert "train" in last_error(capsys)
    shutil.rmtree(output / "final")
    run(recipe, "--resume")
    assert_same_run(output, begun.whole)
    # Asked for by name, it continues to more steps.
    run(recipe, "--resume", str(output / "checkpoint-8"), "train.max_steps=12")
    assert json.loads((output / "run.json").read_text())["steps"] == 12
    assert [line["step"] for line in lines(output, "train")] == list(range(1, 13))


def test_what_is_no_run_is_one_line_and_a_complete_checkpoint_is_enough_without_the_marker(tmp_path, begun, capsys):
    recipe = begun.copy(tmp_path)
    shutil.copytree(begun.whole / "final", tmp_path / "run" / "final")
    halves = ['{"state": "finished"}', '{"drafter": "final"}', '{"drafter": 3}']
    for marker in ("null", "[]", "3", *halves, ""):  # the last as a disk may leave it
        (tmp_path / "run" / "run.json").write_text(marker)
        assert open_resume(load_recipe(recipe), "").folder.name == "checkpoint-5"
    run(recipe, code=2)  # a plain start says that there is a run
    assert "is not empty: resume the run in it (--resume)" in last_error(capsys)
    run(recipe, "--resume", str(tmp_path / "elsewhere"), code=2)
    assert "give a checkpoint-<step>" in last_error(capsys)
    run(recipe, "--resume", f"output.dir={tmp_path / 'nothing'}", code=2)
    assert "holds no complete checkpoint" in last_error(capsys) and not (tmp_path / "nothing").exists()
    run(recipe, "--resume", "train.max_steps=4", "target.path=/nowhere", code=2)  # told before the target is loaded
    assert "checkpoint-5 is after the 4 steps" in last_error(capsys)
    run(recipe, "--resume", "train.max_steps=null", "train.epochs=1", code=2)
    assert "checkpoint-5 is after the 4 steps" in last_error(capsys)
    run(recipe, "--resume", str(tmp_path / "run"), "train.max_steps=5")  # this much only


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_offered_by_name(tmp_path, begun, capsys):
    recipe, output = begun.copy(tmp_path), tmp_path / "run"
    damaged = output / "checkpoint-5" / "state.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = contents(output)
    run(recipe, "--resume", code=2)
    message = last_error(capsys)
    assert str(damaged) in message and f"--resume {output / 'checkpoint-4'}" in message and contents(output) == before
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / "checkpoint-2")
    run(recipe, "--resume", code=2)
    assert "start over in a new folder" in last_error(capsys)


def test_changes_of_the_recipe_that_would_make_it_another_run_are_refused_by_name(
    tmp_path, begun, tiny_target, tiny_rows, capsys, monkeypatch
):
    recipe = begun.copy(tmp_path)
    before = contents(tmp_path / "run")
    run(recipe, "--resume", "train.learning_rate=1.0", "cod.down_sample_ratio=0.5", "data.max_length=33", code=2)
    message = last_error(capsys)
    for change in ("train.learning_rate 0.01 -> 1.0", "cod.down_sample_ratio 0.7 -> 0.5", "data.max_length 32 -> 33"):
        assert change in message
    rows = write_rows(tmp_path / "other.jsonl", [9, 31, 4, 17])
    target = tmp_path / "target"
    shutil.copytree(tiny_target, target)
    weights = load_file(target / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 3  # not the head
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for changed, named in (
        (f"data.sources=[{rows}]", "training data"),
        ("data.max_eval_rows=1", "held-out data"),
        ("train.batch_size=2", "not what checkpoint-5 was trained with: sequences of a step:"),
        (f"target.path={target}", "target's config and weights"),
    ):
        run(recipe, "--resume", changed, code=2)
        assert named in last_error(capsys)
    with monkeypatch.context() as patch:  # as where another tokenizer leaves another token free
        make = build.make_draft
        patch.setattr(build, "make_draft", lambda shaped, target, token, *more: make(shaped, target, token - 1, *more))
        run(recipe, "--resume", code=2)
        assert "trained with: mask token:" in last_error(capsys)
    assert contents(tmp_path / "run") == before
    moved, copy = tmp_path / "moved.jsonl", tmp_path / "copy"
    shutil.copy(tiny_rows, moved)
    shutil.copytree(tiny_target, copy)
    run(recipe, "--resume", f"data.sources=[{moved}]", "data.num_workers=1", "train.keep_last=1", f"target.path={copy}")
    assert_same_run(tmp_path / "run", begun.whole)


def test_a_setting_that_a_checkpoints_version_did_not_have_was_its_default_and_one_that_is_gone_counts(tmp_path, tiny):
    recipe = tiny(tmp_path)
    same, changed = (asdict(load_recipe(recipe, changes)) for changes in ([], ["train.depth_decay=0.5"]))
    old = asdict(load_recipe(recipe))
    del old["train"]["depth_decay"], old["cod"]["max_anchors"]
    old["train"]["average"] = 0.0
    check_recipe(old, same, "checkpoint-5")
    with pytest.raises(ValueError, match=r"train\.depth_decay 1\.0 -> 0\.5"):
        check_recipe(old, changed, "checkpoint-5")
    old["train"]["average"] = 0.2
    with pytest.raises(ValueError, match=r"train\.average 0\.2, which is gone"):
        check_recipe(old, same, "checkpoint-5")


def test_a_run_that_was_out_of_memory_continues_in_more_segments(tmp_path, begun):
    run(begun.copy(tmp_path), "--resume", "cod.num_segments=5", "train.segment_mode=recompute")
    assert same_tensors(drafter(tmp_path / "run" / "final"), drafter(begun.whole / "final"), 1e-9)


def test_a_run_that_started_from_another_drafter_resumes_without_it(tmp_path, tiny, monkeypatch):
    # Of another shape than the recipe and the target would give, and another vocabulary.
    shape = {"intermediate_size": 20, "num_key_value_heads": 4, "rope_theta": 77.0, "draft_vocab_size": 31}
    shape["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    run(tiny(tmp_path / "first", draft=shape, train={"max_steps": 1}))
    source = tmp_path / "first" / "run" / "final"
    sections = {"draft": {"init_from": str(source), "draft_vocab_size": None}, "train": {"max_steps": 2}}
    run(tiny(tmp_path / "whole", **sections))
    parts, output = tiny(tmp_path / "parts", **sections), tmp_path / "parts" / "run"
    stopped(parts, 1, monkeypatch)
    shutil.copytree(output, tmp_path / "again")
    run(parts, "--resume")
    assert_same_run(output, tmp_path / "whole" / "run")
    shutil.rmtree(source)
    run(parts, "--resume", f"output.dir={tmp_path / 'again'}", "draft.init_from=null")
    assert_same_run(tmp_path / "again", tmp_path / "whole" / "run")


def test_best_is_not_named_where_it_holds_another_steps_drafter(tmp_path, begun):
    recipe, output = begun.copy(tmp_path), tmp_path / "run"
    file = output / "best.json"
    assert json.loads(file.read_text())["folder"] == "best"
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": 77}))  # which the resumed run has undone
    run(recipe, "--resume", "train.eval_steps=null", "train.max_steps=6")
    best = json.loads((output / "run.json").read_text())["best"]
    assert best["step"] == 3 and best["folder"] is None


def test_resume_takes_a_folder_and_nothing_else_for_its_own(tmp_path, tiny, monkeypatch):
    recipe, seen = str(tiny(tmp_path)), []
    monkeypatch.setattr(build, "train", lambda made, resume: seen.append((resume, made.train.max_steps)) or "")
    for arguments, resume, steps in (
        ([recipe], None, None),
        (["--resume", recipe, "train.max_steps=5"], "", 5),
        ([recipe, "--resume", "run/checkpoint-3", "train.max_steps=5"], "run/checkpoint-3", 5),
        (["train", recipe, "--resume=run/checkpoint-3"], "run/checkpoint-3", None),
    ):
        assert main(arguments) == 0
        assert seen.pop() == (resume, steps), arguments
