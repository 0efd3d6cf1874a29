"""Asking the Hub: patience when it is busy, and words for what can go wrong."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from upcycle_cli.errors import UpcycleError
from upcycle_cli.hub.answers import bad_answer, endpoint, guard
from upcycle_cli.secrets import blotted

_T = TypeVar("_T")
_PASSING = (429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0)  # seconds before the same question is asked again
_LONGEST_WAIT = 60.0
_LEAST_BYTES_FOR_A_BAR = 10_000_000
_LONGEST_TEXT = 10_000


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask, and ask again after a while when the Hub is busy or the connection broke.

    For questions only, and for what may be said twice. Raises what the last attempt raised.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _WAITS:
        try:
            return ask()
        except transport_errors() as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in _PASSING:
                raise
            asked_for = "" if response is None else response.headers.get("Retry-After", "")
        asked = re.fullmatch("[0-9]{1,9}", asked_for)
        time.sleep(min(float(asked_for), _LONGEST_WAIT) if asked else wait)
    return ask()


def transport_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises for a failed request: its own errors and its client's."""
    from huggingface_hub.errors import HfHubHTTPError

    # Which HTTP client it uses depends on its version; all its errors have one base.
    return tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)


def interruptibly(run: Callable[[], _T]) -> _T:
    """Run something that waits for threads of its own, and stop waiting when a signal comes.

    Returns or raises what `run` does. What it has begun goes on until the process ends.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(run())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=work, name="upcycle-hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # without an end, it would not let a signal's handler run
    if failed:
        raise failed[0]
    return done[0]


def _invalid_url() -> type[Exception]:
    """Return what huggingface_hub's HTTP client raises for a proxy or endpoint that is no URL."""
    client = import_module(transport_errors()[0].__module__.partition(".")[0])
    found: type[Exception] = client.InvalidURL
    return found


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into an UpcycleError that says what to do.

    What the Hub answers meanwhile is checked.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OIDCError,
    )

    guard()
    try:
        yield
    except HFValidationError as error:
        raise UpcycleError(f"'{repo}' is not a repo id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_in_cache(repo, revision) from error
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refusal(repo, revision, error.__cause__) from error
        raise _unreachable(error.__cause__ or error) from error
    except HfHubHTTPError as error:
        raise _refusal(repo, revision, error) from error
    except transport_errors() as error:
        raise _unreachable(error) from error
    except (OSError, RuntimeError, ValueError, ImportError, OIDCError, _invalid_url()) as error:
        # A cache that cannot be written, Xet's own transfer, a setting that makes no sense.
        raise UpcycleError(
            f"what {repo} needs of the Hub failed: {words_of(error)}.",
            f"Check the cache ({constants.HF_HUB_CACHE}), HF_TOKEN, HF_ENDPOINT, proxies and "
            "SSL_CERT_FILE, and run the command again; files that are complete are kept.",
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        if not _is_raised_there(error):
            raise
        # It takes an answer for what it should be: a list for an object, a key for being there.
        raise bad_answer(f"{type(error).__name__}: {words_of(error)}") from error


def _is_raised_there(error: BaseException) -> bool:
    """Whether it was huggingface_hub's own code that failed, and not ours around it."""
    trace, name = error.__traceback__, ""
    while trace is not None:
        name, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return str(name).startswith("huggingface_hub")


def not_in_cache(repo: str, revision: str | None) -> UpcycleError:
    """Say that the Hub may not be asked, and that the cache does not have it."""
    from huggingface_hub import constants

    at = f" at revision {revision}" if revision else ""
    return UpcycleError(
        f"{repo}{at} is neither a directory nor complete in the cache ({constants.HF_HUB_CACHE}), "
        "and HF_HUB_OFFLINE forbids to download it.",
        f"Unset HF_HUB_OFFLINE, or run `hf download {repo}` on a machine that may.",
    )


def _refusal(repo: str, revision: str | None, error: Exception) -> UpcycleError:
    """Say what the Hub refused, and what to do about it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(error, HfHubHTTPError)
    status, words = error.response.status_code, one_line(error.server_message or "")
    known = get_token() is not None
    sign_in = "Sign in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, GatedRepoError):
        hint = "" if known else f" {sign_in}"
        return UpcycleError(
            f"access to {repo} is restricted, and "
            f"{'your account has none' if known else 'you are not signed in'}.",
            f"Ask for it at {endpoint()}/{repo}, then run the command again.{hint}",
        )
    if isinstance(error, RepositoryNotFoundError):
        hint = "Your token may lack access to it." if known else sign_in
        return UpcycleError(
            f"{repo} is neither a directory here nor a repo that the Hub shows you.",
            f"Check the name. If it is private: {hint}",
        )
    if isinstance(error, RevisionNotFoundError):
        return UpcycleError(f"{repo} has no revision '{revision}'.", "Check branch, tag or commit.")
    return _refusal_by_status(repo, status, f": {words}" if words else "")


def _refusal_by_status(repo: str, status: int, words: str) -> UpcycleError:
    match status:
        case 401:
            return UpcycleError(
                f"the Hub refuses the token{words}.",
                "It may have expired: `hf auth login`, or set HF_TOKEN to a new one.",
            )
        case 403:
            return UpcycleError(
                f"the token does not allow this on {repo}{words}.",
                "Use a token with the permission (`hf auth login`, HF_TOKEN).",
            )
        case 429:
            return UpcycleError(
                "the Hub limits your requests.", "Wait some minutes, then try again."
            )
    return UpcycleError(
        f"the Hub answered {status} for {repo}{words}.",
        "Try again later; what was transferred is kept." if status >= 500 else None,
    )


def _unreachable(error: BaseException) -> UpcycleError:
    return UpcycleError(
        f"cannot reach the Hub at {endpoint()}: {words_of(error)}.",
        "Check the connection (HF_ENDPOINT, proxies) and run the command again; what was "
        "transferred is kept.",
    )


def words_of(error: BaseException) -> str:
    """Return what an error from elsewhere says, in one line, without a secret in it."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """Return a text from elsewhere as it can stand in a message, without a secret in it."""
    return " ".join(without_token(text[:_LONGEST_TEXT]).split())[:300].rstrip(".")


def without_token(text: str) -> str:
    """Return a text from elsewhere with what must stay secret blotted out."""
    from huggingface_hub import constants, get_token

    text = re.sub(r"(Bearer\s+)[^'\"]+", r"\1hf_…", text)
    text = text.replace(constants.ENDPOINT, endpoint())
    token = get_token()
    if token:
        # An error can quote it as Python would.
        text = text.replace(token, "hf_…").replace(repr(token)[1:-1], "hf_…")
    return blotted(text)


def fetch_small(repo: str, name: str, revision: str | None) -> Path:
    """Return where a small file of a repo is in the cache, downloaded if need be, without a bar.

    Raises what huggingface_hub raises.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision, tqdm_class=one_bar(0)))


def one_bar(nbytes: int) -> type[Any]:
    """Return what huggingface_hub shows a download of so many bytes with: one bar, or none.

    Its own are up to three at once, of which one stays for every config and card.
    """
    from huggingface_hub.utils import tqdm

    class OneBar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
            # Not of files, nor of bytes on the line beside those that they make on the disk.
            other = options.get("unit") != "B" or str(options.get("name")).endswith(".transfer")
            if other or nbytes < _LEAST_BYTES_FOR_A_BAR:
                options["disable"] = True
            options |= {"desc": "downloading", "leave": False}
            super().__init__(*arguments, **options)  # type: ignore[no-untyped-call]

        @property
        def total(self) -> int:
            """What is to come is known, and does not grow with each file that is begun."""
            return nbytes

        @total.setter
        def total(self, _: object) -> None: ...

        def set_description(self, *_: object, **__: object) -> None:
            """Stay what it is: how the bytes are put together is nobody's business."""

        set_description_str = set_description

    return OneBar


def be_quiet(*, bars: bool) -> None:
    """Keep huggingface_hub's warnings off the screen, and its progress bars unless `bars`.

    Raises UpcycleError when it cannot be imported.
    """
    try:
        from huggingface_hub.utils import disable_progress_bars, logging
    except ValueError as error:
        raise UpcycleError(
            f"huggingface_hub does not start: {error}.", "Check the HF_… variables."
        ) from error

    # What it warns of is that it tries again; what it gives up on is raised.
    logging.set_verbosity_error()
    if not bars and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
