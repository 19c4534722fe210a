"""Documents: what is read from files and folders, in which order, and what is refused with which words."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peagle_train.config import Data
from peagle_train.data.documents import find_all, read_examples
from tests.documents import TOKENIZER, Document, load, write_lines


def write(path: Path, text: str | bytes = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_a_text_file_is_one_document_that_decodes_to_itself(tmp_path: Path) -> None:
    text = "def f():\r\n\treturn 'h\u00e9'\n\n"
    (read,), report = load(write(tmp_path / "a.py", text))
    assert TOKENIZER.decode(read.input_ids) == text
    assert read.loss_mask.tolist() == [0] + [1] * (len(text.encode()) - 1)
    assert (read.input_ids.dtype, read.loss_mask.dtype, read.name) == (torch.int64, torch.uint8, "a.py")
    assert (report.tokens, report.supervised) == (len(text.encode()), len(text.encode()) - 1)


def test_special_tokens_spelled_out_in_text_stay_text(tmp_path: Path) -> None:
    (end,) = TOKENIZER("<|end|>")["input_ids"]
    (read,), _ = load(write(tmp_path / "a.txt", "a<|end|>b"))
    assert read.input_ids.numel() == 9 and end not in read.input_ids
    assert TOKENIZER("<|end|>")["input_ids"] == [end], "the tokenizer is left as it was"


def test_the_standard_library_is_read_without_its_tests() -> None:
    files = find_all(Data(["stdlib"], extensions=[".txt"]))["sources"].files
    found = [file.name for file in files]
    assert {"stdlib/json/decoder.py", "stdlib/os.py"} <= set(found) and found == sorted(found)
    assert all(name.endswith(".py") for name in found)
    folders = {folder for name in found for folder in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


def test_order_and_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    results = []
    for root, order in ((tmp_path / "zz", [0, 1, 2]), (tmp_path / "aa" / "deep", [2, 0, 1])):
        for i in order:
            write(root / "corpus" / ["b/x.txt", "a.txt", "b/a/y.txt"][i], f"text {i}")
        write_lines(root / "corpus" / "b.jsonl", {"input_ids": [1, 2]}, {"input_ids": [3, 4]})
        documents, _ = load(root / "corpus")
        results.append([(d.name, d.key) for d in documents])
    assert results[0] == results[1]
    expected = ["a.txt", "b.jsonl:1", "b.jsonl:2", "b/a/y.txt", "b/x.txt"]
    assert [name for name, _ in results[0]] == [f"corpus/{name}" for name in expected]


def test_globs_folders_and_files_may_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("src/a.py", "src/sub/b.py", "src/sub/c.png", "notes.md", "src/[x].txt"):
        write(tmp_path / name, f"content of {name}")
    monkeypatch.chdir(tmp_path)
    documents, report = load("notes.md", "src/**/*", "src/[x].txt", "./src/sub")
    assert names(documents) == ["notes.md", "src/[x].txt", "src/a.py", "src/sub/b.py"]
    assert report.left_out == {"files of other types": 2, "duplicate documents": 2}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(load("~/src")[0]) == ["src/[x].txt", "src/a.py", "src/sub/b.py"]


@pytest.mark.parametrize(
    "pattern, left", [("sub/*", ["d/a.txt"]), ("d/sub/*", ["d/a.txt"]), ("*.txt", []), ("a.*", ["d/sub/b.txt"])]
)
def test_exclude_patterns_match_below_the_source(tmp_path: Path, pattern: str, left: list[str]) -> None:
    write(tmp_path / "d" / "a.txt", "one")
    write(tmp_path / "d" / "sub" / "b.txt", "two")
    if left:
        documents, report = load(tmp_path / "d", exclude=[pattern])
        assert (names(documents), report.left_out["excluded files"]) == (left, 1)
    else:
        with pytest.raises(ValueError, match=r"has no file to read .*2 excluded files"):
            load(tmp_path / "d", exclude=[pattern])


def test_everything_left_out_is_counted_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name, text in {"a.txt": "one", "b.txt": "one", "c.txt": "", "d.rst": "x", "e.txt": "e", "x.txt": "two"}.items():
        write(folder / name, text)
    write(folder / "f.txt", "a document too many")
    os.symlink(tmp_path, folder / "link")
    _, report = load(folder, exclude=["x*"], max_documents=2)
    told = report.describe()
    for part in ("2 documents of 5 files", "1 empty", "1 duplicate", "1 excluded", "1 files of other", "1 linked"):
        assert part in told
    assert report.is_cut and "max_documents" in told and "\n" not in told


def test_sources_that_name_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.rst")
    write(tmp_path / "x.bin")
    (tmp_path / "empty").mkdir()
    for source, expected in {
        tmp_path / "empty": r"has no file to read \(none at all\)",
        tmp_path / "none.txt": "does not exist",
        tmp_path / "*.nothing": "has no file to read",
        tmp_path / "d": r"has no file to read \(.*1 files of other types.*\.py \.txt \.md",
        tmp_path / "x.bin": "has no file to read",
    }.items():
        with pytest.raises(ValueError, match=expected):
            load(source)
    assert names(load(tmp_path / "d", extensions=[".rst"])[0]) == ["d/a.rst"]


def test_a_gzipped_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    files = find_all(Data([str(path)]))["sources"].files
    assert [json.loads(example.content) for example in read_examples(files)] == [{"text": "a"}, {"text": "b"}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot read .*x\.jsonl\.gz"):
        load(path)


def test_unreadable_files_and_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink(tmp_path / "gone", write(tmp_path / "d" / "a.txt").parent / "b.txt")
    with pytest.raises(ValueError, match=r"cannot read .*b\.txt: No such file"):
        load(tmp_path / "d")
    scan = os.scandir

    def forbidden(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    write(tmp_path / "e" / "closed" / "a.txt")
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ValueError, match=r"closed cannot be read: Permission denied"):
        load(tmp_path / "e")
