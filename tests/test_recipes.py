"""recipes/: every one plans what its head says, launch configs and loops run as they stand."""

import os
import re
import runpy

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import AutoModelForCausalLM

from peagle_train.config import load_recipe
from peagle_train.core.draft import PEagleDraft
from peagle_train.distributed import check_sharding
from peagle_train.files import alone_in, told, write_bytes
from peagle_train.machine import GIB, parse_device
from peagle_train.memory import choose_segments, plan_table, read_sizes
from tests.helpers import ROOT, command
from tests.tiny import MASK, write_rows

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
OF_A_GPU = {  # billions of parameters as the makers count them, the first and last id that no text gives
    "qwen3-8b": (8.19, 151669, 151935),
    "qwen3-coder-30b-a3b": (30.5, 151669, 151935),
    "llama-3.1-8b": (8.03, 128011, 128255),
    "gpt-oss-20b": (20.9, 200019, 201087),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned_and_one_for_a_gpu_says_at_its_head_what_it_needs_and_how_to_use_it(path, tmp_path):
    model = MODELS[path.stem]
    (tmp_path / "config.json").write_text((ROOT / "tests" / "configs" / f"{model}.json").read_text())
    recipe = load_recipe(path, [f"target.path={tmp_path}"])
    table, _ = plan_table(recipe, "cuda:79" if model in OF_A_GPU else "cpu:16")
    assert "cod.num_segments=auto would be" in table and "backward" in table
    if model not in OF_A_GPU:
        return
    head = path.read_text().split("\ntarget:")[0]
    for word in ("on one GPU of 80 GB", "Data:", "Time, planned", "Mask token", "accelerate launch", "vllm serve"):
        assert word in head, word
    assert f"recipes/{path.name}" in head and f'"model": "runs/{path.stem}/final"' in head
    assert recipe.output.dir == f"runs/{path.stem}"
    found = re.search(r"planned by `peagle-train plan --on (\S+)`, not measured: (\d+) segments?, ([\d.]+) GiB", head)
    sizes = read_sizes(recipe, parse_device(found[1]))
    plan, (billions, first, last) = choose_segments(sizes), OF_A_GPU[model]
    assert (plan.num_segments, f"{plan.peak / GIB:.2f}") == (int(found[2]), found[3])
    assert first <= recipe.draft.mask_token_id <= last and f"Mask token {recipe.draft.mask_token_id}" in head
    assert sizes.target_weights / 2e9 == pytest.approx(billions, rel=0.005)


# recipes/accelerate/, read and validated by accelerate's own launcher

FOLDER = ROOT / "recipes" / "accelerate"
EXPECTED = {
    "one_gpu": {"num_processes": 1, "use_fsdp": False, "multi_gpu": False, "num_machines": 1},
    "ddp": {"num_processes": 8, "use_fsdp": False, "multi_gpu": True, "num_machines": 1},
    "fsdp2": {"num_processes": 8, "use_fsdp": True, "fsdp_version": 2, "num_machines": 1},
    "two_nodes": {"num_processes": 16, "multi_gpu": True, "num_machines": 2, "main_process_port": 29500},
}


def launched(*options: str) -> tuple[object, dict[str, str]]:
    """accelerate's arguments, and the environment that it would start the processes in."""
    arguments = launch_command_parser().parse_args([*options, "-m", "peagle_train", "RECIPE"])
    parsed, _, _ = _validate_launch_command(arguments)
    return parsed, prepare_multi_gpu_env(parsed)


def config(name: str) -> list[str]:
    return ["--config_file", str(FOLDER / f"{name}.yaml")]


def test_accelerate_reads_a_config_as_what_its_name_says_and_its_head_says_how_to_launch_with_it():
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)
    for name, expected in EXPECTED.items():
        header = (FOLDER / f"{name}.yaml").read_text().split("compute_environment")[0]
        assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in header
        parsed, environment = launched(*config(name))
        assert {key: getattr(parsed, key) for key in expected} == expected
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def sharding_under(asked: str, *options: str) -> bool:
    names = {k: v for k, v in launched(*options)[1].items() if k.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    with patch_environment(**names):
        return check_sharding(asked)


def test_the_fsdp_config_shards_and_the_others_do_not_unless_the_recipe_says_so_and_what_it_would_not_get_is_refused():
    assert sharding_under("auto", *config("fsdp2")) and not sharding_under("auto", *config("ddp"))
    assert sharding_under("fsdp2", *config("ddp")) and not sharding_under("none", *config("ddp"))
    by_default = "--use_fsdp", "--fsdp_version=2", "--num_processes=2"
    for asked, options, refused in (
        ("none", config("fsdp2"), r"train\.sharding is none"),
        ("auto", by_default, "fsdp_cpu_ram_efficient_loading: true"),
        ("auto", [*config("fsdp2"), "--fsdp_version=1"], "fsdp_version: 1"),
        ("auto", [*config("fsdp2"), "--fsdp_offload_params=true"], "fsdp_offload_params: true"),
        ("auto", [*config("fsdp2"), "--fsdp_reshard_after_forward=false"], "fsdp_reshard_after_forward: false"),
        ("auto", [*config("fsdp2"), "--fsdp_activation_checkpointing=true"], "fsdp_activation_checkpointing: true"),
    ):
        with pytest.raises(ValueError, match=refused):
            sharding_under(asked, *options)


# Loops, and how mistakes are told


@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer"])
def test_a_loop_of_ones_own_learns_and_leaves_a_drafter(name, tiny_target, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [30, 17, 32, 2, 32], prompt=0.3)
    main = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"]
    options = f"--mask-token-id {MASK} --max-length 32 --depths 4 --segments 3 --epochs 12 --learning-rate 0.01"
    assert not main([str(tiny_target), str(rows), str(tmp_path / "out"), *options.split()])
    losses = [float(value) for value in re.findall(r"loss'?:? '?(\d+\.\d+)", capsys.readouterr().out)]
    losses = losses[: 12 * 5]  # the Trainer ends with a mean of its own
    assert len(losses) >= 12 * 4
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    drafter = PEagleDraft.from_pretrained(tmp_path / "out")
    assert command("check", tmp_path / "out") == 0
    assert drafter.mask_token_id == MASK and all(t.isfinite().all() for t in drafter.parameters())
    head = AutoModelForCausalLM.from_pretrained(tiny_target).lm_head.weight
    # not bit for bit: where the processor multiplies in bfloat16, that is what a target is loaded in
    assert torch.allclose(drafter.lm_head.weight, head.float(), rtol=2**-8)


def test_an_error_that_names_no_file_is_no_users_mistake_and_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    assert told(ValueError("a\n  b")) == "a b"
    assert told(FileNotFoundError(2, "No such file or directory", "x\n")) == "No such file or directory: 'x\\n'"
    with pytest.raises(OSError):
        told(OSError(5, "Input/output error"))
    os.mkdir(tmp_path / "page")
    with pytest.raises(OSError) as error:
        write_bytes(tmp_path / "page", b"x")
    assert told(error.value) == f"Is a directory: '{tmp_path / 'page'}'"
    write_bytes(tmp_path / "file", b"x")
    with pytest.raises(ValueError, match=r"--out .*file cannot be made"), alone_in(tmp_path / "file", "preparing"):
        pass
