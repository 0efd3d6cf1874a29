"""Write docs/cli.md from the commands' own --help: `python docs/generate_cli.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("", "convert", "inspect", "verify", "push", "families", "clean", "demo")
PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """Return the whole page."""
    parts = [
        "# CLI reference\n",
        "Generated from `--help` by `python docs/generate_cli.py`; a test keeps it true.\n",
        "Data goes to stdout, talk to stderr; `--json` prints one JSON object on stdout and\n"
        "nothing else. Exit codes: 0 done, 1 a verification failed, 2 bad usage or input or a\n"
        "resource that failed, 70 a bug in upcycle, 129 SIGHUP, 130 SIGINT, 143 SIGTERM.\n",
    ]
    for command in COMMANDS:
        title = f"upcycle {command}".strip()
        parts.append(f"## {title}\n\n```text\n{_help(command)}\n```\n")
    return "\n".join(parts)


def _help(command: str) -> str:
    arguments = [sys.executable, "-m", "upcycle_cli", *command.split(), "--help"]
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    # Colour forced by a CI system would end up in the page.
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        environment.pop(name, None)
    result = subprocess.run(  # noqa: S603 - our own command line
        arguments, env=environment, capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in result.stdout.strip("\n").splitlines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
