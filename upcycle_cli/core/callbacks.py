"""Callbacks that report progress. The classes here do nothing; callers override what they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Progress:
    """Receives the progress of writing, of a calibration and of a verification."""

    def begins(self, what: str) -> None:
        """Receive the step that begins: `calibrating`, or `checking` and the check's name."""

    def checked(self, done: int, total: int, unit: str) -> None:
        """Receive how much of this step is done; `unit` is `bytes` or `layers`."""

    def advance(self, num_bytes: int) -> None:
        """Receive the number of bytes written since the last call."""


class Hooks(Progress):
    """Receives every step of a conversion, on rank 0. An exception raised here ends it."""

    def planned(self, plan: Any) -> None:  # noqa: ANN401 - a Plan, which core does not know
        """Receive the plan."""

    def downloading(self, names: Sequence[str], num_bytes: int) -> None:
        """Receive the names of the sources and how many bytes will be downloaded."""

    def writing(self, plan: Any) -> None:  # noqa: ANN401
        """Receive the plan as it is written, after any calibration."""

    def finished(self, result: Any) -> None:  # noqa: ANN401 - a Conversion
        """Receive the result, before it is pushed."""

    def pushing(self, repo: str, num_files: int, num_bytes: int) -> None:
        """Receive where and how much will be pushed."""
