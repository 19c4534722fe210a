"""Answers of a model in this process: the draws of a slow sampler, whatever the batch and however often it is killed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peagle_train.answers.answers import Answer
from peagle_train.answers.chat_local import KeyedSampling, LocalChat, nucleus
from tests.tiny import VOCAB
from tests.tiny_chat import END, TURN, make_chat_target
from tools.regenerate import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def load(folder: Path) -> Iterator[Any]:
    def load(**options: Any) -> LocalChat:
        settings = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "batch_size": 8, "dtype": "float64"}
        return LocalChat.load(str(folder), **{**settings, **options})

    yield load


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CHATS = [
    [user("w1")],
    [user("w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12")],
    [user("w1 w2"), {"role": "assistant", "content": "w3"}, user("w4")],
    [user("w20 w21 w22")],
    [user("w1 w1")],
]
SEEDS = [11, 12, 13, 14, 15]


@torch.no_grad()
def slow_answer(folder: Path, ids: list[int], seed: int, temperature: float, top_p: float, max_tokens: int) -> Answer:
    """One token at a time, the whole text anew each time, alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    while len(new) < max_tokens:
        scores = model(torch.tensor([ids + new])).logits[0, -1].float()
        if temperature > 0:
            chances = (scores / temperature).softmax(-1)
            kept: set[int] = set()
            for token in sorted(range(VOCAB), key=lambda t: -float(chances[t])):
                if sum(float(chances[t]) for t in kept) < top_p:
                    kept.add(token)
            noise = torch.empty(VOCAB, dtype=torch.float64).exponential_(generator=generator)
            race = [float(noise[t] / chances[t].double()) if t in kept else float("inf") for t in range(VOCAB)]
            new.append(race.index(min(race)))  # the first of exponential clocks to ring is drawn with its own chance
        else:
            new.append(int(scores.argmax()))
        if new[-1] in (3, 4, 5, END):
            return Answer(" ".join(f"w{i}" for i in new[:-1] if i != TURN), "stop", tokens=len(new))
    return Answer(" ".join(f"w{i}" for i in new if i != TURN), "length", tokens=len(new))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.6)])
def test_answers_are_those_of_a_slow_sampler_alone_whatever_the_batch(
    folder: Path, load: Any, temperature: float, top_p: float
) -> None:
    chat = load(temperature=temperature, top_p=top_p)
    expected = [
        slow_answer(folder, chat.prompt_ids(messages), seed, temperature, top_p, 9)
        for messages, seed in zip(CHATS, SEEDS)
    ]
    assert chat.answer(CHATS, SEEDS) == expected
    assert [answer for m, s in zip(CHATS, SEEDS) for answer in chat.answer([m], [s])] == expected
    assert chat.answer(CHATS[3::-1], SEEDS[3::-1]) == expected[3::-1]
    if temperature == 1.0:
        assert {answer.finish_reason for answer in expected} == {"stop", "length"}
        assert chat.answer(CHATS, [seed + 100 for seed in SEEDS]) != expected


def test_sampling_leaves_the_global_generator_alone(load: Any) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load().answer(CHATS, SEEDS)
    assert torch.equal(torch.rand(3), expected)


def test_draws_have_the_chances_of_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    count = 20_000
    drawn = KeyedSampling(range(count), 0.5, 1.0)(torch.empty(0), scores.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    assert torch.allclose(shares, (scores[0] / 0.5).softmax(-1), atol=0.01)
    drawn = KeyedSampling(range(count), 1.0, 0.7)(torch.empty(0), scores.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    assert torch.allclose(shares, torch.tensor([0.7311, 0.2689, 0, 0, 0]), atol=0.01)


@pytest.mark.parametrize(
    "top_p, kept", [(1e-9, [1]), (0.49, [1]), (0.51, [1, 2]), (0.8, [1, 2, 0]), (0.99, [1, 2, 0, 3])]
)
def test_the_nucleus_holds_the_token_that_gets_there(top_p: float, kept: list[int]) -> None:
    scores = torch.tensor([[0.15, 0.5, 0.25, 0.1], [0.1, 0.15, 0.25, 0.5]]).log()
    inside = torch.isfinite(nucleus(scores, top_p))
    assert set(inside[0].nonzero().flatten().tolist()) == set(kept)
    assert inside[0].sum() == inside[1].sum()


def test_chats_that_do_not_fit_or_that_the_template_does_not_take_are_refused_and_the_others_answered(
    load: Any,
) -> None:
    chat = load()
    long = [user("w1 " * 60)]
    tool = [{"role": "tool", "content": "w1"}]
    answers = chat.answer([long, CHATS[0], tool, CHATS[1]], [1, SEEDS[0], 2, SEEDS[1]])
    assert [a.finish_reason == "refused" for a in answers] == [True, False, True, False]
    assert answers[0].detail == "63 tokens and 9 of answer are more than the target's 64"
    assert "no tools here" in answers[2].detail
    assert answers[1::2] == chat.answer(CHATS[:2], SEEDS[:2])
    assert [a.finish_reason for a in chat.answer([long], [0])] == ["refused"]


def test_variables_reach_the_chat_template(load: Any) -> None:
    assert load().prompt_ids([user("w2")]) == [TURN, 2, END, TURN]
    assert load(template_kwargs={"think": True}).prompt_ids([user("w2")]) == [TURN, 2, END, TURN, 1]


def write_prompts(path: Path) -> str:
    turns = [[f"w{i} w{i + 1}", "w3 w4", "w5"][: 1 + i % 3] for i in range(7)]
    path.write_text("".join(json.dumps({"id": i, "turns": turn}) + "\n" for i, turn in enumerate(turns)))
    return str(path)


def test_a_run_that_dies_at_any_answer_gives_the_same_bytes_when_it_is_started_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, whole = write_prompts(tmp_path / "p.jsonl"), tmp_path / "whole.jsonl"
    more = ["--target", str(folder), "--dtype", "float64", "--max-tokens", "16", "--batch-size", "3"]
    command = [prompts, *more, "--temperature", "30", "--seed", "1", "--out"]
    calls: list[list[list[dict[str, str]]]] = []
    answer = LocalChat.answer
    die_at = -1

    class Death(BaseException):
        pass

    def counted(self: LocalChat, conversations: Any, seeds: Any) -> list[Answer]:
        if len(calls) == die_at:
            raise Death
        calls.append(conversations)
        return answer(self, conversations, seeds)

    monkeypatch.setattr(LocalChat, "answer", counted)
    assert main([*command, str(whole)]) == 0
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert rows[0]["generated"]["model"] == folder.name and {len(row["messages"]) for row in rows} >= {2, 4}
    assert len({len(call) for call in calls}) > 1
    asked = list(calls)
    for die_at in range(len(asked)):
        calls.clear()
        out = tmp_path / f"out{die_at}.jsonl"
        with pytest.raises(Death):
            main([*command, str(out)])
        journal = tmp_path / f"out{die_at}.jsonl.journal"
        lines = journal.read_bytes().splitlines(keepends=True)
        if len(lines) > 1:  # as if it had died while it wrote a batch's last row
            journal.write_bytes(b"".join(lines)[:-5])
        limit, die_at = die_at, -1
        assert main([*command, str(out)]) == 0
        assert out.read_bytes() == whole.read_bytes(), limit
    capsys.readouterr()


def test_targets_that_cannot_be_asked_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl")
    for name in ("no_template", "no_tokenizer", "no_weights"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no_tokenizer" / file).unlink()
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    for name, expected in [
        ("no_template", "has no chat template"),
        ("no_tokenizer", "has no usable tokenizer"),
        ("no_weights", "has no .safetensors weights"),
        ("nothing", "is no folder"),
    ]:
        out = tmp_path / "out.jsonl"
        assert main([prompts, "--out", str(out), "--target", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1] and "Traceback" not in error
    assert main([prompts, "--out", str(tmp_path / "o"), "--target", str(folder), "--batch-size", "0"]) == 2
    assert "--batch-size is 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("o*.journal"))


def test_another_target_or_batch_size_does_not_go_on_with_a_journal(folder: Path, load: Any, tmp_path: Path) -> None:
    chat = load()
    identity = chat.identity(str(folder))
    shutil.copytree(folder, tmp_path / folder.name)
    assert LocalChat.identity(chat, str(tmp_path / folder.name)) == identity
    (tmp_path / folder.name / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert LocalChat.identity(chat, str(tmp_path / folder.name)) != identity
    assert load(batch_size=3).identity(str(folder)) != identity
    assert load(dtype="float32").identity(str(folder)) != identity
