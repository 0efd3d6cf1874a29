"""Makes of the table of docs/evidence/engines.md what upcycle says of engines.

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
from interop.conversions import documented
from interop.results import measured

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "upcycle_cli" / "models" / "knowledge" / "engines.json"


def text() -> str:
    """Return what the file says."""
    return json.dumps(measured(documented("engines.md")), indent=1, sort_keys=True) + "\n"


def main(*, write: bool = False) -> None:
    """Print or write it."""
    if write:
        TARGET.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")


if __name__ == "__main__":
    typer.run(main)
