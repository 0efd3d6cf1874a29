"""The shape of the package: few modules at the top, none long, imports downwards only, no circle.

Imports inside functions and for types count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import upcycle_cli

ROOT = Path(upcycle_cli.__file__).parent
MOST_LINES, MOST_MODULE_LINES, MOST_AT_THE_TOP = 21_125, 400, 8
ORDER = (
    *("core", "recipe", "checkpoint", "hub", "models", "training", "plan", "write", "run"),
    *("calibrate", "verification", "inspection", "publish", "api", "report", "cli"),
)
"""From the bottom to the top; a package or module imports only from those before it."""
PUBLIC = ("", "__main__")
"""What users call and import: the public API in __init__.py, and the entry point."""
WITH_FLAGS = {
    *("publish.card", "recipe.recipe_file", "write.staging", "run.models", "models.engines"),
    *("models.overview", "run.engine_runner"),
}
"""These write whole commands, or what an engine needs."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): path
    for path in ROOT.rglob("*.py")
}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module_of(name: str) -> str:
    """Return the module that an imported name is, or is in."""
    inner = name.removeprefix("upcycle_cli").removeprefix(".")
    while inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if f"{name}.".startswith("upcycle_cli."))


GRAPH: Mapping[str, set[str]] = {
    module: {module_of(name) for name in imports(path)} - {module, ""}
    for module, path in MODULES.items()
    if module not in PUBLIC
}


def test_no_circle_of_modules() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"these import one another: {' -> '.join(error.args[1])}")


def test_packages_import_downwards_only() -> None:
    floors = {name: floor for floor, name in enumerate(ORDER)}
    assert {module.partition(".")[0] for module in GRAPH} <= floors.keys()
    upwards = [
        f"{module} imports {imported}"
        for module, found in GRAPH.items()
        for imported in sorted(found)
        if floors[imported.partition(".")[0]] > floors[module.partition(".")[0]]
    ]
    assert upwards == []


def test_modules_are_few_at_the_top_and_short() -> None:
    at_the_top = [path.name for path in ROOT.glob("*.py")]
    assert len(at_the_top) <= MOST_AT_THE_TOP, at_the_top
    long = {module: lines(path) for module, path in MODULES.items()}
    assert {name: count for name, count in long.items() if count > MOST_MODULE_LINES} == {}


def test_the_package_is_small() -> None:
    assert sum(map(lines, MODULES.values())) <= MOST_LINES


def test_tests_mirror_packages_under_names_of_their_own() -> None:
    tests = [*Path(__file__).parent.parent.rglob("test_*.py")]
    assert len({path.name for path in tests}) == len(tests)
    kinds = {*ORDER, "contracts", "hostile", "end_to_end", "benchmarks", "interoperability"}
    folders = {path.relative_to(Path(__file__).parent.parent).parts[0] for path in tests}
    assert folders <= kinds, sorted(folders - kinds)


def test_the_outputs_check_shares_nothing_with_planner_and_writer() -> None:
    found, new = set[str](), {"verification.outputs"}
    while new:
        found |= new
        new = {module for name in new for module in GRAPH[name]} - found
    shared = {name for name in found if name.partition(".")[0] in ("plan", "write", "api")}
    assert shared == {"plan.texts"}  # which reads texts and prompts


def test_messages_below_the_command_line_name_arguments_and_no_flags() -> None:
    found = set()
    for module, path in MODULES.items():
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docs = {node.value for node in nodes if isinstance(node, ast.Expr)}
        texts = {node for node in nodes if isinstance(node, ast.Constant)} - docs
        if any(re.search(r"(?<![\w-])--[a-z]", str(node.value)) for node in texts):
            found.add(module)
    assert {name for name in found if not name.startswith("cli.")} == WITH_FLAGS
