"""The process that forks: it imports once what takes a processor seconds. See forked.py.

    python fork_server.py SOCKET PID [hub]

It ends with the process of that number. With `hub`, it imports nothing that reads the variables of
a Hub while it is imported, so that each program may have a Hub of its own.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import weakref
from contextlib import suppress
from importlib import import_module
from typing import Any

import upcycle_cli

SAFE = """
PIL.Image configparser filelock httpcore2 httpx2 jinja2 matplotlib.backends.backend_svg
matplotlib.figure numpy.random pydantic.dataclasses regex rich.progress rich.table safetensors.torch
tokenizers torch torch._dynamo torch.distributed.run torch.distributed.tensor
torch.utils.checkpoint tqdm.auto truststore typer._adapters xxhash yaml
"""
WITH_A_HUB = """
transformers.conversion_mapping transformers.modeling_gguf_pytorch_utils transformers.modeling_utils
transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
transformers.models.llama.modeling_llama transformers.models.llama.tokenization_llama
transformers.models.mixtral.modeling_mixtral
"""


def import_all() -> None:
    sys.path[0] = ""  # as `python -c` has it
    is_for_hubs = "hub" in sys.argv[3:]
    for name in (SAFE if is_for_hubs else SAFE + WITH_A_HUB).split():
        with suppress(ImportError):  # of another version of a library
            import_module(name)
    if not is_for_hubs:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
    for module in pkgutil.walk_packages(upcycle_cli.__path__, "upcycle_cli."):
        if not module.name.endswith(("__main__", "modeling_upcycled")):
            import_module(module.name)
    early = {"transformers", "huggingface_hub.constants", "typer.rich_utils"} & sys.modules.keys()
    assert early <= (set() if is_for_hubs else {"transformers", "huggingface_hub.constants"}), early
    # Nothing of all this is to be looked at again, by the collector nor when a program ends.
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]  # noqa: SLF001
        finalizer.atexit = False
    gc.collect()
    gc.freeze()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    return json.loads(text), descriptors


def serve() -> tuple[dict[str, Any], list[int]]:
    """Answer with exit codes; return, in a new process each time, what that is to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1] + ".new")
    listener.listen(64)
    os.rename(sys.argv[1] + ".new", sys.argv[1])  # noqa: PTH104 - it is there: it listens
    master = os.pidfd_open(int(sys.argv[2]))
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process
    while True:
        asking = {connection: child for child, connection in running.values()}
        awaited: list[Any] = [listener, master, *running, *asking]
        ready = select.select(awaited, [], [])[0]
        if master in ready:
            os.killpg(0, signal.SIGKILL)  # and whatever still runs
        for connection in asking.keys() & set(ready):
            sent = connection.recv(1)  # a signal, or nothing: whoever asked is gone
            os.kill(asking[connection], sent[0] if sent else signal.SIGKILL)
        for ended in running.keys() & set(ready):
            child, connection = running.pop(ended)
            os.close(ended)
            with suppress(BrokenPipeError):
                connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            connection.close()
        if listener in ready:
            connection, _ = listener.accept()
            wanted, descriptors = receive(connection)
            child = os.fork()
            if not child:
                for opened in (listener, connection, *asking):
                    opened.close()
                for descriptor in (master, *running):
                    os.close(descriptor)
                return wanted, descriptors
            for descriptor in descriptors:
                os.close(descriptor)
            running[os.pidfd_open(child)] = child, connection


import_all()
wanted, (folder, *given) = serve()
os.fchdir(folder)
os.close(folder)
for standard, stream in enumerate(("stdin", "stdout", "stderr")):
    if standard in wanted["open"]:
        descriptor = given.pop(0)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    else:
        os.close(standard)
        setattr(sys, stream, None)
        setattr(sys, f"__{stream}__", None)
os.environ.clear()
os.environ.update(wanted["environment"])
sys.argv = ["-c", *wanted["arguments"]]
if wanted["program"]:
    # It may change the system before it imports the tool.
    for name in [name for name in sys.modules if name.partition(".")[0] == "upcycle_cli"]:
        del sys.modules[name]
program = wanted["program"] or "from upcycle_cli.__main__ import main\nmain()\n"
exec(program, {"__name__": "__main__"})  # noqa: S102 - which is what it is there for
