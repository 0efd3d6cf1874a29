"""Where a page is put: refused before anything is checked, and written whole or not at all."""

from __future__ import annotations

import importlib
import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import write_whole

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class ReportFile:
    """The file that a report is written to, which may be there already: then it is replaced."""

    path: Path

    def check(self, dense: Path | str | None = None) -> None:
        """Raise UpcycleError for what would fail after minutes: no library, no place to write.

        `dense` is a directory that nothing is written into.
        """
        _check_libraries()
        path, folder = self.path, self._folder()
        # Also so that no slip of the hand puts a page in the place of weights.
        if path.suffix.lower() not in _SUFFIXES:
            raise UpcycleError(f"{path} does not end in .html, as a report does.", "Name it so.")
        if not folder.is_dir():
            raise UpcycleError(f"{path.parent} is not a directory.", "Make it, or choose another.")
        try:
            status = path.lstat() if path.is_symlink() or path.exists() else None
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error
        if status is not None and not (stat.S_ISREG(status.st_mode) or path.is_symlink()):
            raise UpcycleError(f"{path} is no regular file, and is not replaced.")
        if dense is not None and folder.is_relative_to(Path(dense).resolve()):
            raise UpcycleError(
                f"{path} lies in {dense}, and a dense model is left as it is.",
                "Write the report somewhere else.",
            )

    def write(self, page: str) -> None:
        """Write a page beside its place and give it its name; raises UpcycleError."""
        try:
            write_whole(self._folder() / self.path.name, page.encode())
        except OSError as error:
            words = f"writing {self.path} failed: {error.strerror}."
            raise UpcycleError(words, "The checks have ended all the same.") from error

    def _folder(self) -> Path:
        return self.path.absolute().parent.resolve()


def _check_libraries() -> None:
    # Without a home it says on stderr where it keeps its fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name in ("matplotlib.backends.backend_svg", "jinja2"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UpcycleError(
                f"--report draws with {name.split('.')[0]}, which cannot be imported: {error}.",
                "Install it with `pip install 'upcycle-cli[report]'`.",
            ) from error
