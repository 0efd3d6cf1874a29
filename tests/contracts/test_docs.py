"""The documentation: generated pages are current, links lead somewhere, options are named."""

from __future__ import annotations

import functools
import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def _generated() -> tuple[str, Path]:
    """Return the CLI reference as `--help` has it now, and where the page lies."""
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page(), module.PAGE


def test_the_cli_reference_is_what_help_prints() -> None:
    reference, page = _generated()
    assert page.read_text(encoding="utf-8") == reference, "run `python docs/generate_cli.py`"


def test_every_option_of_convert_is_in_the_readme() -> None:
    reference, _ = _generated()
    convert = reference[reference.index("## upcycle convert") :].split("\n## ")[0]
    options = set(re.findall(r"--[a-z][a-z-]+", convert)) - {
        "--help",
        "--help-all",
        "--no-virtual-groups",
    }
    assert {option for option in options if option not in README} == set()


def test_links_and_paths_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "tests/README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for path in re.findall(r"(?<![\w/])(?:tests|upcycle_cli|docs)/[\w/.-]*\w", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_quick_start_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = set(re.findall(r"pip install [^\n]*\[([a-z0-9]+)\]", README))
    assert wanted
    assert wanted <= project["optional-dependencies"].keys()
