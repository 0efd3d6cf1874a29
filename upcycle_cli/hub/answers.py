"""The Hub's answers, which are input: checked before they become a path, a wait or words.

`HF_ENDPOINT` can be a mirror, a proxy or a stranger. huggingface_hub makes paths of commit ids and
etags, sleeps for as long as it is told to, and reads what comes to its end; so its HTTP client gets
hooks that every answer passes. What the answers say is checked by `read_repo` and `read_user`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import is_inner_name

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

MOST_ANSWER_BYTES = 50_000_000  # of a body that is no file: a listing of 100,000 files has less
MOST_ERROR_BYTES = 1_000_000  # of an error's body, of which some words are shown
MOST_ANSWER_SECONDS = 30.0  # from the first byte of such a body to its last
LEAST_BYTES_PER_SECOND = 1_000  # of a file, over `MOST_ANSWER_SECONDS`: slower than any line
# Before the first byte of an answer and between two, where huggingface_hub sets no limit.
_MOST_SILENT_SECONDS = {"GET": 30.0, "HEAD": 30.0}
_MOST_SILENT_SECONDS_OF_CHANGES = 600.0  # a commit of many files takes the Hub its time
_MOST_CONNECT_SECONDS = 30.0
_MOST_WAIT_SECONDS = 300  # as long as the Hub's own windows for a number of requests are
_MOST_NAMES = 100_000  # more files than the Hub recommends for a repo
_MOST_SIZE = 2**63 - 1
_MOST_ERROR_WORDS = 1000

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEADERS: Mapping[str, re.Pattern[str]] = {
    "X-Repo-Commit": _COMMIT,
    "X-Xet-Hash": re.compile(r"[0-9a-f]{64}"),
    "X-Linked-Size": re.compile(r"[0-9]{1,18}"),
}
"""What becomes a path in the cache, or a number of bytes there."""
_ETAG = re.compile(r'(W/)?"?[A-Za-z0-9][A-Za-z0-9_.:+=~-]{0,199}"?')
_WAITS: Mapping[str, str] = {
    "Retry-After": r"\s*([0-9]{1,9})\s*",
    "RateLimit": r'"\w+"\s*;\s*r\s*=\s*[0-9]{1,9}\s*;\s*t\s*=\s*([0-9]{1,9})\s*',
}
"""Headers that say how long to wait; in another form they are dropped."""
# Encodings that the client undoes, whatever comes of it: none of them is asked for.
_DECODED = ("gzip", "x-gzip", "deflate", "br", "zstd")
_USER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,96}")


def endpoint() -> str:
    """Return the Hub's address, without a name and password that may stand in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def bad_answer(what: str) -> UpcycleError:
    """Say that what answered is not the Hub, or not well."""
    return UpcycleError(
        f"{endpoint()} does not answer as the Hub does: {what}.",
        "Check HF_ENDPOINT and proxies; nothing of the answer was used.",
    )


# On the wire -------------------------------------------------------------------------------------


_allowance: list[int] = []  # how many bytes of files may still come, in all; empty for any number


@cache
def http_client() -> Any:  # noqa: ANN401
    """Return the module httpx or httpx2, whichever this version of huggingface_hub is made on."""
    from huggingface_hub.errors import HTTPError

    return import_module(HTTPError.__module__.partition(".")[0])


@cache
def guard() -> None:
    """Let everything that huggingface_hub is answered from now on be checked."""
    from huggingface_hub.utils import _http, set_client_factory

    # Whoever imported this may have set one: for a proxy, or for certificates.
    made = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001 - there is no public way to ask for it

    def make() -> Any:  # noqa: ANN401 - a client of httpx or httpx2
        client = made()
        client.event_hooks["request"].append(_on_request)
        client.event_hooks["response"].append(_on_response)
        return client

    set_client_factory(make)


@contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """Raise UpcycleError where, within the context, more comes of files than these bytes take."""
    # What was cut off can come again, from its beginning when the server knows no ranges.
    _allowance[:] = [3 * nbytes + MOST_ERROR_BYTES]
    try:
        yield
    finally:
        _allowance.clear()


def _on_request(request: Any) -> None:  # noqa: ANN401
    """Ask for bytes as they are, wait for no answer without an end, keep the token at home."""
    from huggingface_hub import constants

    home = urlsplit(constants.ENDPOINT)
    is_file = request.method == "GET" and not request.url.path.startswith(f"{home.path}/api/")
    # A redirect's request inherits this: what is asked for stays what it was.
    request.extensions.setdefault("upcycle_file", is_file)
    request.headers["Accept-Encoding"] = "identity"
    silent = _MOST_SILENT_SECONDS.get(request.method, _MOST_SILENT_SECONDS_OF_CHANGES)
    limits = {"connect": _MOST_CONNECT_SECONDS, "read": silent, "write": silent, "pool": None}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = limits | {k: v for k, v in given.items() if v is not None}
    # Of the Hub that was chosen, and of the one that it mirrors.
    if _origin(request.url) not in map(_origin, (constants.ENDPOINT, "https://huggingface.co")):
        request.headers.pop("Authorization", None)


def _origin(url: Any) -> tuple[str, str, int | None]:  # noqa: ANN401
    parsed = http_client().URL(url)
    return parsed.scheme, parsed.host, parsed.port  # None for the scheme's own


def _on_response(response: Any) -> None:  # noqa: ANN401
    """Check an answer's headers, and its body as far as it is no file."""
    headers = response.headers
    if "Location" in headers:
        _check_location(str(response.request.url), headers["Location"])
    for name, pattern in _patterns(response).items():
        value = headers.get(name)
        if value is not None and not pattern.fullmatch(value):
            raise bad_answer(f"its {name} is {shown(value)}")
    for name, form in _WAITS.items():
        match = re.fullmatch(form, headers.get(name, ""))
        if name in headers and (match is None or int(match[1]) > _MOST_WAIT_SECONDS):
            del headers[name]
    if headers.get("Content-Encoding", "").strip().lower() in _DECODED:
        raise bad_answer("it sends compressed what was asked for as it is")
    if response.status_code < 300 and response.request.extensions["upcycle_file"]:
        response.stream = _watched(response.stream)
        return
    if response.status_code >= 400:
        body = _plain_error(_body(response, MOST_ERROR_BYTES))
    else:
        body = _body(response, MOST_ANSWER_BYTES)
        if body[:1] in (b"[", b"{"):
            _check_json(body)
            _hide_bar_of_nothing(response.request.url.path, body)
    response.stream = http_client().ByteStream(body)


def _patterns(response: Any) -> Mapping[str, re.Pattern[str]]:  # noqa: ANN401
    """Return what the headers of an answer must be, as far as huggingface_hub uses them."""
    # An etag names a file in the cache when the answer is to HEAD, and neither an error nor a
    # redirect that is followed; those of the Hub's own pages and API hold slashes.
    headers = response.headers
    followed = "Location" in headers and not urlsplit(headers["Location"]).netloc
    if response.request.method != "HEAD" or response.status_code >= 400 or followed:
        return _HEADERS
    name = "X-Linked-ETag" if headers.get("X-Linked-ETag") else "ETag"
    return {**_HEADERS, name: _ETAG}


def _check_location(url: str, location: str) -> None:
    try:
        target = urlsplit(urljoin(url, location))
        sound = target.scheme in ("http", "https") and target.hostname and target.port != 0
    except ValueError:
        sound = False
    if not sound or not location.isprintable():
        raise bad_answer(f"it redirects to {shown(location)}")


def _body(response: Any, most: int) -> bytes:  # noqa: ANN401
    """Return a whole body, which must be small and come soon."""
    body, begin = bytearray(), time.monotonic()
    try:
        for piece in response.stream:
            body += piece
            if len(body) > most:
                raise bad_answer(f"an answer has more than {most:,} bytes")
            if time.monotonic() - begin > MOST_ANSWER_SECONDS:
                raise bad_answer(f"an answer takes more than {MOST_ANSWER_SECONDS:.0f} seconds")
    finally:
        response.stream.close()
    return bytes(body)


def _check_json(body: bytes) -> None:
    try:
        json.loads(body)
    except RecursionError:
        raise bad_answer("an answer is nested too deeply to be read") from None
    except ValueError as error:
        raise bad_answer(f"an answer is not JSON: {error}") from None


def _hide_bar_of_nothing(path: str, body: bytes) -> None:
    """Let huggingface_hub draw no bar that counts to 0 when the Hub has all files already."""
    from huggingface_hub.utils import disable_progress_bars

    asked_for = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    if path.endswith("/info/lfs/objects/batch") and b'"actions"' not in body and not asked_for:
        disable_progress_bars()


def _plain_error(body: bytes) -> bytes:
    """Return an error's body in one of the forms that huggingface_hub can read."""
    try:
        found = json.loads(body)
    except RecursionError:
        found = None
    except ValueError:
        return body[:_MOST_ERROR_WORDS]
    if not isinstance(found, dict):
        return b"{}"
    listed = found.pop("errors", None)
    items = listed[:10] if isinstance(listed, list) else []
    said = (item.get("message") for item in items if isinstance(item, dict))
    errors = [{"message": text[:_MOST_ERROR_WORDS]} for text in said if isinstance(text, str)]
    plain = {key: text[:_MOST_ERROR_WORDS] for key, text in found.items() if isinstance(text, str)}
    return json.dumps(plain | ({"errors": errors} if errors else {})).encode()


def longest_seconds(nbytes: int) -> float:
    """Return how long a part of a file may take that is read at once."""
    return MOST_ANSWER_SECONDS + nbytes / (100 * LEAST_BYTES_PER_SECOND)


def _watched(stream: Any) -> Any:  # noqa: ANN401
    """Return a file's stream that ends in an error once it stalls or brings too much."""

    class Watched(http_client().SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            begin, received = time.monotonic(), 0
            for piece in stream:
                received += len(piece)
                if _allowance:
                    _allowance[0] -= len(piece)
                    if _allowance[0] < 0:
                        raise bad_answer("it sends far more of a file than it said there is")
                yield piece
                now = time.monotonic()
                if now - begin > MOST_ANSWER_SECONDS:
                    if received < LEAST_BYTES_PER_SECOND * MOST_ANSWER_SECONDS:
                        raise bad_answer(
                            f"a file stalls at {received:,} bytes in {now - begin:.0f} seconds"
                        )
                    begin, received = now, 0

        def close(self) -> None:
            stream.close()

    return Watched()


# What they say -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A repo at one commit, as the Hub describes it."""

    commit: str
    sizes: Mapping[str, int]  # of every file, by name; 0 where they were not asked for
    private: bool


def read_repo(info: ModelInfo, *, sized: bool = False) -> Repo:
    """Return what the Hub says of a repo, which with `sized` has to give the size of every file.

    Raises UpcycleError when it can be no repo: no clone could have its files side by side.
    """
    commit = checked_commit(info.sha)
    siblings = info.siblings or []
    if len(siblings) > _MOST_NAMES:
        raise bad_answer(f"a repo has {len(siblings):,} files")
    sizes: dict[str, int] = {}
    folders: set[str] = set()
    for file in siblings:
        name, size = file.rfilename, file.size
        if not is_inner_name(name) or str(PurePosixPath(name)) != name or name in sizes:
            raise bad_answer(f"a file is named {shown(name)}")
        if sized and (type(size) is not int or not 0 <= size <= _MOST_SIZE):
            raise bad_answer(f"the size of {name} is {shown(size)}")
        sizes[name] = size or 0
        folders.update(map(str, PurePosixPath(name).parents))
    if both := folders & sizes.keys():
        raise bad_answer(f"{min(both)} is a file and a directory")
    return Repo(commit=commit, sizes=sizes, private=info.private is True)


def checked_commit(commit: object) -> str:
    """Return a commit id; raises UpcycleError for what is none."""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise bad_answer(f"the commit is {shown(commit)}")
    return commit


def read_user(answer: object) -> tuple[list[str], bool]:
    """Return whose a token is, and whether it may only read; raises UpcycleError."""
    user = answer if isinstance(answer, dict) else {}
    listed = user.get("orgs", [])
    names: list[str] = []
    for owner in (user, *(listed if isinstance(listed, list) else [None])):
        name = owner.get("name") if isinstance(owner, dict) else None
        if not isinstance(name, str) or not _USER_NAME.fullmatch(name):
            raise bad_answer(f"a user is named {shown(name)}")
        names.append(name)
    auth = user.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    return names, isinstance(token, dict) and token.get("role") == "read"
