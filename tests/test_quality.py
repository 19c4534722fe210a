"""tools/quality.py on a tiny target: what it trains and measures, and what its table makes of a ledger."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from peagle_train import FrozenTarget, cli
from peagle_train.config import load_recipe
from peagle_train.decoding.generate import CachedTarget, Drafter, decode, greedy_tokens, sampler
from peagle_train.decoding.measure import stdlib_cases
from peagle_train.decoding.replay import repeats
from peagle_train.serving.drafter_io import load_drafter
from tests.byte_tokenizer import BYTES_VOCAB, make_byte_target, make_byte_tokenizer, write_stdlib_recipe
from tests.helpers import ROOT, make_draft

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
    tokens = [*range(20, 30), *[7] * 30, *range(40, 45)]  # 29 of 45 repeat the one before
    text = {"name": "m", "prompt": [1, 2], "tokens": tokens, "features": torch.randn(46, draft.fc.in_features)}
    assert quality.measure(tmp_path, [text])["modules"]["m"][2] == 44 - 29


def test_own_text_is_the_targets_greedy_text_after_pieces_of_trained_documents_until_it_repeats(tmp_path, monkeypatch):
    recipe = write_stdlib_recipe(tmp_path / "recipe.yaml", make_byte_target(tmp_path / "target"), "unused")
    (tmp_path / "target" / "generation_config.json").write_text('{"repetition_penalty": 9.0, "do_sample": true}')
    out, lengths = tmp_path / "new" / "own.jsonl", ["--pieces", "7", "--batch-size", "3", "--prompt-tokens", "12"]
    command = [str(recipe), "target.dtype=float32", "--out", str(out), *lengths, "--max-tokens", "90"]
    monkeypatch.setattr(sys, "argv", ["x", *command])
    own_text.main()
    rows, tokenizer = [json.loads(line) for line in out.open()], make_byte_tokenizer()
    target = FrozenTarget.load(str(tmp_path / "target"), dtype="float32")
    held_out = {case.group for case in stdlib_cases(load_recipe(str(recipe)), tokenizer, BYTES_VOCAB, None, 12, 0)[0]}
    library = Path(json.__file__).parent.parent
    trained = [p.read_bytes().decode() for p in library.glob("s[et]*.py") if p.name not in held_out | {"statistics.py"}]
    assert len(rows) == 7 and trained and held_out
    cut = 0
    for row in rows:
        prompt, made = row["input_ids"][:12], row["input_ids"][12:]
        assert any(tokenizer.decode(prompt) in text for text in trained)
        assert row["loss_mask"] == [1] * (12 + len(made))
        whole = greedy_tokens(target, prompt, 90, target.eos_token_ids())
        assert made == whole[: len(made)]
        if again := [at for at, is_again in enumerate(repeats(prompt, whole)) if is_again]:
            assert len(made) == min(len(whole), again[0] + 32)
            cut += len(made) < len(whole)
        else:
            assert made == whole
    assert cut
    assert len({tuple(row["input_ids"][:12]) for row in rows}) == 7
    other = ["--out", str(tmp_path / "other.jsonl")]
    for more, message in (
        ([], "exists"),
        ([*other, "data.eval_sources=[stdlib]"], "eval_sources"),
        ([*other, "--prompt-tokens", "999999"], "lower"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *command, *more])
        with pytest.raises(ValueError, match=message):
            own_text.main()
