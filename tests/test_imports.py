"""Every module imports: types are not checked where an import fails."""

import importlib
import pkgutil
import tomllib
from pathlib import Path

import pytest

import peagle_train

MODULES = [found.name for found in pkgutil.walk_packages(peagle_train.__path__, "peagle_train.")]
ELSEWHERE = ("__main__", "vllm_connector")  # which vLLM imports: test_server.py


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(ELSEWHERE)])
def test_a_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_the_console_script_is_the_modules_own_and_types_are_shipped() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["peagle-train"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert (Path(peagle_train.__file__).parent / "py.typed").is_file()
