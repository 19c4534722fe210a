"""Data of any content: each line is a document, an empty one, a duplicate, or a bad row with a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peagle_train.config import load_recipe
from peagle_train.data.training_data import load_training_data
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_tokenizer
from tests.tiny import make_target, write_recipe

QUIET = settings(max_examples=120, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
MASK = BYTES_VOCAB - 1

texts = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "\ud800", "\x00", "<|im_end|>", "a" * 500]))
odd = st.one_of(st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), texts, st.just([]), st.just({}))
ids = st.lists(st.one_of(st.integers(0, 60), st.integers(-2, BYTES_VOCAB + 2), odd), max_size=6)
roles = st.one_of(st.sampled_from(["system", "user", "assistant", "tool", "developer", "human", "gpt", "x"]), odd)
parts = st.one_of(
    texts, odd, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts | odd}), max_size=2)
)
turns = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "reasoning_content", "weight"]),
        roles | parts,
        max_size=4,
    )
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts})
    | odd,
    max_size=4,
)
rows = st.one_of(
    odd,
    st.dictionaries(
        st.sampled_from(
            ["input_ids", "loss_mask", "messages", "conversations", "prompt", "completion", "text", "tools", "labels"]
        ),
        st.one_of(ids, turns, texts, odd),
        max_size=3,
    ),
    st.fixed_dictionaries({"messages": turns}),
    st.fixed_dictionaries({"input_ids": ids, "loss_mask": ids}),
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 60), min_size=2, max_size=6)}),
)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    st.sampled_from(
        [b"{", b'{"text": "a", "text": "b"}', b"[[[[", b"NaN", b"\xef\xbb\xbf{}", b'{"text": "\\ud800"}', b"1e999"]
    ),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    target = make_target(tmp_path_factory.mktemp("target"), vocab_size=BYTES_VOCAB)
    return target, make_byte_tokenizer(target)


@given(st.lists(lines, min_size=1, max_size=6), st.booleans())
@QUIET
def test_every_line_is_a_document_or_counted_with_a_reason_and_without_leave_the_first_stops(
    tmp_path_factory: pytest.TempPathFactory, world: tuple[Path, Any], content: list[bytes], has_leave: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source = folder / "rows.jsonl"
    good = [b'{"input_ids": [7, 8, 9, 10]}'] if has_leave else []
    source.write_bytes(b"\n".join(good + content) + b"\n")
    target, tokenizer = world
    data = {"max_bad_rows": 99 if has_leave else 0}
    recipe = load_recipe(write_recipe(folder, target, source, folder / "out", draft={"mask_token_id": MASK}, data=data))
    said: list[str] = []
    try:
        made = load_training_data(recipe, tokenizer, BYTES_VOCAB, MASK, said.append)
    except ValueError as error:
        text = str(error)
        assert not has_leave and text and "\n" not in text and "\r" not in text and len(text) < 1500, repr(text)
        return
    report = made.source_reports["sources"]
    blank = sum(not line.strip() for line in content)
    left_out, bad = sum(report.left_out.values()), sum(report.bad_rows.values())
    assert len(good + content) - blank == report.documents + left_out + bad, (content, report)
    assert all(f"{source}, line " in report.first_bad[reason] for reason in report.bad_rows)
    for i in range(len(made.train_rows)):
        row = made.train_rows[i]
        assert 0 <= int(row["input_ids"].min()) and int(row["input_ids"].max()) < BYTES_VOCAB
        assert MASK not in row["input_ids"] and set(np.unique(row["loss_mask"])) <= {0, 1}
    assert all("\n" not in line for line in said)
