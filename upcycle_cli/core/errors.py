"""The one exception type that crosses the command line.

Everything that a user can cause or fix is raised as `UpcycleError`; the command line prints it and
exits with code 2. Any other exception is a bug in upcycle and shows its traceback.
"""

from __future__ import annotations

import reprlib

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 100


def shown(value: object) -> str:
    """Return a value from a file as a message may quote it: in Python's notation, cut short."""
    return _SHOWN.repr(value)


class UpcycleError(Exception):
    """Something that the user can fix: what is wrong and where, and what to do about it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)  # both, so that another process can unpickle it
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ResumableError(UpcycleError):
    """The run was cut short, and the same command resumes from the finished files."""


_LACKS = (
    (MemoryError, "", "memory", "ulimit -v"),
    (RuntimeError, "can't allocate memory", "memory", "ulimit -v"),  # torch's message
    (RuntimeError, "can't start new thread", "threads", "ulimit -u -v"),
    (BaseException, "ThreadPoolBuildError", "threads", "ulimit -u -v"),  # a panic of tokenizers
)


def lack_in_words(error: BaseException) -> UpcycleError | None:
    """Return an error that names the resource this process ran out of; None for other errors."""
    for kind, words, what, limit in _LACKS:
        if isinstance(error, kind) and words in str(error):
            return UpcycleError(
                f"the system gives this process no more {what}.",
                f"Raise its limit (`{limit}`, or the container's), or run it where there is more.",
            )
    return None
