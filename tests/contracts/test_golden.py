"""The bytes of conversions are those that a reference converter wrote: tests/golden.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import cases, run

CASES = cases()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_the_references(name: str, dense: Path, tmp_path: Path) -> None:
    case = CASES[name]
    assert run(case, dense, tmp_path / "moe") == case.digest


def test_every_case_has_a_digest_of_its_own() -> None:
    # The head of an untied output and of an untied source differ, and so does all else.
    assert len({case.digest for case in CASES.values()}) == len(CASES) == 60
