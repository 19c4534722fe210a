"""Which room of the package may import which: a room uses the rooms below it, never one above, and no two each other."""

import ast
from pathlib import Path

import peagle_train

HOUSE = Path(peagle_train.__file__).parent
FLOORS = [
    {"core"},
    {"files", "machine"},
    {"config", "distributed", "ending"},
    {"data"},
    {"target_model"},
    {"serving"},
    {"memory"},
    {"training", "regenerate", "throughput"},
    {"decoding"},
    {"report"},
    {"show"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported() -> dict[str, set[str]]:
    """Every module of the package with those that it imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for path in HOUSE.rglob("*.py"):
        name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        inside = [
            (n.module.removeprefix("peagle_train").lstrip("."), n)
            for n in nodes
            if n.module.split(".")[0] == "peagle_train"
        ]
        found[name] = {module or alias.name for module, n in inside for alias in n.names}
    return found


def test_a_room_imports_only_rooms_below_it() -> None:
    modules = imported()
    assert len(modules) > 40 and {name.split(".")[0] for name in modules} == FLOOR.keys()
    up = [
        f"{name} imports {other}"
        for name, others in modules.items()
        for other in others
        if (room := name.split(".")[0]) != (below := other.split(".")[0]) and FLOOR[room] <= FLOOR[below]
    ]
    assert not up, up


def test_no_modules_import_each_other() -> None:
    modules = imported()
    while modules:  # take away what imports nothing that is left, as often as it goes
        free = [name for name, others in modules.items() if not others & modules.keys()]
        assert free, f"a circle among {sorted(modules)}"
        for name in free:
            del modules[name]
