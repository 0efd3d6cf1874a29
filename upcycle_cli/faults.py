"""What ends a process from below, in words and with an exit code.

A file that is cut short while it is mapped sends whoever reads it a SIGBUS, and a C library that
gets no memory or no thread may call `exit(1)`. Python hears of neither: its own handlers run only
once the faulting instruction has ended, which it never does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from threading import Lock

from upcycle_cli.checkpoint import shortened_file

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_AtExit = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_kept: list[object] = []  # C functions last as long as somebody holds them


def handle_faults(last_words: Callable[[str, str], None], code: int) -> None:
    """End the process with a message, a hint and an exit code where it would end without."""
    first = Lock()

    def on_sigbus(_signum: int) -> None:
        while not first.acquire(blocking=False):
            time.sleep(1)  # another thread has read there too, and is saying so
        try:
            file = shortened_file()
            last_words(
                f"{file or 'a file'} was cut short while it was being read.",
                "Run the command again once nothing writes to it.",
            )
        finally:
            os._exit(code)

    def on_exit(_: object) -> None:
        try:
            last_words(
                "a library has ended the process; what it said is above.",
                "It may lack memory or threads (`ulimit -a`).",
            )
        finally:
            os._exit(code)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    handler, ending = _Handler(on_sigbus), _AtExit(on_exit)
    _kept.extend((handler, ending))
    libc.signal(signal.SIGBUS, handler)
    # Whatever ends by its own will does so by _exit.
    libc["__cxa_atexit"](ending, None, None)
