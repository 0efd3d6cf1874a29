"""`verify`: rebuild the plan of the conversion, compare the MoE with it, and run both models.

- rebuild.py     makes the plan again from `upcycle.json`, with the planner of `convert`
- directory.py   compares files and settings
- weights.py     compares every tensor (unbound.py: values that only the MoE has; explain.py: words)
- outputs.py     runs both models on text with transformers' own code and nothing of the planner
- engines.py     runs both models in inference engines
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import (
    CONFIG_NAME,
    RECORD_NAME,
    Storage,
    read_json,
    refuse_missing,
)
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings, unsafe_settings
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.platform import reuse_freed_memory
from upcycle_cli.core.safe_files import read_small
from upcycle_cli.core.text import choose_from, listed
from upcycle_cli.hub import remote_checkpoint as hub
from upcycle_cli.models.lookup import dense_family, dense_model, is_known, is_moe, is_target
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.models.wrappers import nested_configs, wrapper_of
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.options import check_kind
from upcycle_cli.recipe.recipe import Promise
from upcycle_cli.run.models import check_transformers, transformers_errors
from upcycle_cli.verification import rebuild
from upcycle_cli.verification.directory import check_directory
from upcycle_cli.verification.engines import EngineOptions, check_engine
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import (
    CHECK_NAMES,
    ENGINE,
    CheckResult,
    Findings,
    Report,
    Status,
)

if TYPE_CHECKING:
    from upcycle_cli.plan.plan import Plan


def verify(  # noqa: PLR0913 - options, by name
    dense: Path | str,
    moe: Path | str,
    *,
    experts_from: Path | str | Sequence[Path | str] = (),
    router_init: Path | str | None = None,
    calibration: Path | str | None = None,
    checks: str | Sequence[str] = CHECK_NAMES,
    texts: TextOptions | None = None,
    fail_fast: bool = False,
    dense_revision: str | None = None,
    moe_revision: str | None = None,
    allow_inexact: bool = False,
    watch: Progress | None = None,
    fitted: Calibration | None = None,
    engines: str | Sequence[str] = (),
    engine_options: EngineOptions | None = None,
) -> Report:
    """Check an MoE against the dense model, or the smaller MoE, that it was made from.

    Each is a directory, or a repo on the Hub at a revision (a branch, tag or commit), which is
    downloaded first. `experts_from` are the other models that gave experts. Each can be
    REPO@REVISION or BASE+ADAPTER, too. `router_init` is the file of the router rows, `calibration`
    the text that they were fitted to, unless it was the built-in one. `texts` chooses the text that
    both models run on. `fail_fast` skips the checks after the first that fails. An MoE that does
    not promise equality is measured; `allow_inexact` accepts that. `watch` receives the progress.
    `fitted` is the calibration of a conversion that has just run; without it, rows are fitted
    again. `engines` are names of inference engines that both models run in, too, by
    `engine_options`: each is a check `engine:NAME`, and is skipped if the engine cannot run one of
    them.

    Raises UpcycleError when a check cannot run: for an unknown check, an unusable directory, dense
    model, file or text, or a broken transformers. Damage to the MoE is a finding, not an error.
    """
    names = (name.strip() for each in listed(checks) for name in str(each).split(","))
    checks = [name for name in names if name]
    unknown = [name for name in checks if name not in CHECK_NAMES]
    if unknown or not checks:
        what = f"'{unknown[0]}' is not a check." if unknown else "no check was chosen."
        raise UpcycleError(what, choose_from("".join(unknown[:1]), CHECK_NAMES))
    selected = [name for name in CHECK_NAMES if name in checks]
    in_engines = [*dict.fromkeys(map(str, listed(engines)))]
    if "outputs" in selected or in_engines:
        check_transformers()  # before gigabytes are read
    check_kind(engine_options, "EngineOptions")
    engine_options = engine_options or EngineOptions()
    engine_options.check(in_engines)
    places = hub.locate_source(dense, dense_revision), hub.locate_model(moe, moe_revision)
    others = [hub.locate_source(place) for place in listed(experts_from)]
    check_kind(texts, "TextOptions")
    texts, watch = texts or TextOptions(), watch or Progress()
    texts.check()
    given = Inputs.read(calibration=calibration, rows=router_init)
    reuse_freed_memory()
    try:
        # Check before downloading gigabytes.
        grown = _check_kinds(places[1].path, [place.path for place in (places[0], *others)])
        files = tuple(places[1].names())
        if not all(place.is_local for place in (*places, *others)):
            watch.begins("downloading")
        source, *more = map(_open_source, (places[0], *others))
        paths = source.path, hub.download_model(places[1])
        try:
            converted = open_checkpoint(paths[1], as_stored=True)
        except UpcycleError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from None
            first, *rest = selected
            failed = Findings([error.message]).result(first, "", note="The MoE cannot be read.")
            reason = f"Not run: the MoE cannot be read (see {first})."
            return Report(checks=(failed, *(_skipped(name, reason) for name in rest)), paths=paths)
        case = _Case(source, converted, files, texts, watch, engine_options, fitted)
        case.rebuild(more, given)
        selected += [ENGINE + name for name in in_engines]
        return Report(
            checks=tuple(case.run(selected, fail_fast=fail_fast)),
            promise=str(Promise.NONE if case.plan is None else case.plan.promise),
            grown=grown,
            allow_inexact=allow_inexact,
            paths=paths,
        )
    except OSError as error:
        # A file that the system refuses to read is neither damage nor a bug.
        reason = error.strerror or str(error)
        raise UpcycleError(f"cannot read {error.filename or moe}: {reason}.") from error


@dataclass
class _Case:
    """Two opened models, and the plan that the MoE's record describes."""

    dense: Checkpoint
    moe: Checkpoint
    names: tuple[str, ...]
    texts: TextOptions
    watch: Progress
    engine_options: EngineOptions
    fitted: Calibration | None = None
    plan: Plan | None = None
    record: rebuild.Record = field(default_factory=dict)
    unrecorded: str = ""
    """Why there is no plan to compare with; then nothing passes."""
    mismatch: str = ""
    """Why the record does not describe this conversion; then directory and weights fail."""

    def rebuild(self, others: Sequence[Checkpoint], given: Inputs) -> None:
        """Plan the recorded conversion again; UpcycleError if the user gave other models."""
        if not is_moe(self.dense.config):
            check_source(self.dense, dense_model(self.dense.config, self.dense.tensors))
        try:
            self.record = rebuild.read_record(self.moe)
            self.plan = rebuild.rebuild(self.record, self.dense, self.moe, others, given)
            self.dense = self.plan.source  # computed tensors may have another dtype
        except rebuild.RecordError as error:
            self.unrecorded = str(error)
        except rebuild.MismatchError as error:
            self.mismatch = f"{RECORD_NAME} describes no conversion of {self.dense.path}: {error}"
        rebuild.check_source(self.record, self.dense, self.moe, self.plan)

    def run(self, selected: Sequence[str], *, fail_fast: bool) -> list[CheckResult]:
        """Run the checks in their order."""
        results: list[CheckResult] = []
        imports: Future[Any] | None = None
        for name in selected:
            failed = next((check for check in results if check.status is Status.FAILED), None)
            if fail_fast and failed is not None:
                results.append(_skipped(name, f"Not run: {failed.name} failed."))
                continue
            self.watch.begins(f"checking {name}")
            if name == "outputs" or name.startswith(ENGINE):
                if imports is not None:
                    imports.exception()  # the check imports it again and reports any error
                results.append(self._run_both(name))
            elif self.mismatch:
                results.append(Findings([self.mismatch]).result(name, ""))
            elif self.plan is None:
                why = f" (see {results[0].name})" if results else f": {self.unrecorded}"
                results.append(_skipped(name, f"Nothing to compare with{why}."))
            elif name == "directory":
                results.append(check_directory(self.plan, self.moe, self.names, self.record))
            else:
                from upcycle_cli.verification.weights import check_weights

                if "outputs" in selected and not fail_fast and not rebuild.is_fitted(self.plan):
                    # Import what `outputs` needs while `weights` reads files, unless a calibration
                    # imports it too: two threads must not.
                    package = "transformers.modeling_utils"
                    imports = ThreadPoolExecutor(1).submit(import_module, package)
                routers = self.record["routers"]
                results.append(check_weights(self.plan, self.moe, self.watch, self.fitted, routers))
        return results

    def _run_both(self, name: str) -> CheckResult:
        """Run both models, with shipped code only if it is what this version writes."""
        dense, moe, trust = self.dense, self.moe, self._ships_our_code()
        ours = None if self.plan is None else self.plan.config.get("auto_map")
        # `outputs` runs this package's code, so a script beside the model does no harm.
        harmless = trust or (name == "outputs" and moe.config.get("auto_map") in (None, ours))
        if unsafe := unsafe_settings(moe, ignore_code=harmless, parts=nested_configs(moe.config)):
            return Findings(unsafe).result(name, "", note="The MoE was not run.")
        from upcycle_cli.verification.outputs import Expectation, check_outputs

        expected = Expectation(
            promise=Promise.NONE, reason=self.mismatch or "its recipe is unknown"
        )
        if self.plan is not None:
            expected = rebuild.expectation(self.plan)
        if name != "outputs":
            engine, options = name.removeprefix(ENGINE), self.engine_options
            return check_engine(engine, dense, moe, expected, options, self.texts, trust=trust)
        with transformers_errors():  # a broken transformers is an error, not damage
            pass
        return check_outputs(dense, moe, expected, self.texts, self.watch)

    def _ships_our_code(self) -> bool:
        """Whether the only code of the MoE is what convert writes, and its config names that."""
        if self.plan is None or self.plan.code is None:
            return False
        files = [name for name in self.moe.storage.names() if name.casefold().endswith(".py")]
        named = self.moe.config.get("auto_map") == self.plan.config.get("auto_map")
        held = read_small(self.moe.storage.local(CODE_NAME)) if files == [CODE_NAME] else b""
        return named and held == self.plan.code.encode()


def _skipped(name: str, detail: str) -> CheckResult:
    return CheckResult(name=name, status=Status.SKIPPED, detail=detail)


# The user's models --------------------------------------------------------------------------------


def _check_kinds(moe: Path, sources: Sequence[Path]) -> bool:
    """Whether the MoE grew from the first source, an MoE; UpcycleError for the wrong models."""
    for path, what in ((moe, "MoE"), *((path, "dense model") for path in sources)):
        refuse_missing(path, f"Give the directory of the {what}.")
        if not Storage(path).has(CONFIG_NAME):
            open_checkpoint(path)  # which says what is missing
    try:
        config = read_json(Storage(moe).local(CONFIG_NAME))
    except UpcycleError:
        return False  # opening the MoE will say what is wrong
    if not is_target(config):
        order = " The dense model comes first: upcycle verify DENSE MOE."
        raise _wrong_kind(moe, config, "an MoE that upcycle makes", is_known(config) * order)
    for path in sources:
        config = read_json(Storage(path).local(CONFIG_NAME))
        grows = is_moe(config) and is_target(config) and wrapper_of(config) is None
        if grows and path is sources[0]:
            return True
        if is_moe(config) or not is_known(config):
            raise _wrong_kind(path, config, "a dense model that upcycle reads")
    return False


def _wrong_kind(path: Path, config: dict[str, Any], kind: str, hint: str = "") -> UpcycleError:
    model_type = shown(config.get("model_type"))
    return UpcycleError(
        f"{path} is not {kind}: its model type is {model_type}.",
        f"`upcycle families` lists the model types.{hint}",
    )


def _open_source(place: Storage) -> Checkpoint:
    """Download and open a model that experts were made of; raises UpcycleError."""
    source = hub.open_source(place).download()
    obsolete = not is_target(source.config) and dense_family(source.config).has_obsolete_code
    refuse_unsafe_settings(source, ignore_code=obsolete, parts=nested_configs(source.config))
    return source
