"""Rows and folders of any content: read as they were, or refused in one line."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peagle_train.config import Data, load_recipe
from peagle_train.data.encode import Encoder
from peagle_train.data.training_data import load_training_data, prepare_recipe
from peagle_train.serving.drafter_io import load_drafter
from peagle_train.serving.export import check_folder
from peagle_train.training.checkpoint import verify_checkpoint
from tests.documents import BYTES_MASK, BYTES_VOCAB, TOKENIZER, load
from tests.runs import run
from tests.tiny import MASK, VOCAB, write_recipe, write_rows


def many(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def one_line_at_most() -> Iterator[None]:
    """A ValueError in the block is a refusal: one line of readable text."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        assert text and "\n" not in text and "\r" not in text and len(text) < 1500, repr(text)


# Rows: each line is a document, an empty one, a duplicate, or a bad row with a reason.

WORDS = ["", " ", "user", "assistant", "tool", "human", "x", "\ud800", "\x00", "<|im_end|>", "a" * 500]
KEYS = (
    "input_ids loss_mask messages conversations prompt completion text tools labels"
    " role content from value tool_calls name reasoning_content weight type"
).split()
texts = st.text(max_size=12) | st.sampled_from(WORDS)
odd = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | texts
values = st.recursive(odd, lambda v: st.lists(v) | st.dictionaries(st.sampled_from(KEYS), v), max_leaves=9)
ids = st.lists(st.integers(0, 60) | st.integers(-2, BYTES_VOCAB + 2) | odd, max_size=6)
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts})
rows = st.one_of(
    values,
    st.dictionaries(st.sampled_from(KEYS), values | ids, max_size=3),
    st.fixed_dictionaries({"messages": st.lists(turn | values, max_size=4)}),
    st.fixed_dictionaries({"input_ids": ids, "loss_mask": ids}),
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 60), min_size=2, max_size=6)}),
)
odd_lines = [b"{", b'{"text": "a", "text": "b"}', b"[[[[", b"NaN", b"\xef\xbb\xbf{}", b'{"text": "\\ud800"}', b"1e999"]
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from(odd_lines),
)


@given(st.lists(lines, min_size=1, max_size=6), st.booleans())
@many(60)
def test_every_line_is_a_document_or_counted_with_a_reason_and_without_leave_the_first_stops(
    tmp_path_factory, content, has_leave
):
    source = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    content = [b'{"input_ids": [7, 8, 9, 10]}'] * has_leave + content
    source.write_bytes(b"\n".join(content) + b"\n")
    data = Data([str(source)], eval_fraction=0.0, max_length=32, max_bad_rows=99 if has_leave else 0)
    made, said = None, list[str]()
    with one_line_at_most():
        made = load_training_data(Encoder(data, TOKENIZER, BYTES_VOCAB, BYTES_MASK), said.append)
    if made is None:
        assert not has_leave
        return
    report = load(source, mask_token_id=BYTES_MASK, max_bad_rows=99)[1]
    left_out, bad = sum(n for what, n in report.notes.items() if "documents" in what), sum(report.bad_rows.values())
    assert sum(bool(line.strip()) for line in content) == report.documents + left_out + bad, (content, report)
    assert all(f"{source}, line " in report.first_bad[reason] for reason in report.bad_rows)
    for i in range(len(made.train_rows)):
        row = made.train_rows[i]
        assert 0 <= int(row["input_ids"].min()) and int(row["input_ids"].max()) < BYTES_VOCAB
        assert BYTES_MASK not in row["input_ids"] and set(np.unique(row["loss_mask"])) <= {0, 1}
    assert all("\n" not in line for line in said)


# Folders that a run reads


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_target):
    """A recipe, and folders that it made by name."""
    folder = tmp_path_factory.mktemp("world")
    source = write_rows(folder / "rows.jsonl", [20, 33, 7, 31, 12, 29])
    recipe = write_recipe(folder, tiny_target, source, folder / "run", train={"max_steps": 2, "save_steps": 1})
    prepare_recipe(load_recipe(recipe), folder / "prepared")
    run(recipe)
    folders = folder / "prepared", folder / "run" / "checkpoint-1", folder / "run" / "final"
    return recipe, {path.name: path for path in folders}


def read_prepared(folder: Path, recipe: Path) -> list[Any]:
    read = load_recipe(recipe, [f"data.prepared={folder}"])
    rows = load_training_data(Encoder(read.data, None, VOCAB, MASK), lambda _: None).train_rows
    return [repr([(name, rows[i][name]) for name in sorted(rows[i])]) for i in range(len(rows))]


def read_checkpoint(folder: Path, _: Path) -> list[Any]:
    verify_checkpoint(folder)
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"]


def read_drafter(folder: Path, _: Path) -> list[Any]:
    assert all("\n" not in finding.detail for finding in check_folder(folder))
    # Whoever edits a weight gets that weight: a drafter's folder has no checksums. What it is of must stay.
    return sorted((name, tuple(tensor.shape)) for name, tensor in load_drafter(folder).state_dict().items())


READERS = {"prepared": read_prepared, "checkpoint-1": read_checkpoint, "final": read_drafter}


def damage(path: Path, data: st.DataObject) -> None:
    whole = path.read_bytes()
    at, bit = data.draw(st.integers(0, max(0, len(whole) - 1)), label="at"), data.draw(st.integers(0, 7), label="bit")
    odd = data.draw(st.sampled_from([b"{}", b"[]", b"null", b"3", b'"x"', b"\xff", b"[" * 9999]), label="odd")
    flipped = bytes(byte ^ 1 << bit for byte in whole[at : at + 1])
    made = {"empty": b"", "cut": whole[:at], "bit": whole[:at] + flipped + whole[at + 1 :], "more": whole + b"\n{}"}
    made |= {"other": odd, "zeros": bytes(len(whole))}
    kind = data.draw(st.sampled_from(["gone", "folder", *made]), label="kind")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(made[kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@many(35)
def test_a_damaged_folder_is_refused_in_one_line_or_read_as_it_was(name, tmp_path_factory, world, data):
    recipe, folders = world
    folder = Path(shutil.copytree(folders[name], tmp_path_factory.mktemp("damaged") / name))
    file = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())), label="file")
    damage(folder / file, data)
    with one_line_at_most():
        assert READERS[name](folder, recipe) == READERS[name](folders[name], recipe), file
    shutil.rmtree(folder.parent)
