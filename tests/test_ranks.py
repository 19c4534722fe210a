"""Two and three processes, data-parallel and sharded (FSDP2), on CPU: the run of one process on the same global batch; a
rank that fails, which ends the run at once with its own message; the command line, and launches that lie.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peagle_train.__main__ import main
from peagle_train.config import load_recipe
from peagle_train.target_model.cache import write_cache
from tests import ranks_run
from tests.helpers import ENVIRONMENT, ROOT
from tests.runs import EVALUATED, LENGTHS, contents, drafter, in_child, lines, metrics, run, same_tensors
from tests.tiny import make_target, write_recipe, write_rows

slow = pytest.mark.slow


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *arguments], {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_the_command_line_on_two_processes_prints_once_and_ends_with_one_processs_weights(tmp_path, tiny, capsys):
    recipe = tiny(tmp_path, data=EVALUATED, train={"max_steps": 2})
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 -m peagle_train".split()
    sharded = "train.sharding=fsdp2", "target.shard=true"
    two = launch(*torchrun, str(recipe), f"output.dir={tmp_path / 'two'}", *sharded)
    assert two.returncode == 0, two.stdout + two.stderr
    run(recipe, "train.gradient_accumulation_steps=2")
    assert same_tensors(drafter(tmp_path / "two" / "final"), drafter(tmp_path / "run" / "final"), 1e-8)
    ours, theirs = (
        [line for line in text.splitlines() if line.startswith("held-out")]
        for text in (two.stdout, capsys.readouterr().out)
    )
    assert ours == theirs and len(ours) >= 2


@pytest.mark.parametrize("asked, environment", [("2", ("WORLD_SIZE", "2")), ("several", ("MASTER_ADDR", "127.0.0.1"))])
def test_processes_that_would_train_alone_are_refused_with_the_line_that_works(
    asked, environment, tmp_path, tiny, monkeypatch, capfd
):
    recipe = tiny(tmp_path)
    monkeypatch.setenv(*environment)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert in_child(lambda: sys.exit(main([str(recipe)]))) != 0
    error, how = capfd.readouterr().err, "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2"
    assert f"launched as {asked} processes" in error and how in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_one_of_several_processes_ends_at_once_with_its_code_and_with_all_that_it_said(code):
    script = "import atexit; from peagle_train.files import run_tool; atexit.register(print, 'waited')"
    script += f"; run_tool('x', lambda: print('done') or {code})"
    done = launch("-c", script, WORLD_SIZE="2", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout, done.stderr) == (code, "done\n", "")


# Whole runs

# 6 micro-batches a step are 6, 3 or 2 a process; 11 rows leave an epoch's last step incomplete, and ranks with nothing.
MICRO_BATCHES = 6
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "relay": {"draft": {"layer_type": "qwen3", "fc_norm": True}},
    "recompute": {"train": {"segment_mode": "recompute", "activation_checkpointing": True}},
    "packed": {  # two epochs, of a step each, of which the second reads its features from the ring
        "data": {"max_length": 48},
        "target": {"reuse": 2, "ring": 0.01},
        "train": {"batch_size": 2, "offload_features": True, "probe": True},
    },
    "nothing to learn": {"train": {"max_grad_norm": None}},
    "bf16": {"train": {"dtype": "float32", "mixed_precision": "bf16"}},
}

RUNS = [
    ("relay", 2, "none"), ("relay", 3, "fsdp2"), ("recompute", 2, "fsdp2"), ("packed", 3, "none"),
    ("nothing to learn", 3, "none"), ("nothing to learn", 2, "fsdp2"), ("bf16", 2, "fsdp2"),
]  # fmt: skip
COMPILED = ("relay", 3, "fsdp2")
# Stopped after step 1 by a signal to one of the ranks, then resumed on others: (processes, sharding) twice.
MOVES = [((1, "none"), (2, "fsdp2")), ((2, "fsdp2"), (3, "none"))]


def write_case(folder: Path, target: Path, name: str) -> Path:
    folder.mkdir()
    rows = write_rows(folder / "rows.jsonl", [*LENGTHS, 5], prompt=0.3)
    if name == "nothing to learn":  # but in two documents: whole micro-batches, and one step, have nothing supervised
        documents = [json.loads(line) for line in rows.read_text().splitlines()]
        ids = [token for document in documents[2:] for token in document["input_ids"]] * 2
        # cut to rows of which only the first has something
        documents[2:] = [{"input_ids": ids, "loss_mask": [0, 1] + [0] * (len(ids) - 2)}]
        rows.write_text("".join(json.dumps(document) + "\n" for document in documents))
    held_out = write_rows(folder / "held_out.jsonl", [30, 7, 12, 2], seed=9)
    train = {"max_steps": 3, "eval_steps": 2, "learning_rate": 1e-3, **CASES[name].get("train", {})}
    data = {"eval_sources": [str(held_out)], "pack": name == "packed", **CASES[name].get("data", {})}
    return write_recipe(folder, target, rows, folder / "run", **{**CASES[name], "train": train, "data": data})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Output folders by (case, processes, sharding), or by move; exit code and stderr by the name of a mistake."""
    folder = tmp_path_factory.mktemp("ranks")
    target = make_target(folder / "target")
    recipes = {name: write_case(folder / name, target, name) for name in CASES}
    out: dict[Any, Any] = {"folder": folder}
    tied = make_target(folder / "tied", tie_word_embeddings=True)
    jobs: dict[int, list[list[str]]] = {1: [], 2: [], 3: [["sharded", *map(str, (recipes["relay"], target, tied))]]}

    def add(key: Any, case: str, processes: int, sharding: str, *options: str) -> None:
        out[key] = folder / case / re.sub(r"\W+", "-", str(key))
        settings = [f"output.dir={out[key]}", f"train.sharding={sharding}"]
        settings.append(f"target.shard={processes == 3 and case != 'packed'}".lower())
        settings.append(f"train.gradient_accumulation_steps={MICRO_BATCHES // processes}")
        if key == COMPILED:
            settings += ["train.compile=true", "train.compile_backend=aot_eager"]
        jobs[processes].append(["run", str(recipes[case]), *settings, *options])

    for case, processes, sharding in [*((case, 1, "none") for case in CASES), *RUNS]:
        add((case, processes, sharding), case, processes, sharding)
    for first, then in MOVES:
        add((first, then), "relay", *first, "--stop")
        add((first, then), "relay", *then, "--resume")
    for _, *arguments in jobs[1]:
        ranks_run.run(*arguments)
    jobs[2].append(cache_job(folder, recipes["relay"]))
    groups: list[Any] = [[2, jobs[2]], [3, jobs[3]]]
    mistakes = {"data": "data.num_workers=1", "config": "train.epochs=0", "server": "train.max_steps=1"}
    for where, mistake in mistakes.items():
        groups.append([2, [["main", where, str(recipes["relay"]), f"output.dir={folder / where}", mistake]]])
    path = folder / "groups.json"
    path.write_text(json.dumps(groups))
    result = launch("tests/ranks_run.py", str(path))
    assert result.returncode == 0, result.stderr[-3000:]
    *trained, out["data"], out["config"], out["server"] = json.loads(result.stdout.splitlines()[-1])
    for code, said in trained:
        assert code == 0, said[-3000:]
    return out


def cache_job(folder: Path, recipe: Path) -> list[str]:
    """Features on disk, made whole, and beside that begun: all shards but two are missing."""
    write_cache(load_recipe(recipe), str(folder / "whole"), shard_mib=0.02)
    shutil.copytree(folder / "whole", folder / "begun")
    shards = sorted((folder / "begun").glob("features-*.safetensors"))
    assert len(shards) > 3
    for path in shards[2:]:
        path.unlink()
    return ["cache", str(recipe), str(folder / "begun")]


@slow
def test_two_processes_finish_the_features_that_one_has_begun(outputs):
    assert contents(outputs["folder"] / "begun") == contents(outputs["folder"] / "whole")


@slow
@pytest.mark.parametrize("case, processes, sharding", RUNS)
def test_several_processes_train_and_evaluate_as_one_does(case, processes, sharding, outputs):
    assert_same_run(outputs[case, processes, sharding], outputs[case, 1, "none"], rounded=case == "bf16")
    recompiles = {line["recompiles"] for line in lines(outputs[case, processes, sharding], "train")}
    assert recompiles == ({0} if (case, processes, sharding) == COMPILED else {None})


@slow
@pytest.mark.parametrize("move", MOVES)
def test_a_run_resumes_with_other_numbers_of_processes_and_another_sharding(move, outputs):
    assert_same_run(outputs[move], outputs["relay", 1, "none"])


def assert_same_run(together: Path, alone: Path, rounded: bool = False) -> None:
    ours, theirs = metrics(together), metrics(alone)
    assert [r["kind"] for r in ours] == [r["kind"] for r in theirs] and len(ours) == 3 + 3
    exact = {"supervised"} if rounded else {"accuracy", "supervised", "hits", "expected_accepted_length"}
    for own, expected in zip(ours, theirs):
        for key in {"loss", "grad_norm"} & expected.keys():
            assert own[key] == pytest.approx(expected[key], rel=0.05 if rounded else 1e-9), (own["step"], key)
        for key in exact & expected.keys():
            assert own[key] == expected[key], (own["step"], key)
    assert same_tensors(drafter(together / "final"), drafter(alone / "final"), 1e-3 if rounded else 1e-8)


def lines_of(text: str) -> list[str]:
    """What the ranks themselves wrote, without what was logged (by us, by torch) and progress bars."""
    logged = re.compile(r"peagle_train\.|\[rank|[WE]\d{4} |Writing|Loading|.*Warning")
    return [line for line in text.splitlines() if not logged.match(line)]


@slow
def test_data_that_fails_on_one_rank_is_the_only_traceback_and_ends_the_other(outputs):
    code, lines = outputs["data"][0], lines_of(outputs["data"][1])
    assert code == 1 and lines[0].startswith("Traceback")
    rest = lines[lines.index("OSError: the disk is gone (rank 1)") + 1 :]
    assert all(line.startswith("peagle-train") for line in rest) and len(rest) <= 2


@slow
@pytest.mark.parametrize("where, code, what", [("config", 2, "train.epochs"), ("server", 1, "the server is gone")])
def test_what_fails_on_all_ranks_is_told_once_by_rank_0(where, code, what, outputs):
    # rank 1 gets a SIGTERM, perhaps before it fails
    (line,) = [line for line in lines_of(outputs[where][1]) if "SIGTERM" not in line]
    assert outputs[where][0] == code and what in line and "(rank 0)" in line
