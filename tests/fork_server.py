"""The process that forks: it imports once what takes a processor seconds. See forked.py.

It reads a job a line, and answers with the child's process id and then its exit code. With the
argument `hub`, it imports nothing that reads a Hub's variables, so each job may set its own.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import sys
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


def import_all(kind: str) -> None:
    """Import the libraries and the package; early imports of others would hide missing ones."""
    sys.path[0] = ""  # as `python -c` has it
    for name in (SAFE if kind == "hub" else SAFE + WITH_A_HUB).split():
        with suppress(ImportError):  # of another version of a library
            import_module(name)
    if kind != "hub":
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
    for module in pkgutil.walk_packages(upcycle_cli.__path__, "upcycle_cli."):
        if not module.name.endswith(("__main__", "modeling_upcycled")):
            import_module(module.name)
    early = {"transformers", "huggingface_hub.constants", "typer.rich_utils"} & sys.modules.keys()
    assert early <= (set() if kind == "hub" else {"transformers", "huggingface_hub.constants"})
    gc.freeze()


def next_job() -> dict[str, Any] | None:
    """Answer with exit codes; return each job in a new process, and None at the end."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            job: dict[str, Any] = json.loads(line)
            return job
        os.write(1, b"%d\n" % child)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return None


def become(job: dict[str, Any]) -> None:
    """Take the streams, the directory, the variables and the arguments of a job."""
    streams = (os.devnull, f"{job['folder']}/stdout", f"{job['folder']}/stderr")
    for descriptor, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["-c", *job["arguments"]]
    if job["program"]:
        # It may change the system before it imports upcycle.
        for name in [name for name in sys.modules if name.partition(".")[0] == "upcycle_cli"]:
            del sys.modules[name]


import_all(sys.argv[1])
if (job := next_job()) is not None:
    become(job)
    program = job["program"] or "from upcycle_cli.__main__ import main\nmain()\n"
    exec(program, {"__name__": "__main__"})  # noqa: S102
