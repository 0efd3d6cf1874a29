"""The text that the dense model is run on for a calibration."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.core.text import printable

if TYPE_CHECKING:
    from upcycle_cli.run.texts import Text

BUILTIN = "builtin"


@dataclass(frozen=True)
class CalibrationText:
    """Texts, what they are called, and the digest by which they are known again."""

    name: str
    """`builtin`, or the name of the file without its directory."""
    texts: tuple[Text, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is in them."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()


def calibration_text(place: str | Path, what: str = "the calibration text") -> CalibrationText:
    """Return the text that comes with upcycle, or a file's; errors call it by `what` it is.

    Raises UpcycleError for a file that cannot be read, is no text, or has none in it.
    """
    from upcycle_cli.run.texts import builtin_texts, read_texts

    if str(place) == BUILTIN:
        return CalibrationText(BUILTIN, tuple(builtin_texts()))
    path = Path(place)
    texts = read_texts(path, what)
    return CalibrationText(printable(path.name), tuple(texts))
