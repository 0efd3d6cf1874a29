"""What verification says: one result per check, and a report of them all.

`Findings` collects failures while a check runs and keeps only as many as a person will read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from upcycle_cli.core.display import Compact, Result, Row

CHECK_NAMES = ("directory", "weights", "outputs")
"""The checks, in the order in which they run."""
_MOST_SHOWN = 8


class Status(StrEnum):
    """How a check ended, or all of them together."""

    PASSED = "passed"
    FAILED = "failed"
    MEASURED = "measured"  # nothing is wrong, and nothing proven: equality is not promised
    SKIPPED = "skipped"  # it did not run; its detail says why


@dataclass(frozen=True)
class LayerMeasure:
    """What a layer's mixture of experts does differently from the dense MLP.

    Errors are relative to the root mean square of what the dense model has in their place.
    """

    layer: int
    added_rms: float
    """The error that its experts add to the dense model's own input."""
    added_max: float
    gain: float
    """How much of the dense MLP's output theirs is, projected on it: 1 for the same function."""
    hidden_rms: float
    """The error of the hidden state that left the layer, all layers before it included."""
    whole_share: float
    """The share of tokens that got whole groups."""
    router_entropy: float
    router_margin: float
    load_cv: float
    idle_experts: int
    """How many experts no token chose."""
    load: list[int]
    """How many tokens chose each."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TextMeasure(Compact):
    """One text, and how far the models' predictions of what follows each token are apart."""

    tokens: list[str]
    kl: list[float | None]
    """KL(dense ‖ MoE) in nats; None where it is not finite."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """How each model goes on after a text, taking the most probable token each time."""

    text: str
    dense: str
    moe: str


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckResult(Compact):
    """What one check found."""

    name: str
    status: Status
    detail: str  # for a person
    failures: tuple[str, ...] = ()  # each names a tensor or key and what is wrong with it
    metrics: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    layers: tuple[LayerMeasure, ...] = ()  # what was measured layer by layer
    texts: tuple[TextMeasure, ...] = ()  # and token by token
    continuation: Continuation | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """The results of all checks that were asked for, in the order in which they ran."""

    checks: tuple[CheckResult, ...]
    # What the MoE promises: exact, approximate or none; None when it could not be opened.
    promise: str | None = None
    allow_inexact: bool = False  # a measurement of an MoE that promises nothing is enough
    grown: bool = False  # the source is a smaller MoE, not a dense model
    paths: tuple[Path, Path] | None = None  # where both models were read: the dense one, the MoE

    @property
    def status(self) -> Status:
        """`failed` when any check failed, `passed` when all of them ran and passed.

        `measured` is all between: nothing is wrong, and not everything is proven.
        """
        found = {check.status for check in self.checks}
        if Status.FAILED in found:
            return Status.FAILED
        if found <= {Status.SKIPPED}:
            return Status.SKIPPED
        whole = {check.name for check in self.checks} >= {*CHECK_NAMES}
        proven = whole and found == {Status.PASSED} and self.promise != "none"
        return Status.PASSED if proven else Status.MEASURED

    @property
    def passed(self) -> bool:
        """Whether the MoE computes the dense function, as far as it was checked."""
        return self.status is Status.PASSED

    @property
    def accepted(self) -> bool:
        """Whether the MoE is what the user expects.

        All checks that the user chose passed, or `allow_inexact` accepts a measurement.
        """
        found = {check.status for check in self.checks}
        asked = found == {Status.PASSED} and self.promise != "none"
        return asked or (self.allow_inexact and self.status is Status.MEASURED)

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield a table with a row per check, its failures below its detail."""
        yield [
            (f"{check.name:9}  {check.status}", [check.detail, *(f"- {f}" for f in check.failures)])
            for check in self.checks
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "status": str(self.status),
            "promise": self.promise,
            "checks": [_check_json(check) for check in self.checks],
        }


def _check_json(check: CheckResult) -> dict[str, Any]:
    # JSON has no number for what has no value.
    found = json.loads(json.dumps(asdict(check)), parse_constant=lambda _: None)
    measured = ("layers", "texts", "continuation")  # by one of the checks alone
    return {key: value for key, value in found.items() if value or key not in measured}


class Findings(list[str]):
    """Failures as they are found; a result has the first few in words, the rest as a count."""

    def add(self, *failures: str) -> None:
        """Note failures."""
        self.extend(failures)

    def result(
        self, name: str, passed: str, metrics: Mapping[str, float] | None = None, note: str = ""
    ) -> CheckResult:
        """Return the check's result: in words `passed` when nothing was found, and `note`."""
        hidden = len(self) - _MOST_SHOWN
        problems = "1 problem" if len(self) == 1 else f"{len(self)} problems"
        return CheckResult(
            name=name,
            status=Status.FAILED if self else Status.PASSED,
            detail=f"{f'{problems} found.' if self else passed} {note}".strip(),
            failures=(*self[:_MOST_SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])),
            # What could not be measured is nan, and JSON has no such number.
            metrics={key: value for key, value in (metrics or {}).items() if math.isfinite(value)},
        )
