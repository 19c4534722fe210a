"""A target behind the real vLLM: its features, training from it, and what happens when it stops; mistakes: test_served.py.

Needs vLLM beside this project: `bash tools/vllm_setup.sh`, then `.venv-vllm/bin/python -m pytest -m vllm`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peagle_train.config import Target
from peagle_train.core.collator import CODCollator
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.server import ServedTarget
from tests.helpers import ENVIRONMENT, command, free_port, seeded
from tests.runs import run
from tests.tiny import write_recipe, write_rows
from tests.tiny_chat import make_chat_target

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: bash tools/vllm_setup.sh"),
]

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
CPU = torch.device("cpu")
COMMAND = "import sys; from peagle_train.cli import main; sys.exit(main())"


@contextmanager
def serving(folder: Path, recipe: Path, port: int) -> Iterator[str]:
    """The address of `peagle-train serve-target --run`, in a process group of its own."""
    arguments = ["serve-target", str(recipe), "--run", f"--port={port}", f"--folder={folder / 'states'}"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            env={**ENVIRONMENT, **settings}, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        while "the server answers" not in (text := log.read_text()):
            assert process.poll() is None, text
            time.sleep(0.2)  # a process of its own starts: there is nothing else to wait for
        yield f"http://localhost:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_chat_target(folder / "target", eos_token_id=4, **SHAPE)  # its generation config samples in another way
    write_rows(folder / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13], prompt=0.2)
    return folder


def recipe_in(folder: Path, base: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    target = {"dtype": "float32", **sections.pop("target", {})}
    train = {"max_steps": 8, "dtype": "float32", **sections.pop("train", {})}
    made = {"target": target, "train": train, **sections}
    return write_recipe(folder, base / "target", base / "rows.jsonl", folder / "run", **made)


@pytest.fixture(scope="module")
def server(base):
    with serving(base, recipe_in(base / "serve", base), free_port()) as url:
        yield url


def losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_near(ours: Path, theirs: Path, tolerance: float = 1e-3, first: int | None = None) -> None:
    found, expected = losses(ours)[:first], losses(theirs)[:first]
    assert all(abs(a - b) <= tolerance * b for a, b in zip(found, expected, strict=True))


def test_its_features_are_the_frozen_targets_and_its_files_are_removed(base, server):
    frozen = FrozenTarget.load(str(base / "target"), dtype="float32")
    served = ServedTarget(Target(path=str(base / "target"), server=server), CPU, 32)
    assert served.layer_ids == frozen.layer_ids and served.dtype == torch.float32
    assert torch.equal(served.head_weight(), frozen.head_weight())
    assert torch.equal(served.embedding_rows(), frozen.embedding_rows())
    ids = torch.randint(0, 60, (59,), generator=seeded(0)).tolist()
    rows = [ids[:17], ids[17:18], ids[18:27]], [ids[27:]]
    masked = [{"input_ids": row, "loss_mask": [[1] * len(document) for document in row]} for row in rows]
    batch = CODCollator(32, num_depths=4)(masked)
    documents, head = batch["document_ids"], frozen.head_rows(torch.arange(7))
    is_row = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    ours, theirs = served.outputs(batch, head), frozen.outputs(batch, head)
    # Nobody reads a document's last features, nor what predicts its second token.
    for name, first in (("features", 0), ("last_hidden", 1)):
        found, expected = (getattr(each, name)[:, first : first + 31][is_row] for each in (ours, theirs))
        assert found.shape == expected.shape and float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert not [*(base / "states").rglob("*.safetensors")]


def test_training_from_it_is_training_with_the_target_in_the_process(base, server, tmp_path):
    # Evaluated in the middle, too, while the next batch's features fill what may be asked for ahead.
    evaluated = {"data": {"eval_fraction": 0.3}, "train": {"eval_steps": 3, "probe": True}}
    run(recipe_in(tmp_path / "evaluated", base, target={"prefetch_gib": 1e-6, "server": server}, **evaluated))
    for name, kept in ("once", ()), ("kept", ("target.reuse=4", "target.ring=0.0002")):
        ours, theirs = tmp_path / f"served {name}", tmp_path / f"frozen {name}"
        run(recipe_in(ours, base), f"target.server={server}", *kept)
        run(recipe_in(theirs, base), *kept)
        found = losses(ours / "run")
        assert len(found) >= 8 and found[7] < found[0]
        assert_near(ours / "run", theirs / "run")


def test_answers_written_anew_bring_the_features_that_training_reads(base, server, tmp_path):
    prompts, kept, cache = tmp_path / "prompts.jsonl", tmp_path / "kept", tmp_path / "features"
    prompts.write_text("".join(json.dumps({"turns": [f"w{i} w3", "w4"]}) + "\n" for i in range(5)))
    answers = f"--out={tmp_path / 'rows.jsonl'}", f"--features={kept}", "--keep-truncated", "--max-tokens=8"
    asked = "regenerate", prompts, f"--base-url={server}/v1", f"--model={base / 'target'}", *answers
    assert command(*asked) == 2  # at temperatures above 0 this server, on a CPU, draws wrong tokens
    assert command(*asked, "--temperature=0") == 0
    used = {token for path in kept.glob("*.safetensors") for token in load_file(path)["token_ids"].tolist()}
    draft = {"mask_token_id": min({*range(60)} - used)}
    recipe = recipe_in(tmp_path / "cached", base, draft=draft, data={"sources": [str(cache / "documents.jsonl")]})
    assert command("cache", recipe, f"--speculators={kept}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe, f"output.dir={tmp_path / 'frozen'}")
    assert_near(tmp_path / "cached" / "run", tmp_path / "frozen")
    # The texts are what the model in this process says, although the target's generation config asks for another way.
    local = f"--target={base / 'target'}", "--dtype=float32", f"--out={tmp_path / 'here.jsonl'}", "--temperature=0"
    assert command("regenerate", prompts, *local, "--keep-truncated", "--max-tokens=8") == 0
    there, here = (
        {row["id"]: [m["content"].split() for m in row["messages"]] for row in map(json.loads, lines)}
        for lines in ((tmp_path / name).read_text().splitlines() for name in ("rows.jsonl", "here.jsonl"))
    )
    assert there == here and len(here) == 5


def test_its_cache_trains_what_the_targets_own_trains(base, server, tmp_path):
    recipe, cache = recipe_in(tmp_path / "cached", base), tmp_path / "features"
    assert command("cache", recipe, f"target.server={server}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe_in(tmp_path / "frozen", base))
    assert_near(tmp_path / "cached" / "run", tmp_path / "frozen" / "run")


def test_two_processes_train_from_it(base, server, tmp_path):
    recipe = recipe_in(tmp_path / "two", base, train={"max_steps": 4})
    arguments = "-m torch.distributed.run --standalone --nproc_per_node 2 -m peagle_train".split()
    subprocess.run(
        [sys.executable, *arguments, str(recipe), f"target.server={server}"],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True,
    )  # fmt: skip
    run(recipe_in(tmp_path / "one", base, train={"max_steps": 4, "gradient_accumulation_steps": 2}))
    assert_near(tmp_path / "two" / "run", tmp_path / "one" / "run")


def test_a_server_that_is_killed_ends_the_run_with_a_checkpoint_and_one_that_is_back_lets_it_go_on(base, tmp_path):
    port = free_port()
    # Little is asked for ahead, so that the run needs the server to its end.
    recipe = recipe_in(tmp_path / "killed", base, train={"max_steps": 100}, target={"prefetch_gib": 1e-6})
    first = [sys.executable, "-m", "peagle_train", str(recipe), f"target.server=http://localhost:{port}"]
    output = tmp_path / "killed" / "run"

    def started(*more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*first, *more], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        lines = output / "metrics.jsonl"
        before = lines.read_text().count("\n") if lines.exists() else 0
        while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") > before + 3):
            time.sleep(0.05)
        return process

    with serving(tmp_path, recipe, port):
        run_ = started("target.server_patience=0")
    assert run_.stderr is not None
    said = run_.stderr.read()
    assert run_.wait() == 1 and "gave no answer" in said and "--resume continues" in said, said
    assert [*output.glob("checkpoint-*")]
    with serving(tmp_path, recipe, port):
        run_ = started("--resume")
    with serving(tmp_path, recipe, port):
        said = run_.stderr and run_.stderr.read()
        assert run_.wait() == 0, said
    assert load_file(output / "final" / "model.safetensors")
    run(recipe_in(tmp_path / "whole", base, train={"max_steps": 100}))
    assert len(losses(output)) == 100
    assert_near(output, tmp_path / "whole" / "run", 1e-2, first=20)  # roundings part the rest
