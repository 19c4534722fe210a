"""Which part of the package may import which: a room uses the rooms below it."""

import re
from pathlib import Path

import peagle_train


def test_core_imports_nothing_of_the_package_outside_itself() -> None:
    core = Path(peagle_train.__file__).parent / "core"
    found = {
        path.name: re.findall(r"(?m)^\s*(?:from|import) peagle_train\b(?!\.core).*", path.read_text())
        for path in core.glob("*.py")
    }
    assert found and not any(found.values()), found
