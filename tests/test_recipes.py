"""recipes/: every one loads, and plans from its model's config what its head says."""

import re
from pathlib import Path

import pytest

from peagle_train.config import Recipe, load_recipe
from peagle_train.machine import GIB, parse_device
from peagle_train.memory import choose_segments, dry_run, plan_memory, read_sizes

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MODELS = {
    "quickstart": "smollm2-135m",
    "smollm2_chat": "smollm2-135m",
    "smollm2_cpu": "smollm2-135m",
    "qwen3_8b_8k": "qwen3-8b",
    "qwen3_8b_32k": "qwen3-8b",
    "qwen3_8b_128k": "qwen3-8b",
    "llama31_8b_8k": "llama-3.1-8b",
    "gpt_oss_20b_8k": "gpt-oss-20b",
    "qwen3_coder_30b_8k": "qwen3-coder-30b-a3b",
}
UNUSED = {  # the first and last id that no text gives, by tokenizer and embeddings
    "qwen3-8b": (151669, 151935),
    "qwen3-coder-30b-a3b": (151669, 151935),
    "llama-3.1-8b": (128011, 128255),
    "gpt-oss-20b": (200019, 201087),
}


def of_model(path: Path, folder: Path) -> Recipe:
    """The recipe with a target folder that holds nothing but its model's config."""
    (folder / "config.json").write_text((ROOT / "tests" / "configs" / f"{MODELS[path.stem]}.json").read_text())
    return load_recipe(path, [f"target.path={folder}"])


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES} == set(MODELS)
    assert {path.stem for path in (ROOT / "tests" / "configs").glob("*.json")} == set(MODELS.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_can_be_planned(path: Path, tmp_path: Path) -> None:
    on = "cpu:16" if MODELS[path.stem] == "smollm2-135m" else "cuda:79"
    table = dry_run(of_model(path, tmp_path), on)
    assert "cod.num_segments=auto would be" in table and "saved for backward" in table


@pytest.mark.parametrize("path", [p for p in RECIPES if "smollm2" not in MODELS[p.stem]], ids=lambda path: path.stem)
def test_a_recipe_for_a_gpu_says_at_its_head_what_it_needs_and_how_to_use_it(path: Path, tmp_path: Path) -> None:
    head = path.read_text().split("\ntarget:")[0]
    for word in ("on one GPU of 80 GB", "Data:", "Time, planned", "Mask token", "accelerate launch", "vllm serve"):
        assert word in head, word
    assert f"recipes/{path.name}" in head and f'"model": "runs/{path.stem}/final"' in head
    recipe = of_model(path, tmp_path)
    assert recipe.output.dir == f"runs/{path.stem}"
    found = re.search(r"planned by --dry-run --on (\S+), not measured: (\d+) segments?, ([\d.]+) GiB", head)
    assert found
    plan = choose_segments(read_sizes(recipe, parse_device(found[1])))
    assert plan is not None
    assert (plan.num_segments, f"{plan.peak / GIB:.2f}") == (int(found[2]), found[3])
    first, last = UNUSED[MODELS[path.stem]]
    assert recipe.draft.mask_token_id is not None and first <= recipe.draft.mask_token_id <= last
    assert f"Mask token {recipe.draft.mask_token_id}" in head


def test_parameters_are_counted_as_the_models_makers_count_them(tmp_path: Path) -> None:
    """In billions; sizes as published: 8.2, 8.0, 20.9, 30.5, 0.135."""
    published = {"qwen3_8b_8k": 8.19, "llama31_8b_8k": 8.03, "gpt_oss_20b_8k": 20.9, "qwen3_coder_30b_8k": 30.5}
    for path in RECIPES:
        if path.stem in published:
            sizes = read_sizes(of_model(path, tmp_path), parse_device("cuda:79"))
            assert sizes.target_weights / 2e9 == pytest.approx(published[path.stem], rel=0.005), path.stem


def test_more_gpus_need_less_of_each_where_everything_is_sharded(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "qwen3_coder_30b_8k.yaml"
    recipe = of_model(path, tmp_path)
    alone = plan_memory(read_sizes(recipe, parse_device("cuda:79")), 4)
    recipe.target.shard, recipe.train.sharding = True, "fsdp2"
    of_eight = plan_memory(read_sizes(recipe, parse_device("cuda:79x8")), 4)
    assert of_eight.resident["target weights"] < alone.resident["target weights"] / 4
    assert of_eight.resident["optimizer"] == pytest.approx(alone.resident["optimizer"] / 8, rel=0.01)
    assert of_eight.peak < alone.peak / 2
