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
    """Something that the caller can fix: `message` says what is wrong, `hint` what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)  # both, so that another process can unpickle it
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ResumableError(UpcycleError):
    """The run was cut short, and the same command resumes from the finished files."""


_LACKS = ("can't allocate memory", "can't start new thread", "ThreadPoolBuildError")
"""Parts of the messages of torch, Python and tokenizers when the system refuses memory."""


def lack_in_words(error: BaseException) -> UpcycleError | None:
    """Return an error for a process that ran out of memory or threads; None for other errors."""
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in _LACKS):
        return None
    hint = "Raise its limits (`ulimit -v -u`, or the container's), or run it where there is more."
    return UpcycleError("the system gives this process no more memory or threads.", hint)
