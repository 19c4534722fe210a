"""The journal: whatever moment a run dies in, what was added is there, and the finished file is whole."""

import json
from pathlib import Path

import pytest

from peagle_train.answers.journal import Journal, finished

SETTINGS = {"model": "m", "temperature": 0.5}


def path_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def test_what_was_added_is_there_again_and_the_finished_file_replaces_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    journal = Journal(out, SETTINGS)
    journal.add(3, {"row": "d"})
    journal.add(0, {"row": "\ud800"})
    journal.close()
    again = Journal(out, SETTINGS)
    assert list(again) == [{"index": 0, "row": "\ud800"}, {"index": 3, "row": "d"}]
    assert len(again) == 2 and 3 in again and 1 not in again
    assert not out.exists() and finished(out, SETTINGS) is None
    again.finish(["a", "\u00e9"], {"rows": 2})
    assert out.read_text() == "a\n\u00e9\n" and not path_of(out).exists()
    assert finished(out, SETTINGS) is not None and finished(out, {**SETTINGS, "model": "n"}) is None
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_a_journal_cut_at_any_byte_is_a_prefix_of_its_results(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole", SETTINGS)
    for index in (2, 0, 1):
        whole.add(index, {"row": index * "x"})
    data = path_of(tmp_path / "whole").read_bytes()
    for cut in range(len(data) + 1):
        out = tmp_path / f"out{cut}"
        path_of(out).write_bytes(data[:cut])
        journal = Journal(out, SETTINGS)
        kept = max(0, data[:cut].count(b"\n") - 1)
        assert [entry["index"] for entry in journal] == sorted([2, 0, 1][:kept])
        for index in [2, 0, 1][kept:]:
            journal.add(index, {"row": index * "x"})
        assert path_of(out).read_bytes() == data
        journal.close()


def test_a_crash_between_the_finished_file_and_the_end_of_the_journal_is_finished_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Journal(out, SETTINGS).add(0, {"row": "a"})
    out.write_text("half a li")
    assert finished(out, SETTINGS) is None
    journal = Journal(out, SETTINGS)
    assert list(journal) == [{"index": 0, "row": "a"}]
    journal.finish(["a"], {})
    assert out.read_text() == "a\n"


def test_a_finished_file_that_was_changed_or_is_of_other_settings_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Journal(out, SETTINGS).finish(["a"], {})
    assert finished(out, SETTINGS) is not None
    out.write_text("mine\n")
    assert finished(out, SETTINGS) is None
    with pytest.raises(ValueError, match="out is there already: give another --out, or remove it"):
        Journal(out, SETTINGS)
    assert out.read_text() == "mine\n" and not path_of(out).exists()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"model": "m", "temperature": 0.6}, "was begun with temperature 0.5, now it is 0.6"),
        ({"model": "m"}, "was begun with temperature 0.5, now it is null"),
        ({**SETTINGS, "seed": 1}, "was begun with seed null, now it is 1"),
    ],
)
def test_a_journal_of_other_settings_is_refused_and_left_alone(
    tmp_path: Path, settings: dict[str, object], expected: str
) -> None:
    out = tmp_path / "out"
    Journal(out, SETTINGS).close()
    before = path_of(out).read_bytes()
    with pytest.raises(ValueError, match=expected):
        Journal(out, settings)
    assert path_of(out).read_bytes() == before
    Journal(out, SETTINGS)


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '"text"', '{"index": "x"}', "\udcff"])
def test_damage_in_the_middle_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    text = json.dumps({"settings": SETTINGS}) + "\n" + line + "\n" + json.dumps({"index": 1}) + "\n"
    path_of(tmp_path / "out").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"out\.journal, line 2 is damaged"):
        Journal(tmp_path / "out", SETTINGS)
    path_of(tmp_path / "foreign").write_text(line.encode("ascii", "replace").decode() + "\n")
    with pytest.raises(ValueError, match=r"foreign\.journal, line 1 is damaged"):
        Journal(tmp_path / "foreign", SETTINGS)


def test_two_runs_do_not_write_the_same_journal(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", SETTINGS)
    with pytest.raises(ValueError, match="another process is writing"):
        Journal(tmp_path / "out", SETTINGS)
    first.close()
    Journal(tmp_path / "out", SETTINGS)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        Journal(tmp_path / "file" / "out", SETTINGS)
