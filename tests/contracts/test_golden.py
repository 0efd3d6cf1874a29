"""The bytes of conversions are those that a reference converter wrote: tests/golden.py."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from golden import CHOICES, PAIRS, Sources, cases, digest, run

CASES = cases()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_the_references(name: str, sources: Sources, tmp_path: Path) -> None:
    case = CASES[name]
    assert run(case, sources.of(case), tmp_path / "moe") == case.digest


def test_every_case_has_a_digest_of_its_own() -> None:
    # The head of an untied output and of an untied source differ, and so does all else.
    assert len({case.digest for case in CASES.values()}) == len(CASES) == 60


@pytest.mark.parametrize("pair", PAIRS)
def test_every_value_of_every_option_comes_with_each_pair(pair: tuple[str, str]) -> None:
    here = [case for case in CASES.values() if (case.source, case.target) == pair]
    for option, values in CHOICES.items():
        impossible = {"softmax-topk"} if pair[1] == "mixtral" else set()
        assert {case.options[option] for case in here} == set(values) - impossible


def test_every_two_values_come_together_somewhere() -> None:
    for (one, some), (other, others) in combinations(CHOICES.items(), 2):
        together = {(case.options[one], case.options[other]) for case in CASES.values()}
        assert together == {(value, another) for value in some for another in others}


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (b"model.norm.weight", b"model.norm.Weight"),
        (b'"BF16"', b'"F16" '),
        (b"[64,48]", b"[48,64]"),
    ],
    ids=["name", "dtype", "shape"],
)
def test_another_header_is_noticed(
    found: bytes, instead: bytes, sources: Sources, tmp_path: Path
) -> None:
    case = next(iter(CASES.values()))
    before = run(case, sources.of(case), tmp_path / "moe")
    changed = 0
    for shard in (tmp_path / "moe").glob("*.safetensors"):
        content = shard.read_bytes()
        changed += found in content
        shard.write_bytes(content.replace(found, instead))
    assert changed
    assert digest(tmp_path / "moe") != before
