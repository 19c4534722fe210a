"""Planned FLOPs, against counts by hand, published sizes and torch's counter; what the plan makes of them."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peagle_train.cli import main
from peagle_train.config import Cod, Data, Output, Recipe, Target, Train, load_recipe
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.relay import RelayBuffers
from peagle_train.machine import Device, parse_device
from peagle_train.memory import Sizes, read_target
from peagle_train.throughput import draft_flops, plan_throughput, target_flops
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from bench_memory import sizes_of_bench
from bench_segments import Bench, Settings, attention_without_kernel

RECIPE = ROOT / "recipes" / "qwen3_coder_30b_8k.yaml"
LLAMA_70B = {  # Llama-3.3-70B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
OF_70B = ["draft.intermediate_size=28672", "draft.mask_token_id=128011"]


def recipe_for(model: str, folder: Path, *overrides: str) -> Recipe:
    """The 30B's recipe with a target folder that holds a config.json alone."""
    if model == "llama-3.3-70b":
        (folder / "config.json").write_text(json.dumps(LLAMA_70B))
        overrides = (*OF_70B, *overrides)
    else:
        shutil.copy(ROOT / "tests" / "configs" / f"{model}.json", folder / "config.json")
    return load_recipe(RECIPE, [f"target.path={folder}", *overrides])


# ---- FLOPs


@pytest.mark.parametrize(
    "model, billions, heads",  # active, and heads x their size
    [("llama-3.3-70b", 70.55, 64 * 128), ("qwen3-coder-30b-a3b", 3.35, 32 * 128), ("gpt-oss-20b", 4.19, 64 * 64)],
)
def test_a_target_takes_two_flops_a_parameter_that_a_token_goes_through(
    model: str, billions: float, heads: int, tmp_path: Path
) -> None:
    """gpt-oss-20b: 3.61 published, which leaves the embeddings out."""
    L = 131
    target = read_target(recipe_for(model, tmp_path), parse_device("cuda:79"))
    matrices, attention = target_flops(target, L)
    around = 2 * target.vocab_size * target.hidden_size  # embeddings and head, which the forward does not multiply by
    assert matrices / (2 * L) + around == pytest.approx(billions * 1e9, rel=0.01)
    kinds = getattr(target.config, "layer_types", None) or ["full_attention"] * target.num_layers
    windows = [128 if kind == "sliding_attention" else L for kind in kinds]
    pairs = sum(min(p + 1, window) for window in windows for p in range(L))
    assert attention == pytest.approx(4 * heads * pairs)


def draft_sizes(L: int, window: int | None = None, cod: Any = None, **train: Any) -> Sizes:
    recipe = Recipe(
        Target("-"), Data(["-"], max_length=L), Output("-"), cod=cod or Cod(8, 0.8, 0.0), train=Train(**train)
    )
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    draft = PEagleDraftConfig(
        **shape, head_dim=16, num_hidden_layers=2, vocab_size=1000, draft_vocab_size=500, sliding_window=window
    )
    return Sizes(recipe, draft, Device("cpu", 0), 0, 0)


@pytest.mark.parametrize(
    "window, max_anchors, learned", [(None, None, 1.0), (37, None, 1.0), (None, 11, 1.0), (50, None, 0.5)]
)
def test_a_drafters_step_takes_six_flops_a_parameter_and_element(
    window: int | None, max_anchors: int | None, learned: float
) -> None:
    L, r = 509, 0.8
    sizes = draft_sizes(L, window, Cod(8, r, 0.0, max_anchors=max_anchors))
    matrices, attention = draft_flops(sizes, 1, learned)
    starts = max_anchors or int(L * learned)
    by_depth = [L, *(int((starts - d) * r**d) for d in range(1, 8))]
    elements = sum(by_depth)
    # q, k, v, o and the three of the MLP; the first layer reads embeddings beside features
    layers = [width * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 192 for width in (128, 64)]
    head = (elements - round((1 - learned) * L)) * 500 * 64
    expected = (
        6 * elements * sum(layers) + 4 * L * 3 * 64 * 64 + 6 * head
    )  # fc's input has no gradient, nor has the head
    assert matrices == pytest.approx(expected, rel=0.002)
    # Every element sees the depth-0 elements of its document up to its anchor and its own rollout, or a window of them.
    pairs = sum(count * sum(min(a + 1 + d, window or L + 8) for a in range(L)) / L for d, count in enumerate(by_depth))
    assert attention == pytest.approx(2 * 14 * pairs * 64, rel=0.02)


@pytest.mark.parametrize("mode, S", [("flat", 1), ("checkpoint", 1), ("relay", 2), ("relay", 7)])
def test_planned_flops_of_matrices_are_those_that_torch_counts(mode: str, S: int) -> None:
    bench = Bench(Settings(layers=3, heads=4, kv_heads=2, hidden=64, vocab=96, device="cpu").complete())
    n = 257
    batch, outputs = bench.batch(n, S), bench.target(n)
    with attention_without_kernel(), FlopCounterMode(display=False) as counter:
        bench.step(mode, batch, outputs, RelayBuffers())
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    planned, _ = draft_flops(sizes_of_bench(bench, n, mode), S)
    assert planned == pytest.approx(counted, rel=0.07)  # a layer's last matrix is not computed again


def test_padding_windows_and_recomputed_prefixes_are_counted() -> None:
    relay, recompute = (draft_flops(draft_sizes(4096, segment_mode=m, compile=True), 8) for m in ("relay", "recompute"))
    flat, windowed = draft_flops(draft_sizes(4096), 1), draft_flops(draft_sizes(4096, window=512), 1)
    assert flat[0] < relay[0] < 1.2 * flat[0] and recompute[0] > 1.8 * flat[0]
    assert windowed[0] == flat[0] and windowed[1] < flat[1] / 3
    half = draft_flops(draft_sizes(4096, compile=True), 8, 0.5)
    assert half[0] < 0.85 * relay[0]  # segments without elements are left out


# ---- the plan


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_machine_is_split_where_both_sides_are_equally_fast(tmp_path: Path, reuse: int) -> None:
    kept = f"target.reuse={reuse}", f"target.ring={900 if reuse > 1 else 'null'}", "train.max_steps=9"
    recipe = recipe_for("llama-3.3-70b", tmp_path, "data.max_length=32768", *kept)
    text = plan_throughput(recipe, "h200", 8, 1.0, 0.4, 5 * 10**8)
    serve, train = (
        float(re.search(rf"{side}.* ([\d,]+)\n", text)[1].replace(",", ""))  # type: ignore[index]
        for side in ("target's forward", "drafter's step")
    )
    assert serve == pytest.approx(0.4 * 989e12 * 32768 / 5.893e15, rel=0.01)  # 2 FLOPs a parameter, and attention
    serve *= reuse
    best = max(range(2, 8), key=lambda n: min(n * serve, (8 - n) * train))  # one GPU does not hold 141 GB
    pace = min(best * serve, (8 - best) * train)
    found = re.search(rf"{best} server \+ {8 - best} training\* +([\d,]+) +([\d.]+) ", text)
    assert found and "1 server + 7" not in text
    assert float(found[1].replace(",", "")) == pytest.approx(pace, abs=8 * reuse)
    assert float(found[2]) == pytest.approx(5e8 / pace / 3600, abs=0.06)
    ddp, fsdp2 = (float(re.search(rf"{how} S = \d+, (\d+) GiB", text)[1]) for how in ("DDP", "FSDP2"))  # type: ignore[index]
    assert "drafter of 5.02 billion" in text and fsdp2 < 139 * 0.9 and ddp < 139 * 0.9
    assert "too little memory" in text  # beside the whole target
    token = 4 * 8192 * 2
    assert f"{token // 1024} KiB a token, {5e8 * token / 1e12:.2f} TB" in text


def test_a_forward_that_serves_several_epochs_is_counted_once(tmp_path: Path) -> None:
    given = ["data.max_length=131072", "draft.window=2048", "cod.max_anchors=512", "train.epochs=8"]
    once, often = (
        plan_throughput(recipe_for("llama-3.3-70b", tmp_path, *given, *more), "h200", 8, 1.0, 0.4, 10**8)
        for more in ([], ["target.reuse=4", "target.ring=1000"])
    )
    shown = [re.findall(r"7 server \+ 1 training\*? +([\d,]+)", text) for text in (once, often)]
    assert shown == [["8,970"], ["13,346"]]  # of seven servers, and the drafter's own
    assert "6 server + 2 training*  " in often  # 6 x 1,281 x 4 and 2 x 13,346 lie closest


def test_the_command_plans_a_machine_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_for("qwen3-coder-30b-a3b", tmp_path)
    words = ["plan", str(RECIPE), f"target.path={tmp_path}"]
    assert main([*words, "--gpu", "h200", "--gpus", "8"]) == 0
    both = capsys.readouterr().out
    assert "8 processes, 139.0 GiB of CUDA memory each" in both and "8 h200" in both and "8 training from it" in both
    assert (
        main([*words, "--gpu", "h100", "target.server=http://localhost:8000"]) == 0
    )  # one GPU has nothing to share out
    alone = capsys.readouterr().out
    assert "1 h100" in alone and " server + " not in alone and "target weights" not in alone
    for wrong in (
        ["--gpus", "2"],
        ["--gpu", "h200", "--on", "cuda:8"],
        ["--gpu", "gtx"],
        ["--gpu", "h200", "--share", "2"],
    ):
        assert main([*words, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_worked_plans_in_the_docs_are_what_is_planned(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "running.md").read_text()
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if "B-A3B |" in line or "70B |" in line
    ]
    assert len(cells) == 6
    for model, length, limits, speeds, split, pace, hours, features, fits, host in cells:
        name = "llama-3.3-70b" if "70B" in model else "qwen3-coder-30b-a3b"
        window, anchors = limits.split(", ") if limits else ("null", "null")
        given = [f"data.max_length={length}", f"draft.window={window}", f"cod.max_anchors={anchors}"]
        text = plan_throughput(recipe_for(name, tmp_path, *given), "h200", 8, 1.0, 0.4, 5 * 10**8)
        shown = [*speeds.split(", "), *fits.split("; "), f"{features} TB an epoch", f"host memory, at most: {host} GiB"]
        assert all(figure in text for figure in shown), (shown, text)
        server, training = split.split(" + ")
        assert re.search(rf"{server} server \+ {training} training\* +{pace} +{hours} ", text), text


def test_experts_without_a_number_a_token_are_refused(tmp_path: Path) -> None:
    target = read_target(recipe_for("qwen3-coder-30b-a3b", tmp_path), parse_device("cuda:79"))
    target.config = SimpleNamespace(num_experts=128)
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        target_flops(target, 8)
