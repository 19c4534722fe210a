"""A module imports only what lies below it: a room uses the rooms below it, never one above, nor each other."""

import ast
import tomllib
from pathlib import Path

import pytest

import peagle_train
from peagle_train.cli import main

HOUSE = Path(peagle_train.__file__).parent
FLOORS = [
    "core", "files machine", "config distributed", "data", "target_model", "serving", "memory",
    "training regenerate throughput", "decoding", "show", "cli", "__main__",
]  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}


def test_the_console_script_is_the_modules_own_and_types_are_shipped():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"peagle-train": f"{main.__module__}:main"} and (HOUSE / "py.typed").is_file()


@pytest.fixture
def modules():
    """Every module of the package with those that it imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for path in HOUSE.rglob("*.py"):
        name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peagle_train":
                    inside = node.module.removeprefix("peagle_train").lstrip(".")
                    found[name] |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names} | ({inside} - {""})
    return found


def test_a_room_imports_only_rooms_below_it_and_no_modules_import_each_other(modules):
    assert len(modules) > 40 and {name.split(".")[0] for name in modules} == FLOOR.keys()
    for name, others in modules.items():
        room = name.split(".")[0]
        below = {other.split(".")[0] for other in others} - {room}
        assert all(FLOOR[other] < FLOOR[room] for other in below), (name, others)
    while modules:  # take away what imports nothing that is left, as often as it goes
        free = [name for name, others in modules.items() if not others & modules.keys()]
        assert free, f"a circle among {sorted(modules)}"
        for name in free:
            del modules[name]
