"""Examples in every form that people have them in: what is read, what is counted, what stops a run."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peagle_train.cli import main
from peagle_train.config import parse_sources
from peagle_train.data.messages import BAD_IDS, FORMAT, NOTHING, TOO_LONG, UNREADABLE
from tests.byte_tokenizer import make_byte_target, make_byte_tokenizer
from tests.documents import TOKENIZER, Document, load, write_lines
from tests.tiny import write_recipe

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def learned(document: Document) -> str:
    return TOKENIZER.decode(document.input_ids[document.loss_mask == 1])


TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    "row, text, what_is_learned",
    [
        ({"messages": CHAT}, TEXT, "hello<|im_end|>"),
        ({"conversations": SHAREGPT}, TEXT, "hello<|im_end|>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, TEXT, "hello<|im_end|>"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 = 4<|im_end|>", " 4<|im_end|>"),
        ({"text": "plain"}, "plain", "lain"),
        ({"input_ids": [65, 66, 67], "loss_mask": [0, 0, 1]}, None, None),
    ],
)
def test_a_row_of_each_form_becomes_the_ids_and_the_mask_that_it_means(
    row: dict[str, Any], text: str | None, what_is_learned: str | None, tmp_path: Path
) -> None:
    (read,), report = load(write_lines(tmp_path / "r.jsonl", row))
    if text is None:
        assert (read.input_ids.tolist(), read.loss_mask.tolist()) == (row["input_ids"], row["loss_mask"])
    else:
        assert TOKENIZER.decode(read.input_ids) == text and learned(read) == what_is_learned
    assert report.forms == {next(iter(row)): 1}


def test_the_same_chat_in_several_forms_is_one_document(tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT},
        {"text": "plain"},
        {"conversations": SHAREGPT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ]
    documents, report = load(write_lines(tmp_path / "r.jsonl", *rows))
    assert [document.name for document in documents] == ["r.jsonl:1", "r.jsonl:2"]
    assert report.left_out["duplicate documents"] == 2 and "(1 messages, 1 text)" in report.describe()


def test_a_row_with_several_forms_is_read_as_the_first_of_them_and_that_is_said(tmp_path: Path) -> None:
    everything = {"text": "a", "prompt": "b", "completion": "c", "conversations": SHAREGPT, "messages": CHAT}
    rows = [
        {**everything, "input_ids": [7, 8]},
        everything,
        {"text": "only this", "prompt": "without a completion"},
        {"text": "tt", "prompt": "pp", "completion": "cc"},
    ]
    documents, report = load(write_lines(tmp_path / "r.jsonl", *rows))
    assert [learned(d)[-16:] for d in documents] == [")", "hello<|im_end|>", "nly this", "cc<|im_end|>"]
    assert "3 examples of several forms read as the first of input_ids, messages, conversations, prompt, text" in (
        report.describe()
    )


def ids(tokens: str, **more: str) -> bytes:
    return (
        ", ".join([f'{{"input_ids": {tokens}', *(f'"{key}": {value}' for key, value in more.items())]).encode() + b"}"
    )


# What is in a line, what it is counted as, and a word of what is said about it.
BAD = [
    (b'{"text": "broken', UNREADABLE, "not valid JSON"),
    (b'{"text": "\xff"}', UNREADABLE, "not UTF-8"),
    (b'{"text": "\\ud800"}', UNREADABLE, "ud800"),
    (b"[1, 2]", FORMAT, "give {"),
    (b'{"question": "?"}', FORMAT, "give {"),
    (b'{"text": null}', FORMAT, "give a string"),
    (b'{"prompt": "no completion"}', FORMAT, "two strings"),
    (b'{"messages": %s%s}' % (b"[" * 5000, b"]" * 5000), FORMAT, "nested"),
    (json.dumps({"text": "x" * 10_000}).encode(), TOO_LONG, "data.max_characters is 9999"),
    (json.dumps({"messages": [{"role": "user", "content": "x" * 10_000}, CHAT[1]]}).encode(), TOO_LONG, "10000"),
    (json.dumps({"messages": [{"role": "robot", "content": "hi"}, CHAT[1]]}).encode(), FORMAT, "robot"),
    (json.dumps({"messages": CHAT[1:]}).encode(), NOTHING, "after a prompt"),
    (ids("[1, 2, 3]", loss_mask="[0, 0, 0]"), NOTHING, "no token of 3"),
    (ids("[1, 2, 3]", loss_mask="[1, 0, 0]"), NOTHING, "after the first"),
    (ids('"12"'), FORMAT, "give {"),
    (ids("[1, 300]"), BAD_IDS, "input_ids[1] is 300; ids are integers in 0..299"),
    (ids("[1, true]"), BAD_IDS, "input_ids[1] is True"),
    (ids("[1.0, 2]"), BAD_IDS, "input_ids[0] is 1.0"),
    (ids("[1, 1" + "0" * 99 + "]"), BAD_IDS, "000...;"),
    (ids("[1, 1" + "0" * 5000 + "]"), UNREADABLE, "not valid JSON"),
    (ids("[1, 299]"), BAD_IDS, "input_ids[1] is the mask token 299"),
    (ids("[1, 2]", loss_mask="[1]"), FORMAT, "2 input_ids but 1 in loss_mask"),
    (ids("[1, 2]", loss_mask="[0, 2]"), FORMAT, "loss_mask[1] is 2; give 0 or 1"),
    (ids("[1, 2]", loss_mask="null"), FORMAT, "loss_mask is None"),
    (ids("[1, 2]", labels="[-100, 2]"), FORMAT, "labels is not read"),
]
LIMITS = {"mask_token_id": 299, "max_characters": 9_999}


def test_bad_rows_are_counted_by_reason_with_the_line_of_the_first(tmp_path: Path) -> None:
    lines: list[Any] = [{"text": "a good row"}]
    first: dict[str, int] = {}
    for line, reason, _ in BAD:
        lines += [line, {"text": f"good row {len(lines)}"}]
        first.setdefault(reason, len(lines) - 1)
    path = write_lines(tmp_path / "r.jsonl", *lines)
    documents, report = load(path, max_bad_rows=len(BAD), **LIMITS)
    assert report.bad_rows == Counter(reason for _, reason, _ in BAD) and len(documents) == len(BAD) + 1
    told = report.describe()
    assert f"{len(BAD)} bad rows: " in told and "\n" not in told
    for reason, count in report.bad_rows.items():
        assert f"{count} {reason} (first: {path}, line {first[reason]}: " in told
    with pytest.raises(ValueError, match=f"{len(BAD)} bad rows: .*data.max_bad_rows is {len(BAD) - 1}"):
        load(path, max_bad_rows=len(BAD) - 1, **LIMITS)


@pytest.mark.parametrize("good, bad, share, is_fine", [
    (99, 1, "1%", True), (98, 1, "1%", False), (71, 29, "29%", True), (70, 29, "29%", False), (1, 1, "0%", False),
    (199, 1, "0.5%", True), (1, 7, "100%", True),
])  # fmt: skip
def test_a_share_of_bad_rows_is_of_all_examples_and_is_known_when_all_are_read(
    tmp_path: Path, good: int, bad: int, share: str, is_fine: bool
) -> None:
    path = write_lines(tmp_path / "r.jsonl", *[b"{"] * bad, *({"text": f"row {i}"} for i in range(good)))
    if is_fine:
        documents, report = load(path, max_bad_rows=share)
        assert len(documents) == good and sum(report.bad_rows.values()) == bad
    else:
        with pytest.raises(ValueError, match=f"{bad} bad rows: .*data.max_bad_rows is {share}"):
            load(path, max_bad_rows=share)


def test_check_data_counts_all_that_is_bad_and_ends_with_2_where_a_run_would_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_byte_target(tmp_path / "target")
    path = write_lines(tmp_path / "r.jsonl", {"text": "good"}, b"{", {"text": 5}, b"[", {"text": "fine"})
    recipe = write_recipe(tmp_path, target, path, tmp_path / "run", draft={"mask_token_id": 299})
    for allowed, code in (("0", 2), ("2", 2), ("3", 0), ("59%", 2), ("60%", 0)):
        assert main(["check-data", str(recipe), "--workers", "1", f"data.max_bad_rows={allowed}"]) == code
        out = capsys.readouterr().out
        assert f"2 {UNREADABLE}, first: {path}, line 2: " in out and f"1 {FORMAT}, first: {path}, line 3: " in out
        assert "2 documents of 1 files" in out and ("a run would stop" in out) == (code == 2)
    for wrong in ("1.5", "101%", "-1%", "x"):
        assert main(["check-data", str(recipe), f"data.max_bad_rows={wrong}"]) == 2
        assert "data.max_bad_rows: got " in capsys.readouterr().err


def test_without_leave_the_first_bad_row_stops_with_its_line_and_its_reason(tmp_path: Path) -> None:
    for line, reason, word in BAD:
        path = write_lines(tmp_path / "r.jsonl", {"text": "good"}, line, b"{")
        with pytest.raises(ValueError, match=r"data\.max_bad_rows is 0") as caught:
            load(path, **LIMITS)
        text = str(caught.value)
        assert f"1 {reason} (first: {path}, line 2: " in text and word in text
        assert "\n" not in text and len(text) < 500 and len(re.findall(r"line \d", text)) == 1


def test_a_text_file_that_is_not_utf8_is_a_bad_row_whatever_its_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff\xc3\xbc")
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one\n\xff")
    (folder / "b.txt").write_text("two")
    documents, report = load(folder, max_bad_rows=1)
    assert [TOKENIZER.decode(d.input_ids) for d in documents] == ["two"]
    assert report.first_bad == {UNREADABLE: f"{tmp_path}/d\\udcff\u00fc/a.txt: not UTF-8 (byte 0xff in line 2)"}
    report.describe().encode("utf-8")


def test_a_broken_list_of_rows_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}])[:-1])
    good = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    documents, report = load(path, good, max_bad_rows=1)
    assert len(documents) == 1 and report.first_bad[UNREADABLE].startswith(str(path))
    path.write_text(json.dumps([{"text": "one"}, 5, {"text": "two"}], indent=2))
    documents, report = load(path, max_bad_rows=1)
    assert len(documents) == 2 and report.first_bad[FORMAT].startswith(f"{path}, row 2: ")


def test_data_of_nothing_to_learn_from_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to learn from: 0 documents of 1 files, .* 2 bad rows: 2 unreadable"):
        load(write_lines(tmp_path / "r.jsonl", b"{", b"["), max_bad_rows=9)
    with pytest.raises(ValueError, match=r"nothing to learn from: 0 documents of 1 files, .* 1 empty documents"):
        load(write_lines(tmp_path / "e.jsonl", {"input_ids": []}))


def test_lines_of_ids_are_read_with_their_masks_and_equal_ids_with_another_mask_are_another_document(
    tmp_path: Path,
) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]},
        {"input_ids": [8, 9], "source": "x"},
        {"input_ids": [8, 9], "loss_mask": [1, 1]},
    ]
    (tmp_path / "r.jsonl").write_bytes(("\ufeff" + "\r\n\n".join(map(json.dumps, rows))).encode())
    documents, report = load(tmp_path / "r.jsonl", tokenizer=None)
    found = [(d.name, d.input_ids.tolist(), d.loss_mask.tolist()) for d in documents]
    assert found == [
        ("r.jsonl:1", [5, 6, 7], [1, 0, 1]),
        ("r.jsonl:3", [8, 9], [0, 1]),
        ("r.jsonl:5", [8, 9], [1, 1]),
    ]
    assert report.supervised == 3
    (read,), _ = load(write_lines(tmp_path / "k.jsonl", {"input_ids": [1, 2, 299]}), tokenizer=None)
    assert read.key == "e33c46185c8d0f151e2aa7606446336a022335d6222296ff02a80c5519f61d22", "the same in every release"
    with pytest.raises(ValueError, match="takes a tokenizer"):
        load(write_lines(tmp_path / "t.jsonl", {"text": "ab"}), tokenizer=None)


def test_max_documents_takes_the_first_and_says_so_only_if_there_were_more(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", *({"input_ids": [i, i]} for i in range(5)))
    documents, report = load(path, max_documents=3)
    assert [document.name for document in documents] == ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]
    assert "max_documents" in report.describe()
    documents, report = load(path, max_documents=5)
    assert len(documents) == 5 and "max_documents" not in report.describe()


ROWS = [
    {"messages": CHAT, "source": "x"},
    {"messages": [*CHAT, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "bye"}], "source": "y"},
    {"messages": [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "oui"}], "source": "z"},
]


def test_parquet_arrow_saved_and_named_data_sets_hold_what_the_same_jsonl_holds(tmp_path: Path) -> None:
    import datasets

    path = write_lines(tmp_path / "r.jsonl", *ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    write_lines(tmp_path / "lines.json", *ROWS)
    table = datasets.Dataset.from_list(ROWS).with_format("torch")  # which must not change what is read
    (tmp_path / "named").mkdir()
    table.to_parquet(tmp_path / "named" / "train.parquet")
    table.to_parquet(tmp_path / "rows [1]*.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table.select([0]), "all": table}).save_to_disk(tmp_path / "splits")
    expected, report = load(path)
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (
        *(tmp_path / name for name in ("list.json", "lines.json", "rows [1]*.parquet", "saved")),
        arrow,
        {"path": str(tmp_path / "splits"), "split": "all"},
        f"hf:{tmp_path / 'named'}",
        {"datasets": str(tmp_path / "named"), "split": "train", "streaming": True},
        {"path": str(tmp_path / "named"), "format": "parquet"},
    ):
        documents, other = load(source)
        assert [d.key for d in documents] == [d.key for d in expected], source
        assert other.forms == report.forms
    assert len(load(tmp_path / "splits")[0]) == 1
    for source, expected_error in (
        ({"path": str(tmp_path / "splits"), "split": "test"}, r"cannot read .*splits \(saved\): .*test"),
        ({"path": str(path), "split": "test"}, "is not a data set with splits and names"),
        ("hf:no/such-set", "cannot read no/such-set"),
    ):
        with pytest.raises(ValueError, match=expected_error):
            load(source)


def test_a_null_column_of_a_table_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    import datasets

    rows = [{"messages": CHAT}, {"text": "plain"}, {"input_ids": [1, 2, 3]}, {}]
    names = ("messages", "text", "input_ids", "loss_mask")
    table = datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    table.to_parquet(tmp_path / "r.parquet")
    documents, report = load(tmp_path / "r.parquet", max_bad_rows=1)
    assert report.forms == {"messages": 1, "text": 1, "input_ids": 1}
    assert report.first_bad[FORMAT].startswith(f"{tmp_path / 'r.parquet'}, row 4: ") and len(documents) == 3


@pytest.mark.parametrize(
    "source, expected",
    [
        ({"path": "a", "datasets": "b"}, "data.sources[0] has both of path and datasets"),
        ({"path": "a", "wieght": 2}, "data.sources[0].wieght is not a key; did you mean data.sources[0].weight?"),
        ({"path": "a", "weight": 0}, "data.sources[0].weight: got 0 (int); it should be greater than 0"),
        ({"datasets": "a", "format": "text"}, "data.sources[0].format is text, which is of files"),
        ("hf:", "data.sources[0].datasets: got '' (str); give a non-empty string"),
    ],
)
def test_a_source_with_a_mistake_is_one_clear_line(source: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_sources([source])
    assert str(caught.value).startswith(expected)


def test_a_format_overrules_the_extension(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.txt", {"text": "good"})
    assert [TOKENIZER.decode(d.input_ids) for d in load({"path": str(path), "format": "jsonl"})[0]] == ["good"]
    (as_text,), _ = load({"path": str(write_lines(tmp_path / "r.jsonl", {"text": "good"})), "format": "text"})
    assert TOKENIZER.decode(as_text.input_ids) == '{"text": "good"}\n'


TOOL_TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool_row(name: str, arguments: dict[str, Any], properties: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    parameters = {"type": "object", "properties": properties}
    return {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
        "chat_template_kwargs": kwargs,
    }


def test_tool_calls_and_schemas_of_a_table_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    import datasets

    rows = [
        tool_row("weather", {"city": "Paris"}, {"city": {"type": "string"}}, think=True),
        tool_row("add", {"n": 1, "m": [{"a": 2}, {"b": [None]}]}, {"n": {"type": "integer", "minimum": 0}}, brief=True),
    ]
    (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
    encoder = {"chat_template": str(tmp_path / "tools.jinja")}
    expected, _ = load(write_lines(tmp_path / "r.jsonl", *rows), **encoder)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    assert next(iter(datasets.Dataset.from_parquet(str(tmp_path / "r.parquet"))))["chat_template_kwargs"] == {
        "think": True,
        "brief": None,
    }, "a table has the fields of all rows in each, or this shows nothing"
    documents, _ = load(tmp_path / "r.parquet", **encoder)
    assert [TOKENIZER.decode(d.input_ids) for d in documents] == [TOKENIZER.decode(d.input_ids) for d in expected]
    assert '"arguments": {"city": "Paris"}' in TOKENIZER.decode(documents[0].input_ids)


def test_a_table_without_rows_gives_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = pa.table({"text": pa.array([], pa.string())})
    with pq.ParquetWriter(tmp_path / "first.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(pa.table({"text": ["a text", "another"]}))
    with pq.ParquetWriter(tmp_path / "no_group.parquet", empty.schema):
        pass
    good = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    for name, count in (("no_group.parquet", 0), ("first.parquet", 2)):
        documents, report = load(tmp_path / name, good)
        assert len(documents) == count + 1 and report.files == 2, name


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}"])
def test_plain_prompts_and_completions_need_no_chat_template_and_chats_do(template: str | None, tmp_path: Path) -> None:
    plain = {"prompt": "2 + 2 =", "completion": " 4"}
    without = make_byte_tokenizer()
    without.chat_template = template
    options = {"tokenizer": without}
    path = write_lines(tmp_path / "r.jsonl", plain)
    assert [d.key for d in load(path, **options)[0]] == [d.key for d in load(path)[0]]
    with pytest.raises(ValueError, match="chat template"):
        load(write_lines(tmp_path / "r.jsonl", plain, {"messages": CHAT}), max_bad_rows=9, **options)
