"""The tool in a process that fork_server.py has, as the shell has arranged it.

    python -I -S fork_client.py SOCKET ARGUMENTS...

It has this process's descriptors, its directory and variables, gets the signals that are sent to
it, and gives it its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # as little as possible, since the shell waits for it
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STANDARD = (0, 1, 2)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def ask(
    server: str,
    arguments: Sequence[str],
    descriptors: Mapping[int, int],
    *,
    program: str = "",
    folder: str | Path = ".",
    environment: Mapping[str, str],
    seconds: float | None = None,
    signals: Sequence[int] = (),
) -> int:
    """Run a program, by default the tool; return its exit code, negative for a signal.

    Of `signals`, those that come are sent on.
    """
    wanted = {
        "program": program,
        "arguments": arguments,
        "environment": dict(environment),
        "open": list(descriptors),
    }
    opened = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        text = json.dumps(wanted).encode() + b"\n"
        sent = socket.send_fds(connection, [text], [opened, *descriptors.values()])
        os.close(opened)
        connection.sendall(text[sent:])
        connection.settimeout(seconds)
        for number in signals:
            signal.signal(number, lambda number, _: connection.send(bytes([number])) and None)
        return int(connection.recv(16))


def main() -> None:
    """Be the tool, for a shell."""
    given = {descriptor: descriptor for descriptor in STANDARD if _is_open(descriptor)}
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    code = ask(sys.argv[1], sys.argv[2:], given, environment=os.environ, signals=signals)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
