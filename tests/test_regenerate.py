"""A prompt set answered anew: by a server that fails, in threads, killed and started again, and by a real model here."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from peagle_train.answers.answers import Answer
from peagle_train.answers.conversation import Settings, answer_seed, converse
from peagle_train.answers.prompts import load_prompts
from peagle_train.data.messages import messages_of
from tests.chat_fake import MODEL, FakeServer, Reply, completion, echo, serving
from tests.helpers import ENVIRONMENT, ROOT
from tools.regenerate import main

TOOL = str(ROOT / "tools" / "regenerate.py")
QUESTIONS = [{"id": f"q{i}", "turns": [f"first {i}", f"second {i}"][: 1 + i % 2]} for i in range(7)]
"""10 answers."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(server: FakeServer, prompts: str, out: Path, *more: str) -> list[str]:
    return [prompts, "--out", str(out), "--base-url", server.url, "--model", MODEL, "--retry-wait", "0", *more]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def by_text(replies: dict[str, Reply]) -> Any:
    """A reply by the last question's text, "fine" where there is none."""
    return lambda body: replies.get(body["messages"][-1]["content"], completion("fine"))


def test_each_answer_is_the_context_of_the_next_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    row = {"id": 5, "messages": [system, user("a"), assistant("old"), user("b"), assistant("old"), user("c")]}
    replies = by_text({"a": completion("A", reasoning_content="hm"), "b": completion("B"), "c": completion("C")})
    with serving(replies) as server:
        assert main(command(server, write(tmp_path / "p.jsonl", [row]), tmp_path / "out.jsonl", "--seed", "3")) == 0
    asked = [body for _, body in server.requests]
    assert [m["content"] for m in asked[2]["messages"]] == ["be brief", "a", "A", "b", "B", "c"]
    assert all(set(m) == {"role", "content"} for body in asked for m in body["messages"])
    assert [body["seed"] for body in asked] == [answer_seed(3, 0, turn) for turn in range(3)]
    [written] = rows_of(tmp_path / "out.jsonl")
    thoughtful = {**assistant("A"), "reasoning_content": "hm"}
    assert written["messages"] == [system, user("a"), thoughtful, user("b"), assistant("B"), user("c"), assistant("C")]
    assert written["id"] == "5"
    assert written["generated"] == {
        "model": MODEL,
        "temperature": 0.8,
        "top_p": 1.0,
        "max_tokens": 2048,
        "seed": 3,
        "finish_reasons": ["stop", "stop", "stop"],
    }


def test_only_the_last_question_is_answered_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [user("a"), assistant("old"), user("b"), assistant("old")]}, {"turns": ["a", "b"]}]
    with serving() as server:
        out = tmp_path / "out.jsonl"
        assert main(command(server, write(tmp_path / "p.jsonl", rows), out, "--last-turn")) == 0
    assert [[m["content"] for m in body["messages"]] for _, body in server.requests] == [["a", "old", "b"]]
    [written] = rows_of(out)
    assert written["messages"][:3] == [user("a"), {**assistant("old"), "weight": 0}, user("b")]
    assert written["messages"][3]["content"].endswith(" b") and "weight" not in written["messages"][3]
    assert "1 dropped (1 no recorded answers)" in capsys.readouterr().out


def test_a_recorded_answer_that_is_empty_is_no_recorded_answer(tmp_path: Path) -> None:
    """Training refuses a row with an empty turn of the assistant, even one of weight 0."""
    thoughtful = {**assistant(""), "reasoning_content": "hm"}
    given = [assistant(""), assistant(" \n"), thoughtful]
    rows = [{"messages": [user("a"), answer, user("b")]} for answer in given]
    with serving() as server:
        assert main(command(server, write(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl", "--last-turn")) == 0
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["dropped"] == {"no recorded answers": 2} and len(server.requests) == 1
    [written] = rows_of(tmp_path / "out.jsonl")
    read = messages_of(written)
    assert [message["content"] for message in read.messages[:3]] == ["a", "", "b"] and read.learned[-1]


def test_a_prompt_with_half_of_a_surrogate_pair_is_skipped_and_counted(tmp_path: Path) -> None:
    with serving() as server:
        prompts = write(tmp_path / "p.jsonl", [{"prompt": "x\ud800"}, {"prompt": "b"}])
        assert main(command(server, prompts, tmp_path / "out.jsonl")) == 0
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["2"] and len(server.requests) == 1
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["skipped"] == {"lone surrogate": 1}


def test_variables_of_the_chat_template_go_to_the_server_and_into_the_row(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    with serving() as server:
        assert main(command(server, prompts, out, "--chat-template-kwargs", '{"enable_thinking": false}')) == 0
        assert main(command(server, prompts, tmp_path / "plain.jsonl")) == 0
    first, second = (body for _, body in server.requests)
    assert first["chat_template_kwargs"] == {"enable_thinking": False} and "chat_template_kwargs" not in second
    assert rows_of(out)[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert set(rows_of(tmp_path / "plain.jsonl")[0]) == {"id", "messages", "generated"}


def test_output_is_in_the_order_of_the_prompts_whatever_the_order_of_the_answers(tmp_path: Path) -> None:
    """Each first question but the last waits until the last one has been asked."""
    last_asked = threading.Event()
    first = {f"first {i}" for i in range(6)}

    def respond(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] in first:
            assert last_asked.wait(60)
        else:
            last_asked.set()
        return echo(body)

    prompts = write(tmp_path / "p.jsonl", QUESTIONS)
    with serving(respond) as server:
        assert main(command(server, prompts, tmp_path / "many.jsonl", "--concurrency", "7")) == 0
    with serving() as server:
        assert main(command(server, prompts, tmp_path / "one.jsonl", "--concurrency", "1")) == 0
    assert [row["id"] for row in rows_of(tmp_path / "one.jsonl")] == [f"q{i}" for i in range(7)]
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.parametrize("kill_at, concurrency", [(1, 1), (5, 1), (10, 3)])
def test_a_run_that_is_killed_gives_the_same_bytes_when_it_is_started_again(
    tmp_path: Path, kill_at: int, concurrency: int
) -> None:
    prompts = write(tmp_path / "p.jsonl", QUESTIONS)
    started: list[subprocess.Popen[bytes]] = []
    ready = threading.Event()
    count = iter(range(1, 1000))

    def kill(body: dict[str, Any]) -> Reply:
        if next(count) == kill_at:
            assert ready.wait(60)
            started[0].send_signal(signal.SIGKILL)
            started[0].wait()
        return echo(body)

    out, more = tmp_path / "out.jsonl", ("--concurrency", str(concurrency))
    with serving(kill) as server:
        started.append(subprocess.Popen([sys.executable, TOOL, *command(server, prompts, out, *more)], env=ENVIRONMENT))
        ready.set()
        assert started[0].wait() == -signal.SIGKILL
        assert not out.exists() and (tmp_path / "out.jsonl.journal").exists()
        server.respond = echo
        assert main(command(server, prompts, out, *more)) == 0
        assert main(command(server, prompts, tmp_path / "whole.jsonl", *more)) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    report = "out.jsonl.report.json"
    assert json.loads((tmp_path / report).read_bytes()) == json.loads(
        (tmp_path / "whole.jsonl.report.json").read_bytes()
    )
    assert sorted(p.name for p in tmp_path.iterdir() if "whole" not in p.name) == ["out.jsonl", report, "p.jsonl"]


INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupted_run_ends_at_once_with_one_line_and_keeps_what_it_has(tmp_path: Path) -> None:
    """Although another answer is still out, which nobody will read."""
    prompts, out = write(tmp_path / "p.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    started: list[subprocess.Popen[str]] = []
    ready = threading.Event()
    count = iter(range(1, 1000))

    def interrupt(body: dict[str, Any]) -> Reply:
        number = next(count)
        if number == 4:
            assert ready.wait(60)
            started[0].send_signal(signal.SIGINT)
        if number >= 4:
            started[0].wait()
        return echo(body)

    with serving(interrupt) as server:
        line = [sys.executable, "-c", INTERRUPTIBLE, TOOL, *command(server, prompts, out, "--concurrency", "2")]
        started.append(subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True))
        ready.set()
        assert started[0].communicate(timeout=120)[1] == "regenerate: interrupted; the same command goes on from here\n"
        assert started[0].returncode == 130
        server.respond = echo
        assert main(command(server, prompts, out)) == 0
    assert len(rows_of(out)) == 7


def test_what_was_answered_before_the_server_failed_is_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "p.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    more = ("--concurrency", "1", "--retries", "1")
    with serving(lambda body: (500, b"") if body["messages"][-1]["content"] == "first 4" else echo(body)) as server:
        assert main(command(server, prompts, out, *more)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "gave no answer in 2 tries; the last: 500" in error
        assert "the same command goes on" in error and not out.exists()
        server.requests.clear()
        server.respond = echo
        assert main(command(server, prompts, out, *more)) == 0
        assert "going on behind 4 of 7 prompts" in capsys.readouterr().out
        assert [body["messages"][0]["content"] for _, body in server.requests] == [
            "first 4",
            "first 5",
            "first 5",
            "first 6",
        ]
        assert main(command(server, prompts, out, *more)) == 0
        assert capsys.readouterr().out == f"{out} is already complete\n"
        assert len(server.requests) == 4


def test_too_many_requests_and_hang_ups_are_survived(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", QUESTIONS)
    bad: list[Reply] = [(429, b""), (200, b"{}", {"Content-Length": "99"}), (200, b"{"), (503, b"")]
    lock = threading.Lock()

    def respond(body: dict[str, Any]) -> Reply:
        with lock:
            return bad.pop() if bad else echo(body)

    with serving(respond) as server:
        assert main(command(server, prompts, tmp_path / "out.jsonl")) == 0
    with serving() as server:
        assert main(command(server, prompts, tmp_path / "good.jsonl")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "good.jsonl").read_bytes()


UNFIT = {
    "loop": completion("na " * 100),
    "cut": completion("half a", "length"),
    "empty": completion(" "),
    "long": (400, b'{"message": "too long"}'),
}


def test_unfit_answers_end_their_conversations_and_are_counted_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [["a"], ["loop"], ["a", "loop", "b"], ["cut", "a"], ["a", "cut"], ["empty"], ["long"], ["a", "long"]]
    rows = [{"id": "-".join(t), "turns": t} for t in turns] + [{"messages": [user("a")], "tools": [{}]}]
    prompts = write(tmp_path / "p.jsonl", rows)
    with serving(by_text(UNFIT)) as server:
        assert main(command(server, prompts, tmp_path / "out.jsonl")) == 0
        assert "b" not in [body["messages"][-1]["content"] for _, body in server.requests]
        said = capsys.readouterr().out
        assert main(command(server, prompts, tmp_path / "kept.jsonl", "--keep-truncated")) == 0
    written = {row["id"]: [m["content"] for m in row["messages"]] for row in rows_of(tmp_path / "out.jsonl")}
    fine = ["a", "fine"]
    assert written == {"a": fine, "a-loop-b": fine, "a-cut": fine, "a-long": fine}
    assert "4 of 8 prompts written, 3 cut short (1 loop, 1 refused, 1 truncated), 4 dropped (1 empty, 1 loop," in said
    assert "1 refused, 1 truncated), 1 skipped (1 tools); 11 answers" in said
    assert said.count("is refused: 400 too long") == 1
    report = json.loads((tmp_path / "out.jsonl.report.json").read_bytes())
    assert report["cut"] == {"loop": 1, "refused": 1, "truncated": 1} and report["skipped"] == {"tools": 1}
    assert report["dropped"] == {"empty": 1, "loop": 1, "refused": 1, "truncated": 1} and report["rows"] == 4
    kept = {row["id"]: [m["content"] for m in row["messages"]] for row in rows_of(tmp_path / "kept.jsonl")}
    assert kept == {**written, "cut-a": ["cut", "half a"], "a-cut": [*fine, "cut", "half a"]}
    assert json.loads((tmp_path / "kept.jsonl.report.json").read_bytes())["cut"] == {
        "loop": 1,
        "refused": 1,
        "truncated": 1,
    }


def test_a_server_that_refuses_everything_stops_the_run_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(50)])
    with serving(lambda _: (400, b'{"message": "no template"}')) as server:
        assert main(command(server, prompts, tmp_path / "out.jsonl", "--concurrency", "1")) == 2
    assert "the first 20 prompts are all refused: 400 no template" in capsys.readouterr().err
    assert 20 <= len(server.requests) < 50 and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_run_without_one_usable_answer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda _: completion("", "length")) as server:
        assert main(command(server, write(tmp_path / "p.jsonl", QUESTIONS), tmp_path / "out.jsonl")) == 2
    assert "no prompt got a usable answer (0 of 7 prompts written, 7 dropped (7 truncated)" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_text_that_utf8_cannot_hold_stays_an_escape(tmp_path: Path) -> None:
    with serving(by_text({"a": completion("x\ud800"), "b": completion("\u00e9")})) as server:
        prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
        assert main(command(server, prompts, tmp_path / "out.jsonl")) == 0
    assert "\u00e9" in (tmp_path / "out.jsonl").read_text()
    assert [row["messages"][1]["content"] for row in rows_of(tmp_path / "out.jsonl")] == ["x\ud800", "\u00e9"]


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--temperature", "-1"], "--temperature is -1.0; give 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-p", "0"], "--top-p is 0.0; give more than 0"),
        (["--max-tokens", "0"], "--max-tokens is 0; give 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--limit", "0"], "limit of prompts is 0"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--timeout", "0"], "--timeout must be more than 0"),
        (["--chat-template-kwargs", "[1]"], "give a JSON object"),
        (["--target", "dir"], "give --base-url and --model for a server, or --target"),
        (["--model", ""], "--model is missing"),
        (["--model", "huge"], "has no model 'huge'; it has tiny, other"),
        (["--base-url", "nonsense"], "--base-url is no URL"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    with serving() as server:
        prompts = write(tmp_path / "p.jsonl", QUESTIONS)
        assert main(command(server, prompts, tmp_path / "out.jsonl", *more)) == 2
        assert server.requests == []
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and error.startswith("regenerate: error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_the_key_comes_from_the_environment_and_is_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    prompts, out = write(tmp_path / "p.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    replies: list[Reply] = [(401, b'{"error": {"message": "no sk-secret here"}}')]
    with serving(lambda body: replies[0] if replies else echo(body)) as server:
        assert main(command(server, prompts, out, "--api-key-env", "MY_KEY", "--concurrency", "1")) == 2
        replies.clear()
        assert main(command(server, prompts, out, "--api-key-env", "MY_KEY")) == 0
        assert {headers["Authorization"] for headers, _ in server.requests} == {"Bearer sk-secret"}
    shown = "".join(capsys.readouterr()) + "".join(p.read_text() for p in tmp_path.iterdir())
    assert "--api-key-env" in shown and "sk-secret" not in shown


@pytest.mark.parametrize("change", [["--seed", "1"], ["--limit", "6"], ["--temperature", "0"], ["--last-turn"]])
def test_a_journal_of_another_command_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    prompts, out = write(tmp_path / "p.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    with serving(lambda body: (401, b"") if body["messages"][-1]["content"] == "first 4" else echo(body)) as server:
        assert main(command(server, prompts, out)) == 2
        capsys.readouterr()
        assert main(command(server, prompts, out, *change)) == 2
    assert "out.jsonl.journal was begun with" in capsys.readouterr().err


def test_seeds_differ_by_run_prompt_and_turn_and_fit_31_bits() -> None:
    seeds = [answer_seed(seed, row, turn) for seed in range(5) for row in range(5) for turn in range(5)]
    assert len(set(seeds)) == 125 and all(0 <= seed < 2**31 for seed in seeds)


def test_help_answers_without_heavy_imports() -> None:
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print(sorted({{"torch", "transformers", "tqdm"}} & set(sys.modules))))
sys.argv = ["regenerate", "--help"]
runpy.run_path({TOOL!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "--base-url" in done.stdout and done.stdout.endswith("[]\n")


def test_a_conversation_is_a_function_of_its_answers_alone(tmp_path: Path) -> None:
    """The same prompt object can be asked twice, and nothing of the first time is left in it."""
    [prompt] = load_prompts(write(tmp_path / "p.jsonl", [{"turns": ["a", "b"]}]))
    outcomes = []
    for _ in range(2):
        conversation = converse(prompt, 0, "m", Settings())
        assert next(conversation).messages == [user("a")]
        assert conversation.send(Answer("A")).messages == [user("a"), assistant("A"), user("b")]
        with pytest.raises(StopIteration) as end:
            conversation.send(Answer("B", tokens=2))
        outcomes.append(end.value.value)
    assert outcomes[0] == outcomes[1] and outcomes[0]["answers"] == 2 and outcomes[0]["tokens"] == 2
