"""Reminders of what the licence of a source asks for."""

from __future__ import annotations

import pytest

from upcycle_cli.publish.licences import reminders


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
    found = " ".join(reminders(metadata, "", repo, []))
    for word in words:
        assert word in found


def test_stay_silent_when_nothing_is_missing() -> None:
    files = ["LICENSE.txt", "NOTICE"]
    assert reminders({"license": "llama3.1"}, "Built with Llama.", "me/Llama-x", files) == ()
    assert reminders({"license": "llama2"}, "", "me/x", files) == ()
    for licence in ("apache-2.0", "mit", "llamafile", None):
        assert reminders({"license": licence}, "", "me/x", []) == ()
