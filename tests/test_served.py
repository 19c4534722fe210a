"""A target behind a server that fails as servers do; the real vLLM is in test_server.py."""

import fcntl
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from peagle_train.config import Target
from peagle_train.core.collator import CODCollator
from peagle_train.target_model.frozen import FrozenTarget, TargetLost
from peagle_train.target_model.server import ServedTarget, take
from peagle_train.training.step import BatchRunner
from tests.chat_fake import MODEL, FakeServer, serving
from tests.helpers import command
from tests.runs import EVALUATED, assert_same_run, drafter, last_error, run, same_tensors
from tests.states_fake import States
from tests.tiny import make_target, write_recipe
from tests.tiny_chat import make_chat_target

CPU = torch.device("cpu")


class Served:
    def __init__(self, states: States, server: FakeServer, target: Path) -> None:
        self.states, self.server, self.url, self.path = states, server, server.url, target
        server.models = [{"id": MODEL, "max_model_len": 33}]

    def target(self, max_length: int = 32, **settings: Any) -> ServedTarget:
        settings = {"path": str(self.path), "server": self.url, "check": False, **settings}
        return ServedTarget(Target(**settings), CPU, max_length)


@pytest.fixture
def served(tmp_path, tiny_target):
    states = States(tiny_target, tmp_path / "states")
    with serving(states) as server:
        yield Served(states, server, tiny_target)


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": list(range(1, n + 1)), "loss_mask": [1] * n} for n in lengths]
    return CODCollator(32, num_depths=4)(rows)


def test_a_server_lost_during_an_evaluation_leaves_a_checkpoint_from_which_the_run_goes_on_as_if_it_had_not_been(
    tmp_path, tiny, served, monkeypatch, capsys
):
    there = f"target.server={served.url}", "target.server_patience=0"
    sections: dict[str, Any] = {"data": EVALUATED, "train": {"max_steps": 3, "eval_steps": 2}}
    whole, evaluate = tmp_path / "whole" / "run", BatchRunner.evaluate
    run(tiny(tmp_path / "whole", **sections), *there)
    for lost in (2, 3):  # in the middle, at the end
        recipe, output, calls = tiny(tmp_path / str(lost), **sections), tmp_path / str(lost) / "run", []

        def failing(self, rows):
            calls.append(self)  # noqa: B023
            served.states.down = len(calls) == lost  # noqa: B023
            return evaluate(self, rows)

        with monkeypatch.context() as patch:
            patch.setattr(BatchRunner, "evaluate", failing)
            run(recipe, *there, code=1)
        message = last_error(capsys)
        assert "gave no answer" in message and f"--resume continues from checkpoint-{lost}" in message
        served.states.down = False
        run(recipe, *there, "--resume")
        assert_same_run(output, whole)


def test_patience_begins_with_the_first_failure_and_a_restarted_servers_empty_folder_is_one(served, monkeypatch):
    target, patient = served.target(server_patience=0), served.target(server_patience=1000)
    head, wait = target.head_rows(torch.arange(5)), threading.Event.wait
    for fault in ("down", "busy", "timeout", "no lock"):
        served.states.faults = [fault]
        target.outputs(batch_of(7), head)
    with monkeypatch.context() as patch:  # as long as it has patience it waits, here a moment, and asks again
        patch.setattr(threading.Event, "wait", lambda self, most=None: wait(self, most and 0.001))
        served.states.faults = ["down"] * 5
        patient.outputs(batch_of(7), head)
        with serving(
            lambda _: (500, b"{}")
        ) as broken:  # servers take turns: what one does not answer, the next one does
            broken.models = served.server.models
            served.target(server=[served.url, broken.url]).outputs(batch_of(7, 9, 11), head)
            assert broken.requests
            broken.models = [{"id": MODEL, "max_model_len": 99}]  # either may be asked for any sequence
            with pytest.raises(ValueError, match="takes 33 tokens"):
                served.target(33, server=[broken.url, served.url])
    for fault in ("gone", "other ids", "a layer less"):  # in the middle of a run, which is saved
        served.states.faults = [fault]
        with pytest.raises(TargetLost):
            target.outputs(batch_of(7), head)
    served.states.down = True
    for length in (7, 9):  # after it was lost, too
        with pytest.raises(TargetLost, match=r"gave no answer.*500"):
            target.outputs(batch_of(length), head)


def test_what_is_not_the_recipes_target_is_one_line_at_the_start(served, tmp_path):
    other = str(make_target(tmp_path / "other", intermediate_size=20))
    for fault, max_length, settings, message in (
        ("", 32, {"layer_ids": [1, 2, 3]}, r"gives layers-2-3-4 \[5, 4, 16\], the recipe asks for layers-1-2-3"),
        ("", 33, {}, r"takes 33 tokens; data.max_length \+ 1 is 34"),
        ("", 32, {"path": other, "check": True}, "another model"),
        ("", 32, {"dtype": "bfloat16"}, "computes in float64"),
        ("", 32, {"server": "http://127.0.0.1:1"}, "does not answer"),
        ("gone", 32, {}, "refuses"),
        ("other ids", 32, {}, "other tokens than it was asked for"),
        ("a layer less", 32, {}, r"layers-2-3-4 \[5, 3, 16\], the recipe asks for layers-2-3-4 \[5, 4, 16\]"),
    ):
        served.states.faults = [fault]
        with pytest.raises(ValueError, match=message) as error:
            served.target(max_length, **settings)
        assert "\n" not in str(error.value)


def test_it_is_asked_for_what_training_reads_and_no_more(served):
    target = served.target()
    masks = [[0] * 5 + [1, 1] + [0] * 9, [1] + [0] * 8, [1], [0, 0, 1]]  # a first token is no row's to learn from
    ids = [[7 * i + j + 1 for j in range(len(mask))] for i, mask in enumerate(masks)]
    batch = CODCollator(32, num_depths=4)([{"input_ids": ids, "loss_mask": masks}])
    head = target.head_rows(torch.arange(7))
    expected = served.states.frozen.outputs(batch, head)
    for reach, features in ((None, [*range(6), 26, 27]), (2, [*range(2, 6), 26, 27])):
        target.reach, served.states.prompts = reach, []
        found = target.outputs(batch, head)
        assert sorted(served.states.prompts) == [ids[0][:7], ids[3]]
        for name, columns in (("features", features), ("last_hidden", [5, 6, 28])):
            ours, theirs = (getattr(outputs, name)[0, columns] for outputs in (found, expected))
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
        assert not found.features[0, [*range(features[0]), *range(7, 26), *range(29, 32)]].any()


def test_what_is_asked_for_ahead_is_bounded_and_what_is_read_makes_room(served):
    target = served.target(prefetch_gib=2.01 * 32 * 512 / 2**30)  # of 32 tokens of float64, four states of 16 each
    first, second, third = batch_of(30), batch_of(31), batch_of(32)
    asked = {n: threading.Event() for n in (7, 30, 31, 32)}
    served.server.respond = lambda body: (asked[len(body["prompt"])].set(), served.states(body))[1]
    target.expect([first, second, third])
    for batch in (first, batch_of(7)):  # what is on its way comes meanwhile
        target.outputs(batch, target.head_weight())
    assert asked[31].wait(60) and not asked[32].is_set()
    target.expect([second, third])
    assert asked[32].wait(60)


def test_a_run_closes_its_target(tmp_path, tiny, monkeypatch):
    closed: list[FrozenTarget] = []
    monkeypatch.setattr(FrozenTarget, "close", lambda self: closed.append(self))
    run(tiny(tmp_path, train={"max_steps": 1}))
    assert len(closed) == 1


def test_features_that_are_kept_for_two_passes_are_asked_for_once(tmp_path, tiny, served):
    recipe, kept = tiny(tmp_path, train={"epochs": 2}), ["target.reuse=2", "target.ring=1"]
    run(recipe, f"target.server={served.url}", *kept, f"output.dir={tmp_path / 'served'}")
    assert len(served.states.prompts) == 11 + 3 + 1  # pieces of documents, the check's, and the question for the dtype
    assert not [*served.states.folder.iterdir()]
    run(recipe, *kept)
    assert same_tensors(drafter(tmp_path / "served" / "final"), drafter(tmp_path / "run" / "final"), 1e-9)


def regenerate(folder: Path, states: States, chats: list[list[str]], *more: str) -> int:
    """The exit code; answers come to rows.jsonl, hidden states to kept."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in chats))
    with serving(states) as server:
        where = f"--base-url={server.url}", "--model", MODEL, f"--features={folder / 'kept'}"
        return command("regenerate", prompts, *where, f"--out={folder / 'rows.jsonl'}", *more)


def test_answers_that_are_written_anew_bring_the_features_that_training_reads(tmp_path):
    target, cache = make_chat_target(tmp_path / "target"), tmp_path / "cache"
    chats = [["w1 w2", "w3 w4 w5"], ["w6", "w9", "w7"], ["w8 w8 w8"]]
    assert regenerate(tmp_path, States(target, tmp_path / "states"), chats) == 0
    found = [load_file(path) for path in (tmp_path / "kept").glob("*.safetensors")]
    assert len(found) == 4 and not [*(tmp_path / "states").rglob("*.safetensors")]  # without the answer that was cut
    for sample in found:
        ids, learned = sample["token_ids"].tolist(), sample["loss_mask"].tolist()
        assert ids[-3:] == [11, len(ids) - 3, 12] and learned == [0] * (len(ids) - 3) + [1] * 3
    draft = {"mask_token_id": 57, "draft_vocab_size": None}
    recipe = write_recipe(tmp_path, target, cache / "documents.jsonl", tmp_path / "run", draft=draft)
    assert command("cache", recipe, f"--speculators={tmp_path / 'kept'}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe, f"output.dir={tmp_path / 'anew'}")
    assert same_tensors(drafter(tmp_path / "run" / "final"), drafter(tmp_path / "anew" / "final"), 1e-9)


def test_equal_questions_that_are_answered_together_keep_one_file(tmp_path):
    states = States(make_chat_target(tmp_path / "target"), tmp_path / "states")
    assert regenerate(tmp_path, states, [["w1 w2"]] * 23) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 23
    (kept,) = (tmp_path / "kept").glob("*.safetensors")
    assert kept.stat().st_mode == (tmp_path / "rows.jsonl").stat().st_mode, "readable to whom other files are"


def test_answers_that_are_not_the_targets_or_states_of_other_layers_are_refused(tmp_path, capsys):
    target, kept = make_chat_target(tmp_path / "target"), tmp_path / "kept"
    kept.mkdir()
    (kept / "layers.txt").write_text("layers-2-3-4")
    for folder, name, message in (
        ("cpu", "layers-2-3-4", "draws wrong tokens"),
        ("states", "layers-1-3-4", "holds layers-2-3-4"),
    ):
        assert regenerate(tmp_path, States(target, tmp_path / folder, name), [["w1"]]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert [path.name for path in kept.iterdir()] == ["layers.txt"]


def test_what_lies_around_its_layers_is_read_from_weights_of_several_files(tmp_path, tiny_target):
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    torch.nn.init.uniform_(model.model.norm.weight)
    model.save_pretrained(tmp_path / "target", max_shard_size="8KB")
    assert len([*(tmp_path / "target").glob("*.safetensors")]) > 2
    GenerationConfig(eos_token_id=[5, 7]).save_pretrained(tmp_path / "target")
    with serving(States(tmp_path / "target", tmp_path / "states")) as server:
        target = Served(server.respond, server, tmp_path / "target").target(check=True)  # checks its tokens
    assert torch.equal(target.head_weight(), model.lm_head.weight.double())
    assert torch.equal(target.embedding_rows(), model.get_input_embeddings().weight.double())
    norm = target.final_norm()
    assert norm.weight.dtype == target.dtype and torch.equal(norm.weight, model.model.norm.weight.double())
    assert {5, 7} <= set(target.eos_token_ids())


def test_the_bench_reads_the_same_sequences_from_the_server_and_from_the_target_here(
    tmp_path, tiny, served, monkeypatch, capsys
):
    from tools import bench_server

    words = f"bench_server.py {tiny(tmp_path)} --server {served.url} --batches 2 --turns 1"
    monkeypatch.setattr("sys.argv", words.split())
    bench_server.main()
    assert re.search(r"^vLLM over here: \d", capsys.readouterr().out, re.MULTILINE)
    assert len(served.states.prompts) >= 4  # two turns, the first of them to warm up


def test_a_servers_file_that_does_not_get_whole_is_given_up(tmp_path):
    with (tmp_path / "1.safetensors.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="not whole"):
            take(tmp_path / "1.safetensors", [1], 0.0)
