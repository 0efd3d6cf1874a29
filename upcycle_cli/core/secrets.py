"""Passwords that stand in this process' variables, kept out of everything that is said.

A proxy's and a mirror's address can hold one, and libraries quote addresses in their errors, some
of them decoded. What a bug's traceback quotes goes through here as well.
"""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Iterator
from json import dumps
from urllib.parse import quote, unquote, unquote_plus

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_ADDRESSES = ("HF_ENDPOINT", *_PROXIES, *map(str.upper, _PROXIES))
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 4  # what is shorter is part of words, and blotted out in addresses only
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/?#\"'<>]+@")


def blotted(text: str) -> str:
    """Return a text without this process' secrets, nor what is before the @ of any address."""
    for secret in _secrets():
        text = text.replace(secret, "…")
    return _IN_ADDRESS.sub("", text) if "@" in text else text


def _secrets() -> list[str]:
    """Return what must not be shown in all its spellings, the longest first."""
    found: set[str] = set()
    for name in _TOKENS:
        found.update(_spellings(os.environ.get(name, "").strip()))
    for name in _ADDRESSES:
        # What is no address to a parser can hold a password all the same.
        user_info, at, _ = os.environ.get(name, "").rpartition("@")
        user_info = user_info.rpartition("//")[2] if at else ""
        user, _, password = user_info.partition(":")
        found.update(_spellings(password or user))
        if user_info:
            found.add(b64encode(unquote(user_info).encode(errors="replace")).decode())
    return sorted((text for text in found if len(text) >= _SHORTEST), key=len, reverse=True)


def _spellings(secret: str) -> Iterator[str]:
    for plain in {secret, unquote(secret), unquote_plus(secret)}:
        yield from (plain, repr(plain)[1:-1], dumps(plain)[1:-1])
        encoded = quote(plain, safe="", errors="replace")
        yield from (encoded, encoded.lower(), quote(plain, errors="replace"))
