"""Rows of data in every form that people have them in: what is read, what is counted, what stops a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peagle_train.config import parse_sources
from peagle_train.data.chat import ChatEncoder
from peagle_train.data.documents import Document, SourceReport, load_documents
from peagle_train.data.messages import as_in_json
from peagle_train.data.packing import pack_documents, times_an_epoch
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def load(*sources: Any, **options: Any) -> tuple[list[Document], SourceReport]:
    options = {
        "tokenizer": TOKENIZER,
        "vocab_size": BYTES_VOCAB,
        "make_chat": lambda: ChatEncoder(TOKENIZER),
        **options,
    }
    specs = parse_sources([str(source) if isinstance(source, Path) else source for source in sources])
    return load_documents(specs, **options)


def write_lines(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def learned(document: Document) -> str:
    return TOKENIZER.decode(document.input_ids[document.loss_mask == 1])


@pytest.mark.parametrize(
    "row, text, what_is_learned",
    [
        (
            {"messages": CHAT},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n",
            "hello<|im_end|>",
        ),
        (
            {"conversations": SHAREGPT},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n",
            "hello<|im_end|>",
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n",
            "hello<|im_end|>",
        ),
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
    assert report.forms == {next(iter(row)): 1} and report.several_forms == 0


def test_one_file_may_mix_forms_and_the_same_chat_in_two_of_them_is_one_document(tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT},
        {"text": "plain"},
        {"conversations": SHAREGPT},
        {"input_ids": [1, 2]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ]
    documents, report = load(write_lines(tmp_path / "r.jsonl", *rows))
    assert [document.name for document in documents] == ["r.jsonl:1", "r.jsonl:2", "r.jsonl:4"]
    assert report.duplicates == 2 and report.forms == {"messages": 1, "text": 1, "input_ids": 1}
    assert "(1 messages, 1 text, 1 input_ids)" in report.describe()


def test_a_row_with_several_forms_is_read_as_the_first_of_them_and_that_is_said(tmp_path: Path) -> None:
    everything = {"text": "a", "prompt": "b", "completion": "c", "conversations": SHAREGPT, "messages": CHAT}
    rows = [
        {**everything, "input_ids": [7, 8]},
        everything,
        {"text": "only this", "prompt": "without a completion"},
        {"text": "tt", "prompt": "pp", "completion": "cc"},
    ]
    documents, report = load(write_lines(tmp_path / "r.jsonl", *rows))
    assert [learned(d)[-16:] for d in documents] == [
        TOKENIZER.decode([8]),
        "hello<|im_end|>",
        "nly this",
        "cc<|im_end|>",
    ]
    assert report.several_forms == 3
    assert "3 rows of several forms read as the first of input_ids, messages, conversations, prompt, text" in (
        report.describe()
    )
    assert {"text", "prompt", "conversations"} <= set(report.ignored_keys)


BAD = {
    b'{"text": "broken': "broken JSON",
    b"[1, 2]": "no known form",
    b'{"question": "?"}': "no known form",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": null}': "null field",
    b'{"text": 5}': "wrong types",
    json.dumps({"text": "x" * 10_000_000}).encode(): "text too long",
    json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}, CHAT[1]]}).encode(): "text too long",
    b'{"input_ids": [1, 300]}': "id out of range",
    b'{"input_ids": [1, -1]}': "id out of range",
    b'{"input_ids": [1, null]}': "null field",
    b'{"input_ids": null}': "null field",
    b'{"input_ids": [1, 299]}': "holds the mask token",
    b'{"input_ids": [1, 2], "loss_mask": [1]}': "wrong loss_mask",
    b'{"input_ids": [1, 2], "labels": [1, 2]}': "unread loss mark",
    json.dumps({"messages": [{"role": "robot", "content": "hi"}, CHAT[1]]}).encode(): "wrong roles",
    json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}).encode(): "empty turn",
    json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": None}]}).encode(): "null field",
    json.dumps({"messages": CHAT[:1]}).encode(): "no assistant turn",
    json.dumps({"messages": CHAT[1:]}).encode(): "no supervised token",
    json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": "\ud800"}]}).encode(): "lone surrogate",
    b'{"prompt": "no completion"}': "wrong types",
    b'{"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 0, 0]}': "no supervised token",
    b'{"input_ids": [1, 2, 3, 4], "loss_mask": [1, 0, 0, 0]}': "no supervised token",
    b'{"input_ids": [1]}': "no supervised token",
    b'{"text": "x"}': "no supervised token",
}
LIMITS = {"mask_token_id": 299, "max_characters": 4_000_000}


def test_bad_rows_are_counted_by_reason_with_the_line_of_the_first(tmp_path: Path) -> None:
    lines: list[Any] = [{"text": "a good row"}]
    first: dict[str, int] = {}
    counts: dict[str, int] = {}
    for line, reason in BAD.items():
        lines += [line, {"text": f"good row {len(lines)}"}]
        first.setdefault(reason, len(lines) - 1)
        counts[reason] = counts.get(reason, 0) + 1
    path = write_lines(tmp_path / "r.jsonl", *lines)
    documents, report = load(path, max_bad_rows=len(BAD), **LIMITS)
    assert report.bad_rows == counts and len(documents) == len(BAD) + 1
    assert report.first_bad == {reason: f"{path}, line {line}" for reason, line in first.items()}
    told = report.describe()
    assert f"{len(BAD)} bad rows: " in told and "\n" not in told
    for reason, count in counts.items():
        assert f"{count} {reason} (first: {path}, line {first[reason]})" in told
    with pytest.raises(ValueError, match=f"{len(BAD)} bad rows: .*data.max_bad_rows allows {len(BAD) - 1}") as caught:
        load(path, max_bad_rows=len(BAD) - 1, **LIMITS)
    assert all(f"{count} {reason} (first" in str(caught.value) for reason, count in counts.items())


@pytest.mark.parametrize("line", BAD)
def test_without_leave_the_first_bad_row_stops_with_its_line_and_its_reason(line: bytes, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {"text": "good"}, line, b"{")
    with pytest.raises(ValueError) as caught:
        load(path, **LIMITS)
    text = str(caught.value)
    assert text.startswith(f"{path}, line 2: ") and f"(bad row: {BAD[line]}; data.max_bad_rows is 0" in text
    assert "\n" not in text and len(text) < 500


def test_a_text_file_that_is_not_utf8_is_a_bad_row_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff")
    (tmp_path / "b.txt").write_text("two")
    documents, report = load(tmp_path, max_bad_rows=1)
    assert [d.name for d in documents] == [f"{tmp_path.name}/b.txt"]
    assert report.first_bad == {"not UTF-8": f"{tmp_path / 'a.txt'}, line 2"}


def test_whatever_keys_and_files_are_called_the_report_can_be_written(tmp_path: Path) -> None:
    rows = [{"text": "abc def", "\ud800": 1, "k" * 100: 2}, {"text": "bad", "\ud800": 1, "input_ids": None}]
    folder = tmp_path / os.fsdecode(b"d\xff\xc3\xbc")
    folder.mkdir()
    _, report = load(write_lines(folder / "r.jsonl", *rows), max_bad_rows=1)
    told = report.describe()
    assert f"{tmp_path}/d\\udcff\u00fc/r.jsonl, line 2" in told
    assert r"\ud800" in told and "k" * 57 + "..." in told and "k" * 58 not in told
    told.encode("utf-8")


def test_some_of_the_ignored_keys_are_told_and_the_same_ones_whatever_the_batches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "r.jsonl", *({"text": f"text {i}", f"key {99 - i}": 1} for i in range(50)))
    told = load(path)[1].describe()
    assert "keys ignored: key 79, key 80, " in told and told.endswith("key 98 and others")
    monkeypatch.setattr("peagle_train.data.documents._BATCH_CHARACTERS", 60)
    assert load(path)[1].describe() == told
    path = write_lines(tmp_path / "r.jsonl", *({"text": f"text {i}", f"key {99 - i}": 1} for i in range(20)))
    assert load(path)[1].describe().endswith("key 98, key 99")


def test_a_broken_list_of_rows_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}])[:-1])
    good = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    documents, report = load(path, good, max_bad_rows=1)
    assert len(documents) == 1 and report.first_bad == {"broken JSON": str(path)}
    path.write_text(json.dumps([{"text": "one"}, 5, {"text": "two"}], indent=2))
    documents, report = load(path, max_bad_rows=1)
    assert len(documents) == 2 and report.first_bad == {"no known form": f"{path}, row 2"}


def test_values_nested_without_end_are_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    lines = [b'{"%s": %s%s}' % (key, b"[" * 5000, b"]" * 5000) for key in (b"messages", b"text", b"input_ids", b"x")]
    documents, report = load(write_lines(tmp_path / "r.jsonl", {"text": "good"}, *lines), max_bad_rows=4)
    assert len(documents) == 1 and sum(report.bad_rows.values()) == 4


def test_data_of_nothing_but_bad_rows_is_refused_with_their_reasons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no token: 1 files, 0 empty documents, 2 bad rows: 2 broken JSON"):
        load(write_lines(tmp_path / "r.jsonl", b"{", b"["), max_bad_rows=9)


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
    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "named").mkdir()
    table.to_parquet(tmp_path / "named" / "train.parquet")
    table.to_parquet(tmp_path / "rows [1]*.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table.select([0]), "all": table}).save_to_disk(tmp_path / "splits")
    expected, report = load(path)
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (
        tmp_path / "list.json",
        tmp_path / "lines.json",
        tmp_path / "rows [1]*.parquet",
        arrow,
        tmp_path / "saved",
        {"path": str(tmp_path / "splits"), "split": "all"},
        f"hf:{tmp_path / 'named'}",
        {"datasets": str(tmp_path / "named"), "split": "train", "streaming": True},
        {"path": str(tmp_path / "named"), "format": "parquet"},
    ):
        documents, other = load(source)
        assert [d.key for d in documents] == [d.key for d in expected], source
        assert (other.forms, other.ignored_keys) == (report.forms, report.ignored_keys)
    assert len(load(tmp_path / "splits")[0]) == 1
    with pytest.raises(ValueError, match=r"cannot read .*splits \(saved\): .*no split test, only train, all"):
        load({"path": str(tmp_path / "splits"), "split": "test"})
    with pytest.raises(ValueError, match="cannot read no/such-set"):
        load("hf:no/such-set")


def test_a_null_column_of_a_table_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(
        [
            {"messages": CHAT, "text": None, "input_ids": None, "loss_mask": None},
            {"messages": None, "text": "plain", "input_ids": None, "loss_mask": None},
            {"messages": None, "text": None, "input_ids": [1, 2, 3], "loss_mask": None},
            {"messages": None, "text": None, "input_ids": None, "loss_mask": None},
        ]
    )
    table.to_parquet(tmp_path / "r.parquet")
    documents, report = load(tmp_path / "r.parquet", max_bad_rows=1)
    assert report.forms == {"messages": 1, "text": 1, "input_ids": 1} and report.several_forms == 0
    assert report.first_bad == {"null field": f"{tmp_path / 'r.parquet'}, row 4"} and len(documents) == 3


def test_reading_jsonl_and_text_imports_no_datasets(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {"input_ids": [1, 2, 3]})
    code = (
        "import sys\nfrom peagle_train.data.training_data import load_training_data\n"
        "from peagle_train.data.documents import load_documents\n"
        f"load_documents([{str(path)!r}], tokenizer=None, vocab_size=9)\nsys.exit('datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_weight_says_how_often_each_document_comes_and_its_key_decides_about_the_rest() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (4000, 32), dtype=np.uint8)
    for weight, whole, share in ((1.0, 1, 0.0), (0.5, 0, 0.5), (2.0, 2, 0.0), (2.25, 2, 0.25)):
        times = times_an_epoch(keys, np.full(4000, weight))
        assert set(times.tolist()) <= {whole, whole + 1}
        assert float((times == whole + 1).mean()) == pytest.approx(share, abs=0.03)
        assert np.array_equal(times[100:200], times_an_epoch(keys[100:200], np.full(100, weight)))
        more = times_an_epoch(keys, np.full(4000, weight + 0.1))
        assert (more >= times).all(), "a larger weight only adds"
    mixed = times_an_epoch(keys, np.where(np.arange(4000) < 2000, 0.5, 3.0))
    assert mixed[:2000].max() == 1 and set(mixed[2000:].tolist()) == {3}


def test_rows_of_a_log_normal_mix_of_lengths_are_97_percent_full() -> None:
    lengths = np.random.default_rng(1).lognormal(6.5, 1.2, 3000).astype(int).clip(1, 40_000)
    tokens, mask = torch.zeros(40_000, dtype=torch.int64), torch.ones(40_000, dtype=torch.uint8)
    documents = [Document(tokens[:n], mask[:n], "", f"{i:064x}") for i, n in enumerate(lengths.tolist())]
    rows, report = pack_documents(documents, 4096)
    held = sum(rows[i]["input_ids"].numel() for i in range(len(rows)))
    assert held == lengths.sum() == report.tokens
    assert held / (len(rows) * 4096) >= 0.97 and report.split_documents == int((lengths > 4096).sum()) > 0


def test_a_long_chat_is_split_without_losing_a_token_or_its_mask(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says {i} " * 9} for i in range(5) for role in ("user", "assistant")]
    (chat,), _ = load(write_lines(tmp_path / "r.jsonl", {"messages": turns}))
    rows, report = pack_documents([chat], 101, pack=False)
    assert torch.cat([rows[i]["input_ids"] for i in range(len(rows))]).equal(chat.input_ids)
    assert torch.cat([rows[i]["loss_mask"] for i in range(len(rows))]).equal(chat.loss_mask.long())
    assert (report.split_documents, report.pieces) == (1, -(-chat.input_ids.numel() // 101))


@pytest.mark.parametrize(
    "source, expected",
    [
        ({"path": "a", "datasets": "b"}, "data.sources[0] has both path and datasets"),
        ({"weight": 2}, "data.sources[0] has neither path nor datasets"),
        ({"path": "a", "wieght": 2}, "data.sources[0].wieght is not a key; did you mean data.sources[0].weight?"),
        ({"path": "a", "weight": 0}, "data.sources[0].weight: got 0 (int); give a finite number > 0 and <= 1000"),
        ({"path": "a", "weight": ".nan"}, "data.sources[0].weight: got '.nan'"),
        ({"path": "a", "format": "csv"}, "data.sources[0].format: got 'csv' (str); give one of auto, text, jsonl"),
        ({"datasets": "a", "format": "text"}, "data.sources[0].format is text, which is of files"),
        ("hf:", "data.sources[0].datasets: got '' (str); give a non-empty string"),
    ],
)
def test_a_source_with_a_mistake_is_one_clear_line(source: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_sources([source])
    assert str(caught.value).startswith(expected)


def test_a_split_of_something_that_has_none_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    with pytest.raises(ValueError, match="no data set with splits and names"):
        load({"path": str(path), "split": "test"})


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
    encoder = {"make_chat": lambda: ChatEncoder(TOKENIZER, TOOL_TEMPLATE)}
    expected, _ = load(write_lines(tmp_path / "r.jsonl", *rows), **encoder)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    assert next(iter(datasets.Dataset.from_parquet(str(tmp_path / "r.parquet"))))["chat_template_kwargs"] == {
        "think": True,
        "brief": None,
    }, "a table has the fields of all rows in each, or this shows nothing"
    documents, _ = load(tmp_path / "r.parquet", **encoder)
    assert [TOKENIZER.decode(d.input_ids) for d in documents] == [TOKENIZER.decode(d.input_ids) for d in expected]
    assert '"arguments": {"city": "Paris"}' in TOKENIZER.decode(documents[0].input_ids)


def test_null_stays_in_a_table_as_an_item_of_a_list_and_as_a_messages_own_field() -> None:
    row = {
        "tools": [{"enum": [None, "a"], "x": None}],
        "messages": [{"role": "user", "content": None, "meta": {"x": None}}],
    }
    assert as_in_json({**row, "text": None}) == {
        "tools": [{"enum": [None, "a"]}],
        "messages": [{"role": "user", "content": None, "meta": {}}],
    }


def test_a_sequence_of_mappings_is_read_as_the_list_that_it_stands_for(tmp_path: Path) -> None:
    import datasets

    call = {"id": datasets.Value("string"), "function": {"name": datasets.Value("string")}}
    message = {name: datasets.Value("string") for name in ("role", "content")}
    features = datasets.Features({"messages": datasets.Sequence({**message, "tool_calls": datasets.Sequence(call)})})
    calls = [{"id": "1", "function": {"name": "f"}}, {"id": "2", "function": {"name": "g"}}]
    rows = [{"messages": [{**CHAT[0], "tool_calls": []}, {**CHAT[1], "tool_calls": calls}]}]
    columns = {name: [message[name] for message in CHAT] for name in ("role", "content")}
    called = [{"id": [], "function": []}, {name: [call[name] for call in calls] for name in ("id", "function")}]
    table = datasets.Dataset.from_list([{"messages": {**columns, "tool_calls": called}}], features=features)
    table.save_to_disk(tmp_path / "saved")
    encoder = {"make_chat": lambda: ChatEncoder(TOKENIZER, TOOL_TEMPLATE)}
    (read,), _ = load(tmp_path / "saved", **encoder)
    (expected,), _ = load(write_lines(tmp_path / "r.jsonl", *rows), **encoder)
    assert TOKENIZER.decode(read.input_ids) == TOKENIZER.decode(expected.input_ids) and read.key == expected.key
    uneven = {"messages": {"role": ["user", "assistant"], "content": ["hi"]}}
    datasets.Dataset.from_list([uneven]).to_parquet(tmp_path / "uneven.parquet")
    with pytest.raises(ValueError, match="messages is a dict, not a list of messages"):
        load(tmp_path / "uneven.parquet")


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_data_set_saved_with_a_format_is_read_like_any_other(form: str, tmp_path: Path) -> None:
    import datasets

    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4, 5], "loss_mask": [0, 1]}]
    table = datasets.Dataset.from_list(rows)
    table.set_format(form)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    expected, _ = load(write_lines(tmp_path / "r.jsonl", *rows))
    for name in ("saved", "splits"):
        assert [d.key for d in load(tmp_path / name)[0]] == [d.key for d in expected]


def test_a_table_without_rows_gives_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "nothing.parquet")
    with pq.ParquetWriter(tmp_path / "first.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(pa.table({"text": ["a text", "another"]}))
    with pq.ParquetWriter(tmp_path / "no_group.parquet", empty.schema):
        pass
    good = write_lines(tmp_path / "r.jsonl", {"text": "good"})
    for name, count in (("nothing.parquet", 0), ("no_group.parquet", 0), ("first.parquet", 2)):
        documents, report = load(tmp_path / name, good)
        assert len(documents) == count + 1 and report.files == 2, name


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}"])
def test_plain_prompts_and_completions_need_no_chat_template_and_chats_do(template: str | None, tmp_path: Path) -> None:
    plain = {"prompt": "2 + 2 =", "completion": " 4"}
    without = make_byte_tokenizer()
    without.chat_template = template
    options = {"tokenizer": without, "make_chat": lambda: ChatEncoder(without)}
    path = write_lines(tmp_path / "r.jsonl", plain)
    assert [d.key for d in load(path, **options)[0]] == [d.key for d in load(path)[0]]
    assert ChatEncoder(without).notices == []
    with pytest.raises(ValueError, match="chat template"):
        load(write_lines(tmp_path / "r.jsonl", plain, {"messages": CHAT}), max_bad_rows=9, **options)


FINGERPRINT = "176198b023aebea4290c8876c76cb5ba79d4550b051f6d26564524dc674839a5"


def test_a_chats_fingerprint_is_that_of_earlier_releases_and_looks_at_no_template() -> None:
    without = make_byte_tokenizer()
    without.chat_template = None
    prints = {ChatEncoder(TOKENIZER).fingerprint, ChatEncoder(without).fingerprint}
    assert len(prints) == 2 and ChatEncoder(TOKENIZER).fingerprint == FINGERPRINT
