"""Features on disk: the same weights as without them, whole or not there, and one line for what is wrong."""

import json
import os
import resource
import shlex
import shutil
from collections.abc import Callable
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
from tests.helpers import command
from tests.tiny import make_target, write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 2, 26, 11, 40, 13, 33, 64]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS, prompt=0.3)


def recipe_in(folder: Path, target: Path, rows: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    sections.setdefault("data", {}).setdefault("eval_fraction", 0.3)
    return write_recipe(folder, target, rows, folder / "run", **sections)


def cache(recipe: Path, out: Path, *overrides: str, shard_tokens: int = 40) -> Path:
    """Written with shards of about this many tokens of a float64 target of width 16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    write_cache(load_recipe(recipe, overrides), str(out), shard_mib=shard_tokens * 512 / 2**20)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, target: Path, rows: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return cache(recipe_in(folder, target, rows), folder / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train(recipe: Path, run: Path, *overrides: str) -> dict[str, torch.Tensor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), f"output.dir={run}", *overrides]) == 0
    return load_file(run / "final" / "model.safetensors")


def no_forward(*_: Any, **__: Any) -> Any:
    raise AssertionError("the target was loaded")


@pytest.mark.parametrize("command", ["cache", "prepare"])
def test_a_full_disk_is_one_line(
    command: str, tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, (_, most) = recipe_in(tmp_path, target, rows), resource.getrlimit(resource.RLIMIT_FSIZE)
    AcceleratorState._reset_state(reset_partial_state=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, most))
    try:
        assert main([command, str(recipe), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]


def test_training_from_a_cache_gives_the_weights_of_training_without(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, target, rows, train={"epochs": 1, "eval_steps": 2}, data={"num_workers": 2})
    folder = cache(recipe, tmp_path / "cache", "cod.num_segments=auto")
    online = train(recipe, tmp_path / "online")
    monkeypatch.setattr(FrozenTarget, "load", no_forward)
    cached = train(recipe, tmp_path / "cached", f"target.cache={folder}")
    assert command("cache", "--verify", folder) == 0
    assert online.keys() == cached.keys() and len(online) > 20
    assert all(torch.equal(online[name], cached[name]) for name in online)
    first, second = ((tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("online", "cached"))
    for a, b in zip(map(json.loads, first), map(json.loads, second), strict=True):
        assert all(a.get(name) == b.get(name) for name in ("loss", "accuracy", "mass_outside"))


def test_features_are_read_one_micro_batch_ahead_however_many_a_step_has(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 4}
    recipe = recipe_in(tmp_path, target, rows, train=settings, data={"pack": False, "eval_fraction": 0.0})
    folder = cache(recipe, tmp_path / "cache")
    read, run, events = StoredTarget.read, BatchRunner.run, []

    def reading(self: StoredTarget, *arguments: Any) -> Any:
        events.append("read")
        return read(self, *arguments)

    def running(self: BatchRunner, *arguments: Any, **keywords: Any) -> Any:
        found = run(self, *arguments, **keywords)
        events.append("run")
        return found

    monkeypatch.setattr(StoredTarget, "read", reading)
    monkeypatch.setattr(BatchRunner, "run", running)
    train(recipe, tmp_path / "run", f"target.cache={folder}")
    assert events.count("read") == events.count("run") == 12
    for i in range(len(events)):
        assert events[:i].count("read") <= events[:i].count("run") + 2


def test_packing_masks_and_batches_may_change_without_a_new_cache(tmp_path: Path, target: Path, rows: Path) -> None:
    recipe = recipe_in(tmp_path, target, rows, train={"max_steps": 4, "batch_size": 2, "offload_features": True})
    folder = cache(recipe, tmp_path / "cache", "data.pack=false", "data.eval_fraction=0.0", "data.max_eval_rows=null")
    online, cached = train(recipe, tmp_path / "online"), train(recipe, tmp_path / "cached", f"target.cache={folder}")
    assert all(torch.allclose(online[name], cached[name], rtol=0, atol=1e-9) for name in online)


def test_what_is_read_is_what_the_target_gives(tmp_path: Path, target: Path, rows: Path, made: Path) -> None:
    recipe = load_recipe(recipe_in(tmp_path, target, rows), [f"target.cache={made}"])
    stored, model = StoredTarget(recipe.target, torch.device("cpu")), FrozenTarget.load(str(target), dtype="float64")
    ids = [torch.tensor(json.loads(rows.read_text().splitlines()[i])["input_ids"]) for i in (1, 5)]
    batch = torch.cat([*ids, torch.zeros(3, dtype=torch.int64)])[None], torch.tensor([[0] * 31 + [1] * 2 + [-1] * 3])
    found = stored.outputs({"input_ids": batch[0], "document_ids": batch[1]}, stored.head_weight())
    # Features but those of the documents' last tokens, last hidden states where the mask is 1 (not in the first 9 of 31).
    stored_columns, labels = [*range(30), 31], [*range(9, 31), 32]
    for part in (slice(0, 31), slice(31, 33)):
        features, last = model.features(batch[0][:, part], torch.arange(part.stop - part.start)[None])
        for ours, theirs, columns in (
            (found.features, features, stored_columns),
            (found.last_hidden, last, labels),
        ):
            for i in range(part.start, part.stop):
                expected = theirs[:, i - part.start] if i in columns else torch.zeros_like(theirs[:, 0])
                assert torch.allclose(ours[:, i], expected, atol=1e-12), i
    assert not found.features[:, 33:].any() and not found.last_hidden[:, 33:].any()
    for name in ("head_weight", "embedding_rows", "eos_token_ids"):
        ours, theirs = (getattr(one, name)() for one in (stored, model))
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert torch.equal(*(one.final_norm()(found.last_hidden) for one in (stored, model)))


def test_bfloat16_on_disk_is_the_targets_output_rounded(tmp_path: Path, target: Path, rows: Path, made: Path) -> None:
    recipe = recipe_in(tmp_path, target, rows, train={"max_steps": 2})
    half = cache(recipe, tmp_path / "half", "target.cache_dtype=bfloat16")
    full, rounded = (load_file(folder / "features-00000.safetensors")["features"] for folder in (made, half))
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded[: len(full)], full[: len(rounded)].bfloat16())
    # Training may name another attention than the cache was made with.
    train(recipe, tmp_path / "run", f"target.cache={half}", "target.chunk_tokens=8", "target.attn_implementation=eager")


def test_a_write_stopped_anywhere_and_started_again_leaves_the_same_cache(
    tmp_path: Path, target: Path, rows: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, target, rows)
    assert len(contents(made)) == 7
    replace, calls = os.replace, []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt  # before
        replace(*arguments)
        if len(calls) in (1, 5, 6):
            raise KeyboardInterrupt  # after

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                cache(recipe, tmp_path / "again")
    assert contents(cache(recipe, tmp_path / "again")) == contents(made)


SHARD, INDEX = "features-00001.safetensors", "cache.json"
WRONG: dict[str, tuple[str, Callable[[bytes], bytes] | None, str, str]] = {
    "cut": (SHARD, lambda data: data[:-8], "", f"{SHARD} is missing or damaged"),
    "not whole": (SHARD, None, "", f"{SHARD} is missing or damaged"),
    "head": ("head.safetensors", lambda data: b"\xff" * 8 + data[8:], "", "head.safetensors is missing or damaged"),
    "format": (INDEX, lambda _: b'{"version": 0}', "", "is of format 0, this reads format 3"),
    "index": (INDEX, lambda data: data[:-9], "", "cache.json cannot be read"),
    "no index": (INDEX, None, "", "has no cache.json"),
    "layers": ("", None, "target.layer_ids=[1, 2, 3]", "is of layer_ids [2, 3, 4], the recipe asks for [1, 2, 3]"),
    "dtype": ("", None, "target.dtype=float32", "is of dtype float64, the recipe asks for float32"),
    "cache dtype": ("", None, "target.cache_dtype=bfloat16", "is of cache_dtype float64"),
    "longer rows": ("", None, "data.max_length=64", "with data.max_length 32"),
    "another target": ("", None, "target.path={other}", "is of another target than"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_cache_that_does_not_match_is_one_clear_line_before_any_training(
    case: str, tmp_path: Path, target: Path, rows: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, override, message = WRONG[case]
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    if change:
        (folder / name).write_bytes(change((made / name).read_bytes()))
    elif name:
        (folder / name).unlink()
    overrides = [override] if override else []
    if case == "another target":  # of the same shape
        overrides = [override.format(other=make_target(tmp_path / "other", initializer_range=0.2))]
    assert main([str(recipe_in(tmp_path, target, rows)), f"target.cache={folder}", *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peagle-train train: error") and message in error and "peagle-train cache" in error
    assert not (tmp_path / "run").exists()


def test_a_cache_of_the_format_before_is_refused_in_a_line(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "version": 2}))
    assert command("cache", "--verify", folder) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "format 2" in line and "make the cache" in line


@pytest.mark.parametrize("window", [None, 4])
def test_what_is_not_stored_is_nothing_that_training_depends_on(
    window: int | None, tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two sources with the same ids and other masks, which share their pieces.
    other = write_rows(tmp_path / "other.jsonl", LENGTHS, prompt=0.9)
    sections = {
        "data": {"sources": [str(rows), str(other)], "eval_fraction": 0.2},
        "draft": {"window": window},
        "train": {"batch_size": 2, "max_steps": 6, "eval_steps": 3},
    }
    recipe = recipe_in(tmp_path, target, rows, **sections)
    folder = cache(recipe, tmp_path / "cache")
    online = train(recipe, tmp_path / "online", "train.batch_size=1")
    read, filled = StoredTarget.read, []

    def read_and_fill(*arguments: Any) -> Any:
        found = read(*arguments)
        for name, value in (("features", 1e3), ("last_hidden", float("nan"))):
            is_zero = (found[name] == 0).all(-1)
            filled.append(int(is_zero.sum()))
            found[name][is_zero] = value
        return found

    cached = train(recipe, tmp_path / "cached", f"target.cache={folder}", "train.batch_size=1")
    monkeypatch.setattr(StoredTarget, "read", read_and_fill)
    other_values = train(recipe, tmp_path / "filled", f"target.cache={folder}", "train.batch_size=1")
    assert min(filled) > 0 and online.keys() == cached.keys()
    assert all(torch.equal(online[name], t) and torch.equal(other_values[name], t) for name, t in cached.items())


def test_only_positions_that_the_drafters_layers_can_reach_are_stored(tmp_path: Path, target: Path) -> None:
    g = torch.Generator().manual_seed(0)
    row = {"input_ids": torch.randint(60, (400,), generator=g).tolist(), "loss_mask": [0] * 396 + [1, 0, 1, 0]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    settings = {"data": {"max_length": 401, "eval_fraction": 0.0}, "draft": {"window": 9, "num_layers": 3}}
    recipe = recipe_in(tmp_path, target, tmp_path / "rows.jsonl", **settings)
    found = load_file(cache(recipe, tmp_path / "cache") / "features-00000.safetensors")
    # Tokens 396 and 398 are read by rows 395 and 397, the first of which reaches back by 3 * 8.
    assert found["features"].shape == (397 - 371 + 1, 48) and found["last_hidden"].shape == (2, 16)
    train(recipe, tmp_path / "run", f"target.cache={tmp_path / 'cache'}", "train.max_steps=1", "draft.window=7")


@pytest.mark.parametrize("change", ["draft.window=6", "draft.window=null", "draft.num_layers=3", "mask"])
def test_a_recipe_that_reads_more_than_the_cache_holds_is_refused_in_one_line(
    change: str, tmp_path: Path, target: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, target, rows, draft={"window": 5}, data={"eval_fraction": 0.3})
    sparse = write_rows(tmp_path / "sparse.jsonl", LENGTHS, prompt=0.8)
    folder = cache(recipe, tmp_path / "cache", f"data.sources=[{sparse}]")
    more = f"data.sources=[{rows}]" if change == "mask" else change
    arguments = [str(recipe), f"target.cache={folder}", f"data.sources=[{sparse}]", "train.max_steps=1", more]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error.startswith("peagle-train train: error")
        and "or positions of them" in error
        and "peagle-train cache" in error
    )
    assert not (tmp_path / "run").exists()


def test_features_in_fp8_are_the_targets_to_a_sixteenth_and_last_hidden_states_are_as_before(
    tmp_path: Path, target: Path, rows: Path, made: Path
) -> None:
    recipe = recipe_in(tmp_path, target, rows, train={"max_steps": 2})
    folder = cache(recipe, tmp_path / "cache", "target.cache_dtype=float8_e4m3fn", shard_tokens=10_000)
    stored = load_file(folder / "features-00000.safetensors")
    full = [load_file(path) for path in sorted(made.glob("features-*"))]
    features, last_hidden = (torch.cat([file[name] for file in full]) for name in ("features", "last_hidden"))
    assert stored["features"].dtype == torch.float8_e4m3fn and torch.equal(stored["last_hidden"], last_hidden)
    error = stored["features"].double() * stored["scales"][:, None] - features
    least = features.abs().amax(1, keepdim=True) / 448 / 2**6  # of FP8's normal numbers, scaled
    assert bool((error.abs() <= torch.maximum(features.abs(), least) / 16 * (1 + 1e-6)).all())
    ids = torch.tensor([json.loads(rows.read_text().splitlines()[1])["input_ids"]])
    batch, read = {"input_ids": ids, "document_ids": torch.zeros_like(ids)}, []
    for where in (folder, made):
        one = StoredTarget(load_recipe(recipe, [f"target.cache={where}"]).target, torch.device("cpu"))
        read.append(one.outputs(batch, one.head_weight()).features.double())
    bound = torch.maximum(read[1].abs(), read[1].abs().amax(-1, keepdim=True) / 448 / 2**6) / 16 * (1 + 1e-6)
    assert read[1].any() and bool(((read[0] - read[1]).abs() <= bound).all())
    train(recipe, tmp_path / "run", f"target.cache={folder}")


def test_damage_that_a_start_does_not_see_is_found_by_verify_which_names_the_file(
    tmp_path: Path, target: Path, rows: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    data = bytearray((folder / SHARD).read_bytes())
    data[-100] ^= 1
    (folder / SHARD).write_bytes(data)
    train(recipe_in(tmp_path, target, rows), tmp_path / "run", f"target.cache={folder}", "train.max_steps=1")
    assert command("cache", "--verify", made) == 0 and command("cache", "--verify", folder) == 2
    assert f"{SHARD} is damaged" in capsys.readouterr().err
    assert command("cache", "--verify", tmp_path) == 2


def test_other_rows_or_another_target_never_mix_in_one_folder(
    tmp_path: Path, target: Path, rows: Path, made: Path
) -> None:
    before = contents(made)
    recipe = recipe_in(tmp_path, target, rows)
    for differ, override in (
        ("max_length, .*plan", "data.max_length=16"),
        ("layer_ids", "target.layer_ids=[0, 1, 2]"),
        ("dtype, shards, plan", "target.cache_dtype=float32"),
        ("chunk_tokens", "target.chunk_tokens=8"),  # these two round in another way
        ("attn_implementation", "target.attn_implementation=eager"),
    ):
        with pytest.raises(ValueError, match=rf"holds the cache of another target, .*\({differ} differ\)"):
            cache(recipe, made, override)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        cache(recipe, tmp_path / "mine")
    assert contents(made) == before


def test_what_does_not_fit_the_disk_is_refused_and_the_rest_may_be_there(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    recipe = recipe_in(tmp_path, target, rows)
    usage = shutil.disk_usage(tmp_path)._replace(free=9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"has too little room: 282 tokens of \d+ pieces"):
        cache(recipe, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    cache(recipe, Path(shutil.copytree(made, tmp_path / "cache")))


def test_features_that_are_not_finite_in_the_caches_dtype_are_refused(tmp_path: Path, rows: Path) -> None:
    huge = make_target(tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    save_file(
        {n: t * 1e6 if "embed" in n else t for n, t in weights.items()}, huge / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"not all finite in float16: give another target\.cache_dtype"):
        cache(recipe_in(tmp_path, huge, rows), tmp_path / "cache", "target.cache_dtype=float16")


def test_a_second_writer_of_one_folder_is_told_so_and_touches_nothing(
    tmp_path: Path, target: Path, rows: Path, made: Path
) -> None:
    recipe, folder = recipe_in(tmp_path, target, rows), tmp_path / "cache"
    shutil.copytree(made, folder)
    (folder / SHARD).unlink()
    before = contents(folder)
    with alone_in(folder, "writing features"):
        with pytest.raises(ValueError, match="another process is writing features there"):
            cache(recipe, folder)
        assert contents(folder) == before


def test_the_next_command_can_be_pasted_and_a_home_folder_is_meant(
    tmp_path: Path, target: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    recipe = recipe_in(tmp_path, target, rows)
    line = write_cache(load_recipe(recipe), "~/c 1")
    assert (tmp_path / "a home" / "c 1" / "cache.json").exists()
    pasted = shlex.split(line.partition("RECIPE ")[2])
    assert load_recipe(recipe, pasted).target.cache == str(tmp_path / "a home" / "c 1")
