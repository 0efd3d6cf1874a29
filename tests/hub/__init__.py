"""A Hub on loopback for tests: huggingface_hub itself talks to it, unpatched."""

import subprocess


def assert_says(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """There is one error message, and it contains all words."""
    assert result.stderr.count("error:") == 1
    said = " ".join(result.stderr.split())
    for word in words:
        assert word in said, said
