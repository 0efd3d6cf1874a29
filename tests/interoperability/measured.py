"""Makes of the table of docs/interoperability.md what upcycle says of engines.

    python tests/interoperability/measured.py [--write]

prints `upcycle_cli/models/knowledge/engines.json`, or writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from interop.conversions import cases
from interop.results import Verdicts, measured

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs" / "interoperability.md"
TARGET = REPOSITORY / "upcycle_cli" / "models" / "knowledge" / "engines.json"


def main() -> None:
    """Print or write it."""
    if sys.argv[1:] == ["--write"]:
        TARGET.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")


def documented() -> dict[str, dict[str, str]]:
    """Return the table of the documentation: what each software made of each conversion."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| conversion |") or (line.startswith("| ") and " → " in line)
    ]
    return {name: dict(zip(rows[0][1:], cells, strict=True)) for name, *cells in rows[1:]}


def verdicts() -> Verdicts:
    """Return the same by conversion."""
    found, known = documented(), cases()
    return {case: found[case.name] for case in known if case.name in found}


def text() -> str:
    """Return what the file says."""
    return json.dumps(measured(verdicts()), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
