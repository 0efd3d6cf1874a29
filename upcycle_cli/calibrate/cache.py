"""A calibration as a step of a conversion: run once, and kept until OUTPUT is complete.

A conversion that is resumed uses the calibration it has, so that all of an output follows from one
calibration, whatever machine completes it.
"""

from __future__ import annotations

from contextlib import suppress

from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import read_small, write_whole
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import bind
from upcycle_cli.write.distributed import Team
from upcycle_cli.write.staging import CALIBRATION, Staging

_MOST_BYTES = 4_000_000_000


def with_calibration(plan: Plan, staging: Staging | None, team: Team, watch: Progress) -> Plan:
    """Return the plan with its calibration filled in, on every rank; rank 0 has the `staging`.

    Raises UpcycleError when the calibration cannot be run.
    """
    if plan.inputs.text is None:
        return plan

    def find() -> Calibration | None:
        if staging is None:
            return None
        found = _cached(staging)
        if found is None:
            from upcycle_cli.calibrate.collect import calibrate

            found = calibrate(plan, watch)
            path = staging.directory / CALIBRATION
            write_whole(path, found.to_bytes(), durable=staging.durable)
        return found

    found = team.gather(find)[0]
    assert found is not None
    return bind(plan, found)


def _cached(staging: Staging) -> Calibration | None:
    # A damaged file is no error: the calibration is run again.
    with suppress(OSError, UpcycleError, ValueError, KeyError, TypeError):
        return Calibration.from_bytes(read_small(staging.directory / CALIBRATION, _MOST_BYTES))
    return None
