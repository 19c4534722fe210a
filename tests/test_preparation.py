"""Preparation: the same rows as on the fly, the same bytes after any kill, and refused where it does not fit."""

import fcntl
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peagle_train.data.preparation import prepare_recipe
from peagle_train.data.training_data import TrainingData, load_training_data
from peagle_train.recipe import Recipe, load_recipe
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_tokenizer
from tests.test_checkpoint_files import in_child
from tests.tiny import make_target, write_recipe

MASK = 299
SHARD_TOKENS = 300
BATCH_CHARACTERS = 400


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Shards end where batches do, so that a little data makes several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peagle_train.data.readers._BATCH_CHARACTERS", BATCH_CHARACTERS)
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"), vocab_size=BYTES_VOCAB)
    make_byte_tokenizer(folder)
    return folder


def write_sources(folder: Path) -> list[Any]:
    """Text files, chats and ids, some of them twice, some of them longer than a row."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(12):
        (texts / f"{i:02}.txt").write_text(f"text {i % 10} " * (3 * i + 1))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"answer {i} " * (i % 7 + 1)},
            ]
        }
        for i in range(40)
    ]
    with (folder / "chats.jsonl").open("w") as file:
        file.writelines(
            json.dumps(row) + "\n" for row in [*chats, chats[3], {"text": "text 1 " * 4}, {"question": "?"}]
        )
    with (folder / "ids.jsonl").open("w") as file:
        file.writelines(json.dumps({"input_ids": list(range(i, i + 9))}) + "\n" for i in range(30))
    return [str(texts), {"path": str(folder / "chats.jsonl"), "weight": 1.5}, str(folder / "ids.jsonl")]


def recipe_of(folder: Path, target: Path, **data: Any) -> Recipe:
    folder.mkdir(exist_ok=True, parents=True)
    given = {"max_length": 64, "eval_fraction": 0.2, "max_bad_rows": 1, "max_eval_rows": 4, **data}
    path = write_recipe(folder, target, folder, folder / "run", draft={"mask_token_id": MASK}, data=given)
    return load_recipe(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, target: Path) -> tuple[Recipe, Path]:
    """A recipe, and what was prepared for it."""
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_of(folder, target, sources=write_sources(folder))
    prepare_recipe(recipe, folder / "prepared", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    return recipe, folder / "prepared"


def read(recipe: Recipe, prepared: Path | None = None, lines: list[str] | None = None) -> TrainingData:
    recipe.data.prepared = None if prepared is None else str(prepared)
    tokenizer = make_byte_tokenizer()
    say = (lambda _: None) if lines is None else lines.append
    try:
        return load_training_data(recipe, tokenizer, BYTES_VOCAB, MASK, say)
    finally:
        recipe.data.prepared = None


def assert_same(first: TrainingData, second: TrainingData) -> None:
    for one, other in ((first.train_rows, second.train_rows), (first.eval_rows, second.eval_rows)):
        assert len(one) == len(other)
        for i in range(len(one)):
            assert one[3, i].keys() == other[3, i].keys()
            for name, value in one[3, i].items():
                assert (
                    torch.equal(value, other[3, i][name])
                    if isinstance(value, torch.Tensor)
                    else value == other[3, i][name]
                )
    assert torch.equal(first.counts_V, second.counts_V)
    assert (first.report, first.eval_report, first.in_both) == (second.report, second.eval_report, second.in_both)
    assert first.source_reports == second.source_reports


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_rows_are_those_made_on_the_fly_bit_by_bit(made: tuple[Recipe, Path]) -> None:
    recipe, folder = made
    assert len(list(folder.glob("sources-*.safetensors"))) > 3, "several shards, or this shows little"
    said_now: list[str] = []
    said_then: list[str] = []
    now, then = read(recipe, lines=said_now), read(recipe, folder, said_then)
    assert_same(now, then)
    assert said_then[1:] == said_now and "checksums verified" in said_then[0]
    report = now.source_reports["sources"]
    assert report.bad_rows == {"no known form": 1} and report.duplicates == 2 and len(now.eval_rows) == 4
    assert now.report.repeats > 0 and now.report.split_documents > 0
    assert_same(now, pickle.loads(pickle.dumps(then)))


@pytest.mark.parametrize(
    "data",
    [
        {"max_documents": 17},
        {"pack": False},
        {"eval_fraction": 0.0},
        {"eval": "chats.jsonl"},
        {"eval": "chats.jsonl", "max_documents": 9},
    ],
)
def test_every_setting_means_the_same_in_both_ways(data: dict[str, Any], tmp_path: Path, target: Path) -> None:
    sources = write_sources(tmp_path)
    if "eval" in data:
        data = {**data, "eval_sources": [str(tmp_path / data["eval"])]}
        del data["eval"]
    recipe = recipe_of(tmp_path, target, sources=sources, **data)
    prepare_recipe(recipe, tmp_path / "prepared", shard_tokens=100, say=lambda _: None)
    now = read(recipe)
    assert_same(now, read(recipe, tmp_path / "prepared"))
    if "eval_sources" in data:
        assert (now.in_both > 0) == ("max_documents" not in data) and "eval_sources" in now.source_reports
    if "max_documents" in data:
        assert now.source_reports["sources"].stopped


def test_others_may_read_the_files_as_the_umask_says(made: tuple[Recipe, Path]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in made[1].iterdir()} == {0o666 & ~umask}


def test_an_epoch_holds_each_document_as_often_as_its_source_weighs(tmp_path: Path, target: Path) -> None:
    sources = write_sources(tmp_path)
    weighed = [{"path": sources[0], "weight": 3}, sources[1]["path"], {"path": sources[2], "weight": 0.5}]
    data = read(recipe_of(tmp_path, target, sources=weighed, eval_fraction=0.0, max_length=2048))
    times: dict[tuple[int, ...], int] = {}
    for i in range(len(data.train_rows)):
        row = data.train_rows[i]
        for document in row["document_ids"].unique().tolist():
            ids = tuple(row["input_ids"][row["document_ids"] == document].tolist())
            times[ids] = times.get(ids, 0) + 1
    decode = make_byte_tokenizer().decode
    texts = {ids: count for ids, count in times.items() if decode(list(ids)).startswith("text")}
    chats = {ids: count for ids, count in times.items() if decode(list(ids)).startswith("<|im_start|>")}
    assert set(texts.values()) == {3} and len(texts) == 12
    assert set(chats.values()) == {1} and len(chats) == 40
    others = len(times) - len(texts) - len(chats)
    assert 5 < others < 25 and data.report.left_out_by_weight == 30 - others
    assert data.report.documents == sum(times.values()) and data.report.repeats == 24
    counted = torch.zeros(BYTES_VOCAB, dtype=torch.int64)
    for i in range(len(data.train_rows)):
        row = data.train_rows[i]
        counted += torch.bincount(row["input_ids"][row["loss_mask"] == 1], minlength=BYTES_VOCAB)
    assert torch.equal(counted, data.counts_V)


def test_rows_do_not_depend_on_the_size_of_the_shards_or_of_the_batches(
    made: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = made
    monkeypatch.setattr("peagle_train.data.readers._BATCH_CHARACTERS", 97)
    prepare_recipe(recipe, tmp_path / "other", shard_tokens=10**9, say=lambda _: None)
    assert len(list((tmp_path / "other").glob("sources-*.safetensors"))) == 1
    assert_same(read(recipe, folder), read(recipe, tmp_path / "other"))


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_bytes(
    made: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = made
    prepare_recipe(recipe, tmp_path / "two", num_workers=2, shard_tokens=SHARD_TOKENS, say=lambda _: None)
    assert files_in(tmp_path / "two") == files_in(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from peagle_train.data import preparation
from peagle_train.data import readers
from peagle_train.data import shard_writer
from peagle_train.training.build import load_tokenizer
from peagle_train.recipe import load_recipe

recipe, folder, shard_tokens = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokenizer = load_tokenizer(recipe)
readers._BATCH_CHARACTERS = int(sys.argv[4])
replace, save_file = os.replace, shard_writer.save_file

def prepare(out, kill_at):
    calls = 0
    def dying_replace(source, to):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, to)
        if -calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def dying_save(tensors, path):
        save_file(tensors, path)
        if kill_at == "half" and "00001" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace, shard_writer.save_file = dying_replace, dying_save
    preparation.prepare(recipe, out, tokenizer, 300, 299, shard_tokens=shard_tokens, say=lambda _: None)

for kill_at in ["half", *range(-int(sys.argv[5]), 0), *range(1, int(sys.argv[5]) + 1)]:
    out = folder / f"killed{kill_at}"
    for attempt, at in enumerate((kill_at, kill_at, None) if kill_at == "half" else (kill_at, None)):
        child = os.fork()
        if child == 0:
            prepare(out, at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert attempt or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill_at, status)
    assert status == 0, (kill_at, status)
"""


def test_a_kill_at_any_moment_and_a_restart_leave_the_same_bytes(tmp_path: Path, target: Path) -> None:
    recipe = recipe_of(tmp_path, target, sources=write_sources(tmp_path))
    prepare_recipe(recipe, tmp_path / "whole", shard_tokens=1500, say=lambda _: None)
    whole = files_in(tmp_path / "whole")
    num_files = len(whole)
    assert num_files > 9
    arguments = [str(tmp_path / "recipe.yaml"), str(tmp_path), "1500", str(BATCH_CHARACTERS), str(num_files)]
    result = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    folders = list(tmp_path.glob("killed*"))
    assert len(folders) == 2 * num_files + 1
    for folder in folders:
        assert files_in(folder) == whole, folder


def test_finished_shards_are_kept_and_edited_ones_are_made_again(
    made: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = made
    shutil.copytree(folder, tmp_path / "begun")
    for name in ("index.json", "train.safetensors"):
        (tmp_path / "begun" / name).unlink()
    shard = tmp_path / "begun" / "sources-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x02")
    encoded: list[int] = []
    from peagle_train.data.row_encoder import RowEncoder

    encode = RowEncoder.__call__
    monkeypatch.setattr(RowEncoder, "__call__", lambda self, raws: (encoded.append(len(raws)), encode(self, raws))[1])
    said: list[str] = []
    prepare_recipe(recipe, tmp_path / "begun", shard_tokens=SHARD_TOKENS, say=said.append)
    assert files_in(tmp_path / "begun") == files_in(folder)
    assert any("sources-00002.safetensors is not as it was written: it is made again" in line for line in said)
    assert any("2 finished shards" in line for line in said)
    (tmp_path / "begun" / "index.json").unlink()
    encoded.clear()
    prepare_recipe(recipe, tmp_path / "begun", shard_tokens=SHARD_TOKENS, say=said.append)
    assert encoded == [] and files_in(tmp_path / "begun") == files_in(folder)


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", "{}", '{"file": 1}', "", "x", pytest.param("[" * 100_000, id="deep")]
)
def test_a_record_of_anything_else_is_said_and_its_shard_is_made_again(
    content: str, made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = made
    shutil.copytree(folder, tmp_path / "begun")
    (tmp_path / "begun" / "index.json").unlink()
    (tmp_path / "begun" / "sources-00000.json").write_text(content)
    said: list[str] = []
    prepare_recipe(recipe, tmp_path / "begun", shard_tokens=SHARD_TOKENS, say=said.append)
    assert any("sources-00000.safetensors is not as it was written: it is made again" in line for line in said)
    assert files_in(tmp_path / "begun") == files_in(folder)


def test_a_record_without_what_reading_needs_is_none(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = made
    shutil.copytree(folder, tmp_path / "begun")
    (tmp_path / "begun" / "index.json").unlink()
    path = tmp_path / "begun" / "sources-00000.json"
    record = json.loads(path.read_text())
    for broken in ({"file": record["file"]}, {**record, "report": [1]}, {**record, "report": {"x": 1}}):
        path.write_text(json.dumps(broken))
        prepare_recipe(recipe, tmp_path / "begun", shard_tokens=SHARD_TOKENS, say=lambda _: None)
        assert files_in(tmp_path / "begun") == files_in(folder)
        (tmp_path / "begun" / "index.json").unlink()


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", "", "x", '{"settings": []}', pytest.param("[" * 100_000, id="deep")]
)
def test_a_begun_folder_that_does_not_say_with_what_is_refused_with_the_files_name(
    content: str, made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, _ = made
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "begun.json").write_text(content)
    with pytest.raises(ValueError, match=r"begun\.json is not as it was written: give another folder") as caught:
        prepare_recipe(recipe, tmp_path / "begun", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_same_call_finishes_the_folder(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = made
    sizes = sorted({len(content) for content in files_in(folder).values()})
    for number, limit in enumerate([300, *(size - 1 for size in sizes)]):  # begun.json, then each file in turn
        out = tmp_path / str(number)

        def prepare_without_room(out: Path = out, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(ValueError, match=r"cannot be written: .*make room.*run the same line again") as caught:
                prepare_recipe(recipe, out, shard_tokens=SHARD_TOKENS, say=lambda _: None)
            assert "\n" not in str(caught.value)

        assert in_child(prepare_without_room) == 0, limit
        assert not list(out.glob(".*.partial"))
    prepare_recipe(recipe, out, shard_tokens=SHARD_TOKENS, say=lambda _: None)
    assert files_in(out) == files_in(folder)


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("sources-00001.safetensors", edit, "sources-00001.safetensors is not as it was written"),
        ("train.safetensors", edit, "train.safetensors is not as it was written"),
        ("held_out.safetensors", lambda p: p.unlink(), "held_out.safetensors is missing"),
        ("sources-00000.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-5]), "but was written with"),
        ("index.json", lambda p: p.write_text(p.read_text()[:-40]), "index.json cannot be read"),
        (
            "index.json",
            lambda p: p.write_text(p.read_text().replace('"in_both": 0', '"in_both": 1')),
            "index.json is not as",
        ),
        ("index.json", lambda p: p.unlink(), "is not finished: run tools/prepare_data.py again, it goes on"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused_in_one_line(
    name: str, change: Any, expected: str, made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = made
    shutil.copytree(folder, tmp_path / "copy")
    change(tmp_path / "copy" / name)
    with pytest.raises(ValueError) as caught:
        read(recipe, tmp_path / "copy")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    for other, message in ((tmp_path / "none", "is no folder"), (tmp_path, "holds no prepared data")):
        with pytest.raises(ValueError, match=message):
            read(recipe, other)


@pytest.mark.parametrize(
    "key, value",
    [
        ("max_length", 65),
        ("eval_fraction", 0.25),
        ("sources", ["elsewhere"]),
        ("pack", False),
        ("max_documents", 5),
        ("on_rewrite", "refuse"),
        ("max_characters", None),
    ],
)
def test_prepared_data_of_other_settings_is_refused_with_the_key_and_both_values(
    key: str, value: Any, made: tuple[Recipe, Path]
) -> None:
    _, folder = made
    changed = load_recipe(folder.parent / "recipe.yaml")
    setattr(changed.data, key, value)
    with pytest.raises(ValueError) as caught:
        read(changed, folder)
    text = str(caught.value)
    assert f"was made with data.{key} " in text and "while it is" in text and "\n" not in text


def test_another_tokenizer_template_vocabulary_or_mask_token_is_refused(made: tuple[Recipe, Path]) -> None:
    recipe, folder = made
    recipe = load_recipe(folder.parent / "recipe.yaml", [f"data.prepared={folder}"])
    other_template, other_tokens = make_byte_tokenizer(), make_byte_tokenizer()
    other_template.chat_template = other_template.chat_template.replace("assistant", "assistant ")
    other_tokens.add_tokens(["abc"])
    for arguments, expected in (
        ((other_template, BYTES_VOCAB, MASK), "the chat template"),
        ((other_tokens, BYTES_VOCAB, MASK), "the target's tokenizer"),
        ((make_byte_tokenizer(), 301, MASK), "the target's vocabulary 300, while it is 301 now"),
        ((make_byte_tokenizer(), BYTES_VOCAB, 298), "draft.mask_token_id 299, while it is 298 now"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_training_data(recipe, *arguments, say=lambda _: None)
    used = make_byte_tokenizer()
    used(
        ["a", "bb"], padding=True, truncation=True, max_length=1
    ) if used.pad_token else used.backend_tokenizer.enable_padding()
    load_training_data(recipe, used, BYTES_VOCAB, MASK, say=lambda _: None)  # how it was called last does not matter


def test_a_template_does_not_matter_where_there_is_no_chat(tmp_path: Path, target: Path) -> None:
    sources = write_sources(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=[sources[0], sources[2]])
    prepare_recipe(recipe, tmp_path / "prepared", say=lambda _: None)
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = None
    recipe.data.prepared = str(tmp_path / "prepared")
    assert load_training_data(recipe, tokenizer, BYTES_VOCAB, MASK, say=lambda _: None).report.rows > 0


def test_bad_rows_that_are_no_longer_allowed_are_refused_and_more_of_them_need_no_new_preparation(
    made: tuple[Recipe, Path],
) -> None:
    recipe, folder = made
    stricter = load_recipe(folder.parent / "recipe.yaml", ["data.max_bad_rows=0"])
    with pytest.raises(ValueError, match=r"left out 1 bad rows: 1 no known form .*data.max_bad_rows allows 0"):
        read(stricter, folder)
    assert_same(read(recipe, folder), read(load_recipe(folder.parent / "recipe.yaml", ["data.max_bad_rows=9"]), folder))


def test_a_preparation_goes_on_only_with_the_sources_that_it_was_begun_with(tmp_path: Path, target: Path) -> None:
    recipe = recipe_of(tmp_path, target, sources=write_sources(tmp_path))
    prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    for name in ("index.json", "train.safetensors", "sources-00003.safetensors", "sources-00003.json"):
        (tmp_path / "p" / name).unlink()
    first = tmp_path / "texts" / "00.txt"
    first.write_text(first.read_text().upper())
    with pytest.raises(ValueError, match=r"the sources are not what .* was begun with"):
        prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    first.write_text("more than there was")
    with pytest.raises(ValueError, match="was made with files of the sources"):
        prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    recipe.data.max_length = 32
    with pytest.raises(ValueError, match=r"was made with data.max_length 64, while it is 32 now"):
        prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    with pytest.raises(ValueError, match="is not empty and holds no preparation"):
        prepare_recipe(recipe, tmp_path / "texts", say=lambda _: None)


def test_a_finished_folder_is_refused_when_its_sources_have_changed(tmp_path: Path, target: Path) -> None:
    write_sources(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=[str(tmp_path / "ids.jsonl")])
    said: list[str] = []

    def prepare(shard_tokens: int = 100) -> TrainingData:
        return prepare_recipe(recipe, tmp_path / "p", shard_tokens=shard_tokens, say=said.append)

    first, before = prepare(), files_in(tmp_path / "p")
    assert_same(first, prepare())
    assert "is finished, and the sources have the names and sizes that it was made of: checking it" in said[-1]
    with pytest.raises(ValueError, match="was made with --shard-tokens 100, while it is 200 now"):
        prepare(200)
    with (tmp_path / "ids.jsonl").open("a") as file:
        file.write('{"input_ids": [1, 2]}\n')
    with pytest.raises(
        ValueError, match=r"was made with files of the sources .*give another folder, or remove this one"
    ):
        prepare()
    (tmp_path / "ids.jsonl").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        prepare()
    assert files_in(tmp_path / "p") == before
    (tmp_path / "p" / "begun.json").write_text("[")
    write_sources(tmp_path / "again")
    (tmp_path / "again" / "ids.jsonl").rename(tmp_path / "ids.jsonl")
    with pytest.raises(ValueError, match=r"begun\.json is not as it was written"):
        prepare()


def test_what_cannot_be_compared_with_its_source_is_said(tmp_path: Path, target: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}).save_to_disk(tmp_path / "saved")
    recipe = recipe_of(tmp_path, target, sources=[str(tmp_path / "saved")], eval_fraction=0.0)
    said: list[str] = []
    for _ in range(2):
        prepare_recipe(recipe, tmp_path / "p", say=said.append)
    assert "but that of saved was not looked at: checking it" in said[-1]


def test_a_key_that_no_stream_can_show_does_not_end_a_preparation_nor_a_run(tmp_path: Path, target: Path) -> None:
    rows = [{"text": "abc def", "\ud800": 1}, {"text": "ghi"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(tmp_path, target, sources=[str(tmp_path / "r.jsonl")], eval_fraction=0.0)
    prepare_recipe(recipe, tmp_path / "p", say=lambda line: line.encode())
    lines: list[str] = []
    read(recipe, tmp_path / "p", lines)
    assert r"keys ignored: \ud800" in "\n".join(lines) and "\n".join(lines).isascii()


def test_two_processes_do_not_prepare_in_one_folder(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = made
    (tmp_path / "p").mkdir()
    handle = os.open(tmp_path / "p", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is preparing there"):
        prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    assert not any((tmp_path / "p").iterdir())
    os.close(handle)
    prepare_recipe(recipe, tmp_path / "p", shard_tokens=SHARD_TOKENS, say=lambda _: None)
    assert files_in(tmp_path / "p") == files_in(folder)


def test_streamed_sources_are_refused_until_they_are_prepared(tmp_path: Path, target: Path) -> None:
    import datasets

    write_sources(tmp_path)
    (tmp_path / "named").mkdir()
    rows = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "named" / "train.parquet")
    streamed = {"datasets": str(tmp_path / "named"), "streaming": True}
    recipe = recipe_of(tmp_path, target, sources=[streamed])
    with pytest.raises(ValueError, match=r"is streamed, .*run tools/prepare_data.py"):
        read(recipe)
    prepare_recipe(recipe, tmp_path / "prepared", shard_tokens=50, say=lambda _: None)
    prepared = read(recipe, tmp_path / "prepared")
    expected = read(recipe_of(tmp_path / "plain", target, sources=[str(tmp_path / "ids.jsonl")]))
    for i in range(len(expected.train_rows)):
        assert torch.equal(prepared.train_rows[i]["input_ids"], expected.train_rows[i]["input_ids"])
    assert len(prepared.train_rows) == len(expected.train_rows)


def test_a_prepared_run_gives_the_drafter_of_an_unprepared_one_and_an_edited_one_exits_with_2(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file

    from peagle_train.__main__ import main

    recipe_of(tmp_path, target, sources=write_sources(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    tool = Path(__file__).parent.parent / "tools" / "prepare_data.py"
    monkeypatch.setattr(sys, "argv", [str(tool), str(recipe), "--out", str(tmp_path / "p"), "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code == 0 and f"give data.prepared={tmp_path / 'p'}" in capsys.readouterr().out
    options = ["train.max_steps=2"]
    weights = []
    for name, more in (("now", []), ("then", [f"data.prepared={tmp_path / 'p'}"])):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main([str(recipe), *options, *more, f"output.dir={tmp_path / name}"]) == 0
        weights.append(load_file(tmp_path / name / "final" / "model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    edit(tmp_path / "p" / "train.safetensors")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), *more, f"output.dir={tmp_path / 'edited'}"]) == 2
    assert "train.safetensors is not as it was written" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "edited").exists()


def test_the_tool_answers_help_without_torch_and_tells_mistakes_in_one_line(tmp_path: Path) -> None:
    tool = Path(__file__).parent.parent / "tools" / "prepare_data.py"
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(tool)!r}, run_name='__main__')\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--out" in result.stdout
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"target": {"path": "x"}, "data": {"sources": []}}))
    result = subprocess.run([sys.executable, str(tool), str(tmp_path / "r.yaml")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("prepare_data: error: data.sources: got []")


@pytest.mark.parametrize("make", [load_training_data, prepare_recipe])
def test_a_chat_template_that_is_not_there_is_refused_though_no_row_is_a_chat(
    tmp_path: Path, target: Path, make: Any
) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 2)
    recipe = recipe_of(
        tmp_path, target, sources=[str(tmp_path / "ids.jsonl")], eval_fraction=0, chat_template="/nowhere.jinja"
    )
    with pytest.raises(ValueError, match=r"data\.chat_template: cannot read /nowhere\.jinja"):
        if make is prepare_recipe:
            prepare_recipe(recipe, tmp_path / "prepared", say=lambda _: None)
        else:
            load_training_data(recipe, None, BYTES_VOCAB, MASK, lambda _: None)
    assert not (tmp_path / "prepared").exists()
