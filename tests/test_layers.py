"""Layers point one way: what each room may import, seen from its source and from a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("cellfast", {"torch", "numpy", "pandas", "h5py", "kornia"}),
        ("cellfast.screens.crop_store", {"torch", "kornia", "nvidia.dali"}),
        ("cellfast.screens.ingest_fields", {"torch", "kornia", "nvidia.dali"}),
        ("cellfast.training.config", {"torch"}),
        ("cellfast.printable", {"numpy", "pandas"}),
        ("cellfast.metadata.names", {"torch", "h5py", "pyarrow", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.metadata.paths", {"torch", "h5py", "pyarrow", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.metadata.controls", {"torch", "h5py", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.ops", {"pandas", "h5py", "kornia", "nvidia.dali", "cellfast.data", "cellfast.models", "cellfast.screens"}),
        ("cellfast.data", {"nvidia.dali", "cellfast.training", "cellfast.models"}),
    ],
)
def test_a_room_does_not_import(module, never):
    assert not never & imported(module)


def test_the_command_line_reference_is_up_to_date():
    done = subprocess.run([sys.executable, "-m", "cellfast.cli.reference"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "cli.md").read_text(), "run: python -m cellfast.cli.reference > docs/cli.md"


# From below to above. A room imports from its own layer only itself; the modules of the lowest layer may import one another.
LAYERS = (
    {
        "errors",
        "printable",
        "atomic",
        "bounded",
        "compiled",
        "progress",
        "parquet_footer",
        "declared",
        "signatures",
        "fresh_processes",
    },
    {"storage", "ops", "tensor_file"},
    {"metadata", "models", "losses", "system", "embeddings_folder"},
    {"screens", "augment", "model_file", "profiles"},
    {"data"},
    {"training", "embedding", "export", "outcomes"},
    {"api", "benchmark", "demo"},
    {"cli"},
    {"__main__"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "cellfast").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ``known`` that a file imports, at its top or in a function; not those that only a type checker sees."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for statement in test.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
    # The package itself is the front door, which knows all rooms by name; they ask it for the version.
    return (found & known) - {"cellfast"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach one another (Tarjan's strongly connected components of more than one)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(one: str) -> None:
        number[one] = lowest[one] = len(number)
        stack.append(one)
        for other in graph[one]:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[one] = min(lowest[one], lowest[other])
        if lowest[one] == number[one]:
            members = stack[stack.index(one) :]
            del stack[stack.index(one) :]
            if len(members) > 1:
                found.append(sorted(members))

    for one in graph:
        if one not in number:
            visit(one)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) - {name} for name, path in known.items() if name != "cellfast"}


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert sorted(circles(graph)) == [["a", "b", "c"], ["d", "e"]]


def test_no_module_imports_in_a_circle(graph):
    assert circles(graph) == []


def test_imports_point_down(graph):
    """Imports in functions too: one that points up is a circle that waits."""
    assert {name.split(".")[1] for name in graph} == set(LAYER), (
        "say in LAYERS where a new room lies, and leave out one that is gone"
    )
    up = []
    for name, others in graph.items():
        room = name.split(".")[1]
        for other in others:
            below = other.split(".")[1]
            if below != room and (LAYER[below], LAYER[room]) != (0, 0) and LAYER[below] >= LAYER[room]:
                up.append(f"{name} imports {other}")
    assert up == []
