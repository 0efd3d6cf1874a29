from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_reference_is_what_help_prints() -> None:
    generator = _generator()
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), (
        "run `python docs/generate_cli.py`"
    )


def test_every_option_of_convert_is_in_the_readme() -> None:
    reference = _generator().page()
    convert = reference[reference.index("## upcycle convert") :].split("\n## ")[0]
    options = set(re.findall(r"--[a-z][a-z-]+", convert)) - {"--help", "--no-virtual-groups"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {option for option in options if option not in readme} == set()


def test_relative_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def _rows() -> dict[str, int]:
    """Return the row of each module in the table of the architecture page."""
    rows: dict[str, int] = {}
    page = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    for row, line in enumerate(line for line in page if line.startswith("| `")):
        for folder, several, one in re.findall(
            r"`(\w+/)?(?:\{([\w,]+)\}|(\w+))\.py`", line.split("|")[1]
        ):
            for name in (several or one).split(","):
                rows[f"{folder}{name}"] = row
    return rows


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """Yield what is imported, in functions too; not what only types need."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("upcycle_cli"):
                inner = str(node.module).replace(".", "/").removeprefix("upcycle_cli").lstrip("/")
                if inner in {"", "commands"}:  # packages that have no row: modules are imported
                    yield from (f"{inner}/{alias.name}".lstrip("/") for alias in node.names)
                else:
                    yield inner


def test_imports_point_upward_in_the_architecture_page() -> None:
    rows, package = _rows(), ROOT / "upcycle_cli"
    quiet = {"__main__", *(f"{part}__init__" for part in ("", "commands/", "hub/", "running/"))}
    quiet.add("calibration/__init__")
    modules = {
        path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")
    }
    assert modules - quiet == rows.keys()
    for module in sorted(rows):
        tree = ast.parse((package / f"{module}.py").read_text())
        body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING")]
        for imported in _imports(body):
            name = imported if imported in rows else f"{imported}/__init__"
            assert rows[name] <= rows[module], f"{module} imports {name}"


def test_readme_quick_start_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = set(re.findall(r"pip install [^\n]*\[([a-z0-9]+)\]", readme))
    assert wanted
    assert wanted <= project["optional-dependencies"].keys()
