"""tools/quality.py on a tiny target: what it trains and measures, and what its table makes of a ledger."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from peagle_train import FrozenTarget, cli
from peagle_train.config import load_recipe
from peagle_train.decoding.generate import CachedTarget, Drafter, decode, greedy_tokens, sampler
from peagle_train.decoding.measure import repeats, stdlib_cases
from peagle_train.serving.drafter_io import load_drafter
from tests.documents import BYTES_VOCAB, make_byte_target, make_byte_tokenizer, write_lines, write_stdlib_recipe
from tests.helpers import ROOT, make_draft
from tests.tiny import write_recipe, write_rows

sys.path.insert(0, str(ROOT / "tools"))

import own_text
import quality


@pytest.mark.slow
def test_settings_are_trained_on_one_sample_and_measured_as_decoding_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def child(out: Path, log: str, threads: int, *command: str) -> float:
        """In this process, not in one of its own."""
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(list(command)) == 0, capsys.readouterr().err
        ran.append(log.partition("-")[0])
        return 7.4

    monkeypatch.setattr(quality, "child", child)
    for name, value in {"PROMPT": 12, "ANSWER": 9, "PIECES": 7, "DEV_FRACTION": 0.6}.items():
        monkeypatch.setattr(quality, name, value)
    monkeypatch.setattr(quality, "SAMPLE", ["data.eval_fraction=0.6", "data.max_eval_rows=1"])
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", make_byte_target(tmp_path / "target"), "unused")
    ledger = tmp_path / "ledger.jsonl"
    fixed = ["--recipe", str(recipe), "--out", str(tmp_path / "out"), "--ledger", str(ledger), "--steps", "2"]
    for command in (["base"], ["base", "--seed", "1"], ["one layer", "draft.num_layers=1"]):
        monkeypatch.setattr(sys, "argv", ["x", *command, *fixed])
        assert quality.main() == 0
    assert ran == ["data", "features", "base", "base", "one_layer"]
    base, again, other = (json.loads(line) for line in ledger.open())
    assert (base["steps"], base["seed"], base["cpu_seconds"]) == (2, 0, 7)
    assert (again["seed"], other["changes"]) == (1, ["draft.num_layers=1"])
    assert base["texts"] == again["texts"] == other["texts"]

    target = FrozenTarget.load(str(tmp_path / "target"), dtype="float32")
    draft, passes, tokens = load_drafter(tmp_path / "out" / "base-2-0" / "final"), 0, 0
    texts = torch.load(next((tmp_path / "out").glob("texts-*.pt")))
    tokenizer = make_byte_tokenizer()
    final = {c.group for c in stdlib_cases([load_recipe(recipe)], tokenizer, BYTES_VOCAB, None, quality.PROMPT, 0)[0]}
    assert final and texts and final.isdisjoint(text["name"] for text in texts)
    for text in texts:
        limits = (len(text["tokens"]) + quality.K, sampler(0.0, torch.Generator()), target.eos_token_ids())
        made = decode(CachedTarget(target), Drafter(draft, quality.K), text["prompt"], *limits)
        assert made.tokens[: len(text["tokens"])] == text["tokens"]
        for i, accepted in made.passes:
            if i < len(text["tokens"]) - 1:
                passes, tokens = passes + 1, tokens + min(accepted + 1, len(text["tokens"]) - 1 - i)
    assert base["accepted_length"] == pytest.approx(tokens / passes, abs=1e-4)
    assert [sum(n[i] for n in base["modules"].values()) for i in (0, 1)] == [passes, tokens]

    monkeypatch.setattr(sys, "argv", ["x", "--table", "--ledger", str(ledger)])
    assert quality.main() == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].startswith("| base | 2 | 2 | 7 |") and rows[1].startswith("| one layer | 1 |")


def test_gains_are_of_the_base_on_the_same_texts_with_intervals_over_modules_drawn_together() -> None:
    def line(name: str, tokens: int, texts: str = "same", spread: int = 1) -> dict:
        modules = {f"m{i}": [10, tokens + i % 2 * spread, 20, 3 * (tokens + i % 2 * spread)] for i in range(5)}
        return {"name": name, "texts": texts, "steps": 1, "cpu_seconds": 1, "modules": modules}

    def cells(*lines: dict) -> list[str]:
        return next(r for r in quality.table(lines, "base").splitlines() if "better" in r).strip("| ").split(" | ")

    row = cells(line("better", 15), line("base", 12), line("base", 13), line("better", 15), line("base", 19, "others"))
    assert row[4:6] == ["1.540", "+0.250"] and row[7:9] == ["2.310", "+0.375"]
    assert (row[6], row[9]) == ("+0.250 to +0.250", "+0.375 to +0.375"), "every module gains as much"
    low, high = map(float, cells(line("base", 12), line("better", 15, spread=3))[6].split(" to "))
    assert 0.3 <= low < 0.38 < high <= 0.5


def test_repetition_is_left_out_of_what_is_measured(tmp_path):
    draft = make_draft(torch.float32)
    draft.save_pretrained(tmp_path)
    for end in ([], [*range(40, 45)]):  # at each token the next one is drafted: at the first of a loop, repetition
        tokens = [*range(20, 30), *[7] * 30, *end]  # 29 of them repeat the one before
        features = torch.randn(1 + len(tokens), draft.fc.in_features)
        text = {"name": "m", "prompt": [1, 2], "tokens": tokens, "features": features}
        assert quality.measure(tmp_path, [text])["modules"]["m"][2] == len(tokens) - 1 - 29


def test_pieces_end_at_places_of_their_document_and_of_the_seed_and_more_of_them_begin_with_the_fewer():
    documents = [(np.arange(100), "a"), (np.arange(1000, 1100), "b")]
    pieces = own_text.cut_pieces(documents, 60, 10, 0)
    a, b = [piece[0] for piece in pieces[::2]], [piece[0] - 1000 for piece in pieces[1::2]]
    assert pieces[::2] == [[*range(start, start + 10)] for start in a] and 0 <= min(a + b) <= max(a + b) < 90
    assert a != b and min(len({*a}), len({*b})) > 15, "the places of one document say nothing about another's"
    assert pieces[:7] == own_text.cut_pieces(documents, 7, 10, 0) != own_text.cut_pieces(documents, 7, 10, 1)
    assert [p[0] for p in own_text.cut_pieces(documents[1:], 30, 10, 0)] == [1000 + start for start in b]


def test_own_text_is_the_targets_until_it_ends_or_repeats_after_pieces_of_documents_to_train_on_in_order_of_their_hash(
    tmp_path, tiny_target, monkeypatch
):
    rows, found = write_rows(tmp_path / "rows.jsonl", [40] * 20), []
    for line in rows.open():
        ids = json.loads(line)["input_ids"]
        key = hashlib.sha256(np.array(ids, "<i8").tobytes() + bytes([0] + [1] * 39)).hexdigest()
        found.append((key, ids))
    trained = [ids for key, ids in sorted(found) if int(key[:16], 16) >= 0.3 * 2**64]
    assert 7 < len(trained) < 20

    folder = Path(shutil.copytree(tiny_target, tmp_path / "target"))
    (folder / "generation_config.json").write_text('{"repetition_penalty": 9.0, "do_sample": true}')
    target = FrozenTarget.load(str(folder), dtype="float64")
    recipe = write_recipe(tmp_path, folder, rows, tmp_path / "run", data={"eval_fraction": 0.3})
    out = tmp_path / "new" / "own.jsonl"
    options = "--pieces 7 --batch-size 3 --prompt-tokens 30 --max-tokens 90".split()

    def made(*more: str) -> list[list[int]]:
        monkeypatch.setattr(sys, "argv", ["x", str(recipe), "--out", str(out), *options, *more])
        own_text.main()
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["loss_mask"] == [1] * len(row["input_ids"]) for row in found)
        out.unlink()
        return [row["input_ids"] for row in found]

    texts, cut = made(), 0
    assert len(texts) == 7
    for piece, ids in zip(texts, trained, strict=False):
        prompt = piece[:30]
        assert prompt in [ids[at : at + 30] for at in range(10)], "document by document, from the lowest hash"
        whole = greedy_tokens(target, prompt, 90, target.eos_token_ids())
        again = [at for at, is_again in enumerate(repeats(prompt, whole)) if is_again]
        kept = again[0] + 32 if again else 90
        assert piece[30:] == whole[:kept]
        cut += kept < len(whole)
    assert cut
    end = texts[0][33]
    masked = made(f"draft.mask_token_id={end}", "data.max_bad_rows=100%")
    assert masked and all(end not in piece[30:] for piece in masked)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    ended = [(piece + [end]).index(end, 30) + 1 for piece in texts]
    assert made() == [piece[:n] for piece, n in zip(texts, ended)] and ended[0] <= 34

    chats = write_lines(tmp_path / "chats.jsonl", {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]})
    for more, message in (
        (["--out", str(chats)], "exists"),
        (["data.eval_sources=[stdlib]"], "eval_sources"),
        (["--prompt-tokens", "999999"], "lower"),
        (["--max-tokens", "999999"], "context of"),
        (["data.eval_fraction=1e-9"], "holds out no document"),
        ([f"data.sources=[{chats}]"], "regenerate"),
    ):
        with pytest.raises(ValueError, match=message):
            made(*more)
