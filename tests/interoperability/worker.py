"""One process for a whole run of a software: it is imported once, and forked for each model.

Each line of stdin is a job, {"model", "prompts", "tokens", "picture", "limit_s"}; each line of
stdout its answer, {"output"} or {"error"}. What is printed meanwhile goes to stderr.
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
from typing import Any

Job = dict[str, Any]
Run = Callable[[Job], Any]
"""What a software makes of a job; it may raise, exit or crash."""


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
            case code:
                return {"error": reason(said.read()) or f"exit code {code}"}


def reason(said: str) -> str:
    """Return the line that says what went wrong: often not the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("Value error,")]
    text = (telling or lines or [""])[-1]
    # The files are gone with the run, and different models failed for one reason.
    text = re.sub(r":? /\S*/upcycle-\S*", "", text)
    return text if len(text) <= 200 else f"{text[:200]} …"
