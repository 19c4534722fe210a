"""Preparation: the same sequences as on the fly, in a folder that is whole or not there, refused where it does not fit."""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peagle_train.config import Recipe, load_recipe
from peagle_train.data.packing import TrainingData
from peagle_train.data.training_data import load_training_data, prepare_recipe
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_tokenizer
from tests.chats import chat
from tests.documents import write_lines
from tests.tiny import make_target, write_recipe

MASK = 299


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"), vocab_size=BYTES_VOCAB)
    make_byte_tokenizer(folder)
    return folder


def write_sources(folder: Path) -> list[Any]:
    """Text files, chats and ids, some twice, some longer than a sequence; the ids are several batches."""
    for i in range(12):
        write_lines(folder / "texts" / f"{i:02}.txt", b"text %d " % (i % 10) * (3 * i + 1))
    answers = [f"answer {i} " * (i % 7 + 1) for i in range(40)]
    chats = [chat(f"user: q{i}", f"assistant: {answer}") for i, answer in enumerate(answers)]
    write_lines(folder / "chats.jsonl", *chats, chats[3], {"text": "text 1 " * 4 + "\n"}, {"question": "?"})
    (folder / "ids.json").write_text(json.dumps([{"input_ids": [i // 250, i % 250, 7, 8, 9]} for i in range(600)]))
    return [str(folder / "texts"), {"path": str(folder / "chats.jsonl"), "weight": 1.5}, str(folder / "ids.json")]


def recipe_of(folder: Path, target: Path, **data: Any) -> Recipe:
    folder.mkdir(exist_ok=True, parents=True)
    given = {"max_length": 64, "eval_fraction": 0.2, "max_bad_rows": 1, "max_eval_rows": 4, **data}
    path = write_recipe(folder, target, folder, folder / "run", draft={"mask_token_id": MASK}, data=given)
    return load_recipe(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, target: Path) -> tuple[Recipe, Path]:
    """A recipe, and what two workers prepared for it."""
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_of(folder, target, sources=write_sources(folder))
    prepare_recipe(recipe, folder / "prepared", num_workers=2, say=lambda _: None)
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
        for i in range(max(len(one), len(other))):
            assert repr(one[3, i]) == repr(other[3, i])
    assert torch.equal(first.counts_V, second.counts_V)
    assert (first.report, first.eval_report, first.in_both) == (second.report, second.eval_report, second.in_both)
    assert first.source_reports == second.source_reports


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_sequences_are_those_made_on_the_fly_bit_by_bit(made: tuple[Recipe, Path]) -> None:
    recipe, folder = made
    said_now: list[str] = []
    said_then: list[str] = []
    now, then = read(recipe, lines=said_now), read(recipe, folder, said_then)
    assert_same(now, then)
    assert said_then[1:] == said_now and "checksums verified" in said_then[0]
    report = now.source_reports["sources"]
    assert report.bad_rows == {"wrong format": 1} and report.left_out["duplicate documents"] == 2
    assert len(now.eval_rows) == 4 and now.report.split_documents > 0
    sent = pickle.dumps(then)
    assert (folder / "sources-ids.bin").read_bytes()[:400] not in sent, "files are mapped again, not copied"
    assert_same(now, pickle.loads(sent))
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}, "others may read them"


@pytest.mark.parametrize(
    "data", [{"max_documents": 17}, {"pack": False}, {"eval_fraction": 0.0}, {"eval_sources": ["chats.jsonl"]}]
)
def test_every_setting_means_the_same_in_both_ways(
    data: dict[str, Any], tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=write_sources(tmp_path), **data)
    prepare_recipe(recipe, tmp_path / "prepared", say=lambda _: None)
    now = read(recipe)
    assert_same(now, read(recipe, tmp_path / "prepared"))
    assert (now.in_both > 0) == ("eval_sources" in data) == ("eval_sources" in now.source_reports)
    assert now.source_reports["sources"].is_cut == ("max_documents" in data)


def test_an_epoch_holds_each_document_as_often_as_its_source_weighs(tmp_path: Path, target: Path) -> None:
    sources = write_sources(tmp_path)
    weighed = [{"path": sources[0], "weight": 3}, sources[1]["path"], {"path": sources[2], "weight": 0.5}]
    data = read(recipe_of(tmp_path, target, sources=weighed, eval_fraction=0.0, max_length=2048))
    times, counted = Counter[tuple[int, ...]](), torch.zeros(BYTES_VOCAB, dtype=torch.int64)
    for i in range(len(data.train_rows)):
        row = data.train_rows[i]
        for ids in row["input_ids"].split(row["document_ids"].bincount().tolist()):
            times[tuple(ids.tolist())] += 1
        counted += torch.bincount(row["input_ids"][row["loss_mask"] == 1], minlength=BYTES_VOCAB)
    decode = make_byte_tokenizer().decode
    texts = [count for ids, count in times.items() if decode(ids).startswith("text")]
    chats = [count for ids, count in times.items() if decode(ids).startswith("<|im_start|>")]
    assert texts == [3] * 12 and chats == [1] * 40
    others = len(times) - 12 - 40
    assert 250 < others < 350 and data.report.left_out_by_weight == 600 - others
    assert data.report.documents == sum(times.values()) and torch.equal(counted, data.counts_V)


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("sources-ids.bin", edit, "sources-ids.bin is missing or was changed"),
        ("held_out.safetensors", lambda p: p.unlink(), "held_out.safetensors is missing or was changed"),
        ("index.json", lambda p: p.write_text(p.read_text()[:-40]), "index.json is not what was written"),
        ("index.json", lambda p: p.write_text("[" * 100_000), "index.json is not what was written"),
        ("index.json", lambda p: p.unlink(), "holds no prepared data"),
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


def test_prepared_data_of_other_settings_is_refused_with_the_key_and_both_values(made: tuple[Recipe, Path]) -> None:
    _, folder = made
    changes = {
        "max_length": 65,
        "sources": ["elsewhere"],
        "pack": False,
        "on_rewrite": "refuse",
        "max_characters": None,
    }
    for key, value in changes.items():
        changed = load_recipe(folder.parent / "recipe.yaml")
        setattr(changed.data, key, value)
        with pytest.raises(ValueError, match=f"was made with data.{key} .*while it is"):
            read(changed, folder)
    recipe = load_recipe(folder.parent / "recipe.yaml", [f"data.prepared={folder}"])
    other_template, other_tokens, other_end = (make_byte_tokenizer() for _ in range(3))
    other_template.chat_template = other_template.chat_template.replace("assistant", "assistant ")
    other_tokens.add_tokens(["abc"])
    other_end.eos_token = "<|end|>"
    for arguments, expected in (
        ((other_template, BYTES_VOCAB, MASK), "the chat template"),
        ((other_tokens, BYTES_VOCAB, MASK), "the target's tokenizer"),
        ((other_end, BYTES_VOCAB, MASK), "the target's tokenizer"),
        ((make_byte_tokenizer(), 301, MASK), "the target's vocabulary 300, while it is 301 now"),
        ((make_byte_tokenizer(), BYTES_VOCAB, 298), "draft.mask_token_id 299, while it is 298 now"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_training_data(recipe, *arguments, say=lambda _: None)
    used = make_byte_tokenizer()
    used.backend_tokenizer.enable_padding()
    used.backend_tokenizer.enable_truncation(3)
    load_training_data(recipe, used, BYTES_VOCAB, MASK, say=lambda _: None)  # how it was called last does not matter


def test_bad_rows_that_are_no_longer_allowed_are_refused_and_more_of_them_need_no_new_preparation(
    made: tuple[Recipe, Path],
) -> None:
    recipe, folder = made
    stricter = load_recipe(folder.parent / "recipe.yaml", ["data.max_bad_rows=0"])
    with pytest.raises(ValueError, match=r"skipped 1 bad rows: 1 wrong format .*data.max_bad_rows is 0"):
        read(stricter, folder)
    assert_same(read(recipe, folder), read(load_recipe(folder.parent / "recipe.yaml", ["data.max_bad_rows=9"]), folder))


def test_a_finished_folder_is_checked_and_refused_when_its_sources_or_its_format_have_changed(
    tmp_path: Path, target: Path
) -> None:
    write_sources(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=[str(tmp_path / "ids.json")])
    said: list[str] = []

    def prepare() -> TrainingData:
        return prepare_recipe(recipe, tmp_path / "p", say=said.append)

    first, before = prepare(), files_in(tmp_path / "p")
    assert_same(first, prepare())
    assert "is finished: checking it" in said[-1]
    (tmp_path / "ids.json").write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(ValueError, match="was made with names and sizes of the sources"):
        prepare()
    assert files_in(tmp_path / "p") == before


def test_a_preparation_that_ends_early_leaves_nothing_and_the_next_one_starts_over(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = made
    stricter = load_recipe(folder.parent / "recipe.yaml", ["data.max_bad_rows=0"])
    with pytest.raises(ValueError, match="max_bad_rows is 0"):
        prepare_recipe(stricter, tmp_path / "p", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".p.partial").mkdir()  # what kill -9 would leave
    (tmp_path / ".p.partial" / "sources-ids.bin").write_bytes(b"half")
    prepare_recipe(recipe, tmp_path / "p", say=lambda _: None)
    assert not (tmp_path / ".p.partial").exists()
    assert files_in(tmp_path / "p") == files_in(folder), "one process makes the files that two workers make"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no prepared data"):
        prepare_recipe(recipe, tmp_path / "other", say=lambda _: None)


def test_two_processes_do_not_prepare_in_one_folder(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    handle = os.open(tmp_path / "p", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is preparing there"):
        prepare_recipe(made[0], tmp_path / "p", say=lambda _: None)
    os.close(handle)


def test_streamed_sources_are_refused_until_they_are_prepared(tmp_path: Path, target: Path) -> None:
    import datasets

    write_sources(tmp_path)
    (tmp_path / "named").mkdir()
    datasets.Dataset.from_list(json.loads((tmp_path / "ids.json").read_text())).to_parquet(
        tmp_path / "named" / "train.parquet"
    )
    streamed = {"datasets": str(tmp_path / "named"), "streaming": True}
    recipe = recipe_of(tmp_path, target, sources=[streamed])
    with pytest.raises(ValueError, match=r"is streamed, which has to be prepared"):
        read(recipe)
    prepare_recipe(recipe, tmp_path / "prepared", say=lambda _: None)
    prepared = read(recipe, tmp_path / "prepared")
    expected = read(recipe_of(tmp_path / "plain", target, sources=[str(tmp_path / "ids.json")]))
    assert prepared.train_rows.fingerprint() == expected.train_rows.fingerprint()


def test_a_mistake_of_the_chat_template_is_one_line_wherever_it_is_found(tmp_path: Path, target: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 2)
    absent = recipe_of(
        tmp_path, target, sources=[str(tmp_path / "ids.jsonl")], eval_fraction=0, chat_template="/nowhere.jinja"
    )
    for make in (lambda: prepare_recipe(absent, tmp_path / "p"), lambda: load_training_data(absent, None, 300, MASK)):
        with pytest.raises(ValueError, match=r"data\.chat_template: cannot read /nowhere\.jinja"):
            make()
    (tmp_path / "odd.jinja").write_text("{{ messages[0].role }}")
    write_sources(tmp_path)
    odd = recipe_of(
        tmp_path, target, sources=[str(tmp_path / "chats.jsonl")], chat_template=str(tmp_path / "odd.jinja")
    )
    with pytest.raises(
        ValueError, match=r"the chat template cannot render the user's message .*set data\.chat_template$"
    ):
        prepare_recipe(odd, tmp_path / "p", num_workers=2, say=lambda _: None)
    assert not (tmp_path / "p").exists()


def test_weights_and_held_out_documents_that_leave_nothing_are_refused(tmp_path: Path, target: Path) -> None:
    write_sources(tmp_path)
    source = str(tmp_path / "ids.json")
    for data in ({"sources": [{"path": source, "weight": 1e-9}]}, {"sources": [source], "eval_sources": [source]}):
        with pytest.raises(ValueError, match="nothing to learn from in the 0 documents to train on"):
            read(recipe_of(tmp_path, target, **data))


def test_the_smallest_data_are_evaluated_unless_the_fraction_is_0(tmp_path: Path, target: Path) -> None:
    """On the document that comes first by its key; a lone one is learned from."""
    for count, fraction, held_out in ((2, 1e-9, 1), (3, 0.02, 1), (7, 1e-9, 1), (7, 0.0, 0), (1, 1e-9, 0)):
        path = tmp_path / f"{count}.jsonl"
        rows = [{"input_ids": [5, 7 * i, 9, 11]} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines: list[str] = []
        data = read(recipe_of(tmp_path, target, sources=[str(path)], eval_fraction=fraction, pack=False), None, lines)
        assert (len(data.train_rows), len(data.eval_rows)) == (count - held_out, held_out)
        assert any("no evaluation" in line for line in lines) == (count == 1)
        if held_out:
            keys = [np.array([5, 7 * i, 9, 11], "<i8").tobytes() + bytes([0, 1, 1, 1]) for i in range(count)]
            first = min(range(count), key=lambda i: hashlib.sha256(keys[i]).digest())
            assert data.eval_rows[0]["input_ids"].tolist() == rows[first]["input_ids"]
