"""Examples in every form and place that people have them in: what is read, what is counted, what stops a run."""

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peagle_train.cli import main
from peagle_train.config import Data
from peagle_train.data.documents import find_all, read_examples
from peagle_train.data.messages import BAD_IDS, FORMAT, NOTHING, UNREADABLE, parse
from tests.chats import chat
from tests.documents import TOKENIZER, Document, load, make_byte_target, make_byte_tokenizer, write_lines
from tests.tiny import write_recipe

CHAT = chat("user: hi", "assistant: hello")["messages"]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"


def test_a_row_is_read_in_the_first_form_that_it_has_as_the_ids_and_the_mask_that_it_means(tmp_path):
    prompts, texts = {"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": "2 + 2 =", "completion": " 4"}
    all_but_ids = {"text": "a", **texts, "conversations": SHAREGPT, "messages": CHAT}
    for row, form, text, what_is_learned in (
        ({"messages": CHAT}, "messages", TEXT, "hello<|im_end|>"),
        ({"conversations": SHAREGPT}, "conversations", TEXT, "hello<|im_end|>"),
        (prompts, "prompt", TEXT, "hello<|im_end|>"),
        (texts, "prompt", "2 + 2 = 4<|im_end|>", " 4<|im_end|>"),
        ({"text": "plain"}, "text", "plain", "lain"),
        ({"input_ids": [65, 66, 67], "loss_mask": [0, 0, 1]}, "input_ids", "bcd", "d"),
        ({**all_but_ids, "input_ids": [65, 66]}, "input_ids", "bc", "c"),
        (all_but_ids, "messages", TEXT, "hello<|im_end|>"),
        ({"text": "plain", "prompt": "no completion"}, "text", "plain", "lain"),
    ):
        (read,), report = load(write_lines(tmp_path / "r.jsonl", row))
        assert TOKENIZER.decode(read.input_ids) == text and report.forms == {form: 1}, row
        assert TOKENIZER.decode(read.input_ids[read.loss_mask == 1]) == what_is_learned
    documents, report = load(write_lines(tmp_path / "r.jsonl", {"messages": CHAT}, {"text": "plain"}, prompts))
    assert names(documents) == ["r.jsonl:1", "r.jsonl:2"]
    assert report.notes == {"duplicate documents skipped": 1} and "(1 messages, 1 text)" in report.describe()


def ids(tokens: str, **more: str) -> bytes:
    return ", ".join([f'{{"input_ids": {tokens}', *(f'"{key}": {each}' for key, each in more.items())]).encode() + b"}"


def answered(**changes: Any) -> dict[str, Any]:
    return {"messages": [CHAT[0], {**CHAT[1], **changes}]}


BAD_CHATS = {
    FORMAT: [
        {"messages": [{"role": "user", "content": None}, CHAT[1]]},
        {"messages": [CHAT[0], {"role": "assistant"}]},
        {"prompt": "Hi", "completion": CHAT[1:]},
        {"conversations": SHAREGPT[:1], "system": 7},
        {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "no JSON"}]},
        answered(content=[{"type": "image_url", "image_url": "x"}]),
        answered(thinking=7),
        answered(reasoning_content="Because", thinking="Or not"),
        {**answered(), "tools": [1]},
        answered(tool_calls={"a": 1}),
        answered(tool_calls=[{"function": {"arguments": {}}}]),
        answered(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        {**answered(), "chat_template_kwargs": [1]},
        answered(weight=0.5),
        answered(weight=2),
        *(answered(**{mark: 1}) for mark in ("train", "training", "trainable", "train_detail")),
        *(answered(**{mark: 0}) for mark in ("loss", "loss_weight", "mask", "masked")),
    ],
    NOTHING: [
        answered(content=" \n"),
        answered(content="", tool_calls=[]),
        answered(weight=0),
        chat("user: \t", "assistant: hello"),
        {"messages": CHAT[:1]},
        {"prompt": "Hi", "completion": ""},
        {"prompt": CHAT, "completion": CHAT[:1]},
    ],
}
UNREAD = ("labels", "attention_mask", "assistant_mask", "assistant_masks")
# What is in a line, what it is counted as, and a word of what is said about it.
BAD = [
    (b'{"text": "broken', UNREADABLE, "not valid JSON"),
    (b'{"text": "\xff"}', UNREADABLE, "not UTF-8"),
    (b'{"text": "\\ud800"}', UNREADABLE, "ud800"),
    (json.dumps({"messages": [{"role": "user", "content": "a\udfffb"}, CHAT[1]]}).encode(), UNREADABLE, "udfff"),
    (b"[1, 2]", FORMAT, "give {"),
    (b'{"question": "?"}', FORMAT, "give {"),
    (b'{"text": null}', FORMAT, "give a string"),
    (b'{"prompt": "no completion"}', FORMAT, "two strings"),
    (b'{"messages": %s%s}' % (b"[" * 5000, b"]" * 5000), FORMAT, "nested"),
    (json.dumps({"messages": [{"role": "robot", "content": "hi"}, CHAT[1]]}).encode(), FORMAT, "robot"),
    (json.dumps({"messages": CHAT[1:]}).encode(), NOTHING, "after a prompt"),
    (ids("[1, 2, 3]", loss_mask="[1, 0, 0]"), NOTHING, "no token of 3 has loss_mask 1 after the first"),
    (ids('"12"'), FORMAT, "give {"),
    (ids("[1, 300]"), BAD_IDS, "input_ids[1] is 300; ids are integers in 0..299"),
    (ids("[1, true]"), BAD_IDS, "input_ids[1] is True"),
    (ids("[1, 1" + "0" * 99 + "]"), BAD_IDS, "000;"),
    (ids("[1, 1" + "0" * 5000 + "]"), UNREADABLE, "not valid JSON"),
    (ids("[1, 299]"), BAD_IDS, "input_ids[1] is the mask token 299"),
    (ids("[1, 2]", loss_mask="[1]"), FORMAT, "2 input_ids but 1 in loss_mask"),
    (ids("[1, 2]", loss_mask="[0, 2]"), FORMAT, "loss_mask[1] is 2; give 0 or 1"),
    (ids("[1, 2]", loss_mask="null"), FORMAT, "loss_mask is None"),
    *((ids("[1, 2]", **{key: "[0, 1]"}), FORMAT, f"{key} is not read") for key in UNREAD),
    *((json.dumps(row).encode(), reason, "") for reason, rows in BAD_CHATS.items() for row in rows),
]


def test_bad_rows_are_counted_by_reason_with_the_line_of_the_first_or_stop_with_theirs(tmp_path):
    lines, first = [{"text": "a good row"}], dict[str, int]()
    for line, reason, word in BAD:
        lines += [line, {"text": f"good row {len(lines)}"}]
        first.setdefault(reason, len(lines) - 1)
        path = write_lines(tmp_path / "one.jsonl", {"text": "good"}, line, b"{")
        with pytest.raises(ValueError, match=r"data\.max_bad_rows is 0") as caught:
            load(path, mask_token_id=299)
        text = str(caught.value)
        assert f"1 {reason} (first: {path}, line 2: " in text and word in text and "\n" not in text and len(text) < 600
        assert len(re.findall(r"line \d", text)) == 1
    path = write_lines(tmp_path / "r.jsonl", *lines)
    documents, report = load(path, max_bad_rows=len(BAD), mask_token_id=299)
    assert report.bad_rows == Counter(reason for _, reason, _ in BAD) and len(documents) == len(BAD) + 1
    told = report.describe()
    assert f"{len(BAD)} bad rows: " in told and "\n" not in told
    for reason, count in report.bad_rows.items():
        assert f"{count} {reason} (first: {path}, line {first[reason]}: " in told
    with pytest.raises(ValueError, match=f"{len(BAD)} bad rows, but data.max_bad_rows is {len(BAD) - 1}: "):
        load(path, max_bad_rows=len(BAD) - 1, mask_token_id=299)


def test_a_share_of_bad_rows_is_of_all_examples_and_is_known_when_all_are_read(tmp_path):
    for good, bad, share in ((99, 1, "1%"), (71, 29, "29%"), (199, 1, "0.5%")):
        rows = [*[b"{"] * bad, *({"text": f"row {i}"} for i in range(good))]
        documents, report = load(write_lines(tmp_path / "r.jsonl", *rows), max_bad_rows=share)
        assert (len(documents), report.bad_rows.total()) == (good, bad)
        with pytest.raises(ValueError, match=f"{bad} bad rows, but data.max_bad_rows is {share}: "):
            load(write_lines(tmp_path / "r.jsonl", *rows[:-1]), max_bad_rows=share)


def test_check_data_counts_all_that_is_bad_and_ends_with_2_where_a_run_would_stop(tmp_path, capsys):
    target = make_byte_target(tmp_path / "target")
    path = write_lines(tmp_path / "r.jsonl", {"text": "good"}, b"{", {"text": 5}, b"[", {"text": "fine"})
    recipe = write_recipe(tmp_path, target, path, tmp_path / "run", draft={"mask_token_id": 299})
    for allowed, code in (("2", 2), ("3", 0), ("59%", 2)):
        assert main(["check-data", str(recipe), "--workers", "1", f"data.max_bad_rows={allowed}"]) == code
        out, err = capsys.readouterr()
        assert f"2 {UNREADABLE} (first: {path}, line 2: " in out and f"1 {FORMAT} (first: {path}, line 3: " in out
        assert "2 documents of 1 files" in out and (f"data.max_bad_rows is {allowed}" in err) == (code == 2)
        assert str(path) not in err, "what is printed is not said again"
    write_lines(path, b"{", {"text": 5})
    for allowed, cause in (("0", "2 bad rows, but data.max_bad_rows is 0"), ("2", "nothing to learn from")):
        assert main(["check-data", str(recipe), "--workers", "1", f"data.max_bad_rows={allowed}"]) == 2
        assert cause in capsys.readouterr().err
    good = write_lines(tmp_path / "good.jsonl", {"text": "good"})
    for role, other in (("sources", "eval_sources"), ("eval_sources", "sources")):
        given = f"data.{role}=[{path}]", f"data.{other}=[{good}]"
        assert main(["check-data", str(recipe), "--workers", "1", *given]) == 2
        assert f"data.{role}: 2 bad rows" in capsys.readouterr().err


def test_a_text_file_that_is_not_utf8_is_a_bad_row_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff\xc3\xbc")
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one\n\xff")
    (folder / "b.txt").write_text("two")
    documents, report = load(folder, max_bad_rows=1)
    assert [TOKENIZER.decode(d.input_ids) for d in documents] == ["two"]
    assert report.first_bad == {UNREADABLE: f"{tmp_path}/d\\udcff\u00fc/a.txt: not UTF-8 (byte 4 is 0xff)"}
    report.describe().encode("utf-8")


def test_a_broken_list_of_rows_is_one_bad_row_and_nothing_to_learn_from_is_refused(tmp_path):
    path, good = tmp_path / "list.json", write_lines(tmp_path / "r.jsonl", {"text": "good"})
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}])[:-1])
    documents, report = load(path, good, max_bad_rows=1)
    assert len(documents) == 1 and report.first_bad[UNREADABLE].startswith(str(path))
    path.write_text(json.dumps([{"text": "one"}, 5, {"text": "two"}], indent=2))
    documents, report = load(path, max_bad_rows=1)
    assert len(documents) == 2 and report.first_bad[FORMAT].startswith(f"{path}, row 2: ")
    for lines, told in (([b"{", b"["], "2 bad rows: 2 unreadable"), ([{"input_ids": []}], "1 empty documents")):
        with pytest.raises(ValueError, match=rf"nothing to learn from.*: 0 documents of 1 files, .* {told}"):
            load(write_lines(tmp_path / "e.jsonl", *lines), max_bad_rows=9)


def test_lines_of_ids_are_read_with_their_masks_and_equal_ids_with_another_mask_are_another_document(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]}, {"input_ids": [8, 9], "source": "x"}]
    rows.append({"input_ids": [8, 9], "loss_mask": [1, 1]})
    (tmp_path / "r.jsonl").write_bytes(("\ufeff" + "\r\n\n".join(map(json.dumps, rows))).encode())
    documents, report = load(tmp_path / "r.jsonl", tokenizer=None)
    found = [(int(d.name.rpartition(":")[2]), d.input_ids.tolist(), d.loss_mask.tolist()) for d in documents]
    assert found == [(1, [5, 6, 7], [1, 0, 1]), (3, [8, 9], [0, 1]), (5, [8, 9], [1, 1])] and report.supervised == 3
    (read,), _ = load(write_lines(tmp_path / "k.jsonl", {"input_ids": [1, 2, 299]}), tokenizer=None)
    assert read.key == "e33c46185c8d0f151e2aa7606446336a022335d6222296ff02a80c5519f61d22", "the same in every release"
    with pytest.raises(ValueError, match="takes a tokenizer"):
        load(write_lines(tmp_path / "t.jsonl", {"text": "ab"}), tokenizer=None)


ROWS = [chat("user: hi", "assistant: hello", "user: and?", "assistant: bye", source="x")]
ROWS += [chat("user: caf\u00e9", "assistant: oui", source="y"), chat("user: hi", "assistant: hello", source="z")]


def test_parquet_arrow_saved_and_named_data_sets_hold_what_the_same_jsonl_holds(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", *ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    write_lines(tmp_path / "lines.json", *ROWS)
    table = datasets.Dataset.from_list(ROWS).with_format("torch")  # which must not change what is read
    (tmp_path / "named").mkdir()
    table.to_parquet(tmp_path / "named" / "train.parquet")
    table.to_parquet(tmp_path / "rows [1]*.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").filter(lambda row: True, load_from_cache_file=False)
    assert list((tmp_path / "saved").glob("cache-*.arrow"))  # no example of ours
    datasets.DatasetDict({"train": table.select([0]), "all": table}).save_to_disk(tmp_path / "splits")
    expected, report = load(path)
    for source in (
        *(tmp_path / name for name in ("list.json", "lines.json", "rows [1]*.parquet", "saved", "splits/all")),
        f"hf:{tmp_path / 'named'}",
        {"datasets": str(tmp_path / "named"), "split": "train"},
    ):
        documents, other = load(source)
        assert [d.key for d in documents] == [d.key for d in expected] and other.forms == report.forms, source
    for source, expected_error in (
        (tmp_path / "splits", "give the folder of one of them"),
        ("hf:no/such-set", "cannot read no/such-set"),
    ):
        with pytest.raises(ValueError, match=expected_error):
            load(source)


def test_a_null_column_of_a_table_is_a_field_that_is_not_there_and_tables_may_be_empty(tmp_path):
    rows = [{"messages": CHAT}, {"text": "plain"}, {"input_ids": [1, 2, 3]}, {}]
    columns = ("messages", "text", "input_ids", "loss_mask")
    table = datasets.Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])
    table.to_parquet(tmp_path / "r.parquet")
    documents, report = load(tmp_path / "r.parquet", max_bad_rows=1)
    assert report.forms == {"messages": 1, "text": 1, "input_ids": 1}
    assert report.first_bad[FORMAT].startswith(f"{tmp_path / 'r.parquet'}, row 4: ") and len(documents) == 3
    empty = pa.table({"text": pa.array([], pa.string())})
    with pq.ParquetWriter(tmp_path / "first.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(pa.table({"text": ["a text", "another"]}))
    pq.ParquetWriter(tmp_path / "no_group.parquet", empty.schema).close()
    good = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    for name, count in (("no_group.parquet", 0), ("first.parquet", 2)):
        documents, report = load(tmp_path / name, good)
        assert len(documents) == count + 1 and len(report.files) == 2, name


def test_rows_of_a_table_have_no_fields_of_other_rows(tmp_path):
    rows = [
        {"tools": [{"name": "weather", "properties": {"city": {"type": "string"}}}]},
        {"tools": [{"name": "add", "properties": {"n": {"minimum": 0}, "m": [{"a": 2}, {"b": [None]}]}}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    files = find_all(Data([str(tmp_path / "r.parquet")]))["sources"].files
    assert [parse(example.content) for example in read_examples(files)] == rows


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}"])
def test_plain_prompts_and_completions_need_no_chat_template_and_chats_do(template, tmp_path):
    plain, without = {"prompt": "2 + 2 =", "completion": " 4"}, make_byte_tokenizer()
    without.chat_template = template
    path = write_lines(tmp_path / "r.jsonl", plain)
    assert [d.key for d in load(path, tokenizer=without)[0]] == [d.key for d in load(path)[0]]
    with pytest.raises(ValueError, match="chat template"):
        load(write_lines(tmp_path / "r.jsonl", plain, {"messages": CHAT}), max_bad_rows=9, tokenizer=without)


# Files and folders: what is read, in which order, and what is left out


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_a_text_file_is_one_document_that_decodes_to_itself(tmp_path):
    text = "def f():\r\n\treturn 'h\u00e9'\n\n"
    (read,), report = load(write(tmp_path / "a.py", text))
    assert TOKENIZER.decode(read.input_ids) == text
    assert read.loss_mask.tolist() == [0] + [1] * (len(text.encode()) - 1)
    assert (report.tokens, report.supervised) == (len(text.encode()), len(text.encode()) - 1)
    (end,) = TOKENIZER("<|end|>")["input_ids"]  # special tokens spelled out in text stay text
    (read,), _ = load(write(tmp_path / "a.txt", "a<|end|>b"))
    assert read.input_ids.numel() == 9 and end not in read.input_ids
    assert TOKENIZER("<|end|>")["input_ids"] == [end], "the tokenizer is left as it was"


def test_the_standard_library_is_read_without_its_tests():
    found = [file.name for file in find_all(Data(["stdlib"], extensions=[".txt"]))["sources"].files]
    assert {"stdlib/json/decoder.py", "stdlib/os.py"} <= set(found) and found == sorted(found)
    assert all(name.endswith(".py") for name in found)
    folders = {folder for name in found for folder in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


def test_globs_folders_and_files_may_be_mixed_and_order_and_names_are_those_of_paths_below_each(tmp_path, monkeypatch):
    for name in ("src/a.py", "src/sub/b.py", "src/sub/a/y.txt", "src/sub/c.png", "notes.md", "src/[x].txt"):
        write(tmp_path / name, f"content of {name}")
    write_lines(tmp_path / "src" / "sub.jsonl", {"input_ids": [1, 2]}, {"input_ids": [3, 4]})
    monkeypatch.chdir(tmp_path)
    documents, report = load("notes.md", "src/**/*", "src/[x].txt", "./src/sub")
    below = ["[x].txt", "a.py", "sub.jsonl:1", "sub.jsonl:2", "sub/a/y.txt", "sub/b.py"]
    assert names(documents) == ["notes.md", *(f"src/{name}" for name in below)]
    assert report.notes == {"files of other types skipped": 2, "duplicate documents skipped": 3}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(load("~/src")[0]) == names(documents)[1:]
    weighed = Data([{"path": "notes.md", "weight": 2.5}, {"path": "src/sub.jsonl", "weight": 0.5}])
    assert [raw.weight for raw in read_examples(find_all(weighed)["sources"].files)] == [2.5, 0.5, 0.5]


def test_what_is_left_out_is_counted_by_patterns_below_the_source_and_types_and_content(tmp_path):
    texts = {"a.txt": "one", "b.txt": "one", "c.txt": "", "d.rst": "x", "e.txt": "e", "sub/x.txt": "two"}
    for name, text in texts.items():
        write(tmp_path / "d" / name, text)
    os.symlink(tmp_path, tmp_path / "d" / "link")
    for pattern in ("sub/*", "d/sub/*", "x.txt", "*x.*"):
        documents, report = load(tmp_path / "d", exclude=[pattern])
        is_out = pattern != "x.txt"  # a pattern of the whole path below the source
        assert names(documents) == ["d/a.txt", "d/e.txt", "d/sub/x.txt"][: 3 - is_out]
        assert report.notes["excluded files skipped"] == is_out
    told = report.describe()
    for part in ("2 documents of 4 files", "1 empty", "1 duplicate", "1 excluded", "1 files of other", "1 linked"):
        assert part in told
    assert "\n" not in told


def test_sources_that_name_nothing_are_refused(tmp_path):
    write(tmp_path / "d" / "a.rst")
    write(tmp_path / "x.bin")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "saved" / "dataset_info.json", "{}")
    write(tmp_path / "saved" / "state.json", "{}")
    for source, expected in {
        tmp_path / "empty": r"has no file to read \(none at all\)",
        tmp_path / "saved": r"has no file to read \(none at all\)",
        tmp_path / "none.txt": "does not exist",
        tmp_path / "*.nothing": "has no file to read",
        tmp_path / "d": r"has no file to read \(.*1 files of other types.*\.py \.txt \.md",
        tmp_path / "x.bin": "has no file to read",
    }.items():
        with pytest.raises(ValueError, match=expected):
            load(source)
    assert names(load(tmp_path / "d", extensions=[".rst"])[0]) == ["d/a.rst"]


def test_a_gzipped_file_is_read_and_unreadable_files_and_folders_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "aa"}\n{"text": "bb"}\n'))
    assert [TOKENIZER.decode(d.input_ids) for d in load(path)[0]] == ["aa", "bb"]
    path.write_bytes(path.read_bytes()[:-9])
    os.symlink(tmp_path / "gone", write(tmp_path / "d" / "a.txt").parent / "b.txt")
    write(tmp_path / "e" / "closed" / "a.txt")
    scan = os.scandir

    def forbidden(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    for source, message in (
        (path, r"cannot read .*x\.jsonl\.gz"),
        (tmp_path / "d", r"cannot read .*b\.txt: No such file"),
        (tmp_path / "e", r"closed cannot be read: Permission denied"),
    ):
        with pytest.raises(ValueError, match=message):
            load(source)
