"""From prompts to a report: checks of the text, sets and turns, the command line over files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peagle_train.config import Data, dump_recipe, load_recipe
from peagle_train.data.packing import held_out_documents
from peagle_train.decoding import vllm
from peagle_train.decoding.evaluate import check_same_split, describe_table, num_depths
from peagle_train.decoding.generate import CachedTarget, Decoded, lead
from peagle_train.decoding.measure import (
    ALL,
    TIE_TOLERANCE,
    Case,
    Drafted,
    Measurement,
    Result,
    Settings,
    checks,
    compare,
    load_cases,
    summarize,
)
from peagle_train.decoding.replay import Tally
from peagle_train.regenerate import Prompt
from peagle_train.serving.export import read_run
from peagle_train.target_model.frozen import FrozenTarget
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_tokenizer
from tests.documents import load_documents, table_of
from tests.helpers import command, make_draft, seeded
from tests.test_generate import greedy_by_hand, tiny_draft
from tests.tiny import MASK, VOCAB, write_recipe, write_rows
from tests.tiny import make_target as make_llama
from tests.tiny_chat import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def llama(folder: Path) -> FrozenTarget:
    return FrozenTarget.load(str(folder), dtype="float64")


class Words:
    """A tokenizer of numbers: "5 9" is the ids 5 and 9; a chat is its contents, each after the token 1."""

    chat_template = "as below"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [i for m in messages for i in [1, *map(int, m["content"].split())]]


def cases(n: int, data_set: str = "first", seed: int = 0) -> list[Case]:
    ids = torch.randint(0, MASK, (n, 6), generator=seeded(seed)).tolist()
    return [Case(str(i), data_set, tuple(row)) for i, row in enumerate(ids)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_measurement_has_every_k_and_its_texts_are_the_targets(llama, temperature):
    settings = Settings(num_slots=3, max_tokens=20, temperature=temperature)
    measurement = Measurement(llama, [(tiny_draft(), 4), (tiny_draft(seed=8), 2)], settings)
    results = measurement([*cases(3), *cases(2, "second", seed=1)])
    summary = summarize(results, 0, seed=0)
    assert list(summary) == ["first", "second", ALL]
    assert [row["k"] for row in summary[ALL]["by_k"]] == [1, 2, 3, 4]
    assert [len(rows) for rows in compare(results, seed=0).values()] == [2, 2, 2]
    found = checks(results)
    if temperature == 0:
        assert found["texts"] == {"same": 5, "tie": 0, "bug": 0, "none": 0} and not found["replays_that_differ"]
        assert [tuple(r.prompt) for r in results] == [c.ids for c in [*cases(3), *cases(2, "second", seed=1)]]
        for result in results:
            assert result.tokens == greedy_by_hand(llama, result.prompt, 20)
            assert result.run == result.drafted[0].by_k[2]
    else:
        assert found["texts"]["none"] == 5
    for row in summary[ALL]["by_k"]:
        # the length is 1 plus what its positions say, as no text ended
        assert row["accepted_length"] == pytest.approx(1 + sum(row["accepted_by_position"]))
    assert len(describe_table(summary).splitlines()) == 1 + 3 * 4


def test_the_drafter_runs_in_the_targets_dtype_as_engines_run_it(folder):
    target = FrozenTarget.load(str(folder), dtype="bfloat16")
    [(draft, _)] = Measurement(target, [(tiny_draft(torch.float32), 2)], Settings(num_slots=2)).drafters
    assert {p.dtype for p in draft.parameters()} == {torch.bfloat16}
    assert draft.rotary_emb.inv_freq.dtype == torch.float32


def test_a_prompts_figures_do_not_depend_on_the_others(llama):
    settings = Settings(num_slots=3, max_tokens=12, temperature=1.0)
    alone = Measurement(llama, [(tiny_draft(), 3)], settings)(cases(4)[2:3])
    among = Measurement(llama, [(tiny_draft(), 3)], settings)(cases(4))
    assert replace(alone[0], number=3) == among[2] and alone[0].tokens != among[1].tokens


def test_figures_by_hand():
    def result(id: str, plain: Tally, apart: Tally, tokens: int) -> Result:
        drafted = [Drafted([(plain, apart)], [3.0], [4])]
        return Result(ord(id), id, "set", 0, [5], [0] * tokens, 2, False, (plain, apart), drafted, [], [], {})

    rows = [
        result("a", Tally(4.0, 6.0, (2.0,)), Tally(1.0, 2.0, (1.0,)), 9),
        result("b", Tally(6.0, 7.0, (1.0,)), Tally(0.0, 0.0, (0.0,)), 8),
    ]
    figures = summarize(rows, 0, seed=0)["set"]
    row = figures["by_k"][0]
    assert row["accepted_length"] == 13 / 10 and row["accepted_by_position"] == [0.3]
    assert row["with_repetition"]["accepted_length"] == 15 / 11 and row["in_repetition"]["accepted_length"] == 2
    assert row["tokens_per_target_pass"] == 17 / (11 + 2)
    assert row["interval"][0] >= 7 / 6 and row["interval"][1] <= 6 / 4
    assert figures["teacher_forced_accuracy"] == [0.75] and row["expected_from_teacher_forcing"] == 1.75
    assert row["expected_in_training"] is None


def test_turns_are_asked_one_after_the_other_with_the_targets_own_answers(llama):
    chat = Prompt("q", (({"role": "user", "content": "3 4"},), ({"role": "user", "content": "8"},)), (None, None))
    measurement = Measurement(llama, [(tiny_draft(), 2)], Settings(num_slots=2, max_tokens=5), tokenizer=Words())
    first, second = measurement([Case("q", "chats", chat=chat)])
    assert first.tokens == greedy_by_hand(llama, [1, 3, 4], 5)
    assert second.tokens == greedy_by_hand(llama, [1, 3, 4, 1, *first.tokens, 1, 8], 5)
    figures = summarize([first, second], 0, seed=0)["chats"]
    assert (figures["prompts"], figures["turns"]) == (1, 2) and figures["by_k"][0]["interval"] is None


def test_a_prompt_that_does_not_fit_is_counted_and_left_out(llama):
    long = Case("long", "first", tuple([5] * 250))
    measurement = Measurement(llama, [(tiny_draft(), 2)], Settings(num_slots=2, max_tokens=8))
    results = measurement([long, *cases(1)])
    assert [r.id for r in results] == ["0"]
    assert list(measurement.left_out.values()) == [1] and "256 positions" in next(iter(measurement.left_out))


def test_an_end_token_ends_the_text_and_its_passes(llama):
    prompt = cases(1)[0].ids
    own = greedy_by_hand(llama, prompt, 12)
    eos = frozenset([own[7]])
    end = own.index(own[7]) + 1
    measurement = Measurement(llama, [(tiny_draft(), 3)], Settings(num_slots=3, max_tokens=12), eos=eos)
    result = measurement(cases(1))[0]
    assert result.tokens == own[:end] and result.ended and result.check == {"verdict": "same"}
    assert sum(t.tokens for t in result.run) == end - 1


class Engine:
    """A vLLM that did what it is told to have done."""

    version = "0"

    def __init__(self, did: list[tuple[list[int], list[int]]], counts: bool = True) -> None:
        self.did, self.counted = iter(did), [0, 0, 0] if counts else []

    def counters(self) -> list[int]:
        return self.counted

    def complete(self, prompt: list[int], max_tokens: int, eos: frozenset[int]) -> list[int]:
        tokens, more = next(self.did)
        self.counted = [a + b for a, b in zip(self.counted, more)]
        return tokens


def test_vllm_is_compared_prompt_by_prompt_and_where_it_parts_from_ours_is_said(llama):
    results = Measurement(llama, [(tiny_draft(), 2)], Settings(num_slots=2, max_tokens=9))(cases(4))
    ours = [sum(result.run, Tally()) for result in results]
    counts = [[int(tally.passes), *map(int, tally.accepted)] for tally in ours]
    did = [(list(result.tokens), list(count)) for result, count in zip(results, counts)]
    did[1][0][3] += 1
    did[2][1][0] += 1
    near = replace(results[3], leads=[*results[3].leads[:5], 63.0, *results[3].leads[6:]])
    did[3][0][5] += 1
    report = vllm.measure(Engine(did), None, [*results[:3], near], 9, frozenset(), "float32")
    assert report["prompts"] == {"same": 1, "near_tie": 1, "other": 2}
    assert [(p["id"], p["part_in"], p["ulps"]) for p in report["parted"]] == [
        ("1", "text", results[1].leads[3]),
        ("2", "drafts", min(results[2].draft_leads)),
        ("3", "text", 63.0),
    ]
    passes = sum(count[0] for count in counts)
    assert report["ours"]["passes"] == passes and report["vllm"]["passes"] == passes + 1
    assert report["ours"]["accepted_length"] == pytest.approx(1 + sum(sum(count[1:]) for count in counts) / passes)
    assert "1: other text, ours led by" in vllm.describe_vllm(report)
    engines = Engine([did[0]] * 5), Engine([did[0]] * 5, counts=False)
    report = vllm.measure(*engines, [results[0]] * 4, 9, frozenset(), "float32")
    assert report["prompts"]["same"] == 4 and " times as fast " in vllm.describe_vllm(report)


def test_by_how_much_the_best_logit_leads_is_counted_in_ulp():
    assert lead(torch.tensor([[1.0, 4.4375, 4.40625], [2.0, 2.0, 0.0]], dtype=torch.bfloat16)) == [1.0, 0.0]
    three = torch.tensor(3.0)
    one, two = three.nextafter(torch.tensor(9.0)), three.nextafter(torch.tensor(0.0))
    assert lead(torch.stack([one, two])[None]) == [2.0] and lead(-torch.stack([one, two])[None]) == [2.0]
    assert lead(three[None, None]) == [float("inf")]


def test_a_text_that_parts_from_the_targets_is_a_tie_only_between_close_logits(llama):
    measurement = Measurement(llama, [(tiny_draft(), 2)], Settings(num_slots=2))
    prompt = [3, 1, 4]
    own = greedy_by_hand(llama, prompt, 4)
    other = [*own[:2], (own[2] + 1) % VOCAB, own[3]]
    decoded = Decoded(prompt, other, [1.0] * 4)
    found = measurement.compare(decoded, own, other)
    with torch.no_grad():
        logits = llama.model(torch.tensor([prompt + own[:2]])).logits[0, -1]
    gap = float(logits[own[2]] - logits[other[2]])
    assert found["verdict"] == "bug" and found["at"] == 2 and found["gap"] == pytest.approx(gap)
    assert gap > 2 * TIE_TOLERANCE[torch.float64]
    head = llama.head.weight.data
    kept = head[other[2]].clone()
    head[other[2]] = head[own[2]]  # two tokens with one logit
    try:
        assert measurement.compare(decoded, own, other)["verdict"] == "tie"
    finally:
        head[other[2]] = kept
    assert measurement.compare(decoded, own, own[:3]) == {"verdict": "bug", "at": 3}


def test_a_broken_cache_is_found_as_a_bug(llama, monkeypatch):
    """Were rejected tokens left in the cache, the report would say so."""
    monkeypatch.setattr(CachedTarget, "crop", lambda self, length: setattr(self, "length", length))
    measurement = Measurement(llama, [(tiny_draft(), 3)], Settings(num_slots=3, max_tokens=20))
    assert checks(measurement(cases(2)))["texts"]["bug"] == 2


def test_a_drafter_of_another_target_is_refused(llama):
    with pytest.raises(ValueError, match="give the target that it was trained for"):
        Measurement(llama, [(make_draft(), 2)], Settings(num_slots=2))


# prompts


def test_rows_of_text_are_taken_as_they_are_and_chats_through_the_template(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "5 6"}\n\n{"text": "7"}\n')
    found, said = load_cases(str(texts), Words())
    assert [(c.id, c.data_set, c.prompt_ids([], None)) for c in found] == [
        ("1", "texts.jsonl", [5, 6]),
        ("2", "texts.jsonl", [7]),
    ]
    assert said == "texts.jsonl: 2 texts"
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "5 6"}\n{"prompt": "7"}\n')
    found, _ = load_cases(str(chats), Words(), limit=1)
    assert [c.prompt_ids([], Words()) for c in found] == [[1, 5, 6]]
    found, _ = load_cases(str(chats), Words(), plain=True)
    assert [c.prompt_ids([], None) for c in found] == [[5, 6], [7]]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "5"}\n{"text": 6}\n', "line 2"),
        ('{"text": "5"}\n{"text"\n', "line 2"),
        ("", "no prompt"),
    ],
)
def test_broken_rows_of_text_are_told_by_line(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_cases(str(path), Words())


def test_stdlib_prompts_are_held_out_seeded_and_from_the_recipes_own_split():
    class Recipe:
        data = Data(sources=["stdlib"], exclude=["[!s]*", "s[!q-t]*"], eval_fraction=0.7)

    tokenizer, n = make_byte_tokenizer(), 5000
    documents, _ = load_documents(["stdlib"], tokenizer, BYTES_VOCAB, exclude=Recipe.data.exclude)
    is_out = held_out_documents(table_of(documents).keys_D32, 0.7).tolist()
    held_out = {d.name: d.input_ids.tolist() for d, out in zip(documents, is_out) if out}
    options: dict[str, Any] = {"recipe": Recipe, "prompt_tokens": n, "vocab_size": BYTES_VOCAB}
    found, said = load_cases("stdlib", tokenizer, **options)
    assert {f"stdlib/{c.id}" for c in found} == {name for name, ids in held_out.items() if len(ids) > n}
    assert 3 < len(found) < len(held_out) < len(documents) and "are shorter" in said
    text = {name: tokenizer.decode(ids) for name, ids in held_out.items()}
    starts = {text[f"stdlib/{case.id}"].index(tokenizer.decode(case.ids)) for case in found}
    assert len(starts) > 3, "at several places"
    assert load_cases("stdlib", tokenizer, **options)[0] == found
    assert {c.id: c for c in load_cases("stdlib", tokenizer, **options, seed=1)[0]} != {c.id: c for c in found}
    twice, said = load_cases("stdlib", tokenizer, **options, cuts=2, limit=len(found) + 2)
    assert twice[:-2] == found and f"{len(twice)} pieces of {n} tokens, of {len(found)} of the" in said
    assert all(c.ids != first.ids for c, first in zip(twice[-2:], found)), "other places of the same modules"
    assert [c.group for c in twice[-2:]] == [c.id for c in found[:2]] and len({c.id for c in twice}) == len(twice)
    assert all(tokenizer.decode(c.ids) in text[f"stdlib/{c.group}"] for c in twice)
    Recipe.data = Data(sources=["stdlib"], eval_fraction=0.0)
    with pytest.raises(ValueError, match="eval_fraction"):
        load_cases("stdlib", Words(), **options)


def test_pieces_of_one_module_are_resampled_as_one(llama):
    plain = cases(4)
    together = [replace(case, group="a" if i < 3 else "b") for i, case in enumerate(plain)]
    same_id = [replace(case, id="7") for case in plain]
    settings = Settings(num_slots=2, max_tokens=6)
    numbers = [
        [r.number for r in Measurement(llama, [(tiny_draft(), 2)], settings)(given)]
        for given in (plain, together, same_id)
    ]
    assert numbers == [[1, 2, 3, 4], [1, 1, 1, 4], [1, 2, 3, 4]]


# the command line


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafters, as a run leaves them, and a file of prompts."""
    make_tokenizer().save_pretrained(folder)
    root = tmp_path_factory.mktemp("runs")
    recipe = dump_recipe(load_recipe(write_recipe(root, folder, write_rows(root / "rows.jsonl", [20]), root)))
    for name, seed in (("first", 7), ("second", 8)):
        draft = tiny_draft(torch.float32, seed)
        draft.config.eagle_aux_hidden_state_layer_ids = [2, 3, 4]
        draft.save_pretrained(root / name / "final")
        (root / name / "recipe.yaml").write_text(recipe)
        evaluation = {"kind": "eval", "step": 9, "accuracy": [0.25, 0.5, 0.0, 0.0], "loss": 1.0}
        (root / name / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
        (root / name / "run.json").write_text(json.dumps({"state": "finished", "drafter": "final", "steps": 9}))
    (root / "texts.jsonl").write_text("".join(f'{{"text": "w{i} w{i + 7} w{i + 2}"}}\n' for i in range(4)))
    return root


def test_the_tool_measures_two_drafters_and_writes_everything(runs, capsys):
    arguments = [str(runs / "first" / "final"), "--prompts", str(runs / "texts.jsonl"), "--max-tokens", "9", "--k", "3"]
    others = [str(runs / "second" / "final"), str(runs / "first" / "final")]
    arguments += ["--compare", *others, "--json", str(runs / "out.json"), "--dtype", "float64"]
    assert command("evaluate", *arguments) == 0
    text = capsys.readouterr().out
    report = json.loads((runs / "out.json").read_text())
    assert report["checks"]["texts"] == {"same": 4, "tie": 0, "bug": 0, "none": 0}
    assert [f["texts.jsonl"]["by_k"][-1]["k"] for f in report["figures"]] == [4, 4, 4], "the recipe's num_depths"
    in_training = [row["expected_in_training"] for row in report["figures"][1]["texts.jsonl"]["by_k"]]
    assert in_training == [1.25, 1.375, 1.375, 1.375]
    assert [found["other"] for found in report["differences"]] == others
    second, itself = (found["by_data_set"]["texts.jsonl"] for found in report["differences"])
    assert [row["k"] for row in second] == [1, 2, 3, 4] and any(row["difference"] for row in second)
    assert all(row["difference"] == 0 and row["interval"] == [0, 0] for row in itself)
    lengths = [f["texts.jsonl"]["by_k"][0]["accepted_length"] for f in report["figures"]]
    assert second[0]["difference"] == lengths[0] - lengths[1]
    assert "texts: 4 are the target's own" in text and "1.375" in text
    assert len(report["turns"]) == 4 and len(report["turns"][0]["tokens"]) == 9


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--k", "0"], "--k: got 0"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json"),
        (["--json", "/proc/out.json"], "/proc/"),
        (["--device", "x"], "--device x cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--prompts", "nonsense"], "give a .jsonl file or one of stdlib, humaneval, mt-bench"),
        (["--cuts", "2"], "are for the prompts stdlib alone"),
        (["--prompts", "stdlib"], "eval_fraction"),
        (["--target", "/nowhere"], "/nowhere"),
        (["--prompts", "TEXTS", "TEXTS"], "two of --prompts are called"),
        (["--speed"], "--base-url and --speed are for --engine vllm alone"),
        (["--engine", "vllm", "--temperature", "1"], "--engine vllm is greedy, but --temperature is 1"),
        (["--engine", "vllm", "--dtype", "float64"], "give --dtype float32"),
        (["--engine", "vllm", "--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models: "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(runs, capsys, changes, message):
    changes = [str(runs / "texts.jsonl") if word == "TEXTS" else word for word in changes]
    assert command("evaluate", runs / "first" / "final", "--prompts", "humaneval", *changes) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_drafter_that_may_have_learned_from_the_prompts_is_not_compared():
    recipes = {f: SimpleNamespace(data=Data(sources=["x"], eval_fraction=f)) for f in (0.01, 0.05, 0.1)}
    folders = [Path("first"), Path("second")]
    check_same_split(folders, [recipes[0.05], recipes[0.1]])
    for other in (recipes[0.01], None):
        with pytest.raises(ValueError, match=r"second had .* may have learned from these prompts"):
            check_same_split(folders, [recipes[0.05], other])


def test_a_checkpoints_estimate_is_of_its_own_step(tmp_path):
    lines = [{"kind": "eval", "step": n, "accuracy": [n / 10]} for n in (3, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "eval", "st')
    (tmp_path / "run.json").write_text(json.dumps({"steps": 7}))
    found = [read_run(tmp_path / name).evaluation for name in ("checkpoint-3", "checkpoint-5", "final", "export")]
    assert found == [lines[0], None, lines[1], None]


def test_an_exports_k_is_what_its_config_says(tmp_path):
    for proposals, k in (([{"speculative_tokens": 4}], 4), ([], None)):
        config = {"speculators_model_type": "peagle", "speculators_config": {"proposal_methods": proposals}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert num_depths(tmp_path, None) == k
