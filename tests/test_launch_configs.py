"""recipes/accelerate/: read and validated by accelerate's own launcher."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from peagle_train.distributed import check_sharding

FOLDER = Path(__file__).parent.parent / "recipes" / "accelerate"
EXPECTED = {
    "one_gpu": {"num_processes": 1, "use_fsdp": False, "multi_gpu": False, "num_machines": 1},
    "ddp": {"num_processes": 8, "use_fsdp": False, "multi_gpu": True, "num_machines": 1},
    "fsdp2": {"num_processes": 8, "use_fsdp": True, "fsdp_version": 2, "num_machines": 1},
    "two_nodes": {"num_processes": 16, "multi_gpu": True, "num_machines": 2, "main_process_port": 29500},
}


def launched(name: str, *options: str) -> tuple[object, dict[str, str]]:
    """accelerate's arguments, and the environment that it would start the processes in."""
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "-m", "peagle_train", "RECIPE"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return parsed, prepare_multi_gpu_env(parsed)


def test_every_config_is_tested_and_says_how_to_launch_with_it() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)
    for name in EXPECTED:
        header = (FOLDER / f"{name}.yaml").read_text().split("compute_environment")[0]
        assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in header


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_a_config_as_what_its_name_says(name: str) -> None:
    parsed, environment = launched(name)
    assert {key: getattr(parsed, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def sharding_under(environment: dict[str, str], asked: str = "auto") -> bool:
    names = {k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    with patch_environment(**names):
        return check_sharding(asked)


def test_the_fsdp_config_shards_and_the_others_do_not_unless_the_recipe_says_so() -> None:
    assert sharding_under(launched("fsdp2")[1]) and not sharding_under(launched("ddp")[1])
    assert sharding_under(launched("ddp")[1], "fsdp2") and not sharding_under(launched("ddp")[1], "none")
    with pytest.raises(ValueError, match=r"train\.sharding is none"):
        sharding_under(launched("fsdp2")[1], "none")


@pytest.mark.parametrize(
    "option", [
        "fsdp_version=1", "fsdp_offload_params=true", "fsdp_reshard_after_forward=false",
        "fsdp_activation_checkpointing=true", "fsdp_cpu_ram_efficient_loading=true",
    ],
)  # fmt: skip
def test_what_an_fsdp_launch_may_ask_for_and_would_not_get_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.replace("=", ": ")):
        sharding_under(launched("fsdp2", f"--{option}")[1])


def test_an_fsdp_launch_without_the_config_is_refused_for_its_defaults() -> None:
    arguments = ["--use_fsdp", "--fsdp_version=2", "--num_processes=2", "-m", "peagle_train", "RECIPE"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading"):
        sharding_under(prepare_multi_gpu_env(parsed))
