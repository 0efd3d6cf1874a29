"""The two pages: a verification and an inspection."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import locate, sha256_of
from upcycle_cli.core.text import counted
from upcycle_cli.inspection.summary import Inspection, inspect, inspection_rows
from upcycle_cli.report import sections
from upcycle_cli.report.page import Section, Table, properties, render
from upcycle_cli.verification.result import CHECK_NAMES, TRAINED, Report, Status
from upcycle_cli.write.record import FORMAT

_VERDICTS = {
    Status.FAILED: "The MoE does not match the {dense}",
    Status.MEASURED: "Nothing is wrong, but not everything is proven: the difference to the "
    "{dense} was measured",
    Status.SKIPPED: "No check could run, so nothing is proven",
}
_PASSED = {
    "exact": "The MoE computes the function of the {dense}, up to floating-point rounding",
    "approximate": "The MoE computes the function of the {dense}, up to an error of the size of "
    "its router logits, as its recipe promises",
}
_TRAINED = "The MoE was trained after its conversion or made from others than the {dense}"
_PACKAGES = ("upcycle-cli", "torch", "transformers", "numpy", "safetensors")


def verification_html(report: Report, *, models: Sequence[str], command: str) -> str:
    """Return the page of a verification; `models` are the dense models, then the MoE."""
    name = Path(models[-1]).name or models[-1]
    dense = "smaller MoE" if report.grown else "dense model"
    paths = report.paths or (Path(models[0]), Path(models[-1]))
    record, facts = dict[str, Any](), None
    with suppress(UpcycleError):
        held = read_json(locate(paths[1], RECORD_NAME, anywhere=True))
        record = held if held.get("format") == FORMAT else {}  # a link can lead to any JSON
    with suppress(UpcycleError, OSError):
        facts = _facts_section(inspect(paths[1]))
    layers = [layer for check in report.checks for layer in check.layers]
    texts = [text for check in report.checks for text in check.texts]
    names = [dense, *(f"{dense} {number}" for number in range(2, len(models))), "MoE"]
    parts = (
        facts,
        Section(key="checks", title="Checks", checks=report.checks),
        sections.recipe_section(record),
        sections.errors_section(layers),
        sections.texts_section(texts),
        sections.load_section(layers),
        _origin_section(dict(zip(names, models, strict=True)), paths, record, command),
    )
    return render(
        parts,
        title=f"{name}: {report.status} (upcycle verify)",
        kind=f"Verification of a Mixture of Experts against the {dense} it was made from",
        heading=name,
        status=str(report.status),
        verdict=_verdict(report, dense),
        # The first failure of each check, such as a scaled expert and then the KL that it causes.
        findings=[check.failures[0] for check in report.checks if check.failures],
    )


def inspection_html(inspection: Inspection, *, name: str, command: str) -> str:
    """Return the page of an inspected MoE."""
    heading = name.rstrip("/").rsplit("/", maxsplit=1)[-1] or name
    weights, record = inspection.weights, inspection.record or {}
    parts = (
        _facts_section(inspection),
        sections.recipe_section(record),
        sections.drift_section((weights and weights.movement) or ()),
        sections.load_section(() if inspection.load is None else inspection.load.layers),
        _origin_section({"MoE": name}, [inspection.checkpoint.path], record, command),
    )
    return render(
        parts,
        title=f"{heading} (upcycle inspect)",
        kind="Inspection of a Mixture of Experts",
        heading=heading,
        verdict="Use upcycle verify to compare the MoE with its dense model.",
    )


def _facts_section(inspection: Inspection) -> Section:
    rows = [(label, "; ".join(lines)) for label, lines in inspection_rows(inspection)]
    table = Table(caption="Facts", rows=rows)
    return Section(key="facts", title="Checkpoint", tables=[table])


def _verdict(report: Report, dense: str) -> str:
    words = _VERDICTS.get(report.status) or _PASSED[report.promise or "exact"]
    failed = [check for check in report.checks if check.status is Status.FAILED]
    if any(each.startswith(TRAINED) for check in failed for each in check.failures):
        words = _TRAINED
    words = words.format(dense=dense)
    if failed:
        names = ", ".join(check.name for check in failed)
        words += f": {counted(len(failed), 'check')} failed ({names})"
    ran = {check.name for check in report.checks if check.status is not Status.SKIPPED}
    asked = dict.fromkeys((*CHECK_NAMES, *(check.name for check in report.checks)))
    missing = ", ".join(name for name in asked if name not in ran)
    return f"{words}. Not checked: {missing}." if missing else f"{words}."


def _origin_section(
    models: Mapping[str, str], paths: Sequence[Path], record: Mapping[str, Any], command: str
) -> Section:
    """Return the section on the origin of a page; `paths` are the directories of the models."""
    files = [path / name for path in paths for name in (CONFIG_NAME, RECORD_NAME)]
    digests = {str(file): sha256_of(file) for file in files if file.is_file()}
    versions = {"Python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    tables = [
        properties({**models, "command": command}, "Models and command"),
        properties(versions, "Versions"),
        properties(digests, "SHA-256 of files"),
    ]
    if record:
        content = {key: dumps(value) for key, value in record.items()}
        tables.append(properties(content, f"The content of {RECORD_NAME}"))
    return Section(key="origin", title="Origin", tables=tables)
