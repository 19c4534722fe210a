"""A target behind the real vLLM: its features, training from it, and what happens when it stops.

Needs vLLM beside this project: `bash tools/vllm_setup.sh`, then `.venv-vllm/bin/python -m pytest -m vllm`.
"""

import importlib.util
import json
import os
import signal
import socket
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
from tests.helpers import ENVIRONMENT, command
from tests.runs import last_error, run
from tests.tiny import make_target, write_recipe, write_rows
from tests.tiny_chat import make_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: bash tools/vllm_setup.sh"),
]

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
CPU = torch.device("cpu")
COMMAND = "import sys; from peagle_train.cli import main; sys.exit(main())"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Served:
    """`peagle-train serve-target --run` in a process group of its own."""

    def __init__(self, folder: Path, recipe: Path, port: int) -> None:
        arguments = [str(recipe), "--run", f"--port={port}", f"--folder={folder / 'states'}"]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        self.url, self.log = f"http://localhost:{port}", folder / f"server-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "serve-target", *arguments],
                env={**ENVIRONMENT, **settings}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        while "the server answers" not in (text := self.log.read_text()):
            assert self.process.poll() is None, text
            time.sleep(0.2)  # a process of its own starts: there is nothing else to wait for

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(folder: Path, recipe: Path, port: int) -> Iterator[Served]:
    served = Served(folder, recipe, port)
    try:
        served.wait()
        yield served
    finally:
        served.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_target(folder / "target", **SHAPE)
    make_tokenizer().save_pretrained(folder / "target")
    write_rows(folder / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13], prompt=0.2)
    return folder


def recipe_in(folder: Path, base: Path, **sections: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    target = {"dtype": "float32", **sections.pop("target", {})}
    train = {"max_steps": 8, "dtype": "float32", **sections.pop("train", {})}
    made = {"target": target, "train": train, **sections}
    return write_recipe(folder, base / "target", base / "rows.jsonl", folder / "run", **made)


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Served]:
    with serving(base, recipe_in(base / "serve", base), free_port()) as served:
        yield served


def losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_its_features_are_the_frozen_targets_and_its_files_are_removed(base: Path, server: Served) -> None:
    frozen = FrozenTarget.load(str(base / "target"), dtype="float32")
    served = ServedTarget(Target(path=str(base / "target"), server=server.url), CPU, 32)
    assert served.layer_ids == frozen.layer_ids and served.dtype == torch.float32
    assert torch.equal(served.head_weight(), frozen.head_weight())
    assert torch.equal(served.embedding_rows(), frozen.embedding_rows())
    g = torch.Generator().manual_seed(0)
    lengths = (17, 1, 9), (32,)
    rows = [
        {
            "input_ids": [torch.randint(0, 60, (n,), generator=g).tolist() for n in row],
            "loss_mask": [[1] * n for n in row],
        }
        for row in lengths
    ]
    batch = CODCollator(32, num_depths=4)(rows)
    documents, head = batch["document_ids"], frozen.head_rows(torch.arange(7))
    is_row = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    ours, theirs = served.outputs(batch, head), frozen.outputs(batch, head)
    # Nobody reads a document's last features, nor what predicts its second token.
    for found, expected, first in (
        (ours.features, theirs.features, 0),
        (ours.last_hidden, theirs.last_hidden, 1),
    ):
        ours_, theirs_ = (tensor[:, first : first + 31][is_row] for tensor in (found, expected))
        assert found.shape == expected.shape and float((ours_ - theirs_).abs().max() / theirs_.abs().max()) <= 1e-5
    assert not [*(base / "states").rglob("*.safetensors")]


def test_it_is_asked_for_what_training_reads_and_no_more(
    base: Path, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    served = ServedTarget(Target(path=str(base / "target"), server=server.url), CPU, 32)
    create, prompts = openai.resources.Completions.create, []

    def creating(self: Any, **arguments: Any) -> Any:
        prompts.append(arguments["prompt"])
        return create(self, **arguments)

    monkeypatch.setattr(openai.resources.Completions, "create", creating)
    masks = [[0] * 5 + [1, 1] + [0] * 9, [1] + [0] * 8, [1], [0, 0, 1]]  # a first token is no row's to learn from
    ids = [[7 * i + j + 1 for j in range(len(mask))] for i, mask in enumerate(masks)]
    batch = CODCollator(32, num_depths=4)([{"input_ids": ids, "loss_mask": masks}])
    head = served.head_rows(torch.arange(7))
    expected = FrozenTarget.load(str(base / "target"), dtype="float32").outputs(batch, head)
    for reach, features in ((None, [*range(6), 26, 27]), (2, [*range(2, 6), 26, 27])):
        served.reach = reach
        found = served.outputs(batch, head)
        assert sorted(map(len, prompts)) == [3, 7] and {*map(tuple, prompts)} == {tuple(ids[0][:7]), tuple(ids[3])}
        prompts.clear()
        for name, columns in (("features", features), ("last_hidden", [5, 6, 28])):
            ours, theirs = (getattr(outputs, name)[0, columns] for outputs in (found, expected))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not found.features[0, [*range(features[0]), *range(7, 26), *range(29, 32)]].any()


def test_training_from_it_is_training_with_the_target_in_the_process(
    base: Path, server: Served, tmp_path: Path
) -> None:
    # Evaluated in the middle, too, while the next batch's features fill what may be asked for ahead.
    evaluated = {"data": {"eval_fraction": 0.3}, "train": {"eval_steps": 3, "probe": True}}
    run(recipe_in(tmp_path / "evaluated", base, target={"prefetch_gib": 1e-6, "server": server.url}, **evaluated))
    for name, kept in ("once", ()), ("kept", ("target.reuse=4", "target.ring=0.0002")):
        ours, theirs = tmp_path / f"served {name}", tmp_path / f"frozen {name}"
        run(recipe_in(ours, base), f"target.server={server.url}", *kept)
        run(recipe_in(theirs, base), *kept)
        expected, found = losses(theirs / "run"), losses(ours / "run")
        assert len(found) == len(expected) >= 8 and found[7] < found[0]
        assert all(abs(a - b) <= 1e-3 * b for a, b in zip(found, expected, strict=True))


def test_answers_written_anew_bring_the_features_that_training_reads(
    base: Path, server: Served, tmp_path: Path
) -> None:
    prompts, kept, cache = tmp_path / "prompts.jsonl", tmp_path / "kept", tmp_path / "features"
    prompts.write_text("".join(json.dumps({"turns": [f"w{i} w3", "w4"]}) + "\n" for i in range(5)))
    answers = f"--out={tmp_path / 'rows.jsonl'}", f"--features={kept}", "--keep-truncated", "--max-tokens=8"
    asked = "regenerate", prompts, f"--base-url={server.url}/v1", f"--model={base / 'target'}", *answers
    assert command(*asked) == 2  # at temperatures above 0 this server, on a CPU, draws wrong tokens
    assert command(*asked, "--temperature=0") == 0
    used = {token for path in kept.glob("*.safetensors") for token in load_file(path)["token_ids"].tolist()}
    draft = {"mask_token_id": min({*range(60)} - used)}
    recipe = recipe_in(tmp_path / "cached", base, draft=draft, data={"sources": [str(cache / "documents.jsonl")]})
    assert command("cache", recipe, f"--speculators={kept}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe, f"output.dir={tmp_path / 'frozen'}")
    pairs = zip(losses(tmp_path / "cached" / "run"), losses(tmp_path / "frozen"), strict=True)
    assert all(abs(a - b) <= 1e-3 * b for a, b in pairs)


def test_its_cache_trains_what_the_targets_own_trains(base: Path, server: Served, tmp_path: Path) -> None:
    recipe, cache = recipe_in(tmp_path / "cached", base), tmp_path / "features"
    assert command("cache", recipe, f"target.server={server.url}", f"--out={cache}") == 0
    run(recipe, f"target.cache={cache}")
    run(recipe_in(tmp_path / "frozen", base))
    pairs = zip(losses(tmp_path / "cached" / "run"), losses(tmp_path / "frozen" / "run"), strict=True)
    assert all(abs(a - b) <= 1e-3 * b for a, b in pairs)


def test_two_processes_train_from_it(base: Path, server: Served, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "two", base, train={"max_steps": 4})
    arguments = "-m torch.distributed.run --standalone --nproc_per_node 2 -m peagle_train".split()
    subprocess.run(
        [sys.executable, *arguments, str(recipe), f"target.server={server.url}"],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True,
    )  # fmt: skip
    run(recipe_in(tmp_path / "one", base, train={"max_steps": 4, "gradient_accumulation_steps": 2}))
    pairs = zip(losses(tmp_path / "two" / "run"), losses(tmp_path / "one" / "run"), strict=True)
    assert all(abs(a - b) <= 1e-3 * b for a, b in pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target.layer_ids": "[1, 2, 3]"}, "gives layers 2-3-4, the recipe asks for 1-2-3"),
        ({"data.max_length": "64"}, "takes 33 tokens; data.max_length and a token more are 65"),
        ({"target.path": "OTHER"}, "it serves another model"),
        ({"target.dtype": "bfloat16"}, "computes in float32"),
        ({"target.server": "http://localhost:1"}, "does not answer"),
    ],
    ids=str,
)
def test_what_is_not_the_recipes_target_is_one_line_at_the_start(
    base: Path, server: Served, tmp_path: Path, settings: dict[str, str], message: str, capsys: pytest.CaptureFixture
) -> None:
    if "target.path" in settings:
        settings = {"target.path": str(make_target(tmp_path / "other", **{**SHAPE, "num_attention_heads": 4}))}
    given = {"target.server": server.url, **settings}
    run(recipe_in(tmp_path / "wrong", base), *(f"{key}={value}" for key, value in given.items()), code=2)
    assert message in last_error(capsys)


def test_a_server_that_is_killed_ends_the_run_with_a_checkpoint_and_one_that_is_back_lets_it_go_on(
    base: Path, tmp_path: Path
) -> None:
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
    found, expected = losses(output), losses(tmp_path / "whole" / "run")
    assert len(found) == len(expected) == 100  # roundings part the rest
    assert all(abs(a - b) <= 1e-2 * b for a, b in zip(found[:20], expected[:20], strict=True))
