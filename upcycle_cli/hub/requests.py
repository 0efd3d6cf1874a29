"""Asking the Hub: patience when it is busy, and words for what can go wrong."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.secrets import blotted
from upcycle_cli.hub.answers import bad_answer, endpoint, guard, http_client

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_T = TypeVar("_T")
_PASSING = (429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0)  # seconds before the same question is asked again
_LONGEST_WAIT = 60.0
_LEAST_BYTES_FOR_A_BAR = 10_000_000
_LONGEST_TEXT = 10_000
SIGN_IN = "Sign in with `hf auth login`, or set HF_TOKEN."


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask, and ask again after a while when the Hub is busy or the connection broke.

    For what may be said twice. Raises what the last attempt raised. huggingface_hub's
    `http_backoff` does so for one request with its URL, but most methods of its HfApi do without.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for wait in _WAITS:
        try:
            return ask()
        except HTTPError as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in _PASSING:
                raise
            # A number of seconds: `guard` has dropped whatever else it was.
            asked_for = None if response is None else response.headers.get("Retry-After")
        time.sleep(min(float(asked_for or wait), _LONGEST_WAIT))
    return ask()


def run_interruptibly(run: Callable[[], _T]) -> _T:
    """Return or raise what `run` does, and stop waiting for it, not it, when a signal comes."""
    outcome: Future[_T] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="upcycle-hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # without an end, it would not let a signal's handler run
    return outcome.result()


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Check what the Hub answers, and raise UpcycleError for what huggingface_hub raises."""
    from huggingface_hub import constants, errors

    guard()
    odd_url = http_client().InvalidURL  # which is no HTTPError
    oidc = getattr(errors, "OIDCError", OSError)  # version 1 has none
    try:
        yield
    except errors.HFValidationError as error:
        raise UpcycleError(f"'{repo}' is not a repo id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_cached(repo, revision) from error
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refusal(repo, revision, error.__cause__) from error
        raise _unreachable(error.__cause__ or error) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(repo, revision, error) from error
    except errors.HTTPError as error:
        raise _unreachable(error) from error
    # A cache that cannot be written, Xet's own transfer, a setting that makes no sense.
    except (OSError, RuntimeError, ValueError, ImportError, oidc, odd_url) as error:
        raise UpcycleError(
            f"what {repo} needs of the Hub failed: {words_of(error)}.",
            f"Check the cache ({constants.HF_HUB_CACHE}), HF_TOKEN, HF_ENDPOINT, proxies and "
            "SSL_CERT_FILE, and run the command again; files that are complete are kept.",
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith("huggingface_hub"):
            raise  # ours
        # It takes an answer for what it should be: a list for an object, a key for being there.
        raise bad_answer(f"{type(error).__name__}: {words_of(error)}") from error


def not_cached(repo: str, revision: str | None) -> UpcycleError:
    """Say that the Hub may not be asked, and that the cache does not have it."""
    from huggingface_hub import constants

    at = f" at revision {revision}" if revision else ""
    return UpcycleError(
        f"{repo}{at} is neither a directory nor complete in the cache ({constants.HF_HUB_CACHE}), "
        "and HF_HUB_OFFLINE forbids to download it.",
        f"Unset HF_HUB_OFFLINE, or run `hf download {repo}` on a machine that may.",
    )


def _refusal(repo: str, revision: str | None, error: HfHubHTTPError) -> UpcycleError:
    """Say what the Hub refused, and what to do about it."""
    from huggingface_hub import errors, get_token

    known, status = get_token() is not None, error.response.status_code
    words = _one_line(error.server_message or "")
    words = f": {words}" if words else ""
    hint: str | None
    if isinstance(error, errors.GatedRepoError):
        why = "your account has none" if known else "you are not signed in"
        message = f"access to {repo} is restricted, and {why}."
        hint = f"Ask for it at {endpoint()}/{repo}, then run the command again."
        hint += "" if known else f" {SIGN_IN}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"{repo} is neither a directory here nor a repo that the Hub shows you."
        hint = "Check the name. If it is private: "
        hint += "Your token may lack access to it." if known else SIGN_IN
    elif isinstance(error, errors.RevisionNotFoundError):
        message, hint = f"{repo} has no revision '{revision}'.", "Check branch, tag or commit."
    elif status == 401:
        message = f"the Hub refuses the token{words}."
        hint = "It may have expired: `hf auth login`, or set HF_TOKEN to a new one."
    elif status == 403:
        message = f"the token does not allow this on {repo}{words}."
        hint = "Use a token with the permission (`hf auth login`, HF_TOKEN)."
    elif status == 429:
        message, hint = "the Hub limits your requests.", "Wait some minutes, then try again."
    else:
        message = f"the Hub answered {status} for {repo}{words}."
        hint = "Try again later; what was transferred is kept." if status >= 500 else None
    return UpcycleError(message, hint)


def _unreachable(error: BaseException) -> UpcycleError:
    return UpcycleError(
        f"cannot reach the Hub at {endpoint()}: {words_of(error)}.",
        "Check the connection (HF_ENDPOINT, proxies) and run the command again; what was "
        "transferred is kept.",
    )


def words_of(error: BaseException) -> str:
    """Return what an error from elsewhere says, in one line, without a secret in it."""
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    from huggingface_hub import constants, get_token

    text = re.sub(r"(Bearer\s+)[^'\"]+", r"\1hf_…", text[:_LONGEST_TEXT])
    text = text.replace(constants.ENDPOINT, endpoint())
    if token := get_token():
        # An error can quote it as Python would.
        text = text.replace(token, "hf_…").replace(repr(token)[1:-1], "hf_…")
    return " ".join(blotted(text).split())[:300].rstrip(".")


def fetch(repo: str, name: str, revision: str | None) -> Path:
    """Return where a small file of a repo is in the cache; raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=revision, tqdm_class=download_bar(0)))


def download_bar(nbytes: int) -> type[Any]:
    """Return what huggingface_hub shows a download of so many bytes with: one bar, or none."""
    # Its own are up to three at once, of which one stays for every config and card.
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


def silence_library(*, bars: bool) -> None:
    """Keep huggingface_hub's warnings off the screen, and its bars too; raises UpcycleError."""
    try:
        from huggingface_hub.utils import disable_progress_bars, logging
    except ValueError as error:
        words = f"huggingface_hub does not start: {error}."
        raise UpcycleError(words, "Check the HF_… variables.") from error
    # What it warns of is that it tries again; what it gives up on is raised.
    logging.set_verbosity_error()
    if not bars and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()
