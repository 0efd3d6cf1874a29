"""Where a page comes from: versions, digests, what `upcycle.json` records, and the command."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.errors import shown
from upcycle_cli.report.page import Section, Table, number, properties

FOOTER = "Made by upcycle. This page is one file: it loads nothing, and runs no script."
_PACKAGES = ("upcycle-cli", "torch", "transformers", "numpy", "safetensors")
_MOST_ROWS = 400


def origin_section(
    models: Mapping[str, str],
    digests: Mapping[str, str | None],
    record: Mapping[str, Any],
    command: str,
) -> Section:
    """Return the section that says by what, from what and how a page was made."""
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    tables = [
        properties("Models and command", {**models, "command": command}),
        properties("Versions", versions),
        properties("SHA-256 of files", digests),
    ]
    recorded = list(_recorded(record))
    if recorded:
        tables.append(
            Table(
                caption=f"What {RECORD_NAME} records",
                columns=("of what", "value"),
                rows=recorded[:_MOST_ROWS],
                folded=f"Digests that {RECORD_NAME} records",
            )
        )
    return Section(key="origin", title="Origin", tables=tables)


def _recorded(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a record, which can hold anything, says of versions and digests."""
    rows = [("upcycle", _dict(record.get("tool")).get("version")), ("numpy", record.get("numpy"))]
    merged = _dict(record.get("experts_from"))
    models = [_dict(each) for each in (record.get("source"), *_list(merged.get("models")))]
    for i, model in enumerate(models):
        whose = f"source {i + 1}" if len(models) > 1 else "source"
        groups = [str(g) for g, of in enumerate(_list(merged.get("groups"))) if of == i]
        rows += [
            (whose, model.get("name")),
            (f"{whose}: revision", model.get("revision")),
            (f"{whose}: virtual groups", ", ".join(groups) or None),
            (f"{whose}: config.json", model.get("config_sha256")),
            *_files(whose, model),
        ]
    rows += [("plan", record.get("plan_sha256")), *_files("MoE", record)]
    return [(name, _text(value)) for name, value in rows if value is not None]


def _files(whose: str, of: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for file in map(_dict, _list(of.get("files"))):
        digest = file.get("sha256") or file.get("header_sha256")
        kind = "" if file.get("sha256") else " (header)"
        yield f"{whose}: {_text(file.get('name'))}{kind}", digest


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return number(value) if isinstance(value, str) else shown(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
