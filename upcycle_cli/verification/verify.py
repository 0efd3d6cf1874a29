"""`verify`: rebuild the plan of the conversion, compare the MoE with it, and run both models.

- rebuild.py     from `upcycle.json` to the plan, by the function that convert calls
- directory.py   the files, config.json and settings
- weights.py     every tensor (unknowns.py: values that only the MoE has; explain.py: in words)
- outputs.py     both models on text, by transformers' own code; it uses nothing of the planner
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import (
    CONFIG_NAME,
    RECORD_NAME,
    Storage,
    find_adapter,
    read_json,
)
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings, unsafe_config_settings
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.hub.remote_checkpoint import download_model, locate_model, split_revision
from upcycle_cli.models.lookup import dense_family, dense_model, is_known, is_moe, is_target
from upcycle_cli.models.wrappers import nested_configs, wrapper_of
from upcycle_cli.plan.tensor_files import read_router_file
from upcycle_cli.plan.texts import CalibrationText, calibration_text
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.recipe import NeuronOrder, Promise, RouterInit
from upcycle_cli.verification import rebuild
from upcycle_cli.verification.directory import check_directory
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CHECK_NAMES, CheckResult, Findings, Report, Status

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan


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
    watch: Progress | None = None,
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
    selected = _selected(checks)
    places = locate_model(dense, dense_revision), locate_model(moe, moe_revision)
    others = [locate_model(*split_revision(str(place))) for place in experts_from]
    texts, watch = texts or TextOptions(), watch or Progress()
    texts.check()
    if calibration is not None and not isinstance(calibration, CalibrationText):
        calibration = calibration_text(calibration)
    rows = None if router_init is None else read_router_file(Path(router_init))
    given = rebuild.Given(router_file=rows, text=calibration)
    try:
        # Before gigabytes are downloaded, too.
        _check_kind(places[1].path, moe=True)
        grown = _check_kind(places[0].path, moe=False, grown_to=places[1].path)
        for place in () if grown else others:
            _check_kind(place.path, moe=False)
        names = tuple(places[1].names())
        paths = download_model(places[0]), download_model(places[1])
        source, *more = (_open_source(path) for path in (paths[0], *map(download_model, others)))
        try:
            converted = open_checkpoint(paths[1])
        except UpcycleError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from None
            return replace(_damaged(selected, error), paths=paths)
        case = _Case(source, converted, names, texts, watch, given)
        case.rebuild(more)
        return Report(
            checks=case.run(selected, fail_fast=fail_fast),
            promise=str(Promise.NONE if case.plan is None else case.plan.promise),
            grown=grown,
            allow_inexact=allow_inexact,
            paths=paths,
        )
    except OSError as error:
        # What the system does not let one read is neither damage nor a bug.
        reason = error.strerror or str(error)
        raise UpcycleError(f"cannot read {error.filename or moe}: {reason}.") from error


@dataclass
class _Case:
    """Two opened models, and the plan that the record of one says."""

    dense: Checkpoint
    moe: Checkpoint
    names: tuple[str, ...]
    texts: TextOptions
    watch: Progress
    given: rebuild.Given
    plan: Plan | None = None
    record: rebuild.Record = field(default_factory=dict)
    unrecorded: str = ""
    """Why there is no plan to compare with; then nothing can pass."""
    mismatch: str = ""
    """Why the record cannot be one of this conversion; then the comparisons fail."""
    imports: Thread | None = None

    def rebuild(self, others: Sequence[Checkpoint]) -> None:
        """Plan the recorded conversion again; UpcycleError where the user gave other models."""
        if not is_moe(self.dense.config):
            check_source(self.dense, dense_model(self.dense.config, self.dense.tensors))
        try:
            self.record = rebuild.read_record(self.moe)
            self.plan = rebuild.rebuild(self.record, self.dense, self.moe, others, self.given)
        except rebuild.RecordError as error:
            self.unrecorded = str(error)
        except rebuild.MismatchError as error:
            self.mismatch = f"{RECORD_NAME} describes no conversion of {self.dense.path}: {error}"

    def run(self, selected: Sequence[str], *, fail_fast: bool) -> tuple[CheckResult, ...]:
        """Run the checks in their order."""
        results: list[CheckResult] = []
        for name in selected:
            failed = next((check for check in results if check.status is Status.FAILED), None)
            if fail_fast and failed is not None:
                results.append(_skipped(name, f"Not run: {failed.name} failed."))
                continue
            self.watch.begins(f"checking {name}")
            if name == "outputs":
                results.append(self._outputs())
            elif self.mismatch:
                results.append(Findings([self.mismatch]).result(name, ""))
            elif self.plan is None:
                results.append(_skipped(name, f"Nothing to compare with: {self.unrecorded}."))
            elif name == "directory":
                results.append(check_directory(self.plan, self.moe, self.names, self.record))
            else:
                ahead = "outputs" in selected and not fail_fast
                results.append(self._weights(self.plan, ahead=ahead))
        return tuple(results)

    def _weights(self, plan: Plan, *, ahead: bool) -> CheckResult:
        from upcycle_cli.calibrate.collect import calibrate
        from upcycle_cli.verification.weights import check_weights

        unproven = self._unproven(plan)
        again = unproven is None and self._is_fitted(plan)
        fitted = calibrate(plan, self.watch) if again else None
        if ahead:
            self.imports = Thread(target=_import_transformers)
            self.imports.start()
        return check_weights(plan, self.moe, self.watch, fitted, unproven)

    def _is_fitted(self, plan: Plan) -> bool:
        """Whether only the text of the calibration proves what the plan leaves open."""
        if plan.growing is not None:
            return False
        recipe = plan.recipe
        clustered = recipe.neuron_order is NeuronOrder.CLUSTERED and recipe.perturbed
        return clustered or recipe.router_init in (RouterInit.BALANCED, RouterInit.CENTROIDS)

    def _unproven(self, plan: Plan) -> str | None:
        """Return why what the plan leaves open cannot be proven; None where it can."""
        init = None if plan.growing is not None else plan.recipe.router_init
        if init is RouterInit.FILE and self.given.router_file is None:
            return "the file of the router rows is not given (--router-init FILE)"
        if init is RouterInit.PROMPTS:
            return "router rows were made of prompts, which are not at hand"
        if self._is_fitted(plan) and rebuild.text_at_hand(self.record, self.given.text) is None:
            return "the text of the calibration is not given (--calibration FILE)"
        return None

    def _outputs(self) -> CheckResult:
        allowed = () if self.plan is None else self.plan.config.keys() & {"auto_map"}
        unsafe = [
            f"{CONFIG_NAME}: {each}"
            for each in unsafe_config_settings(self.moe.config, [*nested_configs(self.moe.config)])
            if each.partition(" ")[0] not in allowed
        ]
        if unsafe:
            return Findings(unsafe).result("outputs", "", note="The MoE was not run.")
        if self.imports is not None:
            self.imports.join()
        from upcycle_cli.run.models import transformers_errors
        from upcycle_cli.verification.outputs import Expectation, check_outputs

        with transformers_errors():  # raises where transformers is broken, which is no damage
            pass
        expected = Expectation(promise=Promise.NONE, reason=self.unrecorded or self.mismatch)
        if self.plan is not None:
            expected = rebuild.expectation(self.plan)
        return check_outputs(self.dense, self.moe, expected, self.texts, self.watch)


def _import_transformers() -> None:
    """Import what the check `outputs` needs, while other checks read files."""
    with suppress(Exception):  # the check imports it again, and reports why that fails
        import transformers.modeling_utils  # noqa: F401

        from upcycle_cli.verification import outputs  # noqa: F401


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


def _check_kind(path: Path, *, moe: bool, grown_to: Path | None = None) -> bool:
    """Whether a directory is the MoE that another one grew from.

    Raises UpcycleError when it is not the MoE, or not the dense model.
    """
    directory = Storage(path)
    if not path.is_dir() or not directory.has(CONFIG_NAME):
        hint = f"Give the directory of {'the MoE' if moe else 'the dense model'}."
        no_model = UpcycleError(f"{path} is not a directory with a {CONFIG_NAME}.", hint)
        raise find_adapter(directory) or no_model
    config = read_json(directory.local(CONFIG_NAME))
    known, target = is_known(config), is_target(config)
    if grown_to is not None and target and is_moe(config) and wrapper_of(config) is None:
        if path.resolve() != grown_to.resolve():
            return True
        raise UpcycleError(
            f"{path} is given twice.",
            "The dense model comes first, or the MoE that another one was grown from.",
        )
    if target if moe else known and not is_moe(config):
        return False
    kind = "an MoE that upcycle can make" if moe else "a dense model that upcycle reads"
    swapped = known if moe else target
    order = " The dense model comes first: upcycle verify DENSE MOE." if swapped else ""
    raise UpcycleError(
        f"{path} is not {kind}: its model type is {shown(config.get('model_type'))}.",
        f"`upcycle families` lists the model types.{order}",
    )


def _open_source(path: Path) -> Checkpoint:
    """Open the source, or another model that experts were made of; UpcycleError."""
    source = open_checkpoint(path)
    obsolete = not is_target(source.config) and dense_family(source.config).has_obsolete_code
    refuse_unsafe_settings(source, ignore_code=obsolete, parts=nested_configs(source.config))
    return source
