"""The file of a report: refused before any work, and written completely or not at all."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from tempfile import TemporaryFile

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import is_in, write_whole

_SUFFIXES = (".html", ".htm")


def check_report_file(path: Path, dense: Path | None) -> None:
    """Raise UpcycleError if a report cannot be written there; never into the directory `dense`."""
    _check_libraries()
    # The suffix also keeps a page from replacing weights by a typing error.
    if path.suffix.lower() not in _SUFFIXES:
        raise UpcycleError(f"{path} does not end in .html.", "Choose a name that does.")
    if not path.parent.is_dir():
        raise UpcycleError(f"{path.parent} is not a directory.", "Create it first.")
    if dense is not None and is_in(path.parent, dense):
        raise UpcycleError(
            f"{path} is in {dense}, and the dense model is never modified.",
            "Write the report somewhere else.",
        )
    try:
        if path.exists() and not path.is_file():
            raise UpcycleError(f"{path} is not a regular file, and is not replaced.")
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UpcycleError(f"cannot write {path}: {error.strerror}.") from error


def write_report(path: Path, page: str) -> None:
    """Write a page, complete or not at all; raises UpcycleError."""
    try:
        write_whole(path, page.encode())
    except OSError as error:
        words = f"writing {path} failed: {error.strerror}."
        raise UpcycleError(words, "The checks themselves have finished.") from error


def _check_libraries() -> None:
    # Without a home directory it warns on stderr about its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        for name in ("matplotlib.backends.backend_svg", "jinja2"):
            importlib.import_module(name)
    except ImportError as error:
        raise UpcycleError(
            f"--report needs matplotlib and jinja2, and one cannot be imported: {error}.",
            "Install them with `pip install 'upcycle-cli[report]'`.",
        ) from error
