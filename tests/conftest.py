"""What every test needs: no network, a fresh state of Accelerate, and GPU tests only where there is a GPU."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports transformers or tokenizers: both read these once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Inductor's flex attention for CPUs has room for the threads that it was compiled for, which its cache does not look at:
# from a cache that a process with fewer threads has filled, it writes over other memory.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
    f"{tempfile.gettempdir()}/peagle_inductor_{os.getuid()}_{os.environ.get('OMP_NUM_THREADS', os.cpu_count())}"
)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, so that several workers end together.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # seconds, so only when it decides something

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate's state outlives an Accelerator: its device and its processes would be those of the test before."""
    if "accelerate.state" in sys.modules:  # seconds to import, and most tests do without
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_target

    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def llama(tiny_target: Path) -> Any:
    """That target, loaded."""
    from peagle_train.target_model.frozen import FrozenTarget

    return FrozenTarget.load(str(tiny_target), dtype="float64")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import LENGTHS
    from tests.tiny import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", LENGTHS, prompt=0.3)


@pytest.fixture(scope="session")
def tiny(tiny_target: Path, tiny_rows: Path) -> Any:
    """Writes a recipe for that target and those rows: folder, sections."""
    from tests.runs import recipe_for

    return lambda folder, **sections: recipe_for(folder, tiny_target, tiny_rows, **sections)
