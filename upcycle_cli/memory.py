"""How much memory this process can still take, by the machine and by its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MARGIN = 1.1
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the memory that machine and control groups leave, None where nothing says it."""
    known = [1024 * kib for key, kib in _numbers(_MEMINFO) if key == "MemAvailable"]
    known += _cgroup_bytes()
    return max(0, min(known)) if known else None


def _cgroup_bytes() -> Iterator[int]:
    """Yield what each control group above the process leaves, of either version."""
    for line in _lines(_OWN_CGROUPS):
        # hierarchy:controllers:path, the controllers being empty in version 2
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, limit_name, usage_name = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, where only the root is to be seen.
        own = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (own, *own.parents):
            limit = _number(root / folder / limit_name)
            usage = _number(root / folder / usage_name)
            if limit is not None and usage is not None:
                cache = dict(_numbers(root / folder / "memory.stat"))
                # Version 1 counts the groups below under another name.
                reclaimable = cache.get("total_inactive_file", cache.get("inactive_file", 0))
                yield limit - usage + min(reclaimable, usage)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the names and numbers of a file of lines such as `name: 1 kB`."""
    for line in _lines(path):
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            yield words[0].removesuffix(":"), int(words[1])


def _number(path: Path) -> int | None:
    """Return a file's number; None when it is not there, or says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def memory_objection(needed: float) -> str | None:
    """Say how memory for `needed` bytes, and a margin, is lacking; None when it is there."""
    available = available_bytes()
    needed *= _MARGIN
    if available is None or needed <= available:
        return None
    return f"it needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available"
