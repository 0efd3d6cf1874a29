"""Requests to the Hub through huggingface_hub: limits on what it may answer, retries, progress.

`HF_ENDPOINT` can be a mirror, a proxy or a hostile server, and huggingface_hub builds paths in its
cache from the commit ids and etags that it receives. So its HTTP client gets hooks that check those
headers and stop a body that does not end.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import is_inner_name
from upcycle_cli.hub.errors import bad_response, http_client, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_T = TypeVar("_T")

MAX_ANSWER_BYTES = 50_000_000  # of an answer that is not a file: 100,000 file names need less
_TEMPORARY_ERRORS = (429, 500, 502, 503, 504)
_RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_MAX_RETRY_WAIT = 60.0
_MIN_BYTES_FOR_A_BAR = 10_000_000

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEADERS: Mapping[str, re.Pattern[str]] = {
    "X-Repo-Commit": _COMMIT,
    "X-Xet-Hash": re.compile(r"[0-9a-f]{64}"),
    "X-Linked-Size": re.compile(r"[0-9]{1,18}"),
}
"""Headers that become a path in the cache or a number of bytes, and what they must look like."""
_ETAG = re.compile(r'(W/)?"?[A-Za-z0-9][A-Za-z0-9_.:+=~-]{0,199}"?')


# Limits on answers -------------------------------------------------------------------------------

_file_bytes_left: list[int] = []  # for all downloads together; empty when there is no limit


@cache
def install_hooks() -> None:
    """Make huggingface_hub pass requests and answers through the checks of this module."""
    from huggingface_hub.utils import _http, set_client_factory

    # Keep the factory that is set: the user's own may be for a proxy or for certificates.
    make_client = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001 - there is no public accessor

    def make_client_with_hooks() -> Any:  # noqa: ANN401 - a client of httpx or httpx2
        client = make_client()
        client.event_hooks["request"].append(_prepare_request)
        client.event_hooks["response"].append(_check_response)
        return client

    set_client_factory(make_client_with_hooks)


@contextmanager
def download_limit(nbytes: int) -> Iterator[None]:
    """Raise UpcycleError when files of `nbytes` bytes turn out to be much larger."""
    # A download that broke off may start again from the beginning.
    _file_bytes_left[:] = [3 * nbytes + 1_000_000]
    try:
        yield
    finally:
        _file_bytes_left.clear()


def _prepare_request(request: Any) -> None:  # noqa: ANN401
    from huggingface_hub import constants

    api = f"{urlsplit(constants.ENDPOINT).path}/api/"
    is_file = request.method == "GET" and not request.url.path.startswith(api)
    # A redirect inherits this from the first request.
    request.extensions.setdefault("upcycle_is_file", is_file)
    request.headers["Accept-Encoding"] = "identity"  # the limits are on bytes as they are sent
    # huggingface_hub sets no timeout for most requests; to commit many files takes minutes.
    silent = 30.0 if request.method in ("GET", "HEAD") else 600.0
    timeouts = {"connect": 30.0, "read": silent, "write": silent, "pool": None}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = timeouts | {k: v for k, v in given.items() if v is not None}


def _check_response(response: Any) -> None:  # noqa: ANN401
    headers, patterns = response.headers, dict(_HEADERS)
    # huggingface_hub names cached files by the etag of a HEAD request. Answers that it does not use
    # this way (errors, relative redirects) may have etags with slashes.
    relative_redirect = "Location" in headers and not headers["Location"].startswith("http")
    if response.request.method == "HEAD" and response.status_code < 400 and not relative_redirect:
        patterns["X-Linked-ETag" if headers.get("X-Linked-ETag") else "ETag"] = _ETAG
    for name, pattern in patterns.items():
        if name in headers and not pattern.fullmatch(headers[name]):
            raise bad_response(f"its {name} is {shown(headers[name])}")
    is_file = response.status_code < 300 and response.request.extensions["upcycle_is_file"]
    response.stream = _limited(response.stream, _file_bytes_left if is_file else [MAX_ANSWER_BYTES])


def _limited(stream: Any, bytes_left: list[int]) -> Any:  # noqa: ANN401
    """Return a stream that counts `bytes_left[0]` down and raises UpcycleError below 0."""

    class LimitedStream(http_client().SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for chunk in stream:
                if bytes_left:
                    bytes_left[0] -= len(chunk)
                    if bytes_left[0] < 0:
                        raise bad_response("it sends far more bytes than it announced")
                yield chunk

        def close(self) -> None:
            stream.close()

    return LimitedStream()


# What answers say --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A repo at one commit."""

    commit: str
    sizes: Mapping[str, int]
    """The size of every file, by name; 0 where sizes were not requested."""
    private: bool


def read_repo(info: ModelInfo, *, with_sizes: bool = False) -> Repo:
    """Check what the Hub says about a repo; raises UpcycleError."""
    sizes: dict[str, int] = {}
    for file in info.siblings or []:
        name, size = file.rfilename, file.size
        if not is_inner_name(name):
            raise bad_response(f"a file is named {shown(name)}")
        if with_sizes and (type(size) is not int or size < 0):
            raise bad_response(f"the size of {name} is {shown(size)}")
        sizes[name] = size or 0
    return Repo(commit=checked_commit(info.sha), sizes=sizes, private=info.private is True)


def checked_commit(commit: object) -> str:
    """Return a commit id; raises UpcycleError for anything else."""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise bad_response(f"the commit is {shown(commit)}")
    return commit


def read_user(answer: Any) -> tuple[list[str], bool]:  # noqa: ANN401
    """Return the user's name and organizations, and whether the token is read-only."""
    token = answer.get("auth", {}).get("accessToken") or {}
    names = [answer["name"], *(org["name"] for org in answer.get("orgs", ()))]
    return names, token.get("role") == "read"


# Making requests ---------------------------------------------------------------------------------


@contextmanager
def hub_session(repo: str, revision: str | None = None) -> Iterator[None]:
    """Make requests with the hooks in place; raises UpcycleError for what goes wrong."""
    install_hooks()
    with hub_errors(repo, revision):
        yield


def retry(request: Callable[[], _T]) -> _T:
    """Make a request that is safe to repeat, again after a while when the Hub is busy.

    Raises what the last attempt raised. Most methods of HfApi do not retry by themselves.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in _RETRY_WAITS:
        try:
            return request()
        except HTTPError as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in _TEMPORARY_ERRORS:
                raise
            told = "" if response is None else response.headers.get("Retry-After", "")
        time.sleep(min(float(told) if re.fullmatch("[0-9]{1,6}", told) else wait, _MAX_RETRY_WAIT))
    return request()


def run_interruptibly(run: Callable[[], _T]) -> _T:
    """Return or raise what `run` does in a thread; a signal ends the wait, not the thread."""
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="upcycle-hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # join without a timeout would block signal handlers
    return outcome.result()


def fetch(repo: str, name: str, revision: str | None) -> Path:
    """Download a small file into the cache; raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision, tqdm_class=download_bar(0)))


def download_bar(nbytes: int) -> type[Any]:
    """Return the progress bar class for a download of `nbytes` bytes: one bar, none if small."""
    from huggingface_hub.utils import tqdm

    class DownloadBar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
            # huggingface_hub also counts files, and bytes on the wire beside bytes on disk.
            other = options.get("unit") != "B" or str(options.get("name")).endswith(".transfer")
            if other or nbytes < _MIN_BYTES_FOR_A_BAR:
                options["disable"] = True
            super().__init__(*arguments, **(options | {"desc": "downloading", "leave": False}))  # type: ignore[no-untyped-call]

    return DownloadBar


def silence_library(*, bars: bool) -> None:
    """Hide huggingface_hub's warnings, and its progress bars unless `bars`; raises UpcycleError."""
    try:
        from huggingface_hub.utils import disable_progress_bars, logging
    except ValueError as error:
        raise UpcycleError(
            f"huggingface_hub does not start: {error}.", "Check the HF_… variables."
        ) from error
    # Its warnings announce retries; a final failure is raised.
    logging.set_verbosity_error()
    if not bars and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
