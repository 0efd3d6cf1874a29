"""Reminders of what the licence of a source asks for."""

from __future__ import annotations

import pytest

from upcycle_cli.publish.licences import reminders


def card_of(metadata: dict[str, str]) -> str:
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    return f"---\n{lines}---\n"


@pytest.mark.parametrize(
    ("metadata", "repo", "words"),
    [
        ({"license": "llama3.1"}, "me/MyMoE", ['begin with "Llama"', '"Built with Llama"']),
        ({"license": "llama3.3"}, "me/Llama-MoE", ['"Built with Llama"']),
        ({"license": "llama3"}, "me/Llama-3-MoE", ['"Built with Meta Llama 3"']),
        ({"license": "llama3"}, "me/Llama-MoE", ['begin with "Llama 3"']),
        ({"license": "other", "license_name": "llama-3.2"}, "me/x", ['begin with "Llama"']),
        ({"license": "llama4"}, "me/x", ['begin with "Llama"', "`hf upload me/x Notice`"]),
        ({"license": "llama2"}, "me/x", ["LLAMA 2 Community License", "`hf upload me/x LICENSE`"]),
        ({"license": "gemma"}, "me/x", ["Gemma Terms of Use"]),
    ],
)
def test_remind_of_names_phrases_and_files(
    metadata: dict[str, str], repo: str, words: list[str]
) -> None:
    found = " ".join(reminders(card_of(metadata), repo, []))
    for word in words:
        assert word in found


def test_stay_silent_when_nothing_is_missing() -> None:
    files = ["LICENSE.txt", "NOTICE"]
    card = card_of({"license": "llama3.1"}) + "Built with Llama."
    assert reminders(card, "me/Llama-x", files) == ()
    assert reminders(card_of({"license": "llama2"}), "me/x", files) == ()
    for licence in ("apache-2.0", "mit", "llamafile", "null", "["):
        assert reminders(card_of({"license": licence}), "me/x", []) == ()
