"""A sequence in readable tokens and a batch as a picture: what is shown is what is trained."""

from functools import partial
from typing import Any

import pytest
import torch

from peagle_train.core.collator import CODCollator
from peagle_train.show import MASK, PAST_END, list_elements, show_tokens, token_name, visible_elements
from tests import test_alignment as alignment
from tests.chats import make_tokenizer
from tests.helpers import command, make_batch, make_rows
from tests.oracles import who_sees_whom
from tests.test_generate import tiny_draft
from tests.tiny import write_recipe, write_rows

WORDS = alignment.WORDS[:-1]  # without padding
SEQUENCE = {
    "input_ids": torch.arange(10),
    "loss_mask": torch.tensor(alignment.MASK[:-1]),
    "document_ids": torch.tensor(alignment.DOCUMENTS[:-1]),
}


def as_shown(
    who: tuple[int, int], reads: str, feature: str, position_id: int, predicts: str | None, learned: bool
) -> tuple[Any, ...]:
    (anchor, depth), label = who, sum(who) + 1
    given = (MASK, "mask_hidden") if depth else (f"'{reads}'", f"{anchor} '{feature}'")
    then = f"'{predicts}'" if predicts else PAST_END
    return (*who, position_id, *given, then, f"{label} '{WORDS[label]}'", "yes" if learned else "no")


def test_elements_are_shown_as_the_contract_has_them_and_tokens_by_document_with_the_learned_ones_in_brackets():
    collator, name, seen = CODCollator(16, num_depths=4, down_sample_ratio=1.0), [*WORDS, MASK].__getitem__, set()
    for epoch in range(30):
        shown = list_elements({**SEQUENCE, "epoch": epoch}, collator, len(WORDS), name)
        assert shown == sorted(shown)
        seen.update(shown)
    elements = {element[0] for element in alignment.TABLE}  # of those that can be drawn
    assert {row for row in seen if row[:2] in elements} == {as_shown(*element) for element in alignment.TABLE}
    assert show_tokens(SEQUENCE, name).splitlines() == [
        "--- document 0: positions 0 to 6, 4 tokens learned ---",
        "nameacolour[DARK][SEA][BLUE][END]",
        "--- document 1: positions 7 to 9, 2 tokens learned ---",
        "bye[SO][LONG]",
    ]


def test_names_of_tokens_have_no_line_breaks_no_control_characters_and_nothing_lost():
    tokenizer = make_tokenizer()
    name = partial(token_name, tokenizer)
    text = "Hi the\n\tsea \x1b[31m \u00e9\u4f60<|im_end|>"
    shown = [name(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(shown[:5]) == r"Hi the\n\tsea"
    assert r"\x1b" in "".join(shown) and not any(c in "".join(shown) for c in "\n\t\x1b")
    assert "".join(shown).endswith("<|im_end|>") and "\ufffd" not in "".join(shown)
    assert token_name(None, 7) == "<7>"


@pytest.fixture
def recipe(tmp_path, tiny_target):
    return write_recipe(tmp_path, tiny_target, write_rows(tmp_path / "rows.jsonl", [18]), tmp_path / "out")


def test_the_tool_shows_a_sequence_of_a_recipe_and_what_its_elements_read(recipe, capsys):
    for more in ("cod.down_sample_ratio=1.0", "cod.num_segments=auto"):  # S changes no element
        assert command("show-row", recipe, "--row", 0, "--elements", more) == 0
        text = capsys.readouterr().out
        assert "1 documents of 1 files" in text and "sequence 0 of 1 training sequences: 18 tokens, 17 of them" in text
        [line, *_] = [line for line in text.splitlines() if line.startswith("11 ")]
        assert [cell.strip() for cell in line.split("  ") if cell.strip()][:3] == ["11", "0", "11"]


@pytest.mark.parametrize(("S", "documents", "window"), [(1, 1, None), (3, 2, 5), (7, 3, 8)])
def test_the_picture_shows_what_the_oracle_sees(S, documents, window):
    batch = make_batch(make_rows(37, documents=documents), 37, S)
    anchor_N, depth_N, segment_N, visible_NN = visible_elements(batch, window)
    who = list(zip(batch["document_ids"][0, anchor_N].tolist(), anchor_N.tolist(), depth_N.tolist()))
    assert len(who) == int((batch["depth"] >= 0).sum()) == segment_N.numel()
    assert torch.equal(visible_NN, who_sees_whom(who, who, window))
    assert segment_N.tolist() == sorted(segment_N.tolist())


def test_a_picture_of_a_short_sequence_takes_no_table_of_all_slots_of_a_long_one():
    batch = make_batch(make_rows(37), 2**18, 1)  # whose pairs would take terabytes
    assert torch.equal(visible_elements(batch)[3], visible_elements(make_batch(make_rows(37), 37, 1))[3])


def test_a_picture_is_drawn_of_a_sequence_and_mistakes_are_one_line(tmp_path, recipe, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "batch.png"
    assert command("show-batch", recipe, "--out", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size < 150 * 1024
    tiny_draft(sliding_window=5).save_pretrained(tmp_path / "drafter")
    for *more, window in ([5], ["draft.window=9", 9]):  # the recipe's own before the drafter's
        assert command("show-batch", recipe, "--out", out, f"draft.init_from={tmp_path / 'drafter'}", *more) == 0
        assert f"S = 3, window {window}" in capsys.readouterr().out
    for tool, *more, message in (
        ("show-row", "--row", "-1", "give 0 to 0"),
        ("show-batch", "--row", "1", "give 0 to 0"),
        ("show-batch", "cod.num_segments=auto", "cod.num_segments is auto"),
    ):
        assert command(tool, recipe, *more) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"peagle-train {tool}: error: ") and message in last
