"""Kills a conversion at each step that touches the file system, and goes on after each.

A program of its own, so that it can fork: `kill_points.py DENSE OUTPUT [REPLACED]` prints a
JSON object for each step: the event before which it was killed, what OUTPUT held then and what it
holds after the next run. With REPLACED, a copy of that directory is in OUTPUT's place beforehand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import cast

from engine_fixtures import contents, execute, plan_of

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def kill_before(step: int, place: Path, told: Path) -> None:
    """Let this process be killed before the step-th event at `place`."""
    steps = count(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS:
            return
        path = str(arguments[0])
        if not path.startswith(str(place)):
            return  # a file of Python's own
        if event == "open" and not cast("int", arguments[2]) & os.O_CREAT:
            return
        if next(steps) == step:
            names = [str(argument).removeprefix(str(place)) for argument in arguments[:2]]
            descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, " ".join([event, *names]).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def convert(dense: Path, output: Path, *, step: int, told: Path) -> bool:
    """Convert in a child that is killed before a step, 0 for none; return whether it was."""
    child = os.fork()
    if child == 0:
        plan = plan_of(dense, "E2G2T2", max_shard_bytes=60_000)
        if step:
            kill_before(step, output.parent, told)
        execute(plan, output, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, f"the run after step {step} failed"
        return False
    return os.WTERMSIG(status) == signal.SIGKILL


def main(dense: Path, output: Path, replaced: Path | None = None) -> None:
    told = output.parent.with_name("told")
    # What is seen after a kill does not depend on it, and it takes long.
    setattr(os, "fsync", lambda _: None)  # noqa: B010 - mypy sees a name that differs
    # A first run imports whatever a run needs, so that no child has to.
    execute(plan_of(dense, "E2G2T2"), output.parent.with_name("imported"))
    for step in count(1):
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if replaced is not None:
            shutil.copytree(replaced, output)
        if not convert(dense, output, step=step, told=told):
            return
        killed = contents(output) if output.exists() else None
        places = {entry.name: contents(entry) for entry in output.parent.iterdir()}
        convert(dense, output, step=0, told=told)
        names = sorted(entry.name for entry in output.parent.iterdir())
        found = {
            "before": told.read_text(),
            "killed": killed,
            "places": places,
            "resumed": contents(output),
            "names": names,
        }
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
