"""From prompts to a report: checks of the text, sets and turns, replay, intervals, the command line over files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from peagle_train.config import Data, dump_recipe, load_recipe
from peagle_train.data.packing import held_out_documents
from peagle_train.decoding import evaluate
from peagle_train.decoding.evaluate import describe_vllm, measure_in_vllm
from peagle_train.decoding.generate import CachedTarget, Decoded, Drafter, decode, sampler
from peagle_train.decoding.measure import (
    ALL,
    TIE_TOLERANCE,
    Case,
    Result,
    accepted_slots,
    compare,
    count,
    load_cases,
    measure,
    ratio_interval,
    repeats,
    replay,
    stdlib_cases,
    summarize,
    verdict,
)
from peagle_train.regenerate import Prompt
from peagle_train.target_model.frozen import FrozenTarget
from tests.documents import BYTES_VOCAB, load, make_byte_tokenizer, table_of
from tests.helpers import command, make_draft, seeded
from tests.test_generate import PROMPT, by_hand, tiny_draft
from tests.tiny import MASK, VOCAB, write_recipe, write_rows
from tests.tiny_chat import END, TURN, make_tokenizer


def cases(n: int, data_set: str = "first", seed: int = 0) -> list[Case]:
    ids = torch.randint(0, MASK, (n, 6), generator=seeded(seed)).tolist()
    return [Case(str(i), data_set, tuple(row)) for i, row in enumerate(ids)]


def measured(llama: FrozenTarget, given: list[Case], K: int = 2, drafts: int = 1, **options: Any) -> list[Result]:
    results, left_out = measure(llama, [tiny_draft(seed=7 + i) for i in range(drafts)], given, K, **options)
    assert not left_out
    return results


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_measurement_has_every_k_and_its_texts_are_the_targets(llama, temperature):
    given = [*cases(3), *cases(2, "second", seed=1)]
    results = measured(llama, given, K=4, drafts=2, max_tokens=20, temperature=temperature)
    summary = summarize(results, 0, seed=0)
    assert list(summary) == ["first", "second", ALL]
    assert [len(rows) for rows in compare(results, seed=0).values()] == [4, 4, 4]
    assert [tuple(r.prompt) for r in results] == [c.ids for c in given]
    assert [r.check["verdict"] for r in results] == ["none" if temperature else "same"] * 5
    if temperature == 0:
        assert all(result.tokens == by_hand(llama, result.prompt, 20) for result in results)
    for row in summary[ALL]["by_k"]:
        # the length is 1 plus what its positions say, as no text ended
        assert row["accepted_length"] == pytest.approx(1 + sum(row["accepted_by_position"]))


def test_the_drafter_runs_in_the_targets_dtype_as_engines_run_it(tiny_target):
    draft = tiny_draft(torch.float32)
    measure(FrozenTarget.load(str(tiny_target), dtype="bfloat16"), [draft], cases(1), 2, max_tokens=2)
    assert {p.dtype for p in draft.parameters()} == {torch.bfloat16}
    assert draft.rotary_emb.inv_freq.dtype == torch.float32


def test_a_prompts_figures_do_not_depend_on_the_others_and_pieces_of_one_module_are_one(llama):
    given, options = cases(4), {"max_tokens": 12, "temperature": 1.0}
    alone, among = measured(llama, given[2:3], **options), measured(llama, given, **options)
    assert replace(alone[0], number=3) == among[2] and alone[0].tokens != among[1].tokens
    together = [replace(case, group="a" if i < 3 else "b") for i, case in enumerate(given)]
    same_id = [replace(case, id="7") for case in given]
    numbers = [[r.number for r in measured(llama, some, max_tokens=2)] for some in (given, together, same_id)]
    assert numbers == [[1, 2, 3, 4], [1, 1, 1, 4], [1, 2, 3, 4]]


def test_figures_by_hand():
    def result(number: int, counts: list[int], tokens: int) -> Result:
        return Result(number, "", "set", 0, [5], [0] * tokens, 2, [], [[counts], [[counts[0], counts[0], 0]]], {})

    rows = [result(1, [4, 6, 2], 9), result(2, [6, 7, 1], 8)]
    figures = summarize(rows, 0, seed=0)["set"]
    row = figures["by_k"][0]
    assert row["accepted_length"] == 13 / 10 and row["accepted_by_position"] == [0.3]
    assert row["interval"][0] >= 7 / 6 and row["interval"][1] <= 6 / 4
    assert (figures["prompts"], figures["tokens"], figures["repeated_tokens"]) == (2, 17, 4)
    difference = compare(rows, seed=0)["set"][0]
    assert difference["difference"] == pytest.approx(0.3)
    assert difference["interval"] == pytest.approx([1 / 6, 1 / 2])
    together = summarize([replace(row, number=1) for row in rows], 0, seed=0)["set"]
    assert together["prompts"] == 1 and together["by_k"][0]["interval"] is None


def test_turns_are_asked_one_after_the_other_with_the_targets_own_answers(llama):
    chat = Prompt("q", (({"role": "user", "content": "w3 w4"},), ({"role": "user", "content": "w8"},)))
    first, second = measured(llama, [Case("q", "chats", chat=chat)], max_tokens=5, tokenizer=make_tokenizer())
    asked = [TURN, 3, 4, END, TURN]
    assert first.tokens == by_hand(llama, asked, 5)
    assert second.tokens == by_hand(llama, [*asked, *first.tokens, END, TURN, 8, END, TURN], 5)
    assert first.number == second.number


def test_a_prompt_that_does_not_fit_is_left_out_and_an_end_token_ends_the_text_and_its_passes(llama):
    # Its second turn would follow an answer that is not there.
    chat = Prompt("chat", (({"role": "user", "content": "a"},),) * 2)
    given = [Case("long", "first", (5,) * 250), Case("none", "first"), Case("chat", "first", chat=chat), *cases(1)]
    tokenizer = Mock(apply_chat_template=Mock(side_effect=RuntimeError("roles must\nalternate")))
    results, left_out = measure(llama, [tiny_draft()], given, 2, max_tokens=8, tokenizer=tokenizer)
    assert [r.id for r in results] == ["0"] and [*left_out.values()] == [1, 1, 1]
    assert all(part in reason for part, reason in zip(("256 positions", "empty", "(roles must alternate)"), left_out))
    own = by_hand(llama, cases(1)[0].ids, 12)
    end = own.index(own[7]) + 1
    [result] = measured(llama, cases(1), K=3, max_tokens=12, eos=frozenset([own[7]]))
    assert result.tokens == own[:end] and result.check == {"verdict": "same"}
    assert result.counts[0][-1][1] == end - 1


def engine(texts: list[list[int]], counts: list[int]) -> Any:
    """A vLLM that did what it is told to have done."""
    return SimpleNamespace(version="0", complete=Mock(side_effect=texts), counts=lambda: counts)


def test_vllm_is_compared_prompt_by_prompt_and_texts_that_differ_are_named(llama):
    results = measured(llama, cases(3), max_tokens=9)
    accepted, texts = [n for r in results for _, n in r.passes], [list(r.tokens) for r in results]
    texts[1].pop()
    report = measure_in_vllm(engine(texts, [len(accepted) + 1, 3, 1]), results, 9, frozenset())
    assert [(each["id"], each["tokens"]) for each in report["texts_that_differ"]] == [("1", texts[1])]
    assert report["ours"]["passes"] == len(accepted) and report["vllm"]["passes"] == len(accepted) + 1
    assert report["ours"]["accepted_length"] == pytest.approx(1 + sum(accepted) / len(accepted))
    assert report["vllm"]["accepted_by_position"] == [3 / (len(accepted) + 1), 1 / (len(accepted) + 1)]
    assert "2 of 3 texts equal ours" in describe_vllm(report)[-1]


def test_a_text_that_parts_from_the_targets_is_a_tie_only_between_close_logits(llama):
    prompt = [3, 1, 4]
    own = by_hand(llama, prompt, 4)
    other = [*own[:2], (own[2] + 1) % VOCAB, own[3]]
    found = verdict(llama, prompt, own, other)
    with torch.no_grad():
        logits = llama.model(torch.tensor([prompt + own[:2]])).logits[0, -1]
    gap = float(logits[own[2]] - logits[other[2]])
    assert found["verdict"] == "bug" and found["at"] == 2 and found["gap"] == pytest.approx(gap)
    assert gap > 2 * TIE_TOLERANCE[torch.float64]
    with patch.dict(TIE_TOLERANCE, {torch.float64: gap * 1.01}):
        assert verdict(llama, prompt, own, other)["verdict"] == "tie"
    assert verdict(llama, prompt, own, own[:3]) == {"verdict": "bug", "at": 3}


def test_a_drafter_of_another_target_and_more_slots_than_a_drafters_window_holds_are_refused(llama):
    with pytest.raises(ValueError, match=r"is for a target of vocabulary and hidden size \(48, 12\)"):
        measure(llama, [make_draft()], cases(1), 2)
    draft = tiny_draft()
    draft.config.sliding_window = 5
    assert measure(llama, [draft], cases(1), 5, max_tokens=8)[0]
    with pytest.raises(ValueError, match="window is 5 positions, but K is 6"):
        measure(llama, [draft], cases(1), 6, max_tokens=8)


# replay


@pytest.mark.parametrize(
    "prompt, temperature, window", [(PROMPT, 0.0, None), (PROMPT, 0.3, None), (PROMPT, 0.0, 4), ([14], 0.0, None)]
)
def test_replay_of_every_k_is_a_decoding_of_its_own(llama, prompt, temperature, window):
    n, K_max, lengths = 67, 4, []

    def decoded(draft: Any, K: int) -> Decoded:
        return decode(CachedTarget(llama), Drafter(draft, K), prompt, n + K_max, sampler(temperature, seeded(0)))

    # It is right now and then, as it only knows the text's two commonest tokens.
    known = torch.tensor(decoded(tiny_draft(), 1).tokens).bincount().topk(2).indices.sort().values
    draft = tiny_draft(ids=known, sliding_window=window)
    runs = {K: decoded(draft, K) for K in (1, 2, K_max)}
    for text in (runs[1], runs[K_max]):
        accepted = accepted_slots(draft, text, K_max)
        for m in range(1, 30):  # nothing is accepted beyond a text's end
            cut = Decoded(prompt, text.tokens[: m + 1], text.features[: len(prompt) + m])
            assert accepted_slots(draft, cut, K_max) == [min(n, m - i) for i, n in enumerate(accepted[:m])]
        for K, run in runs.items():
            assert run.tokens == text.tokens
            passes = replay(accepted, K, n)
            assert passes == [(i, a) for i, a in run.passes if i < n - 1]
            lengths.append(sum(a + 1 for _, a in passes) / len(passes))
    # neither hopeless nor perfect, and not in the first slot alone
    assert 1.1 < lengths[0] < lengths[1] <= lengths[2] < 2


def test_passes_begin_before_max_tokens_and_are_counted_whole_by_slot_without_repetition():
    assert replay([3] * 12, 3, 10) == [(0, 3), (4, 3), (8, 3)]
    assert replay([3] * 12, 3, 9) == [(0, 3), (4, 3)]
    assert replay([3] * 12, 3, 1) == replay([], 3, 9) == []
    # A drafted end token brings none of the target's.
    sides = [False, True, True, True, False, True, False]
    assert count([(0, 2), (3, 0), (4, 3)], 3, sides) == [2, 6, 2, 2, 1]
    assert count([], 2, []) == [0, 0, 0, 0]


@pytest.mark.parametrize("period", [1, 3, 40, 64])
def test_a_loop_of_at_most_64_tokens_is_repetition_from_its_second_period_on(period):
    head, unit = list(range(1000, 1030)), list(range(period))
    needed = max(24, 2 * period)
    text = head + unit + (unit * needed)[:needed] + [7000]
    assert repeats([9], text) == [False] * (30 + period) + [True] * needed + [False]
    text = head + unit + (unit * needed)[: needed - 1] + [7000]
    assert not any(repeats([9], text))
    # A longer period is no loop, and a prompt can hold the first.
    assert not any(repeats([], list(range(65)) * 5))
    assert all(repeats([5, 6], [5, 6] * 12)) and not any(repeats([5, 7], [5, 6] * 12)[:2])
    assert not any(repeats([5, 6] * 12, [5, 6] * 11)), "what the prompt repeats is not the output's"


def test_intervals_are_seeded_hold_the_ratio_and_are_narrow_for_pairs():
    passes = torch.randint(20, 40, (50,), generator=seeded(0)).tolist()
    tokens = [p * (1 + float(torch.rand((), generator=seeded(i)))) for i, p in enumerate(passes)]
    interval = ratio_interval(tokens, passes, seed=3)
    assert interval == ratio_interval(tokens, passes, seed=3) != ratio_interval(tokens, passes, seed=4)
    assert interval[0] < sum(tokens) / sum(passes) < interval[1]
    assert ratio_interval(tokens[:1], passes[:1]) is None
    assert ratio_interval([*tokens, 0.0], [*passes, 0.0], seed=3) == interval
    # Of two drafters that differ by the same everywhere.
    better = [t + 0.1 * p for t, p in zip(tokens, passes)]
    assert ratio_interval(better, passes, less=(tokens, passes)) == pytest.approx((0.1, 0.1))
    assert interval[1] - interval[0] > 0.1


# prompts


def test_texts_are_taken_as_they_are_and_chats_through_the_template_if_there_is_one(tmp_path):
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text('{"text": "w5 w6"}\n\n{"text": "w7"}\n')
    found, said = load_cases(str(texts), make_tokenizer())
    assert said == "texts.jsonl: 2 texts" and {c.data_set for c in found} == {"texts.jsonl"}
    assert [(c.id, c.prompt_ids([], None)) for c in found] == [("1", [5, 6]), ("2", [7])]
    chats.write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n')
    found, _ = load_cases(str(chats), make_tokenizer(), limit=1)
    assert [c.prompt_ids([], make_tokenizer()) for c in found] == [[TURN, 5, 6, END, TURN]]
    plain = make_tokenizer()
    plain.chat_template = None
    found, said = load_cases(str(chats), plain)
    assert [c.prompt_ids([], None) for c in found] == [[5, 6], [7]] and "no chat template" in said
    chats.write_text('{"turns": ["w5", "w6"]}\n')
    with pytest.raises(ValueError, match="is a conversation"):
        load_cases(str(chats), plain)
    for content, message in (('{"text": "w5"}\n{"text"\n', "line 2"), ("", "no prompt")):
        texts.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_cases(str(texts), make_tokenizer())


def test_stdlib_prompts_are_held_out_seeded_and_from_the_recipes_own_split():
    recipe: Any = SimpleNamespace(data=Data(sources=["stdlib"], exclude=["[!s]*", "s[!q-t]*"], eval_fraction=0.7))
    more: Any = SimpleNamespace(data=replace(recipe.data, eval_fraction=0.9))
    recipes, tokenizer, n = [more, recipe], make_byte_tokenizer(), 5000  # no more than what each of them holds out

    def pieces(limit: int | None = None, seed: int = 0) -> tuple[list[Case], str]:
        return stdlib_cases(recipes, tokenizer, BYTES_VOCAB, limit, n, seed)

    documents, _ = load("stdlib", exclude=recipe.data.exclude)
    is_out = held_out_documents(table_of(documents).keys_D32, 0.7).tolist()
    held_out = {d.name: d.input_ids.tolist() for d, out in zip(documents, is_out) if out}
    found, said = pieces()
    assert {f"stdlib/{c.id}" for c in found} == {name for name, ids in held_out.items() if len(ids) > n}
    assert 3 < len(found) < len(held_out) < len(documents) and "are shorter" in said
    text = {name: tokenizer.decode(ids) for name, ids in held_out.items()}
    starts = {text[f"stdlib/{case.id}"].index(tokenizer.decode(case.ids)) for case in found}
    assert len(starts) > 3, "at several places"
    assert pieces()[0] == found
    assert {c.id: c for c in pieces(seed=1)[0]} != {c.id: c for c in found}
    twice, said = pieces(limit=len(found) + 2)
    assert twice[:-2] == found and f"{len(twice)} pieces of {n} tokens, of {len(found)} of the" in said
    assert all(c.ids != first.ids for c, first in zip(twice[-2:], found)), "other places of the same modules"
    assert [c.group for c in twice[-2:]] == [c.id for c in found[:2]] and len({c.id for c in twice}) == len(twice)
    assert all(tokenizer.decode(c.ids) in text[f"stdlib/{c.group}"] for c in twice)
    for data in (Data(sources=["stdlib"], eval_fraction=0.0), Data(sources=["stdlib"], eval_sources=["other"])):
        recipe.data = data
        with pytest.raises(ValueError, match="eval_fraction"):
            pieces()


# the command line


@pytest.fixture(scope="module")
def runs(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drafters, as a run leaves them, and a file of prompts."""
    root = tmp_path_factory.mktemp("runs")
    target = shutil.copytree(tiny_target, root / "target")
    make_tokenizer().save_pretrained(target)
    recipe = dump_recipe(load_recipe(write_recipe(root, target, write_rows(root / "rows.jsonl", [20]), root)))
    for name, seed in (("first", 7), ("second", 8)):
        draft = tiny_draft(torch.float32, seed)
        draft.config.eagle_aux_hidden_state_layer_ids = [2, 3, 4]
        draft.save_pretrained(root / name / "final")
        (root / name / "final" / "recipe.yaml").write_text(recipe)
    (root / "texts.jsonl").write_text("".join(f'{{"text": "w{i} w{i + 7} w{i + 2}"}}\n' for i in range(4)))
    return root


def evaluated(runs: Path, *more: object) -> int:
    """The exit code of measuring the first drafter in a few tokens a prompt."""
    return command("evaluate", runs / "first", "--prompts", runs / "texts.jsonl", "--max-tokens", 9, *more)


def test_the_tool_measures_two_drafters_and_writes_everything(runs, capsys):
    others = [str(runs / "second" / "final"), str(runs / "first" / "final")]
    assert evaluated(runs, "--dtype", "float64", "--json", runs / "out.json", "--compare", *others) == 0
    text = capsys.readouterr().out
    report = json.loads((runs / "out.json").read_text())
    assert [turn["check"] for turn in report["turns"]] == [{"verdict": "same"}] * 4
    assert [f["texts.jsonl"]["by_k"][-1]["k"] for f in report["figures"]] == [4, 4, 4], "the recipe's num_depths"
    assert [found["other"] for found in report["differences"]] == others
    second, itself = (found["by_data_set"]["texts.jsonl"] for found in report["differences"])
    assert [row["k"] for row in second] == [1, 2, 3, 4] and any(row["difference"] for row in second)
    assert all(row["difference"] == 0 and row["interval"] == [0, 0] for row in itself)
    lengths = [f["texts.jsonl"]["by_k"][0]["accepted_length"] for f in report["figures"]]
    assert second[0]["difference"] == lengths[0] - lengths[1]
    assert "texts: 4 of 4 equal the target's own" in text and f"{lengths[0]:.3f}" in text
    assert len(report["turns"]) == 4 and len(report["turns"][0]["tokens"]) == 9


def test_a_wrong_text_is_named_and_the_exit_code_is_1_but_a_tie_of_logits_is_no_failure(runs, capsys, monkeypatch):
    """Were rejected tokens left in the cache, for example."""
    monkeypatch.setattr(CachedTarget, "crop", lambda self, length: setattr(self, "length", length))
    words = "--max-tokens", 20, "--dtype", "float64", "--limit", 1
    assert evaluated(runs, *words) == 1
    assert "WRONG, and no tie: texts.jsonl 1, turn 1" in capsys.readouterr().out
    monkeypatch.setitem(TIE_TOLERANCE, torch.float64, 1e9)
    assert evaluated(runs, *words) == 0 and "1 first differ where" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ("--json /nowhere/out.json", "/nowhere/out.json"),
        ("--device cuda:99", "--device cuda:99 cannot be used"),
        ("--prompts nonsense", "give a .jsonl file, humaneval, mt-bench or (evaluate) stdlib"),
        ("--prompt-tokens 9", "--prompt-tokens goes with --prompts stdlib"),
        ("--prompts stdlib", "eval_fraction"),
        ("--target /nowhere", "/nowhere"),
        ("--prompts TEXTS TEXTS", "two of --prompts are called"),
        ("--engine vllm --temperature 1", "--engine vllm is greedy"),
        ("--engine vllm --dtype float64", "has no float64"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(runs, capsys, changes, message):
    arguments = changes.replace("TEXTS", str(runs / "texts.jsonl")).split()
    assert command("evaluate", runs / "first" / "final", "--prompts", "humaneval", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_text_of_vllm_that_differs_is_a_failure_in_float32_alone(runs, monkeypatch):
    monkeypatch.setattr(evaluate, "check_vllm", lambda *_: None)
    monkeypatch.setattr(evaluate, "Engine", lambda *_: engine([[1, 2]], [1, 0, 0]))
    words = "--limit", 1, "--engine", "vllm", "--dtype"
    assert [evaluated(runs, *words, dtype) for dtype in ("float32", "bfloat16")] == [1, 0]
