"""Sequences: packed without losing a token, prepared in a folder that is whole or not there, and dealt to the ranks."""

import copy
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_train.config import Recipe, load_recipe
from peagle_train.data import packing
from peagle_train.data.encode import Encoder
from peagle_train.data.packing import EMPTY_ROW, PackedRows, TrainingData, held_out_documents
from peagle_train.data.training_data import (
    StepBatchSampler,
    encoder_of,
    epoch_order,
    load_training_data,
    prepare_recipe,
)
from tests import oracles
from tests.chats import chat
from tests.documents import BYTES_VOCAB, TOKENIZER, Document, make_byte_target, pack_documents, write_lines
from tests.tiny import write_recipe

MASK = BYTES_VOCAB - 1


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_byte_target(tmp_path_factory.mktemp("target"))


def write_sources(folder: Path) -> list[Any]:
    """Text files, chats and ids, some twice, some longer than a sequence; the ids are several batches."""
    for i in range(12):
        write_lines(folder / "texts" / f"{i:02}.txt", b"text %d " % (i % 10) * (3 * i + 1))
    answers = [f"answer {i} " * (i % 7 + 1) for i in range(40)]
    chats = [chat(f"user: q{i}", f"assistant: {answer}") for i, answer in enumerate(answers)]
    write_lines(folder / "chats.jsonl", *chats, chats[3], {"text": "text 1 " * 4 + "\n"}, {"question": "?"})
    (folder / "ids.json").write_text(json.dumps([{"input_ids": [i // 250, i % 250, 7, 8, 9]} for i in range(600)]))
    return [str(folder / "texts"), {"path": str(folder / "chats.jsonl"), "weight": 1.5}, str(folder / "ids.json")]


def recipe_of(folder: Path, target: Path, **data: Any) -> Recipe:
    folder.mkdir(exist_ok=True, parents=True)
    given = {"max_length": 64, "eval_fraction": 0.2, "max_bad_rows": 1, "max_eval_rows": 4, **data}
    path = write_recipe(folder, target, folder, folder / "run", draft={"mask_token_id": MASK}, data=given)
    return load_recipe(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, target):
    """A recipe, and what two workers prepared for it."""
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_of(folder, target, sources=write_sources(folder))
    state = torch.get_rng_state()
    prepare_recipe(recipe, folder / "prepared", num_workers=2)
    assert torch.equal(torch.get_rng_state(), state), "workers take nothing from the global generator"
    return recipe, folder / "prepared"


def read(recipe: Recipe, prepared: Path | None = None, said: list[str] | None = None, **changes: Any) -> TrainingData:
    data = replace(recipe.data, prepared=prepared and str(prepared))
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "vocab_size": BYTES_VOCAB, "mask_token_id": MASK, **changes}
    return load_training_data(Encoder(data, **how), ([] if said is None else said).append)


def assert_same(first: TrainingData, second: TrainingData) -> None:
    for one, other in ((first.train_rows, second.train_rows), (first.eval_rows, second.eval_rows)):
        assert [repr(one[3, i]) for i in range(len(one))] == [repr(other[3, i]) for i in range(len(other))]
    assert torch.equal(first.counts_V, second.counts_V)
    assert (first.report, first.lines) == (second.report, second.lines)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_sequences_are_those_made_on_the_fly_bit_by_bit(made):
    recipe, folder = made
    said_now, said_then = list[str](), list[str]()
    now, then = read(recipe, said=said_now), read(recipe, folder, said_then)
    assert_same(now, then)
    assert said_then[1:] == said_now and "checksums verified" in said_then[0]
    assert "2 duplicate documents skipped, skipped 1 bad rows: 1 wrong format (first: " in now.lines[0]
    assert len(now.eval_rows) == 4 and now.report.split_documents > 0
    assert "held out: 4 of these sequences are evaluated on (data.max_eval_rows)" in said_now


@pytest.mark.parametrize("data", [{"pack": False}, {"eval_fraction": 0.0}, {"eval_sources": ["chats.jsonl"]}])
def test_every_setting_means_the_same_in_both_ways(data, tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=write_sources(tmp_path), **data)
    prepare_recipe(recipe, tmp_path / "prepared")
    now = read(recipe)
    assert_same(now, read(recipe, tmp_path / "prepared"))
    assert any("in data.eval_sources too: not trained on" in line for line in now.lines) == ("eval_sources" in data)


def test_an_epoch_holds_each_document_as_often_as_its_source_weighs(tmp_path, target, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_TOKENS", 7)  # tokens are counted across the borders of these
    sources = []
    for source, weight in enumerate((3, 1, 0.5)):
        rows = ({"input_ids": [source, i, 7, 8, 9]} for i in range(200))
        path = write_lines(tmp_path / f"{source}.jsonl", *rows)
        sources.append({"path": str(path), "weight": weight})
    data = read(recipe_of(tmp_path, target, sources=sources, eval_fraction=0.5, max_eval_rows=None))
    pieces, counted = Counter(pieces_of(data.train_rows)), torch.zeros(BYTES_VOCAB, dtype=torch.int64)
    for (ids, mask), times in pieces.items():
        counted += times * torch.bincount(torch.tensor(ids)[torch.tensor(mask) == 1], minlength=BYTES_VOCAB)
    times = [[n for (ids, _), n in pieces.items() if ids[0] == source] for source in range(3)]
    assert [{*each} for each in times] == [{3}, {1}, {1}]
    assert all(70 < len(each) < 130 for each in times[:2]) and 30 < len(times[2]) < 70
    held_out = Counter(pieces_of(data.eval_rows))
    assert {*held_out.values()} == {1} and 250 < len(held_out) < 350 and not held_out & pieces
    assert data.report.documents == pieces.total() and torch.equal(counted, data.counts_V)


def test_prepared_data_of_other_settings_is_refused_with_the_key_and_both_values(made):
    recipe, folder = made
    others = {"max_length": 65, "sources": ["elsewhere"], "pack": False, "exclude": ["x*"], "extensions": [".x"]}
    others |= {"template_kwargs": {"enable_thinking": True}, "eval_sources": ["elsewhere"]}
    for key, value in {**others, "eval_fraction": 0.125}.items():
        changed = replace(recipe, data=replace(recipe.data, **{key: value}))
        with pytest.raises(ValueError, match=f"was made with data.{key} .*while it is"):
            read(changed, folder)
    template, tokens, end, used = (copy.deepcopy(TOKENIZER) for _ in range(4))
    template.chat_template = template.chat_template.replace("assistant", "assistant ")
    tokens.add_tokens(["abc"])
    end.eos_token = "<|end|>"
    for changes, expected in (
        ({"tokenizer": template}, "the chat template"),
        ({"tokenizer": tokens}, "the target's tokenizer"),
        ({"tokenizer": end}, "the target's tokenizer"),
        ({"vocab_size": 301}, "the target's vocabulary 300, while it is 301 now"),
        ({"mask_token_id": 298}, "draft.mask_token_id 299, while it is 298 now"),
    ):
        with pytest.raises(ValueError, match=expected):
            read(recipe, folder, **changes)
    used.backend_tokenizer.enable_padding()
    used.backend_tokenizer.enable_truncation(3)
    read(recipe, folder, tokenizer=used)  # how it was called last does not matter


def test_a_finished_folder_is_checked_and_refused_when_its_sources_have_changed(tmp_path, target, capsys):
    write_sources(tmp_path)
    recipe = recipe_of(tmp_path, target, sources=[str(tmp_path / "ids.json")])
    first, before = prepare_recipe(recipe, tmp_path / "p"), files_in(tmp_path / "p")
    capsys.readouterr()
    assert_same(first, prepare_recipe(recipe, tmp_path / "p"))
    assert "is finished: checking it" in capsys.readouterr().out
    tokens = tmp_path / "p" / "sources-ids.bin"
    written = tokens.read_bytes()
    tokens.write_bytes(bytes([written[0] ^ 1]) + written[1:])
    with pytest.raises(ValueError, match=r"sources-ids\.bin is missing or changed"):
        prepare_recipe(recipe, tmp_path / "p")
    tokens.write_bytes(written)
    (tmp_path / "ids.json").write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(ValueError, match="was made with names and sizes of the sources"):
        prepare_recipe(recipe, tmp_path / "p")
    assert files_in(tmp_path / "p") == before


def test_a_preparation_that_ends_early_leaves_nothing_and_the_next_one_starts_over(made, tmp_path):
    recipe, folder = made
    for overrides, expected in (  # the draft vocabulary's size is told before data is read
        (["data.max_bad_rows=0"], "max_bad_rows is 0"),
        (["data.sources=[gone]", "draft.draft_vocab_size=301"], "is 301; the target's vocabulary has 300"),
    ):
        with pytest.raises(ValueError, match=expected):
            prepare_recipe(load_recipe(folder.parent / "recipe.yaml", overrides), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    encoder_of(load_recipe(folder.parent / "recipe.yaml", ["draft.draft_vocab_size=300"]))  # all of it
    (tmp_path / ".p.partial").mkdir()  # what kill -9 would leave
    (tmp_path / ".p.partial" / "sources-ids.bin").write_bytes(b"half")
    prepare_recipe(recipe, tmp_path / "p")
    assert not (tmp_path / ".p.partial").exists()
    assert files_in(tmp_path / "p") == files_in(folder), "one process makes the files that two workers make"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no prepared data"):
        prepare_recipe(recipe, tmp_path / "other")


def test_weights_and_held_out_documents_that_leave_nothing_are_refused(tmp_path, target):
    write_sources(tmp_path)
    source = str(tmp_path / "ids.json")
    for data in ({"sources": [{"path": source, "weight": 1e-9}]}, {"sources": [source], "eval_sources": [source]}):
        with pytest.raises(ValueError, match="nothing to learn from in the 0 documents to train on"):
            read(recipe_of(tmp_path, target, **data))


def test_the_smallest_data_are_evaluated_unless_the_fraction_is_0(tmp_path, target):
    """On the document that comes first by its key; a lone one is learned from."""
    for count, fraction, held_out in ((2, 1e-9, 1), (7, 1e-9, 1), (7, 0.0, 0), (1, 1e-9, 0)):
        rows, said = [[5, 7 * i, 9, 11] for i in range(count)], list[str]()
        source = write_lines(tmp_path / f"{count}.jsonl", *({"input_ids": row} for row in rows))
        recipe = recipe_of(tmp_path, target, sources=[str(source)], eval_fraction=fraction, pack=False)
        data = read(recipe, said=said)
        assert (len(data.train_rows), len(data.eval_rows)) == (count - held_out, held_out)
        assert any("no evaluation" in line for line in said) == (count == 1)
        if held_out:
            keys = [np.array(row, "<i8").tobytes() + bytes([0, 1, 1, 1]) for row in rows]
            first = min(range(count), key=lambda i: hashlib.sha256(keys[i]).digest())
            assert data.eval_rows[0]["input_ids"].tolist() == rows[first]


# The held-out split, and packing without losing a token


def document(ids: list[int], mask: list[int] | None = None, key: str = "0" * 64) -> Document:
    mask = [0] + [1] * (len(ids) - 1) if mask is None else mask
    return Document(torch.tensor(ids), torch.tensor(mask, dtype=torch.uint8), "test", key)


def keys(count: int) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(count)), np.uint8).reshape(-1, 32)


def test_about_the_fraction_is_held_out_whatever_the_others_are_and_it_only_grows_with_the_fraction():
    held_out = held_out_documents(keys(2000), 0.1)
    assert 150 < held_out.sum() < 250
    assert np.array_equal(held_out_documents(keys(2000)[250:100:-3], 0.1), held_out[250:100:-3])
    more = held_out_documents(keys(2000), 0.2)
    assert more[held_out].all() and more.sum() > held_out.sum()
    assert not held_out_documents(keys(9), 0.0).any() and held_out_documents(keys(0), 0.5).size == 0


def pieces_of(rows: PackedRows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    pieces = []
    for row in rows:
        for piece in row["document_ids"].unique().tolist():
            inside = row["document_ids"] == piece
            pieces.append((tuple(row["input_ids"][inside].tolist()), tuple(row["loss_mask"][inside].tolist())))
    return pieces


def slow_best_fit_spaces(lengths: list[int], capacity: int) -> list[int]:
    """The space each row has left, by looking at every row for every piece."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        if not fitting:
            spaces.append(capacity)
            fitting = [len(spaces) - 1]
        spaces[min(fitting, key=lambda row: spaces[row])] -= length
    return sorted(spaces)


bits = st.lists(st.integers(0, 1), min_size=1, max_size=23)


@settings(max_examples=50, deadline=None)
@given(st.lists(bits, max_size=12), st.integers(1, 9), st.booleans())
def test_packing_loses_nothing_and_fills_rows_as_a_slow_packer_does(masks, max_length, pack):
    documents = [document([100 * i + j for j in range(len(mask))], mask) for i, mask in enumerate(masks)]
    rows, report = pack_documents(documents, max_length, pack)

    expected = [
        (tuple(d.input_ids[at : at + max_length].tolist()), tuple(d.loss_mask[at : at + max_length].tolist()))
        for d in documents
        for at in range(0, d.input_ids.numel(), max_length)
    ]
    assert Counter(pieces_of(rows)) == Counter(expected)
    lengths = [len(ids) for ids, _ in expected]
    spaces = [max_length - row["input_ids"].numel() for row in rows]
    if pack:
        assert sorted(spaces) == slow_best_fit_spaces(lengths, max_length)
    else:
        assert pieces_of(rows) == expected and len(rows) == len(expected)

    supervised = 0  # counted as section 3 of the contract counts it
    for row in rows:
        rows_of_the_drafter = oracles.drafter_rows(row["document_ids"].tolist())
        supervised += sum(row["loss_mask"][p + 1].item() for p in rows_of_the_drafter)
    assert report.supervised == supervised
    assert report.lost_at_splits == sum(sum(mask[1:]) for mask in masks) - supervised
    assert (report.documents, report.pieces, report.rows) == (len(masks), len(expected), len(rows))
    assert report.tokens == sum(map(len, masks))
    assert report.split_documents == sum(len(mask) > max_length for mask in masks)
    assert report.fill == pytest.approx(report.tokens / (len(rows) * max_length) if len(rows) else 0)


def test_a_row_has_the_collators_fields_and_types_and_index_minus_one_is_an_empty_one():
    rows, _ = pack_documents([document([5, 6, 7]), document([8, 9])], 5)
    row, names = rows[0], ("input_ids", "loss_mask", "document_ids")
    assert [row[name].tolist() for name in names] == [[5, 6, 7, 8, 9], [0, 1, 1, 0, 1], [0, 0, 0, 1, 1]]
    assert {row[name].dtype for name in names} == {torch.int64}
    assert "epoch" not in row and rows[7, 0]["epoch"] == 7
    assert type(row["row_key"]) is int and 0 <= row["row_key"] < 2**63
    empty = rows[3, -1]
    assert (empty["row_key"], empty["epoch"]) == (0, 3)
    assert {(empty[name].shape, empty[name].dtype) for name in names} == {((0,), torch.int64)}


def test_a_rows_key_depends_on_its_content_alone():
    def key(*documents: Document, max_length: int = 8) -> int:
        return int(pack_documents(documents, max_length)[0][0]["row_key"])

    base, split = key(document([1, 2, 3, 4])), key(document([1, 2], [0, 1]), document([3, 4], [1, 1]))
    assert base == key(document([1, 2, 3, 4], key="f" * 64), max_length=4) == 8061358075994652352
    others = {split, key(document([1, 2, 3, 5])), key(document([1, 2, 3, 4], [0, 1, 1, 0]))}
    assert len({base, *others}) == 4


def test_limit_takes_a_fixed_sample_in_order_and_shares_the_tokens():
    rows, _ = pack_documents([document([i] * (i % 5 + 1)) for i in range(40)], 5, pack=False)
    limited, keys = rows.limit(7), [row["row_key"] for row in rows]
    chosen = [row["row_key"] for row in limited]
    assert len(limited) == 7 and len(rows) == 40
    assert sorted(chosen) == sorted(keys)[:7] and chosen == [key for key in keys if key in chosen]
    assert all(repr(row) == repr(rows[keys.index(row["row_key"])]) for row in limited)
    assert [row["row_key"] for row in rows.limit(None)] == keys


def slow_oracle(
    num_rows: int, batch: int, accumulation: int, rank: int, world: int, seed: int, num_steps: int
) -> list[list[tuple[int, int]]]:
    """Deal out one sequence at a time, as the contract says it."""
    per_step = batch * accumulation * world
    micro_batches = []
    epoch, queue = -1, []
    for _ in range(num_steps):
        if not queue:
            epoch += 1
            queue = epoch_order(num_rows, seed, epoch).tolist()
            queue += [EMPTY_ROW] * (-num_rows % per_step)
        step: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for j in range(per_step):
            step.setdefault((j // (world * batch), (j // batch) % world), []).append((epoch, queue.pop(0)))
        micro_batches += [step[micro_batch, rank] for micro_batch in range(accumulation)]
    return micro_batches


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), sizes, sizes, sizes, st.integers(1, 7), st.integers(0, 9), st.data())
def test_the_batches_are_those_of_a_slow_dealer(num_rows, batch, accumulation, world, num_steps, seed, data):
    rank = data.draw(st.integers(0, world - 1))
    start = data.draw(st.integers(0, num_steps))
    sampler = StepBatchSampler(num_rows, batch, accumulation, rank, world, seed, start, num_steps)
    expected = slow_oracle(num_rows, batch, accumulation, rank, world, seed, num_steps)
    assert list(sampler) == list(sampler) == expected[start * accumulation :]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and torch.equal(torch.get_rng_state(), state)
    # Seeds that agree in their low 32 bits, which are all that torch keeps of one.
    assert epoch_order(50, 0, 0).tolist() != epoch_order(50, 2**32, 0).tolist()
    assert epoch_order(8, 0, 0).tolist() == [3, 7, 4, 6, 5, 1, 0, 2], "the same in every release"


def test_resuming_late_costs_one_permutation_and_without_num_steps_it_is_one_epoch():
    assert len(list(StepBatchSampler(1000, batch_size=4, seed=3, start_step=10**9 + 7, num_steps=10**9 + 8))) == 1
    assert len(list(StepBatchSampler(7, batch_size=2))) == 4


def test_every_block_that_comes_again_is_mixed_in_a_way_of_its_own():
    sampler = StepBatchSampler(64, batch_size=1, num_steps=128, reuse=2, block_steps=16)
    blocks = [[index for ((_, index),) in list(sampler)[first : first + 16]] for first in range(0, 128, 16)]
    mixes = {tuple(first.index(row) for row in again) for first, again in zip(blocks[::2], blocks[1::2], strict=True)}
    assert len(mixes) == 4
