"""What a new card inherits from a card that somebody else wrote: lines of text, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcycle_cli.checkpoint.card_metadata import is_edited, read_card_metadata

KEPT = {"license": "mit", "language": ["en"]}
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 9)}]}}\n"
    for i in range(20)
)


def front(text: str) -> bytes:
    return f"---\n{text}\n---\n\n# Model\n".encode()


GOOD = "license: mit\nlanguage: [en]"
STRANGE = {
    # Other keys of any kind do no harm.
    "tags": (front(f"tags: 5\n{GOOD}"), KEPT, ""),
    "a number as key": (front(f"1: 2\n{GOOD}"), KEPT, ""),
    "a date": (front(f"date: 2024-13-45\nday: 2024-01-01\n{GOOD}"), KEPT, ""),
    "a long number": (front(f"n: {'9' * 10000}\n{GOOD}"), KEPT, ""),
    "laughs": (front(LAUGHS + GOOD), KEPT, ""),
    "merges": (front(MERGES + GOOD), KEPT, ""),
    # A value that is not lines of text is reported.
    "a mapping": (front("license: {a: b}\nlanguage: [en]"), {}, "license"),
    "a mixed list": (front("license: mit\nlanguage: [en, []]"), {}, "language"),
    "Norwegian": (front("license: null\nlanguage: no"), {"language": "no"}, ""),
    "an alias": (front(f"{LAUGHS}license: *j\nlanguage: [en]"), {}, "license"),
    "two lines": (front('license: "a\\nb"\nlanguage: [en]'), {}, "license"),
    "a long line": (front(f"license: {'x' * 1000}\nlanguage: no"), {}, "license"),
    "not YAML": (front("license: ["), {}, "not YAML"),
    "deep": (front("a: " + "[" * 5000), {}, "not YAML"),
    "huge": (b"x" * 10_000_001, {}, "10,000,000 bytes"),
    "no UTF-8": (b"---\nlicense: \xff\n---\n", {}, "utf-8"),
    # A card without a licence is not reported.
    "nothing": (front(""), {}, ""),
    "no front matter": (b"# Model\n---\nlicense: mit\n---\n", {}, ""),
    "empty": (b"", {}, ""),
}


@pytest.mark.parametrize(("card", "kept", "word"), STRANGE.values(), ids=STRANGE)
def test_inherit_lines_of_text_only(
    tmp_path: Path, card: bytes, kept: dict[str, object], word: str
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    found = read_card_metadata(tmp_path)
    assert found.values == kept
    assert bool(found.notes) == bool(word)
    assert word in " ".join(found.notes)
    is_edited(card.decode(errors="replace"))  # does not raise


def test_inherit_nothing_from_what_is_not_a_file(tmp_path: Path) -> None:
    assert read_card_metadata(tmp_path).notes == ()
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    found = read_card_metadata(tmp_path)
    assert not found.values
    assert "README.md" in found.notes[0]
