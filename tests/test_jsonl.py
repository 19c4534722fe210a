"""Rows of token ids in .jsonl files: what is read, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from peagle_train.data.packing import Document, SourceReport, load_documents
from tests.byte_tokenizer import make_byte_tokenizer


def load(path: Path, **options: Any) -> tuple[list[Document], SourceReport]:
    return load_documents([str(path)], **{"tokenizer": None, "vocab_size": 300, **options})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_rows(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_ids_are_read_with_their_masks(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]},
        {"input_ids": [8, 9], "source": "x"},
        {"input_ids": [4, 4]},
    ]
    path = write(tmp_path / "r.jsonl", "\ufeff" + "\r\n\n".join(map(json.dumps, rows)))
    documents, report = load(path)
    assert [(d.input_ids.tolist(), d.loss_mask.tolist()) for d in documents] == [
        ([5, 6, 7], [1, 0, 1]),
        ([8, 9], [0, 1]),
        ([4, 4], [0, 1]),
    ]
    assert [document.name for document in documents] == ["r.jsonl:1", "r.jsonl:3", "r.jsonl:5"]
    assert (report.supervised, report.unsupervised, report.ignored_keys) == (3, 0, ["source"])


def test_max_documents_takes_the_first_and_says_so_only_if_there_were_more(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", *({"input_ids": [i, i]} for i in range(5)))
    documents, report = load(path, max_documents=3)
    assert [document.name for document in documents] == ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"] and report.stopped
    documents, report = load(path, max_documents=5)
    assert len(documents) == 5 and not report.stopped


def test_equal_ids_with_another_mask_are_another_document(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", {"input_ids": [1, 2]}, {"input_ids": [1, 2], "loss_mask": [1, 1]})
    assert len(load(path)[0]) == 2


def test_a_documents_key_is_the_same_in_every_release(tmp_path: Path) -> None:
    (read,), _ = load(write_rows(tmp_path / "r.jsonl", {"input_ids": [1, 2, 299]}))
    assert read.key == "e33c46185c8d0f151e2aa7606446336a022335d6222296ff02a80c5519f61d22"


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"input_ids": [1, 2', "line 2: not valid JSON"),
        ("[1, 2]", "line 2: give {"),
        ('{"ids": [1, 2]}', "line 2: give {"),
        ('{"input_ids": "12"}', "line 2: give {"),
        ('{"input_ids": [1, true]}', r"line 2: input_ids\[1\] is True; ids are integers in 0..299"),
        ('{"input_ids": [1.0, 2]}', r"line 2: input_ids\[0\] is 1.0; "),
        ('{"input_ids": [1, NaN]}', r"line 2: input_ids\[1\] is nan; "),
        ('{"input_ids": [1, "2"]}', r"line 2: input_ids\[1\] is \\?'2\\?'; "),
        ('{"input_ids": [1, null]}', r"line 2: input_ids\[1\] is None; "),
        ('{"input_ids": [[1], 2]}', r"line 2: input_ids\[0\] is \[1\]; "),
        ('{"input_ids": [1, 300]}', r"line 2: input_ids\[1\] is 300; "),
        ('{"input_ids": [1, -1]}', r"line 2: input_ids\[1\] is -1; "),
        ('{"input_ids": [1, 1' + "0" * 99 + "]}", r"line 2: input_ids\[1\] is 1000*\.\.\.; "),
        ('{"input_ids": [1, 1' + "0" * 5000 + "]}", "line 2: not valid JSON"),
        ('{"input_ids": [1, 2], "loss_mask": [1]}', "line 2: 2 input_ids but 1 in loss_mask; they must match"),
        ('{"input_ids": [], "loss_mask": [1]}', "line 2: 0 input_ids but 1 in loss_mask"),
        ('{"input_ids": [1, 2], "loss_mask": [0, 2]}', r"line 2: loss_mask\[1\] is 2; give 0 or 1"),
        ('{"input_ids": [1, 2], "loss_mask": [0, true]}', r"line 2: loss_mask\[1\] is True"),
        ('{"input_ids": [1, 2], "loss_mask": [0, 1.0]}', r"line 2: loss_mask\[1\] is 1.0"),
        ('{"input_ids": [1, 2], "loss_mask": null}', "line 2: loss_mask is None; give a list of 0 and 1"),
        ('{"input_ids": [1, 2], "labels": [-100, 2]}', "line 2: labels is not read"),
        ('{"input_ids": [1, 299]}', r"line 2: input_ids\[1\] is the mask token 299, which must never occur"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path / "r.jsonl", '{"input_ids": [1, 2]}\n' + line + "\n")
    with pytest.raises(ValueError, match=expected) as caught:
        load(path, mask_token_id=299)
    assert str(caught.value).startswith(f"{path}, line 2: ") and "\n" not in str(caught.value)


def test_data_without_a_token_or_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no token: 1 files, 1 empty documents"):
        load(write_rows(tmp_path / "e.jsonl", {"input_ids": []}))
    path = write_rows(tmp_path / "r.jsonl", {"input_ids": [1, 2], "loss_mask": [1, 0]}, {"input_ids": [3]})
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: no token of 2 has loss_mask 1 behind the first"):
        load(path)
    with pytest.raises(
        ValueError, match="hold no token: 1 files, 0 empty documents, 2 bad rows: 2 no supervised token"
    ):
        load(path, max_bad_rows=2)
    with pytest.raises(ValueError, match="nothing to learn from: none of 1 documents"):
        load(write(tmp_path / "one.txt", "x"), tokenizer=make_byte_tokenizer())
