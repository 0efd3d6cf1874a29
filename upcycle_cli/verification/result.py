"""The result of each check, and the report of them all.

`Findings` collects failures while a check runs and keeps as many as a person will read.
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
ENGINE = "engine:"
"""How the name of a check in an engine begins."""
TRAINED = "these weights were trained, or made from another model or adapter"
"""How the failure begins that explains all differences of a trained MoE."""
TEXT_TOKENS = 768
"""How many tokens of text both models run on by default."""
_MOST_SHOWN = 8


class Status(StrEnum):
    """How a check ended, or all of them together."""

    PASSED = "passed"
    FAILED = "failed"
    MEASURED = "measured"  # nothing is wrong, but equality is not promised or not proven
    SKIPPED = "skipped"  # did not run; its detail says why


@dataclass(frozen=True)
class LayerMeasure:
    """How the experts of a layer differ from the dense MLP; errors are relative to its rms."""

    layer: int
    added_rms: float
    """The error of the experts' output on the dense model's own input."""
    added_max: float
    gain: float
    """The experts' output projected on the dense MLP's: 1 for the same function."""
    hidden_rms: float
    """The error of the hidden state after the layer, including all layers before it."""
    whole_share: float
    """The share of tokens that use whole groups."""
    router_entropy: float
    router_margin: float
    load_cv: float
    idle_experts: int
    """How many experts no token chose."""
    load: list[int]
    """How many tokens chose each expert."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TextMeasure(Compact):
    """One text, and how far both models' predictions of the next token are apart."""

    tokens: list[str]
    kl: list[float | None]
    """KL(dense ‖ MoE) in nats; None where it is not finite."""


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckResult(Compact):
    """What one check found."""

    name: str
    status: Status
    detail: str  # a summary for people
    failures: tuple[str, ...] = ()  # each names a tensor, file or key and what is wrong
    metrics: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    layers: tuple[LayerMeasure, ...] = ()
    texts: tuple[TextMeasure, ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """The results of all checks that were asked for, in the order in which they ran."""

    checks: tuple[CheckResult, ...]
    promise: str | None = None  # exact, approximate or none; None if the MoE cannot be opened
    allow_inexact: bool = False  # accept an MoE that was only measured
    grown: bool = False  # the source is a smaller MoE, not a dense model
    paths: tuple[Path, Path] | None = None  # the directories of the dense model and the MoE

    @property
    def status(self) -> Status:
        """`failed` if any check failed, `passed` if all checks ran and passed, else `measured`."""
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
        """Whether all checks passed: the MoE computes the dense model's function."""
        return self.status is Status.PASSED

    @property
    def accepted(self) -> bool:
        """Whether the chosen checks passed, or `allow_inexact` accepts a measurement."""
        found = {check.status for check in self.checks}
        asked = found == {Status.PASSED} and self.promise != "none"
        measured = self.allow_inexact and self.status is Status.MEASURED
        return asked or (measured and not self.not_run)

    @property
    def not_run(self) -> tuple[str, ...]:
        """Why engines could not run a model, for each that could not; nothing failed then."""
        skipped = [each for each in self.checks if each.status is Status.SKIPPED]
        found = tuple(each.detail for each in skipped if each.name.startswith(ENGINE))
        return () if self.status is Status.FAILED else found

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(status='{self.status}', ", 1)

    def tables(self) -> Iterator[Iterable[Row]]:
        """Yield a table with a row per check, its failures below its detail."""
        width = max(len(name) for name in (*CHECK_NAMES, *(each.name for each in self.checks)))
        yield [
            (
                f"{each.name:{width}}  {each.status}",
                [each.detail, *(f"- {f}" for f in each.failures)],
            )
            for each in self.checks
        ]

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        """Return the report as plain JSON values; `full` adds loads of experts and KL of tokens."""
        return {
            "status": str(self.status),
            "promise": self.promise,
            "checks": [_check_json(check, full=full) for check in self.checks],
        }


def _check_json(check: CheckResult, *, full: bool) -> dict[str, Any]:
    # JSON has no nan and no infinity.
    found = json.loads(json.dumps(asdict(check)), parse_constant=lambda _: None)
    if not full:
        found["texts"] = None
        for layer in found["layers"]:
            del layer["load"]
    measured = ("layers", "texts")  # only `outputs` has them
    return {key: value for key, value in found.items() if value or key not in measured}


class Findings(list[str]):
    """Collects failures; the result shows the first few and counts the rest."""

    def result(
        self,
        name: str,
        passed: str,
        metrics: Mapping[str, float] | None = None,
        note: str = "",
        *,
        is_measured: bool = False,
    ) -> CheckResult:
        """Return the check's result; its detail is `passed` if nothing failed, then `note`."""
        passes = Status.MEASURED if is_measured else Status.PASSED
        hidden = len(self) - _MOST_SHOWN
        problems = "1 problem" if len(self) == 1 else f"{len(self):,} problems"
        return CheckResult(
            name=name,
            status=Status.FAILED if self else passes,
            detail=f"{f'{problems} found.' if self else passed} {note}".strip(),
            failures=(*self[:_MOST_SHOWN], *([f"and {hidden:,} more"] if hidden > 0 else [])),
            # A metric that could not be measured is nan, which JSON does not have.
            metrics={key: value for key, value in (metrics or {}).items() if math.isfinite(value)},
        )
