"""Write docs/reference/cli.md from `--help-all`: `python docs/generate_cli.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("", "convert", "inspect", "verify", "push", "families", "clean", "demo")
PAGE = Path(__file__).parent / "reference" / "cli.md"
INTRODUCTION = """\
# CLI reference

Generated from `--help-all` by `python docs/generate_cli.py`; a test checks that it is current.

Data goes to stdout, talk to stderr. `--json` prints one JSON object on stdout and nothing else;
[schema.json](schema.json) describes the object of every command.
Exit codes: 0 done, 1 a verification failed, 2 bad usage, input or resource, 70 a bug in upcycle,
129 SIGHUP, 130 SIGINT, 143 SIGTERM.
"""


def page() -> str:
    """Return the whole page."""
    parts = (
        f"## {f'upcycle {command}'.strip()}\n\n```text\n{_help(command)}\n```\n"
        for command in COMMANDS
    )
    return "\n".join([INTRODUCTION, *parts])


def _help(command: str) -> str:
    arguments = [sys.executable, "-m", "upcycle_cli", *command.split(), "--help-all"]
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):  # a CI system may force colour
        environment.pop(name, None)
    result = subprocess.run(  # noqa: S603 - our own command line
        arguments, env=environment, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in result.stdout.strip("\n").splitlines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
