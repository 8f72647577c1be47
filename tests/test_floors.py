"""The package's folders are floors: imports go down, never up, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import llavolta

FLOORS = [
    ["errors", "paths", "quiet"],
    ["compression", "data"],
    ["worlds"],
    ["train"],
    ["cost"],
    ["studies"],
    ["show", "harness"],
]
LEVEL = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
ROOT = Path(llavolta.__file__).parent
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.rglob("*.py")}


def imports(file: Path) -> set[str]:
    """Every module of the package that ``file`` imports, also inside of functions, without the package's name."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{name.name}" for name in node.names}
    own = {name.removeprefix("llavolta.") for name in names if name.startswith("llavolta.")}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in own}
    return {f"{name}.__init__" if f"{name}.__init__" in MODULES else name for name in found} - {""}


def test_imports_go_down_and_never_in_a_circle():
    outside = ("__init__", "bench")  # what a user imports and calls, every __main__ too, stands above all floors
    graph = {
        name: imports(file) for name, file in MODULES.items() if name not in outside and not name.endswith("__main__")
    }
    arrows = [(name, other) for name, others in graph.items() for other in others]
    floor = {name: LEVEL[name.split(".")[0]] for pair in arrows for name in pair}
    assert not [f"{name} -> {other}" for name, other in arrows if floor[name] < floor[other]]
    same = {"compression", "data"}  # side by side on one floor: neither imports the other
    assert not [(a, b) for a, b in arrows if {a.split(".")[0], b.split(".")[0]} == same]
    assert len(list(TopologicalSorter(graph).static_order())) > 50  # CycleError names the circle


def test_what_is_not_a_floor_is_found():
    assert {name.split(".")[0] for name in MODULES if "." in name} == {f for level in FLOORS[1:] for f in level}
    assert "compression.plan" in imports(MODULES["compression.patch"])
