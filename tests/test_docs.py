from __future__ import annotations

import importlib.util
import re
import tomllib
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


def test_every_module_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for module in (ROOT / "upcycle_cli").glob("*.py"):
        assert module.name.startswith("__") or module.name in page, module.name


def test_readme_quick_start_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = set(re.findall(r"pip install [^\n]*\[([a-z0-9]+)\]", readme))
    assert wanted
    assert wanted <= project["optional-dependencies"].keys()
