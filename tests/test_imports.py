"""Every module imports: types are not checked where an import fails."""

import importlib
import pkgutil

import pytest

import peagle_train

MODULES = [found.name for found in pkgutil.walk_packages(peagle_train.__path__, "peagle_train.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_a_module_can_be_imported(name: str) -> None:
    importlib.import_module(name)
