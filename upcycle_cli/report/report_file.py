"""The file of a report: refused before any work, and written completely or not at all."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from upcycle_cli.core.errors import UpcycleError

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class ReportFile:
    """A file for a report; an existing one is replaced."""

    path: Path

    def check(self, dense: Path | str | None = None) -> None:
        """Raise UpcycleError for a missing library, and for a place that cannot be written.

        Nothing is written into the directory `dense`.
        """
        _check_libraries()
        path, folder = self.path, self.path.absolute().parent.resolve()
        # The suffix also keeps a page from replacing weights by a typing error.
        if path.suffix.lower() not in _SUFFIXES:
            raise UpcycleError(f"{path} does not end in .html.", "Choose a name that does.")
        if not folder.is_dir():
            raise UpcycleError(f"{path.parent} is not a directory.", "Create it first.")
        try:
            path.lstat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
        if path.exists() and not path.is_file():
            raise UpcycleError(f"{path} is not a regular file, and is not replaced.")
        if dense is not None and folder.is_relative_to(Path(dense).resolve()):
            raise UpcycleError(
                f"{path} is in {dense}, and the dense model is never modified.",
                "Write the report somewhere else.",
            )
        try:
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error

    def write(self, page: str) -> None:
        """Write a page beside its place and rename it; raises UpcycleError."""
        place = self.path.absolute()
        partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
        try:
            try:
                partial.write_text(page, encoding="utf-8")
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            words = f"writing {self.path} failed: {error.strerror}."
            raise UpcycleError(words, "The checks themselves have finished.") from error


def _check_libraries() -> None:
    # Without a home directory it warns on stderr about its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name in ("matplotlib.backends.backend_svg", "jinja2"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UpcycleError(
                f"--report needs {name.split('.')[0]}, which cannot be imported: {error}.",
                "Install it with `pip install 'upcycle-cli[report]'`.",
            ) from error
