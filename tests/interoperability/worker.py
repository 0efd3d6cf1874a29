"""One process for a whole run of a software: it is imported once, and forked for each model.

`python worker.py NAME` runs an engine by upcycle_cli/run/engine_runner.py. Each line of stdin is a
job of that, with "limit_s"; each line of stdout its answer, {"output"} or {"error"}. What is
printed meanwhile goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# At the end: modules beside the runner may have the names of others.
sys.path.append(str(Path(__file__).resolve().parents[2] / "upcycle_cli" / "run"))

from engine_runner import ENGINES, ENVIRONMENT, reason

Job = dict[str, Any]
Run = Callable[[Job], Any]
"""What a software makes of a job; it may raise, exit or crash."""
_AUTO = ("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
USED = {
    "transformers": ("transformers.generation.utils", "transformers.modeling_utils", *_AUTO),
    "vllm": ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.v1.engine.llm_engine"),
    "llama_cpp": ("torch", "transformers.modeling_utils", *_AUTO),
    "mlx_lm": ("mlx_lm.generate", "mlx_lm.utils"),
}
"""What an engine imports with its first model only, worth importing once; not gguf, of which the
converter of llama.cpp brings its own."""


def answer_all(run: Run) -> None:
    """Answer every job, each in a process of its own, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(in_a_fork(run, json.loads(line))), file=answers, flush=True)


def in_a_fork(run: Run, job: Job) -> dict[str, Any]:
    """Return what `run` makes of a job, or why it made nothing of it."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if not child:
            code = 1
            os.setsid()
            signal.alarm(job["limit_s"])
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = said  # wherever they led
            try:
                json.dump(run(job), answer)
                answer.flush()
                code = 0
            except BaseException:  # noqa: BLE001 - SystemExit too: nothing may leave the fork
                traceback.print_exc()
            finally:
                said.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it started and left behind
        said.seek(0)
        answer.seek(0)
        match os.waitstatus_to_exitcode(status):
            case 0:
                return {"output": json.load(answer)}
            case code if code == -signal.SIGALRM:
                return {"error": f"no answer in {job['limit_s']} s"}
            case code if code < 0:
                return {"error": f"exit code {code}"}
            case _:
                # The files are gone with the run, and different models failed for one reason.
                return {"error": re.sub(r":? /\S*/upcycle-\S*", "", reason(said.read()))}


# vLLM may start processes that import this file once more.
if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    module, run = ENGINES[sys.argv[1]]
    for name in (module, *USED.get(module, ())):
        import_module(name)
    answer_all(run)
