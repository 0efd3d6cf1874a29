"""Requests to the Hub through huggingface_hub: errors in plain words, limits on answers, retries.

`HF_ENDPOINT` can be a hostile server, and huggingface_hub builds paths in its cache from the commit
ids and etags that it receives. So hooks in its HTTP client check these, and limit each body.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import is_inner_name
from upcycle_cli.core.text import blotted

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.errors import HfHubHTTPError

_T = TypeVar("_T")

MAX_ANSWER_BYTES = 50_000_000  # of an answer that is not a file: 100,000 file names need less
_TEMPORARY_ERRORS = (429, 500, 502, 503, 504)
_RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_MAX_RETRY_WAIT = 60.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?[A-Za-z0-9][A-Za-z0-9_.:+=~-]{0,199}"?')
_MAX_TEXT = 10_000
_ANSWERS: Mapping[int, tuple[str, str]] = {
    401: ("the Hub refuses the token", "Get a new one: `hf auth login`, or set HF_TOKEN."),
    403: ("the token does not allow this", "Use another one: `hf auth login`, or set HF_TOKEN."),
    429: ("the Hub limits your requests", "Wait some minutes, then try again."),
}
SIGN_IN = "Sign in with `hf auth login`, or set HF_TOKEN."


# Errors -------------------------------------------------------------------------------------------


def endpoint() -> str:
    """Return the Hub's address without the user name and password that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def bad_response(problem: str) -> UpcycleError:
    """Return the error for a server that does not behave like the Hub."""
    words = f"{endpoint()} does not answer like the Hub: {problem}."
    return UpcycleError(words, "Check HF_ENDPOINT and proxies. The answer was not used.")


@cache
def http_client() -> Any:  # noqa: ANN401
    """Return the module httpx or httpx2, whichever this version of huggingface_hub uses."""
    from huggingface_hub.errors import HTTPError

    return import_module(HTTPError.__module__.partition(".")[0])


@contextmanager
def hub_session(repo: str, revision: str | None = None) -> Iterator[None]:
    """Make requests with the hooks in place; turn what huggingface_hub raises into UpcycleError."""
    try:
        from huggingface_hub import __version__, constants, errors, hf_api  # noqa: F401 - reads the variables
    except ValueError as error:
        words = f"huggingface_hub does not start: {error}."
        raise UpcycleError(words, "Check the HF_… variables.") from error
    if __version__.startswith("0."):  # it has no httpx, which the hooks need
        raise UpcycleError(
            f"models on the Hub need huggingface_hub 1 or newer; {__version__} is installed.",
            "Upgrade: pip install 'huggingface-hub>=1' 'transformers>=5'. Without it, give a "
            f"directory: `hf download {repo}` prints one.",
        )
    invalid_url = http_client().InvalidURL  # not a subclass of HTTPError
    oidc_error = getattr(errors, "OIDCError", OSError)  # new in huggingface_hub 2
    install_hooks()
    try:
        yield
    except errors.HFValidationError as error:
        raise UpcycleError(f"'{repo}' is not a repo id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_cached(repo, revision) from error
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _http_error(repo, revision, error.__cause__) from error
        raise _unreachable(error.__cause__ or error) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, revision, error) from error
    except errors.HTTPError as error:
        raise _unreachable(error) from error
    # Among others: a cache that cannot be written, a failed Xet transfer, a bad proxy setting.
    except (OSError, RuntimeError, ValueError, ImportError, oidc_error, invalid_url) as error:
        raise UpcycleError(
            f"a request to the Hub for {repo} failed: {error_text(error)}.",
            f"Check the cache ({constants.HF_HUB_CACHE}), HF_TOKEN, HF_ENDPOINT, proxies and "
            "SSL_CERT_FILE, and run the command again; complete files are kept.",
        ) from error


def not_cached(repo: str, revision: str | None) -> UpcycleError:
    """Return the error for a repo that is not in the cache when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    at = f" at revision {revision}" if revision else ""
    return UpcycleError(
        f"{repo}{at} is neither a directory nor complete in the cache ({constants.HF_HUB_CACHE}), "
        "and HF_HUB_OFFLINE forbids the download.",
        f"Unset HF_HUB_OFFLINE, or run `hf download {repo}` on a machine with access.",
    )


def _http_error(repo: str, revision: str | None, error: HfHubHTTPError) -> UpcycleError:
    from huggingface_hub import errors, get_token

    signed_in, status = get_token() is not None, error.response.status_code
    because = f": {error_text(error.server_message)}" if error.server_message else ""
    if isinstance(error, errors.GatedRepoError):
        why = "your account has no access" if signed_in else "you are not signed in"
        hint = f"Ask for access at {endpoint()}/{repo}, then run the command again."
        hint += "" if signed_in else f" {SIGN_IN}"
        return UpcycleError(f"access to {repo} is restricted, and {why}.", hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "your token may lack access to it." if signed_in else f"s{SIGN_IN[1:]}"
        words = f"{repo} is neither a local directory nor a repo that you can see on the Hub."
        return UpcycleError(words, f"Check the name. If it is private, {hint}")
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "Check the branch, tag or commit."
        return UpcycleError(f"{repo} has no revision '{revision}'.", hint)
    advice = "Try again later; transferred data is kept." if status >= 500 else None
    what, advice = _ANSWERS.get(status, (f"the Hub answered {status} for {repo}", advice))
    return UpcycleError(f"{what}{because}.", advice)


def _unreachable(error: BaseException) -> UpcycleError:
    return UpcycleError(
        f"cannot reach the Hub at {endpoint()}: {error_text(error)}.",
        "Check the connection (HF_ENDPOINT, proxies) and run the command again; transferred data "
        "is kept.",
    )


def error_text(error: BaseException | str) -> str:
    """Return an error of a library or of the Hub in one line, without secrets."""
    from huggingface_hub import constants, get_token

    text = str(error)[:_MAX_TEXT] or type(error).__name__
    text = re.sub(r"(Bearer\s+)[^'\"]+", r"\1hf_…", text)
    text = text.replace(constants.ENDPOINT, endpoint())
    if token := get_token():
        # Some messages quote it with Python's escapes.
        text = text.replace(token, "hf_…").replace(repr(token)[1:-1], "hf_…")
    return " ".join(blotted(text).split())[:300].rstrip(".")


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
    # These become paths in the cache.
    headers, patterns = response.headers, {"X-Repo-Commit": _COMMIT}
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


def file_sizes(info: ModelInfo) -> dict[str, int]:
    """Return the size of every file of a repo, 0 where it was not requested; UpcycleError."""
    sizes: dict[str, int] = {}
    for file in info.siblings or []:
        name, size = file.rfilename, file.size or 0
        if not is_inner_name(name):
            raise bad_response(f"a file is named {shown(name)}")
        if type(size) is not int or size < 0:
            raise bad_response(f"the size of {name} is {shown(size)}")
        sizes[name] = size
    return sizes


def checked_commit(commit: object) -> str:
    """Return a commit id; raises UpcycleError for anything else."""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise bad_response(f"the commit is {shown(commit)}")
    return commit


# Making requests ---------------------------------------------------------------------------------


def retry(request: Callable[[], _T]) -> _T:
    """Make a request that is safe to repeat, again when the Hub is busy; HfApi rarely retries."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in _RETRY_WAITS:
        try:
            return request()
        except HTTPError as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in _TEMPORARY_ERRORS:
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
        time.sleep(
            min(float(asked) if re.fullmatch("[0-9]{1,6}", asked) else wait, _MAX_RETRY_WAIT)
        )
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

    return Path(hf_hub_download(repo, name, revision=revision))
