"""Standard output and error that outlive whoever reads them.

A pipe whose reader has gone, a full disk, a descriptor that is closed: Python, rich and the
libraries each have an exit code of their own for these, most of them 1, which means here that a
verification failed. So writing never fails; what was lost is asked for at the end.
"""

from __future__ import annotations

import errno
import io
import select
import sys
from contextlib import suppress
from typing import Any


class _Sink(io.FileIO):
    """A descriptor to which one can write whatever happens; `lost` is the first thing that did."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # a pipe that somebody has made not to wait
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes
        return written


_sinks: dict[str, _Sink] = {}


def make_streams_robust() -> None:
    """Replace standard output and error by streams whose writing never fails."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not None and not isinstance(old, io.TextIOWrapper):
            continue  # somebody has put something of his own there
        sink = _sinks[name] = _Sink(descriptor, "wb", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(sink),
            encoding="utf-8" if old is None else old.encoding,
            # A sign that the terminal cannot show must not end a conversion.
            errors="backslashreplace",
            line_buffering=name == "stderr" or sink.isatty(),
            write_through=old is not None and old.write_through,
        )
        setattr(sys, name, stream)


def flush_streams() -> OSError | None:
    """Write what is to be written; return why data is lost, if it is."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    lost = _sinks["stdout"].lost if "stdout" in _sinks else None  # talk is no data
    # A reader who has gone had seen enough.
    return None if lost is None or lost.errno == errno.EPIPE else lost
