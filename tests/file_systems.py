"""File systems of their own on loop devices, for which it takes root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

MAKE = {
    # Without discarding: the image's blocks stay allocated, and writing them costs no allocation.
    "XFS": ("mkfs.xfs", "-q", "-f", "-K"),
    "Btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}


class UnavailableError(Exception):
    """This machine cannot mount one; the message says why."""


@contextmanager
def file_system(kind: str, folder: Path, nbytes: int) -> Iterator[Path]:
    """Yield the mount point of a new file system of that size, whose image lies in `folder`.

    Raises UnavailableError.
    """
    if os.geteuid() != 0:
        raise UnavailableError("mounting takes root")
    if shutil.which(MAKE[kind][0]) is None:
        raise UnavailableError(f"{MAKE[kind][0]} is not installed")
    image, mount = folder / f"{kind}.image", folder / kind
    with ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        # Direct: the image's pages are not to be cached a second time.
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        _run(*MAKE[kind], device)
        mount.mkdir()
        stack.callback(mount.rmdir)
        _run("mount", device, str(mount))
        stack.callback(_run, "umount", str(mount))
        yield mount


def used_bytes(mount: Path) -> int:
    """Return how much of a file system is taken, shared extents counted once."""
    os.sync()
    status = os.statvfs(mount)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{' '.join(command)}: {error.stderr.strip()}") from error
    return result.stdout.strip()
