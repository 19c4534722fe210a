"""A target behind a server that fails as servers do; the real vLLM is in test_server.py."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peagle_train.config import Target
from peagle_train.core.collator import CODCollator
from peagle_train.target_model.frozen import FrozenTarget, TargetLost
from peagle_train.target_model.server import ServedTarget
from peagle_train.training.evaluate import Evaluator
from tests.chat_fake import MODEL, serving
from tests.helpers import command
from tests.runs import EVALUATED, Tiny, drafter, last_error, metrics, run, same_tensors
from tests.states_fake import States
from tests.tiny import write_recipe, write_rows
from tests.tiny_chat import make_chat_target

CPU = torch.device("cpu")
IDS = torch.arange(1, 8)


class Served:
    def __init__(self, states: States, url: str, target: Path) -> None:
        self.states, self.url, self.path = states, url, target

    def target(self, **settings: Any) -> ServedTarget:
        return ServedTarget(Target(path=str(self.path), server=self.url, check=False, **settings), CPU, 32)


@pytest.fixture
def served(tmp_path: Path, tiny_target: Path) -> Iterator[Served]:
    states = States(tiny_target, tmp_path / "states")
    with serving(states) as server:
        server.models = [{"id": MODEL, "max_model_len": 33}]
        yield Served(states, server.url, tiny_target)


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": list(range(1, n + 1)), "loss_mask": [1] * n} for n in lengths]
    return CODCollator(32, num_depths=4)(rows)


@pytest.mark.parametrize("lost", [2, 4, 5], ids=["in the middle", "last step's weights", "their mean"])
def test_a_server_lost_during_an_evaluation_leaves_a_checkpoint_from_which_the_run_goes_on_as_if_it_had_not_been(
    lost: int,
    tmp_path: Path,
    tiny: Tiny,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    there = f"target.server={served.url}", "target.server_patience=0"
    sections: dict[str, Any] = {"data": EVALUATED, "train": {"max_steps": 5, "eval_steps": 2, "average": 0.5}}
    run(tiny(tmp_path / "whole", **sections), *there)
    recipe, output = tiny(tmp_path / "parts", **sections), tmp_path / "parts" / "run"
    evaluate, calls = Evaluator.__call__, []

    def failing(self: Evaluator) -> Any:
        calls.append(self)
        served.states.down = len(calls) == lost
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", failing)
        run(recipe, *there, code=1)
    step = 2 if lost == 2 else 5
    message = last_error(capsys)
    assert "gave no answer" in message and f"--resume continues from checkpoint-{step}" in message
    served.states.down = False
    run(recipe, *there, "--resume")
    whole = tmp_path / "whole" / "run"
    assert same_tensors(drafter(output / "final"), drafter(whole / "final"))
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (output, whole))
    assert all(ours[key] == theirs[key] for key in ("before", "after", "best", "last_step"))
    ours, theirs = ({(x["step"], x["kind"]): x for x in metrics(folder)} for folder in (output, whole))
    assert ours == theirs


def test_patience_begins_with_the_first_failure_and_a_restarted_servers_empty_folder_is_one(served: Served) -> None:
    target = served.target(server_patience=0)
    head = target.head_rows(torch.arange(5))
    served.states.faults = ["down"]
    target.outputs(batch_of(7), head)
    served.states.faults = ["no lock"]
    target.outputs(batch_of(7), head)
    for server in target.servers:
        server.patience = 0.01
    served.states.faults = ["held"]
    target.outputs(batch_of(7), head)


def test_a_request_after_a_server_was_lost_names_the_reason_too(served: Served) -> None:
    target, served.states.down = served.target(server_patience=0), True
    for length in (7, 9):
        with pytest.raises(TargetLost, match="500"):
            target.outputs(batch_of(length), target.head_rows(torch.arange(5)))


def test_a_folder_that_is_not_shared_is_told_as_that(served: Served) -> None:
    served.states.faults = ["no lock"]
    with pytest.raises(ValueError, match="share that folder"):
        served.target()


def test_a_folder_that_does_not_say_its_layers_is_a_warning(
    tmp_path: Path, tiny_target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = States(tiny_target, tmp_path, name="shared")
    with serving(states) as server, caplog.at_level(logging.WARNING):
        server.models = [{"id": MODEL, "max_model_len": 33}]
        target = Served(states, server.url, tiny_target).target()
        target.outputs(batch_of(7), target.head_rows(torch.arange(5)))
    assert sum("serve-target" in record.message for record in caplog.records) == 1


def test_what_is_still_queued_when_a_target_is_closed_is_never_asked_and_a_run_closes_its_target(
    tmp_path: Path, tiny: Tiny, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = served.target()
    served.states.prompts.clear()
    served.states.gate.clear()
    target.expect([batch_of(*range(2, 32)), batch_of(*range(2, 32))])
    target.close()
    served.states.gate.set()
    other = served.target()
    for _ in range(30):  # what is still on its way comes meanwhile
        other.outputs(batch_of(3), other.head_weight())
    assert len(served.states.prompts) <= 32 + 1 + 30  # of 60 the 32 that were asked at once, and the other's
    closed = []
    monkeypatch.setattr(FrozenTarget, "close", lambda self: closed.append(self))
    run(tiny(tmp_path, train={"max_steps": 1}))
    assert len(closed) == 1


def test_features_that_are_kept_for_two_passes_are_asked_for_once(tmp_path: Path, tiny: Tiny, served: Served) -> None:
    recipe, kept = tiny(tmp_path, train={"epochs": 2}), ["target.reuse=2", "target.ring=1"]
    run(recipe, f"target.server={served.url}", *kept, f"output.dir={tmp_path / 'served'}")
    assert len(served.states.prompts) == 11 + 3 + 1  # pieces of documents, the check's, and the question for the dtype
    assert not [*served.states.folder.iterdir()]
    run(recipe, *kept)
    found, expected = (drafter(tmp_path / name / "final") for name in ("served", "run"))
    assert all(torch.allclose(found[name], tensor, rtol=0, atol=1e-9) for name, tensor in expected.items())


def test_answers_that_are_written_anew_bring_the_features_that_training_reads(tmp_path: Path) -> None:
    target, states, cache = make_chat_target(tmp_path / "target"), tmp_path / "kept", tmp_path / "cache"
    prompts = tmp_path / "prompts.jsonl"
    asked = ["w1 w2", "w3 w4 w5"], ["w6", "w9", "w7"], ["w8 w8 w8"]
    prompts.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in asked))
    with serving(States(target, tmp_path / "states")) as server:
        where = f"--base-url={server.url}", "--model", MODEL, f"--features={states}", f"--out={tmp_path / 'rows.jsonl'}"
        assert command("regenerate", prompts, *where) == 0
    found = [load_file(path) for path in states.glob("*.safetensors")]
    assert len(found) == 4 and not [*(tmp_path / "states").rglob("*.safetensors")]  # without the answer that was cut
    for sample in found:
        ids, learned = sample["token_ids"].tolist(), sample["loss_mask"].tolist()
        assert ids[-3:] == [11, len(ids) - 3, 12] and learned == [0] * (len(ids) - 3) + [1] * 3
    draft = {"mask_token_id": 57, "draft_vocab_size": None}
    recipe = write_recipe(tmp_path, target, cache / "documents.jsonl", tmp_path / "run", draft=draft)
    assert command("cache", recipe, f"--speculators={states}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe, f"output.dir={tmp_path / 'anew'}")
    ours, theirs = (drafter(tmp_path / name / "final") for name in ("run", "anew"))
    assert all(torch.allclose(ours[name], tensor, rtol=0, atol=1e-9) for name, tensor in theirs.items())


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_equal_questions_that_are_answered_together_keep_one_file(temperature: float, tmp_path: Path) -> None:
    states, prompts = States(make_chat_target(tmp_path / "target"), tmp_path / "states"), tmp_path / "prompts.jsonl"
    prompts.write_text((json.dumps({"prompt": "w1 w2"}) + "\n") * 23)
    with serving(states) as server:
        where = f"--base-url={server.url}", "--model", MODEL, f"--features={tmp_path / 'kept'}"
        out = f"--out={tmp_path / 'rows.jsonl'}", f"--temperature={temperature}"
        assert command("regenerate", prompts, *where, *out) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 23
    assert len([*(tmp_path / "kept").glob("*.safetensors")]) == 1


@pytest.mark.parametrize("fault", ["draws wrong tokens", "holds layers-2-3-4"])
def test_answers_that_are_not_the_targets_or_states_of_other_layers_are_refused(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target, prompts, kept = make_chat_target(tmp_path / "target"), tmp_path / "prompts.jsonl", tmp_path / "kept"
    prompts.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    states = States(
        target, tmp_path / ("states" if "layers" in fault else "cpu"), fault.replace("holds", "layers-1-3-4")[:12]
    )
    kept.mkdir()
    (kept / "layers.txt").write_text("layers-2-3-4")
    with serving(states) as server:
        where = f"--base-url={server.url}", "--model", MODEL, f"--features={kept}", f"--out={tmp_path / 'rows.jsonl'}"
        assert command("regenerate", prompts, *where) == 2
    assert fault in capsys.readouterr().err.strip().splitlines()[-1]
    assert not [*kept.glob("*.safetensors")]


def test_an_answer_that_is_wrong_in_the_middle_of_a_run_is_a_target_that_is_lost(served: Served) -> None:
    served.states.faults = ["gone"]
    with pytest.raises(ValueError, match="refuses"):  # at the start it is a mistake of the user's
        served.target()
    target, batch = served.target(), batch_of(7)
    served.states.faults = ["gone"]
    with pytest.raises(TargetLost, match="refuses"):
        target.outputs(batch, target.head_weight())
    target.close()


def test_head_embeddings_and_norm_are_found_in_weights_of_several_files(tmp_path: Path, tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    model.save_pretrained(tmp_path / "target", max_shard_size="8KB")
    assert len([*(tmp_path / "target").glob("*.safetensors")]) > 2
    states = States(tmp_path / "target", tmp_path / "states")
    with serving(states) as server:
        server.models = [{"id": MODEL, "max_model_len": 33}]
        target = ServedTarget(Target(path=str(tmp_path / "target"), server=server.url), CPU, 32)  # checks its tokens
        assert torch.equal(target.head_weight(), model.lm_head.weight.double())
        assert torch.equal(target.embedding_rows(), model.get_input_embeddings().weight.double())
        target.close()


def test_the_bench_reads_the_same_sequences_from_the_server_and_from_the_target_here(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from tools import bench_server

    rows = write_rows(tmp_path / "rows.jsonl", [30, 32, 29, 31])
    recipe = write_recipe(tmp_path, served.path, rows, tmp_path / "run")
    words = [
        "bench_server.py",
        str(recipe),
        "data.max_length=32",
        "--server",
        served.url,
        "--batches",
        "2",
        "--turns",
        "1",
    ]
    monkeypatch.setattr("sys.argv", words)
    bench_server.main()
    printed = capsys.readouterr().out
    assert re.search(r"^vLLM over here: \d", printed, re.MULTILINE), printed
    assert len(served.states.prompts) >= 4  # two turns, the first of them to warm up
