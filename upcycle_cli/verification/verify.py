"""`verify`: rebuild the plan of the conversion, compare the MoE with it, and run both models.

- rebuild.py     from `upcycle.json` to the plan, by the function that convert calls
- directory.py   the files, config.json and settings
- weights.py     every tensor (unknowns.py: values that only the MoE has; explain.py: in words)
- outputs.py     both models on text, by transformers' own code; it uses nothing of the planner
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import (
    CONFIG_NAME,
    RECORD_NAME,
    Storage,
    find_adapter,
    read_json,
)
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.callbacks import Watch
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import check_utf8, open_regular
from upcycle_cli.core.text import printable
from upcycle_cli.hub.remote_checkpoint import download_model, locate_model, split_revision
from upcycle_cli.models.families import dense_family, dense_model, is_known, is_moe, is_target
from upcycle_cli.models.wrappers import nested_configs, wrapper_of
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.recipe import NeuronOrder, Promise, RouterInit
from upcycle_cli.verification.result import CHECK_NAMES, CheckResult, Findings, Report, Status

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan
    from upcycle_cli.plan.texts import CalibrationText
    from upcycle_cli.verification.outputs import Expectation
    from upcycle_cli.verification.prompts import TextOptions
    from upcycle_cli.verification.rebuild import Given
    from upcycle_cli.verification.weights import Evidence


def verify(  # noqa: PLR0913 - options, by name
    dense: Path | str,
    moe: Path | str,
    *,
    experts_from: Sequence[Path | str] = (),
    router_init: Path | str | None = None,
    calibration: CalibrationText | Path | str | None = None,
    checks: Sequence[str] = CHECK_NAMES,
    texts: TextOptions | None = None,
    fail_fast: bool = False,
    dense_revision: str | None = None,
    moe_revision: str | None = None,
    allow_inexact: bool = False,
    watch: Watch | None = None,
) -> Report:
    """Check the MoE in one directory against the dense model in another, or that it grew from.

    Either can be a repo on the Hub at a revision (a branch, tag or commit); it is downloaded first.
    `experts_from` are the other models that experts were made of, each a directory or a repo, as
    REPO or REPO@REVISION. `router_init` is the file that router rows were given in, `calibration`
    the text that they were fitted to; the built-in text is at hand always. `texts` says what both
    models are run on. With `fail_fast` no check runs after one that failed. An MoE that does not
    promise equality is measured; `allow_inexact` says that this is expected, and makes the report
    `accepted`. `watch` hears how far the checks are.

    Raises UpcycleError when the check cannot be made: an unknown check, a directory, dense model,
    file or prompts that cannot be used, a broken transformers. Damage to the MoE is a finding.
    """
    from upcycle_cli.verification.prompts import TextOptions

    selected = _selected(checks)
    places = locate_model(dense, dense_revision), locate_model(moe, moe_revision)
    others = [locate_model(*split_revision(str(place))) for place in experts_from]
    texts, watch = texts or TextOptions(), watch or Watch()
    texts.check()
    given = _read_given(router_init, calibration)
    for place in (*places, *others):
        check_utf8(place.path)
    try:
        # Before gigabytes are downloaded, too.
        _check_kind(places[1].path, moe=True)
        first = _config(places[0].path) or {}
        grown = is_target(first) and is_moe(first) and wrapper_of(first) is None
        if grown:
            _check_grown(places[0].path, places[1].path, others, router_init)
        for place in () if grown else (places[0], *others):
            _check_kind(place.path, moe=False)
        names = places[1].names()
        paths = download_model(places[0]), download_model(places[1])
        merged = [download_model(place) for place in others]
        try:
            source, *more = _open_sources(paths[0], *merged)
            converted = _open_moe(paths[1])
            if not grown:
                _refuse_grown(source, converted)
            case = _Case(source, converted, tuple(more), tuple(names), texts, watch, grown=grown)
            case.rebuild(given)
            report = Report(
                checks=case.run(selected, fail_fast=fail_fast),
                promise=case.promise,
                grown=grown,
                allow_inexact=allow_inexact,
            )
        except _DamagedError as error:
            report = _damaged(selected, error)
        return replace(report, paths=paths)
    except OSError as error:
        # What the system does not let one read is neither damage nor a bug.
        reason = error.strerror or str(error)
        raise UpcycleError(f"cannot read {error.filename or moe}: {reason}.") from error


class _DamagedError(UpcycleError):
    """The MoE cannot be opened."""


@dataclass
class _Case:
    """Two opened models, and the plan that the record of one says."""

    dense: Checkpoint
    moe: Checkpoint
    others: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    texts: TextOptions
    watch: Watch
    grown: bool
    plan: Plan | None = None
    given: Given | None = None
    record: dict[str, Any] = field(default_factory=dict)
    unrecorded: str | None = None
    """Why there is no plan to compare with; then nothing can pass."""
    mismatch: str | None = None
    """Why the record cannot be one of this conversion; then the comparisons fail."""

    def rebuild(self, given: Given) -> None:
        """Plan the recorded conversion again; UpcycleError where the user gave other models."""
        from upcycle_cli.verification.rebuild import (
            MismatchError,
            RecordError,
            read_record,
            rebuild,
        )

        self.given = given
        if not self.grown:
            check_source(self.dense, dense_model(self.dense.config, self.dense.tensors))
        try:
            self.record = dict(read_record(self.moe))
            self.plan = rebuild(self.record, self.dense, self.moe, self.others, given)
        except RecordError as error:
            self.unrecorded = str(error)
        except MismatchError as error:
            self.mismatch = f"{RECORD_NAME} describes no conversion of {self.dense.path}: {error}"

    @property
    def promise(self) -> str | None:
        """What the MoE is held to."""
        return str(Promise.NONE if self.plan is None else self.plan.promise)

    def run(self, selected: Sequence[str], *, fail_fast: bool) -> tuple[CheckResult, ...]:
        """Run the checks in their order."""
        checks: dict[str, Callable[[], CheckResult]] = {
            "directory": self._directory,
            "weights": self._weights,
            "outputs": self._outputs,
        }
        results: list[CheckResult] = []
        for name in selected:
            failed = next((check for check in results if check.status is Status.FAILED), None)
            if fail_fast and failed is not None:
                results.append(_skipped(name, f"Not run: {failed.name} failed."))
            elif name != "outputs" and self.mismatch is not None:
                results.append(Findings([self.mismatch]).result(name, ""))
            elif name != "outputs" and self.plan is None:
                results.append(_skipped(name, f"Nothing to compare with: {self.unrecorded}."))
            else:
                self.watch.begins(f"checking {name}")
                results.append(checks[name]())
        return tuple(results)

    def _directory(self) -> CheckResult:
        from upcycle_cli.verification.directory import check_directory

        assert self.plan is not None
        return check_directory(self.plan, self.moe, self.names, self.record)

    def _weights(self) -> CheckResult:
        from upcycle_cli.verification.weights import check_weights

        assert self.plan is not None
        evidence = self._evidence(self.plan)
        return check_weights(self.plan, self.moe, self.watch, evidence)

    def _evidence(self, plan: Plan) -> Evidence:
        """Return what proves values that the plan leaves open; a calibration is run again."""
        from upcycle_cli.verification.rebuild import text_at_hand
        from upcycle_cli.verification.weights import Evidence

        if plan.expansion is not None:
            return Evidence()
        assert self.given is not None
        init, recipe = plan.recipe.router_init, plan.recipe
        if init is RouterInit.FILE and self.given.router_file is None:
            return Evidence(
                unproven="the file of the router rows is not given (--router-init FILE)"
            )
        if init is RouterInit.PROMPTS:
            return Evidence(unproven="router rows were made of prompts, which are not at hand")
        fitted = init in (RouterInit.BALANCED, RouterInit.CENTROIDS)
        if not fitted and not (recipe.perturbed and recipe.neuron_order is NeuronOrder.CLUSTERED):
            return Evidence()
        if text_at_hand(self.record, self.given.text) is None:
            words = "the text of the calibration is not given (--calibration FILE)"
            return Evidence(unproven=words)
        from upcycle_cli.calibrate.collect import calibrate

        return Evidence(fitted=calibrate(plan, self.watch))

    def _outputs(self) -> CheckResult:
        from upcycle_cli.verification.settings import unsafe_settings

        allowed = () if self.plan is None else self.plan.config.keys() & {"auto_map"}
        if unsafe := unsafe_settings(self.moe.config, allowed):
            words = [f"{CONFIG_NAME}: {each}" for each in unsafe]
            return Findings(words).result("outputs", "", note="The MoE was not run.")
        from upcycle_cli.run.models import transformers_errors
        from upcycle_cli.verification.outputs import check_outputs

        with transformers_errors():  # raises where transformers is broken, which is no damage
            pass
        return check_outputs(self.dense, self.moe, self._expectation(), self.texts, self.watch)

    def _expectation(self) -> Expectation:
        from upcycle_cli.verification.outputs import Expectation
        from upcycle_cli.verification.rebuild import expectation

        if self.plan is not None:
            return expectation(self.plan)
        reason = self.unrecorded or self.mismatch or ""
        return Expectation(promise=Promise.NONE, reason=reason)


def _skipped(name: str, detail: str) -> CheckResult:
    return CheckResult(name=name, status=Status.SKIPPED, detail=detail)


def _damaged(selected: Sequence[str], error: UpcycleError) -> Report:
    """Return the report on an MoE that cannot be opened: whichever check comes first fails."""
    first, *others = selected
    failed = Findings([error.message]).result(first, "", note="The MoE cannot be read.")
    reason = f"Not run: the MoE cannot be read (see {first})."
    return Report(checks=(failed, *(_skipped(name, reason) for name in others)))


# What the user gives ------------------------------------------------------------------------------


def _selected(checks: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in checks if name not in CHECK_NAMES]
    if unknown or not checks:
        what = f"'{unknown[0]}' is not a check." if unknown else "no check was asked for."
        raise UpcycleError(what, f"Choose from {', '.join(CHECK_NAMES)}.")
    return tuple(name for name in CHECK_NAMES if name in checks)


def _read_given(
    router_init: Path | str | None, calibration: CalibrationText | Path | str | None
) -> Given:
    from upcycle_cli.plan.tensor_files import read_router_file
    from upcycle_cli.plan.texts import CalibrationText, calibration_text
    from upcycle_cli.verification.rebuild import Given

    text = calibration
    if text is not None and not isinstance(text, CalibrationText):
        text = calibration_text(text)
    return Given(
        router_file=None if router_init is None else read_router_file(Path(router_init)),
        text=text,
    )


def _config(path: Path) -> dict[str, Any] | None:
    """Return what a model's config.json says, None where there is none; UpcycleError."""
    directory = Storage(path)
    there = path.is_dir() and directory.has(CONFIG_NAME)
    return read_json(directory.local(CONFIG_NAME)) if there else None


def _check_kind(path: Path, *, moe: bool) -> None:
    """Raise UpcycleError when a directory is not the MoE, or not the dense model."""
    config = _config(path)
    if config is None:
        hint = f"Give the directory of {'the MoE' if moe else 'the dense model'}."
        no_model = UpcycleError(f"{path} is not a directory with a {CONFIG_NAME}.", hint)
        raise find_adapter(Storage(path)) or no_model
    known = is_known(config)
    if is_target(config) if moe else known and not is_moe(config):
        return
    kind = "an MoE that upcycle can make" if moe else "a dense model that upcycle reads"
    swapped = known if moe else is_target(config)
    order = " The dense model comes first: upcycle verify DENSE MOE." if swapped else ""
    raise UpcycleError(
        f"{path} is not {kind}: its model type is {shown(config.get('model_type'))}.",
        f"`upcycle families` lists the model types.{order}",
    )


def _check_grown(source: Path, moe: Path, others: Sequence[object], router_init: object) -> None:
    """Raise UpcycleError for arguments that make no sense where the source is an MoE."""
    if source.resolve() == moe.resolve():
        raise UpcycleError(
            f"{source} is given twice.",
            "The dense model comes first, or the MoE that another one was grown from.",
        )
    for odd, words in ((others, "--experts-from"), (router_init, "--router-init")):
        if odd:
            raise UpcycleError(
                f"an MoE grows from one model, with that model's routers: it takes no {words}.",
                f"Leave out {words}.",
            )


def _refuse_grown(dense: Checkpoint, moe: Checkpoint) -> None:
    """Raise UpcycleError where an MoE has grown from another: two steps lie between these two."""
    try:
        record = read_json(moe.storage.local(RECORD_NAME)) if moe.storage.has(RECORD_NAME) else {}
    except UpcycleError:
        return
    if "growth" not in record:
        return
    source = record.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    between = printable(name) if isinstance(name, str) and name else "SOURCE"
    here, there, grown = (shlex.quote(str(word)) for word in (dense.path, between, moe.path))
    raise UpcycleError(
        f"{moe.path} was not made from a dense model: it has grown from the MoE {between}, says "
        f"its {RECORD_NAME}.",
        "Each step is proven by itself, with that MoE's directory: "
        f"upcycle verify {here} {there} && upcycle verify {there} {grown}",
    )


def _open_sources(*paths: Path) -> list[Checkpoint]:
    """Open the source and the other models that experts were made of; UpcycleError."""
    sources = [open_checkpoint(path) for path in paths]
    for each in sources:
        obsolete = not is_target(each.config) and dense_family(each.config).has_obsolete_code
        refuse_unsafe_settings(each, ignore_code=obsolete, parts=nested_configs(each.config))
        _check_readable(each)
    return sources


def _open_moe(path: Path) -> Checkpoint:
    try:
        moe = open_checkpoint(path)
    except UpcycleError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None
        raise _DamagedError(error.message) from error
    _check_readable(moe)
    return moe


def _check_readable(model: Checkpoint) -> None:
    """Raise OSError where a directory cannot be listed or a file of it cannot be read."""
    with os.scandir(model.path):
        pass
    for name in model.files:
        try:
            with open_regular(model.path / name) as file:
                file.read(1)
        except UpcycleError:
            continue  # a link or pipe in a file's place: a finding of the check `directory`
