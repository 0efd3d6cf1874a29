"""Makes of the rows of results.json what upcycle says of engines and trainers.

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
from interop.conclusions import all_rows, measured
from interop.conversions import results

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "upcycle_cli" / "models" / "knowledge" / "engines.json"


def text() -> str:
    """Return what the file says."""
    software = {name: each["version"] for name, each in results()["software"].items()}
    targets = ",\n".join(
        f"  {_json(target)}: {{\n"
        + ",\n".join(f"   {_json(name)}: {_json(parts)}" for name, parts in sorted(found.items()))
        + "\n  }"
        for target, found in sorted(measured(all_rows()).items())
    )
    return f'{{\n "software": {_json(software)},\n "targets": {{\n{targets}\n }}\n}}\n'


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def main(*, write: bool = False) -> None:
    """Print or write it."""
    if write:
        TARGET.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")


if __name__ == "__main__":
    typer.run(main)
