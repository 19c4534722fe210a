"""A row in readable tokens: what is shown is what is trained."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from peagle_train.core.collator import CODCollator
from peagle_train.data.show_row import (
    BEHIND_END,
    MASK,
    TokenNames,
    default_anchors,
    list_elements,
    show_elements,
    show_tokens,
)
from tests import chats
from tests.chats import make_tokenizer, stock
from tests.helpers import ENVIRONMENT, ROOT
from tests.tiny import make_target, write_recipe

# Two documents; the assistant's words are in capitals.
WORDS = ["name", "a", "colour", "DARK", "SEA", "BLUE", "END", "bye", "SO", "LONG"]
ROW = {
    "input_ids": torch.arange(10),
    "loss_mask": torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 1]),
    "document_ids": torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
}
MASK_TOKEN, NUM_DEPTHS = 10, 4

# Of every element that can be drawn: anchor, depth, position, token read, column of its features, column of the target's
# distribution, the token that stands behind that one, learned.
TABLE = [
    (0, 0, 0, "a", 0, 1, "colour", False),
    (1, 0, 1, "colour", 1, 2, "DARK", False),
    (1, 1, 2, MASK, None, 3, "SEA", True),
    (1, 2, 3, MASK, None, 4, "BLUE", True),
    (1, 3, 4, MASK, None, 5, "END", True),
    (2, 0, 2, "DARK", 2, 3, "SEA", True),
    (2, 1, 3, MASK, None, 4, "BLUE", True),
    (2, 2, 4, MASK, None, 5, "END", True),
    (2, 3, 5, MASK, None, 6, BEHIND_END, True),
    (3, 0, 3, "SEA", 3, 4, "BLUE", True),
    (3, 1, 4, MASK, None, 5, "END", True),
    (3, 2, 5, MASK, None, 6, BEHIND_END, True),
    (4, 0, 4, "BLUE", 4, 5, "END", True),
    (4, 1, 5, MASK, None, 6, BEHIND_END, True),
    (5, 0, 5, "END", 5, 6, BEHIND_END, True),
    (7, 0, 0, "SO", 7, 8, "LONG", True),
    (7, 1, 1, MASK, None, 9, BEHIND_END, True),
    (8, 0, 1, "LONG", 8, 9, BEHIND_END, True),
]


def word_names() -> TokenNames:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, MASK])}, unk_token=MASK))
    tokenizer.decoder = decoders.Fuse()
    return TokenNames(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_elements_are_shown_as_the_contract_has_them() -> None:
    collator = CODCollator(16, NUM_DEPTHS, down_sample_ratio=1.0)
    names, seen = word_names(), set()
    for epoch in range(30):
        shown = list_elements({**ROW, "epoch": epoch}, collator, MASK_TOKEN, names, range(10))
        assert set(shown) <= set(TABLE), "no element but those of the table"
        assert {e for e in TABLE if e[1] == 0} <= set(shown), "depth 0 is never dropped"
        assert shown == sorted(shown)
        seen.update(shown)
    assert seen == set(TABLE)


def test_only_the_anchors_asked_for_are_shown() -> None:
    collator = CODCollator(16, NUM_DEPTHS, down_sample_ratio=1.0)
    shown = list_elements(ROW, collator, MASK_TOKEN, word_names(), [7, 0])
    assert {e.anchor for e in shown} == {0, 7}
    drafting = default_anchors(ROW, collator)
    assert set(drafting) <= {1, 2, 3, 4, 7} and drafting
    assert list_elements(ROW, collator, MASK_TOKEN, word_names(), [6]) == [], "no row of the drafter starts there"


def test_the_table_of_elements_is_text() -> None:
    collator = CODCollator(16, 2, down_sample_ratio=1.0)
    names = word_names()
    shown = [e for e in list_elements(ROW, collator, MASK_TOKEN, names, [1, 5]) if e.depth == 0]
    assert show_elements(shown, ROW, names).splitlines() == [
        "anchor  depth  position  reads token  and features        predicts          from the target at  learned",
        "1       0      1         'colour'     of column 1 'a'     'DARK'            column 2 'colour'   no",
        "5       0      5         'END'        of column 5 'BLUE'  (behind the end)  column 6 'END'      yes",
    ]


def test_tokens_are_shown_by_document_with_the_learned_ones_marked() -> None:
    names = word_names()
    assert show_tokens(ROW, names, is_colored=False).splitlines() == [
        "--- document 0: columns 0 to 6, 4 tokens learned from ---",
        "nameacolour[DARK][SEA][BLUE][END]",
        "--- document 1: columns 7 to 9, 2 tokens learned from ---",
        "bye[SO][LONG]",
    ]
    colored = show_tokens(ROW, names, is_colored=True)
    assert "nameacolour\x1b[30;102mDARK\x1b[0m\x1b[30;42mSEA\x1b[0m" in colored and "[DARK]" not in colored


def test_names_of_tokens_have_no_line_breaks_no_control_characters_and_nothing_lost() -> None:
    tokenizer = make_tokenizer()
    names = TokenNames(tokenizer)
    text = "Hi the\n\tsea \x1b[31m \u00e9\u4f60<|im_end|>"
    shown = [names[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(shown[:5]) == r"Hi the\n\tsea"
    assert r"\x1b" in "".join(shown) and not any(c in "".join(shown) for c in "\n\t\x1b")
    assert "".join(shown).endswith("<|im_end|>") and "\ufffd" not in "".join(shown)
    assert TokenNames(None)[7] == "<7>"


def make_recipe(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    target = make_target(folder / "target", vocab_size=len(tokenizer) + 1)
    chatting = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    chatting.chat_template = stock(chats.CHATML)
    chatting.save_pretrained(target)
    turns = ["user: What colour is the sea?", "assistant: Blue."]
    (folder / "chats.jsonl").write_text(json.dumps(chats.chat(*turns)) + "\n")
    changes: dict[str, Any] = {"data": {"max_length": 64}, "draft": {"mask_token_id": len(tokenizer)}}
    return write_recipe(folder, target, folder / "chats.jsonl", folder / "out", **changes)


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The tool's exit code, in this process."""
    monkeypatch.setattr(sys, "argv", ["show_row.py", *map(str, arguments)])
    main = runpy.run_path(str(ROOT / "tools" / "show_row.py"))["main"]
    return int(main())


def test_the_tool_shows_a_row_of_a_recipe_and_what_its_elements_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path)
    assert run_tool(monkeypatch, recipe, "--row", 0, "--anchors", "11", "cod.down_sample_ratio=1.0") == 0
    text = capsys.readouterr().out
    assert "1 documents of 1 files" in text
    assert "row 0 of 1 training rows: 18 tokens, 3 of them learned from, 1 documents\n" in text
    assert "\n<|im_start|>user\\n\nWhat colour is the sea?<|im_end|>\\n\n" in text
    assert "\n<|im_start|>assistant\\n\n[Blue][.][<|im_end|>]\\n\n" in text
    lines = [line.split("  ") for line in text.splitlines() if line.startswith("11 ")]
    cells = [cell.strip() for cell in lines[0] if cell.strip()]
    assert cells[:5] == ["11", "0", "11", "'assistant'", "of column 11 '<|im_start|>'"]
    assert cells[5:] == [r"'\n'", "column 12 'assistant'", "no"]


def test_mistakes_are_one_line_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path)
    for arguments, message in (
        (["--row", "1"], "--row 1: there are 1 training rows; give 0 to 0"),
        (["--row", "-1"], "--row -1: there are 1 training rows; give 0 to 0"),
        (["--row", "0", "--held-out"], "--row 0: there are 0 held-out rows"),
        (["--row", "0", "--anchors", "18"], "--anchors 18: the row has columns 0 to 17"),
        (["--row", "0", f"target.path={tmp_path}"], "has no config that can be read"),
    ):
        assert run_tool(monkeypatch, recipe, *arguments) == 2
        *_, said = capsys.readouterr().err.splitlines()
        assert said.startswith("show_row: error: ") and message in said


def test_the_tools_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    command = [sys.executable, str(ROOT / "tools" / "show_row.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and "--anchors" in done.stdout, done.stderr
