"""The documentation: short, links lead somewhere, the CLI reference is current."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "tests/README.md", *(ROOT / "docs").rglob("*.md"))
}
MOST_WORDS, MOST_WORDS_OF_A_GUIDE = 15_000, 800


def test_the_cli_reference_is_what_help_prints() -> None:
    found = runpy.run_path(str(ROOT / "docs/generate_cli.py"))
    assert found["PAGE"].read_text("utf-8") == found["page"](), "run `python docs/generate_cli.py`"


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    links = re.findall(r"""(?:\]\(|src(?:set)?=")([^)#:"]*)(?:#([^)]*))?[)"]""", PAGES[page])
    for link, anchor in links:
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"there is no {link}"
        assert not anchor or anchor in _anchors(PAGES[target]), f"{link} has no heading #{anchor}"
    assert not _missing_paths(PAGES[page])


def test_the_package_names_files_that_exist() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "upcycle_cli").rglob("*.py"))
    assert not _missing_paths("".join(sources))


def _missing_paths(text: str) -> set[str]:
    paths = set(re.findall(r"(?<![\w/])(?:tests|upcycle_cli|docs)/[\w/.-]*\w", text))
    return {path for path in paths if not (ROOT / path).exists()}


def test_pages_for_users_are_short() -> None:
    words = {path.relative_to(ROOT).as_posix(): len(text.split()) for path, text in PAGES.items()}
    others = ("README.md", "tests/", "docs/evidence/", "docs/contributing/changelog.md")
    assert sum(n for page, n in words.items() if not page.startswith(others)) <= MOST_WORDS
    guides = ("docs/start.md", "docs/guides/")
    long = {page: n for page, n in words.items() if n > MOST_WORDS_OF_A_GUIDE}
    assert not [page for page in long if page.startswith(guides)]


def test_the_set_up_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = set(re.findall(r"pip install [^\n]*\[([a-z0-9]+)\]", README))
    assert wanted
    assert wanted <= project["optional-dependencies"].keys()
