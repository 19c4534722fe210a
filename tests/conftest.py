"""What every test needs: no network, a fresh state of Accelerate, and GPU tests only where there is a GPU."""

import os
import sys

# Before anything imports transformers or tokenizers: both read these once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
