"""Features on disk, ours and those of speculators: the same weights as without, whole or not there, a line for mistakes."""

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from peagle_train.__main__ import main
from peagle_train.config import load_recipe
from peagle_train.files import alone_in
from peagle_train.target_model.cache import StoredTarget, write_cache
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.step import BatchRunner
from tests.helpers import command, seeded
from tests.runs import EVALUATED, LENGTHS, contents, drafter, last_error, metrics, run, same_tensors
from tests.states_fake import States
from tests.tiny import make_target, write_rows

THEIR_LENGTHS = [9, 31, 4, 17, 32, 1, 2]


@pytest.fixture
def recipe_in(tiny, tmp_path):
    """Writes a recipe."""
    return lambda **sections: tiny(tmp_path, **{"data": EVALUATED, **sections})


def cache(recipe: Path, out: Path, *overrides: str, shard_tokens: int = 24) -> Path:
    """Written with shards of about this many tokens of a float64 target of width 16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    write_cache(load_recipe(recipe, overrides), str(out), shard_mib=shard_tokens * 512 / 2**20)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("made")
    return cache(tiny(folder, data=EVALUATED), folder / "cache")


def train(recipe: Path, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    run(recipe, f"output.dir={output}", *overrides)
    return drafter(output / "final")


@pytest.mark.parametrize("command", ["cache", "prepare --workers 1"])
def test_a_full_disk_is_one_line(command, tmp_path, recipe_in, capsys):
    recipe, (_, most) = recipe_in(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, most))
    try:
        assert main([*command.split(), str(recipe), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("window", [None, 4])
def test_training_from_a_cache_gives_the_weights_of_training_without_whatever_is_not_stored(
    window, tmp_path, recipe_in, tiny_rows, monkeypatch
):
    # Two sources with the same ids and other masks, which share their pieces.
    other = write_rows(tmp_path / "other.jsonl", LENGTHS, prompt=0.9)
    data = {"sources": [str(tiny_rows), str(other)], "eval_fraction": 0.2, "num_workers": 2 if window else 0}
    train_ = {"batch_size": 2, "max_steps": 6, "eval_steps": 3}
    recipe = recipe_in(data=data, draft={"window": window}, train=train_)
    folder = cache(recipe, tmp_path / "cache", "cod.num_segments=auto")
    online = train(recipe, tmp_path / "online", "train.batch_size=1")
    monkeypatch.delattr(FrozenTarget, "load")
    read, filled = StoredTarget.read, []

    def read_and_fill(self, batch, room):
        read(self, batch, room)
        for found, value in zip(room, (1e3, float("nan")), strict=True):
            is_zero = (found == 0).all(-1)
            filled.append(int(is_zero.sum()))
            found[is_zero] = value

    cached = train(recipe, tmp_path / "cached", f"target.cache={folder}", "train.batch_size=1")
    monkeypatch.setattr(StoredTarget, "read", read_and_fill)
    other_values = train(recipe, tmp_path / "filled", f"target.cache={folder}", "train.batch_size=1")
    assert min(filled) > 0 and same_tensors(online, cached) and same_tensors(other_values, cached)
    assert metrics(tmp_path / "online") == metrics(tmp_path / "cached")
    assert command("cache", "--verify", folder) == 0


def test_features_are_read_one_micro_batch_ahead_however_many_a_step_has(tmp_path, recipe_in, monkeypatch):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 4}
    recipe = recipe_in(train=settings, data={"pack": False, "eval_fraction": 0.0})
    folder, events = cache(recipe, tmp_path / "cache"), []
    read, run_batch = StoredTarget.read, BatchRunner.run
    monkeypatch.setattr(StoredTarget, "read", lambda *given: (events.append("read"), read(*given))[1])
    monkeypatch.setattr(BatchRunner, "run", lambda *given, **more: (run_batch(*given, **more), events.append("run"))[0])
    train(recipe, tmp_path / "run", f"target.cache={folder}")
    assert events.count("read") == events.count("run") == 12
    for i in range(len(events)):
        assert events[:i].count("read") <= events[:i].count("run") + 2


def test_packing_batches_and_attention_may_change_without_a_new_cache(tmp_path, recipe_in):
    recipe = recipe_in(train={"max_steps": 4, "batch_size": 2, "offload_features": True})
    folder = cache(recipe, tmp_path / "cache", "data.pack=false", "data.eval_fraction=0.0", "data.max_eval_rows=null")
    more = f"target.cache={folder}", "target.chunk_tokens=8", "target.attn_implementation=eager"
    assert same_tensors(train(recipe, tmp_path / "cached", *more), train(recipe, tmp_path / "online"), 1e-9)


def test_features_in_fp8_are_the_targets_to_a_sixteenth_and_last_hidden_states_are_as_before(
    tmp_path, recipe_in, tiny_rows, made
):
    recipe = recipe_in(train={"max_steps": 2})
    folder = cache(recipe, tmp_path / "cache", "target.cache_dtype=float8_e4m3fn", shard_tokens=10_000)
    stored = load_file(folder / "features-00000.safetensors")
    last_hidden = torch.cat([load_file(path)["last_hidden"] for path in sorted(made.glob("features-*"))])
    assert stored["features"].dtype == torch.float8_e4m3fn and torch.equal(stored["last_hidden"], last_hidden)
    ids = torch.tensor([[*json.loads(tiny_rows.read_text().splitlines()[1])["input_ids"], 0, 0, 0]])
    batch, read = {"input_ids": ids, "document_ids": torch.tensor([[0] * 31 + [-1] * 3])}, []
    for where in (folder, made):
        one = StoredTarget(load_recipe(recipe, [f"target.cache={where}"]).target, torch.device("cpu"))
        read.append(one.outputs(batch, one.head_weight()).features.double())
    least = read[1].abs().amax(-1, keepdim=True) / 448 / 2**6  # of FP8's normal numbers, scaled
    bound = torch.maximum(read[1].abs(), least) / 16 * (1 + 1e-6)
    assert read[1].any() and bool(((read[0] - read[1]).abs() <= bound).all()) and not read[0][:, 31:].any()
    train(recipe, tmp_path / "run", f"target.cache={folder}")


def test_a_write_stopped_anywhere_and_started_again_leaves_the_same_cache(tmp_path, recipe_in, made, monkeypatch):
    recipe, replace, calls = recipe_in(), os.replace, []
    assert len(contents(made)) == 7

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt  # before
        replace(*arguments)
        if len(calls) in (1, 4, 5):
            raise KeyboardInterrupt  # after

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                cache(recipe, tmp_path / "again")
    assert contents(cache(recipe, tmp_path / "again")) == contents(made)


SHARD, INDEX = "features-00001.safetensors", "cache.json"
WRONG: dict[str, tuple[str, Any, str, str]] = {
    "cut": (SHARD, lambda data: data[:-8], "", f"{SHARD} is missing or damaged"),
    "not whole": (SHARD, None, "", f"{SHARD} is missing or damaged"),
    "format": (INDEX, lambda data: data.replace(b'"version": 3', b'"version": 4'), "", "is of format 4, this reads"),
    "index": (INDEX, lambda data: data[:-9], "", "cache.json cannot be read"),
    "index lacks a key": (INDEX, lambda data: data.replace(b'"shards"', b'""'), "", "cache.json cannot be read"),
    "layers": ("", None, "target.layer_ids=[1, 2, 3]", "is of layer_ids [2, 3, 4], the recipe asks for [1, 2, 3]"),
    "dtype": ("", None, "target.dtype=float32", "is of dtype float64, the recipe asks for float32"),
    "cache dtype": ("", None, "target.cache_dtype=bfloat16", "is of cache_dtype float64"),
    "longer rows": ("", None, "data.max_length=64", "with data.max_length 32"),
    "another target": ("", None, "target.path={other}", "is of another target than"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_cache_that_does_not_match_is_one_clear_line_before_any_training(case, tmp_path, recipe_in, made, capsys):
    name, change, override, message = WRONG[case]
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    if change:
        (folder / name).write_bytes(change((made / name).read_bytes()))
    elif name:
        (folder / name).unlink()
    if case == "another target":  # of the same shape
        override = override.format(other=make_target(tmp_path / "other", initializer_range=0.2))
    run(recipe_in(), f"target.cache={folder}", *filter(None, [override]), code=2)
    error = last_error(capsys)
    assert message in error and not (tmp_path / "run").exists()


def test_positions_that_the_drafters_layers_cannot_reach_are_not_stored_and_a_recipe_that_reads_them_is_refused(
    tmp_path, recipe_in, tiny_rows, capsys
):
    row = {"input_ids": torch.randint(60, (400,), generator=seeded(0)).tolist(), "loss_mask": [0] * 396 + [1, 0, 1, 0]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = {"sources": [str(tmp_path / "rows.jsonl")], "max_length": 401, "eval_fraction": 0.0}
    recipe = recipe_in(data=data, draft={"window": 9, "num_layers": 3})
    folder = cache(recipe, tmp_path / "cache")
    found = load_file(folder / "features-00000.safetensors")
    # Tokens 396 and 398 are read by rows 395 and 397, the first of which reaches back by 3 * 8.
    assert found["features"].shape == (397 - 371 + 1, 48) and found["last_hidden"].shape == (2, 16)
    more = f"target.cache={folder}", "train.max_steps=1"
    for reads in ("draft.window=10", "draft.window=null", "draft.num_layers=4", f"data.sources=[{tiny_rows}]"):
        run(recipe, *more, reads, code=2)
        error = last_error(capsys)
        assert "or positions of them" in error and "peagle-train cache" in error and not (tmp_path / "run").exists()
    train(recipe, tmp_path / "run", *more, "draft.window=7")


def test_damage_that_a_start_does_not_see_is_found_by_verify_which_names_the_file(tmp_path, recipe_in, made, capsys):
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    data = bytearray((folder / SHARD).read_bytes())
    data[-100] ^= 1
    (folder / SHARD).write_bytes(data)
    train(recipe_in(), tmp_path / "run", f"target.cache={folder}", "train.max_steps=1")
    assert command("cache", "--verify", made) == 0 and command("cache", "--verify", folder) == 2
    assert f"{SHARD} is damaged" in capsys.readouterr().err
    assert command("cache", "--verify", tmp_path) == 2 and "cache.json cannot be read" in capsys.readouterr().err


def test_other_rows_another_target_or_another_writer_never_mix_in_one_folder(tmp_path, recipe_in, made):
    before, recipe = contents(made), recipe_in()
    for differ, override in (
        ("max_length, .*plan", "data.max_length=16"),
        ("layer_ids", "target.layer_ids=[0, 1, 2]"),
        ("dtype, shards, plan", "target.cache_dtype=float32"),
    ):
        with pytest.raises(ValueError, match=rf"holds the cache of another target, .*\({differ} differ\)"):
            cache(recipe, made, override)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        cache(recipe, tmp_path / "mine")
    assert contents(made) == before
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    (folder / SHARD).unlink()
    before = contents(folder)
    with alone_in(folder, "writing features"):
        with pytest.raises(ValueError, match="another process is writing features there"):
            cache(recipe, folder)
        assert contents(folder) == before


def test_what_does_not_fit_the_disk_is_refused_and_the_rest_may_be_there(tmp_path, recipe_in, monkeypatch, made):
    usage = shutil.disk_usage(tmp_path)._replace(free=9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"has too little room: 185 tokens"):
        cache(recipe_in(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    cache(tmp_path / "recipe.yaml", Path(shutil.copytree(made, tmp_path / "cache")))


# Hidden states that speculators wrote


@pytest.fixture(scope="module")
def their_rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", THEIR_LENGTHS, 0.4)


@pytest.fixture
def recipe(recipe_in, their_rows):
    data = {"sources": [str(their_rows)], "max_bad_rows": 1, "eval_fraction": 0.0}
    return recipe_in(train={"max_steps": 2}, data=data)


@pytest.fixture(scope="module")
def samples(their_rows):
    return [json.loads(line) for line in their_rows.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_target, samples):
    """Files as speculators leaves them."""
    folder, states = tmp_path_factory.mktemp("written"), States(tiny_target, tmp_path_factory.mktemp("states"))
    for i, row in enumerate(samples):
        ids = torch.tensor(row["input_ids"])
        save_file({"token_ids": ids, "hidden_states": states.states(ids)[0]}, folder / f"hs_{i}.safetensors")
    return folder


def copied(written: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """`changes` replace tensors of hs_1; None removes one."""
    shutil.copytree(written, folder)
    tensors = {**load_file(folder / "hs_1.safetensors"), **changes}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, folder / "hs_1.safetensors")
    return folder


def write_data_set(folder: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    table = datasets.Dataset.from_list([{**row, "seq_len": len(row["input_ids"])} for row in rows])
    table.with_format("torch").save_to_disk(str(folder))


@pytest.mark.parametrize("mask", ["in the data set as tensors", "in the files"])
def test_a_drafter_from_speculators_files_is_the_one_from_the_target(
    mask, tmp_path, recipe, samples, written, monkeypatch, caplog
):
    data, cache, targets, final_norm = tmp_path / "data", tmp_path / "cache", [], FrozenTarget.final_norm
    monkeypatch.setattr(FrozenTarget, "final_norm", lambda self: (targets.append(self), final_norm(self))[1])
    files = copied(written, data / "hidden_states")
    if mask.startswith("in the data set"):
        write_data_set(data, samples)
    else:
        for i, row in enumerate(samples):
            path = files / f"hs_{i}.safetensors"
            save_file({**load_file(path), "loss_mask": torch.tensor(row["loss_mask"])}, path)
    assert command("cache", recipe, "--speculators", data, "--out", cache) == 0
    documents = [json.loads(line) for line in (cache / "documents.jsonl").read_text().splitlines()]
    assert documents == [row for row in samples if 1 in row["loss_mask"][1:]] != samples
    assert f"{len(samples) - len(documents)} samples with no token to learn from" in caplog.text
    [target] = targets
    assert all(parameter.is_meta for parameter in target.model.parameters()), "its weights stay on the disk"
    online, source = train(recipe, tmp_path / "online"), f"data.sources=[{cache / 'documents.jsonl'}]"
    assert same_tensors(train(recipe, tmp_path / "cached", f"target.cache={cache}", source), online, 1e-9)


LAST_NAN = torch.tensor([0.0, 0.0, 0.0, float("nan")])[:, None]
MISFITS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no ids": ({"token_ids": None}, [], "token_ids"),
    "two layers": ({"hidden_states": torch.zeros(31, 3, 16)}, [], "(31, 3, 16)"),
    "ids outside": ({"token_ids": torch.full((31,), 61)}, [], "in 0..60"),
    "not finite": ({"hidden_states": torch.full((31, 4, 16), float("nan"))}, [], "not all finite"),
    "last hidden states not finite": ({"hidden_states": LAST_NAN.expand(31, 4, 16)}, [], "not all finite"),
    "FP8": ({"hidden_states_scales": torch.ones(31, 4)}, [], "FP8 (hidden_states_scales)"),
    "mask": ({"loss_mask": torch.ones(30, dtype=torch.int64)}, [], "loss_mask"),
    "other layers": ({}, ["target.layer_ids=[0, 1, 2]"], "layer"),
    "longer than a row": ({}, ["data.max_length=16"], "has 31 tokens, data.max_length is 16"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit_are_one_clear_line(case, tmp_path, recipe, written, capsys):
    changes, overrides, message = MISFITS[case]
    files = copied(written, tmp_path / "files", **changes)
    assert command("cache", recipe, *overrides, "--speculators", files, "--out", tmp_path / "cache") == 2
    assert message in capsys.readouterr().err


def test_a_data_set_of_other_tokens_and_files_that_are_no_cache_are_refused(tmp_path, recipe, samples, written, capsys):
    files = copied(written, tmp_path / "data" / "hidden_states")
    write_data_set(tmp_path / "data", samples[1:] + samples[:1])
    assert command("cache", recipe, "--speculators", files, "--out", tmp_path / "cache") == 2
    assert "row 0 of the data set next to it has other tokens" in capsys.readouterr().err
    run(recipe, f"target.cache={written}", code=2)
    assert "--speculators" in last_error(capsys)
