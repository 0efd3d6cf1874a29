"""Makes of the table of docs/interoperability.md what upcycle says of engines.

    python tests/interoperability/measured.py [--write]

prints `upcycle_cli/models/knowledge/engines.json`, or writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from interop.conversions import cases
from interop.results import Verdicts, measured

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "upcycle_cli" / "models" / "knowledge" / "engines.json"


def documented() -> dict[str, dict[str, str]]:
    """Return the table of the documentation: what each software made of each conversion."""
    text = (REPOSITORY / "docs" / "interoperability.md").read_text(encoding="utf-8")
    names, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| conversion |") or (line.startswith("| ") and " → " in line)
    )
    return {name: dict(zip(names[1:], cells, strict=True)) for name, *cells in rows}


def verdicts() -> Verdicts:
    """Return the same by conversion."""
    found = documented()
    return {case: found[case.name] for case in cases() if case.name in found}


def text() -> str:
    """Return what the file says."""
    return json.dumps(measured(verdicts()), indent=1, sort_keys=True) + "\n"


def main(*, write: bool = False) -> None:
    """Print or write it."""
    if write:
        TARGET.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")


if __name__ == "__main__":
    typer.run(main)
