"""Who hears how a conversion goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_cli.conversion import Conversion
    from upcycle_cli.plan.base import Planned


class Watch:
    """What is told of the progress of a model that is run; this one shows nothing."""

    def begins(self, what: str) -> None:
        """Hear what begins: `calibrating`, or `checking` and the name of the check."""

    def calibrated(self) -> None:
        """Hear that the dense model has been run on a calibration's text."""

    def checked(self, done: int, total: int, unit: str) -> None:
        """Hear how far that is, in `bytes` or `layers`."""


class Progress(Watch):
    """What is told of a conversion's progress; this one shows nothing."""

    def advance(self, num_bytes: int) -> None:
        """Hear that so many bytes more are written."""


class Hooks(Progress):
    """Hears how a conversion goes on, on the rank that leads; what is raised here ends it."""

    def planned(self, plan: Planned) -> None:
        """Hear what is going to be made."""

    def downloading(self, plan: Planned, nbytes: int) -> None:
        """Hear how many bytes of the source are to be downloaded."""

    def writing(self, plan: Planned) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return what is entered while OUTPUT is written and verified."""
        return nullcontext()

    def finished(self, done: Conversion) -> None:
        """Hear what was made, before it is pushed."""

    def pushing(self, files: int, nbytes: int) -> None:
        """Hear how much is to be pushed."""
