"""Writes what came out into results.json, where rows that did not run stay as they are."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from interop.conversions import RESULTS, Case
from interop.results import Cell


def record(
    found: Mapping[Case, Mapping[str, Cell]], versions: Mapping[str, str], *, date: str = ""
) -> None:
    """Write results into the file; they replace what another version of the same software gave."""
    with RESULTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # engines and trainers may run at the same time
        merged = merge(json.load(file), found, versions, date or str(datetime.now(UTC).date()))
        file.seek(0)
        file.write(text_of(merged))
        file.truncate()


def merge(
    before: Mapping[str, Any],
    found: Mapping[Case, Mapping[str, Cell]],
    versions: Mapping[str, str],
    date: str,
) -> dict[str, Any]:
    """Return the content of results.json with these results."""
    software = dict(before["software"])
    tried = {name for cells in found.values() for name in cells}
    kept = {name for name in software if software[name]["version"] == versions.get(name)}
    gone = tried - kept
    software |= {name: {"version": versions[name], "date": date} for name in sorted(tried)}
    rows = {
        each["conversion"]: {s: cell for s, cell in each["found"].items() if s not in gone}
        for each in before["rows"]
    }
    for case, cells in found.items():
        rows.setdefault(case.name, {}).update({name: str(cell) for name, cell in cells.items()})
    return {
        "software": software,
        "rows": [{"conversion": name, "found": cells} for name, cells in rows.items()],
    }


def text_of(content: Mapping[str, Any]) -> str:
    """Return the file's text: a line for each software and each conversion."""
    software = (f"  {_json(name)}: {_json(each)}" for name, each in content["software"].items())
    rows = (f"  {_json(each)}" for each in content["rows"])
    first, second = ",\n".join(software), ",\n".join(rows)
    return f'{{\n "software": {{\n{first}\n }},\n "rows": [\n{second}\n ]\n}}\n'


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
