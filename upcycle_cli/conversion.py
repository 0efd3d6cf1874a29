"""`convert`: from a dense checkpoint to a published mixture of experts."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint import CONFIG_NAME, RECORD_NAME, open_checkpoint, read_json
from upcycle_cli.errors import UpcycleError
from upcycle_cli.outputs import Options
from upcycle_cli.plan import Plan, build_plan
from upcycle_cli.publish import check_output, check_space, transaction
from upcycle_cli.recipe import Recipe

if TYPE_CHECKING:
    from upcycle_cli.verification import Report

CARD_NAME = "README.md"
CHECKSUMS_NAME = "SHA256SUMS"
_SPARE_BYTES = 64_000_000  # tokenizer, headers, card


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    plan: Plan
    output: Path
    seconds: float
    report: Report | None
    """What verify found, when it was asked for."""
    published: bool
    """False when verify failed: then OUTPUT was left as it was."""
    already_done: bool = False
    """True when OUTPUT was there already, made by this very plan."""


def convert(
    source: Path | str,
    output: Path | str,
    recipe: Recipe,
    *,
    target: str = "auto",
    options: Options | None = None,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
) -> Conversion:
    """Convert the dense checkpoint in `source` into a mixture of experts in `output`.

    Raises UpcycleError when that cannot be done; `output` is then as it was before.
    """
    plan = build_plan(recipe, open_checkpoint(Path(source)), target=target, options=options)
    return execute(plan, Path(output), overwrite=overwrite, verify=verify, checksums=checksums)


def execute(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    verify: bool = False,
    checksums: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    on_check: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write what the plan says and publish it as `output`.

    `progress` hears the bytes written, `on_check` the name of each verification as it starts.

    Raises UpcycleError when that cannot be done; `output` is then as it was before.
    """
    started = time.monotonic()
    output = output.absolute()
    report = None
    try:
        if is_finished(plan, output):
            return _already_done(plan, output, on_check if verify else None)
        check_output(output, plan.source.path, overwrite=overwrite)
        check_space(output, plan.nbytes + _SPARE_BYTES)
        with transaction(output, overwrite=overwrite) as (partial, publish):
            _fill(plan, partial, progress)
            if verify:
                report = _verify(plan, partial, on_check)
            publish[0] = report is None or report.passed
            if checksums and publish[0]:
                _write_checksums(partial)
            plan.source.check_unchanged()
    except OSError as error:
        where = error.filename or output
        raise UpcycleError(f"writing {where} failed: {error.strerror}.") from error
    return Conversion(plan, output, time.monotonic() - started, report, published=publish[0])


def is_finished(plan: Plan, output: Path) -> bool:
    """Whether `output` is the complete result of this very plan."""
    if not (output / RECORD_NAME).is_file() or not (output / CONFIG_NAME).is_file():
        return False
    try:
        if read_json(output / RECORD_NAME).get("plan_sha256") != plan.digest:
            return False
        found = open_checkpoint(output)
    except UpcycleError:
        # Damaged since: not the result any more, and check_output decides what to do with it.
        return False
    sizes = {name: entry.nbytes for name, entry in found.tensors.items()}
    return found.config == plan.config and sizes == {t.name: t.nbytes for t in plan.tensors}


def _already_done(plan: Plan, output: Path, on_check: Callable[[str], None] | None) -> Conversion:
    """Leave a finished output as it is; verify it when `on_check` is given."""
    report = None
    if on_check is not None:
        # Its sizes and its config are right; only verify can say whether its bytes still are.
        from upcycle_cli.verification import verify

        report = verify(plan.source.path, output, on_start=on_check)
    sound = report is None or report.passed
    return Conversion(plan, output, 0.0, report, published=sound, already_done=True)


def _fill(plan: Plan, directory: Path, progress: Callable[[int], None]) -> None:
    # Torch takes seconds to import, so nothing that can fail before the first byte waits for it.
    from upcycle_cli.card import model_card
    from upcycle_cli.record import record
    from upcycle_cli.writer import write_json, write_weights

    routers = write_weights(plan, directory, progress)
    write_json(directory / CONFIG_NAME, plan.config)
    for file in plan.source.companions:
        (directory / file.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.source.path / file.name, directory / file.name)
    write_json(directory / RECORD_NAME, record(plan, routers))
    (directory / CARD_NAME).write_text(model_card(plan, None), encoding="utf-8")


def _verify(plan: Plan, directory: Path, on_check: Callable[[str], None]) -> Report:
    from upcycle_cli.card import model_card
    from upcycle_cli.verification import verify

    report = verify(plan.source.path, directory, on_start=on_check)
    (directory / CARD_NAME).write_text(model_card(plan, report), encoding="utf-8")
    return report


def _write_checksums(directory: Path) -> None:
    """Write SHA256SUMS in the form that `sha256sum --check` reads."""
    lines = []
    for path in sorted(file for file in directory.rglob("*") if file.is_file()):
        name = path.relative_to(directory).as_posix()
        if not name.startswith(".upcycle"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {name}\n")
    (directory / CHECKSUMS_NAME).write_text("".join(lines), encoding="utf-8")
