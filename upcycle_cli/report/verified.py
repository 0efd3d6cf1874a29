"""The page of a verification: its sections, each from what the checks have found.

What was not measured has no section: without the check `outputs` there are no layers and no texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, locate, read_small
from upcycle_cli.core.text import counted
from upcycle_cli.report.layers import errors_section, load_section, routing_section
from upcycle_cli.report.origin import FOOTER, origin_section
from upcycle_cli.report.page import Check, Page, Section, properties
from upcycle_cli.report.recipe import recipe_section
from upcycle_cli.report.texts import texts_section
from upcycle_cli.verification.result import (
    CHECK_NAMES,
    CheckResult,
    Continuation,
    LayerMeasure,
    Report,
    Status,
    TextMeasure,
)

_VERDICTS = {
    Status.FAILED: "The MoE is not what the method makes of the dense model",
    Status.MEASURED: "Nothing is wrong and nothing is proven: this MoE promises no equality, and "
    "how far it is from the dense model was measured",
    Status.SKIPPED: "Nothing is proven: no check could run",
}
_PASSED = {
    "exact": "The MoE computes the function of the dense model, up to the rounding of floating "
    "point arithmetic",
    "approximate": "The MoE computes the function of the dense model up to an error of the order "
    "of its routers' logits, which is all that it promises",
}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A verification: what was found, what was asked for, and where the files are."""

    report: Report
    dense: str
    moe: str
    command: str
    experts_from: Sequence[str] = ()
    """The other models that experts are of."""

    @property
    def paths(self) -> tuple[Path, Path]:
        """Where both models were read; as they were given when none could be."""
        return self.report.paths or (Path(self.dense), Path(self.moe))

    def check(self, name: str) -> CheckResult | None:
        """Return what a check found, None when it was not asked for."""
        return next((check for check in self.report.checks if check.name == name), None)

    @property
    def layers(self) -> Sequence[LayerMeasure]:
        """What was measured layer by layer."""
        return [layer for check in self.report.checks for layer in check.layers]

    @property
    def texts(self) -> Sequence[TextMeasure]:
        """What was measured token by token."""
        return [text for check in self.report.checks for text in check.texts]

    @property
    def continuation(self) -> Continuation | None:
        """How the models go on after a text."""
        outputs = self.check("outputs")
        return None if outputs is None else outputs.continuation

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What `upcycle.json` says, empty when it is not there or not to be read."""
        try:
            found = read_json(locate(self.paths[1], RECORD_NAME))
        except UpcycleError:
            return {}
        return found


def verification_page(verified: Verified) -> Page:
    """Return the page of a verification, whatever its outcome."""
    report = verified.report
    name = Path(verified.moe).name or verified.moe
    origin = _origin_of(report)
    return Page(
        title=f"{name}: {report.status} (upcycle verify)",
        kind=f"Verification of a Mixture of Experts against the {origin} it was made from",
        heading=name,
        status=str(report.status),
        verdict=_verdict(report),
        sections=[section for make in _SECTIONS if (section := make(verified)) is not None],
        footer=FOOTER,
    )


def _origin_of(report: Report) -> str:
    return "smaller one" if report.grown else "dense model"


def _verdict(report: Report) -> str:
    words = _VERDICTS.get(report.status) or _PASSED[report.promise or "exact"]
    words = words.replace("dense model", _origin_of(report))
    if report.status is Status.FAILED:
        failed = [check.name for check in report.checks if check.status is Status.FAILED]
        words += f": {counted(len(failed), 'check')} failed ({', '.join(failed)})"
    ran = {check.name for check in report.checks if check.status is not Status.SKIPPED}
    missing = ", ".join(name for name in CHECK_NAMES if name not in ran)
    return f"{words}. Not checked: {missing}." if missing else f"{words}."


def _checks(verified: Verified) -> Section:
    checks = [
        Check(
            name=check.name,
            status=str(check.status),
            detail=check.detail,
            failures=check.failures,
            metrics=properties(f"Metrics of the check {check.name}", check.metrics)
            if check.metrics
            else None,
        )
        for check in verified.report.checks
    ]
    return Section(key="checks", title="Checks", checks=checks)


def _recipe(verified: Verified) -> Section:
    weights = verified.check("weights")
    return recipe_section(verified.record, {} if weights is None else weights.metrics)


def _origin(verified: Verified) -> Section:
    paths, origin = verified.paths, _origin_of(verified.report)
    digests = {
        f"{name} of the {who}": _digest(path, name)
        for who, path, name in (
            (origin, paths[0], CONFIG_NAME),
            ("MoE", paths[1], CONFIG_NAME),
            ("MoE", paths[1], RECORD_NAME),
        )
    }
    others = {f"{origin} {i}": model for i, model in enumerate(verified.experts_from, 2)}
    models = {origin: verified.dense, **others, "MoE": verified.moe}
    return origin_section(models, digests, verified.record, verified.command)


def _digest(directory: Path, name: str) -> str:
    try:
        return hashlib.sha256(read_small(locate(directory, name), MOST_JSON_BYTES)).hexdigest()
    except UpcycleError:
        return "missing or unreadable"


_SECTIONS: tuple[Callable[[Verified], Section | None], ...] = (
    _checks,
    _recipe,
    lambda verified: errors_section(verified.layers),
    lambda verified: texts_section(verified.texts, verified.continuation),
    lambda verified: routing_section(verified.layers),
    lambda verified: load_section(verified.layers),
    _origin,
)
