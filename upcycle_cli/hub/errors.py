"""What can go wrong with the Hub, in plain words: what happened, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.secrets import blotted

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_MAX_TEXT = 10_000
SIGN_IN = "Sign in with `hf auth login`, or set HF_TOKEN."


def endpoint() -> str:
    """Return the Hub's address without the user name and password that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def bad_response(problem: str) -> UpcycleError:
    """Return the error for a server that does not behave like the Hub."""
    return UpcycleError(
        f"{endpoint()} does not answer as the Hub does: {problem}.",
        "Check HF_ENDPOINT and proxies; nothing of the answer was used.",
    )


@cache
def http_client() -> Any:  # noqa: ANN401
    """Return the module httpx or httpx2, whichever this version of huggingface_hub uses."""
    from huggingface_hub.errors import HTTPError

    return import_module(HTTPError.__module__.partition(".")[0])


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into UpcycleError."""
    from huggingface_hub import constants, errors

    invalid_url = http_client().InvalidURL  # not a subclass of HTTPError
    oidc_error = getattr(errors, "OIDCError", OSError)  # new in huggingface_hub 2
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
    message = _one_line(error.server_message or "")
    because = f": {message}" if message else ""
    if isinstance(error, errors.GatedRepoError):
        why = "your account has no access" if signed_in else "you are not signed in"
        hint = f"Ask for access at {endpoint()}/{repo}, then run the command again."
        hint += "" if signed_in else f" {SIGN_IN}"
        return UpcycleError(f"access to {repo} is restricted, and {why}.", hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "Your token may lack access to it." if signed_in else SIGN_IN
        return UpcycleError(
            f"{repo} is neither a local directory nor a repo that you can see on the Hub.",
            f"Check the name. If it is private: {hint}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        hint = "Check the branch, tag or commit."
        return UpcycleError(f"{repo} has no revision '{revision}'.", hint)
    what = f"the Hub answered {status} for {repo}"
    advice = "Try again later; transferred data is kept." if status >= 500 else None
    if status == 401:
        what = "the Hub refuses the token"
        advice = "It may have expired: `hf auth login`, or set HF_TOKEN to a new one."
    elif status == 403:
        what = f"the token does not allow this on {repo}"
        advice = "Use a token with the permission (`hf auth login`, HF_TOKEN)."
    elif status == 429:
        what, advice = "the Hub limits your requests", "Wait some minutes, then try again."
    return UpcycleError(f"{what}{because}.", advice)


def _unreachable(error: BaseException) -> UpcycleError:
    return UpcycleError(
        f"cannot reach the Hub at {endpoint()}: {error_text(error)}.",
        "Check the connection (HF_ENDPOINT, proxies) and run the command again; transferred data "
        "is kept.",
    )


def error_text(error: BaseException) -> str:
    """Return the message of a library's error in one line, without secrets."""
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    from huggingface_hub import constants, get_token

    text = re.sub(r"(Bearer\s+)[^'\"]+", r"\1hf_…", text[:_MAX_TEXT])
    text = text.replace(constants.ENDPOINT, endpoint())
    if token := get_token():
        # Some messages quote it with Python's escapes.
        text = text.replace(token, "hf_…").replace(repr(token)[1:-1], "hf_…")
    return " ".join(blotted(text).split())[:300].rstrip(".")
