"""Keeps the passwords and tokens of this process out of messages and tracebacks.

The address of a proxy or a mirror can hold a password, and libraries quote addresses in errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote, unquote

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_ADDRESSES = ("HF_ENDPOINT", *_PROXIES, *map(str.upper, _PROXIES))
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 4  # shorter passwords are parts of words; they are removed from addresses only
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")


def blotted(text: str) -> str:
    """Return a text without the secrets of this process and the user part of any address."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "…")
    return _IN_ADDRESS.sub("", text)


def _secrets() -> Iterator[str]:
    for name in _TOKENS:
        yield from _spellings(os.environ.get(name, "").strip())
    for name in _ADDRESSES:
        user_info, at, _ = os.environ.get(name, "").rpartition("@")
        user, _, password = user_info.rpartition("//")[2].partition(":")
        if at:
            yield from _spellings(password or user)


def _spellings(secret: str) -> set[str]:
    """Return a secret as it is, decoded, and percent-encoded."""
    plain = unquote(secret)
    found = {secret, plain, quote(plain, safe="", errors="replace")}
    return {text for text in found if len(text) >= _SHORTEST}
