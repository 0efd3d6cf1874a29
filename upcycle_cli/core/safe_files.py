"""Safe reads of untrusted files, and small files that are written whole.

A directory that was cloned or unpacked can hold links to other places, pipes that nobody writes to,
devices without an end, and gigabytes where kilobytes belong. `locate` finds a file of such a
directory and `open_regular` opens it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.platform import make_durable

MOST_JSON_BYTES = 10_000_000  # more than any config, record or tokenizer setting has
MOST_LISTING_BYTES = 100_000_000  # more than any index has: as large as a safetensors header may be
MOST_COMPANION_BYTES = 500_000_000  # more than any tokenizer has

CHECKSUMS_NAME = "SHA256SUMS"
_TEMPORARY_PREFIX, _TEMPORARY_SUFFIX = ".upcycle-", ".new"


def is_in(path: Path, directory: Path) -> bool:
    """Whether a path is a directory or inside it, links resolved."""
    with suppress(OSError, RuntimeError):  # links in a circle lead nowhere
        path, directory = path.resolve(), directory.resolve()
    return path.is_relative_to(directory)


def locate(directory: Path, name: str, *, anywhere: bool = False) -> Path:
    """Return where a regular file of a directory really is.

    A link is followed where `is_inside` allows, or `anywhere`. Raises UpcycleError.
    """
    path = directory / name
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        words = f"{path} is missing or unreadable: {reason}."
        raise UpcycleError(words, "Download or copy it again.") from error
    if not (anywhere or is_inside(directory, real)):
        words = f"{path} is a link to {real}, which is not in {directory}; it is not followed."
        raise UpcycleError(words, "Put the file itself there, if it belongs there.")
    check_regular(path, status)
    return real


def is_inside(directory: Path, real: Path) -> bool:
    """Whether a path without links is in a directory or, of a Hub snapshot, in the blobs."""
    root = directory.resolve()
    places, repo = [root], root.parent.parent  # of models--ORG--NAME/snapshots/COMMIT
    if root.parent.name == "snapshots" and repo.name.startswith("models--"):
        # A repo's blobs can be links to blobs that all repos of the cache share.
        places += [repo / "blobs", repo.parent / "blobs"]
    return any(map(real.is_relative_to, places))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; UpcycleError at once for anything else, or OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """Return the contents of a regular file of at most `most` bytes; raises UpcycleError."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1) or b""  # None from a file of /proc that would wait
    except OSError as error:
        raise UpcycleError(f"cannot read {path}: {error.strerror}.") from error
    if len(data) > most:
        raise UpcycleError(f"{path} is too large: more than {most:,} bytes.")
    return data


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a small file that appears complete, or stays what it was; raises OSError."""
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{os.urandom(8).hex()}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                make_durable(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # the name that the user knows
        raise


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with everything in it."""
    if is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def is_directory(path: Path) -> bool:
    """Whether this is a directory and no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_temporary(name: str) -> bool:
    """Whether this is the name of a file that `write_whole` had not finished."""
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file; raises UpcycleError, or OSError when unreadable."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of these patterns, folder by folder."""
    # fnmatch lets * match slashes, too.
    level = [pattern for pattern in patterns if name.count("/") == pattern.count("/")]
    return any(fnmatchcase(name, pattern) for pattern in level)


def is_inner_name(name: object) -> TypeGuard[str]:
    """Whether this names a file inside a directory: relative, printable, without `..`."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and path.parts[0] != "/" and ".." not in path.parts


def read_header(file: BufferedReader) -> bytes:
    """Return an open weight file's header; a false length reads a limited number of bytes."""
    return file.read(min(int.from_bytes(file.read(8), "little"), MOST_LISTING_BYTES))


def read_checksums(path: Path) -> dict[str, str]:
    """Return the digests in a SHA256SUMS file by name; raises UpcycleError."""
    lines = read_small(path).decode(errors="replace").splitlines()
    parts = (line.partition(" ") for line in lines)
    found = {name[1:]: digest for digest, _, name in parts}  # a space or a star precedes the name
    if not all(map(is_inner_name, found)):
        raise UpcycleError(f"{CHECKSUMS_NAME} has a bad line.")
    return found


def check_regular(path: Path, status: os.stat_result) -> None:
    """Raise UpcycleError unless this is the status of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise UpcycleError(f"cannot read {path}: it is not a regular file.")
