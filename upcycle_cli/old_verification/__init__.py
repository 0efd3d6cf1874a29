"""`verify`: is a mixture of experts what the method makes of a dense model?

Five checks that use nothing of the converter: its plan and its formulas may be wrong, and then
these must say so. They share the checkpoint reader and the families' tables of names with it.

- structure.py   names, shapes, dtypes and settings, against transformers' own model
- companions.py  the tokenizer, the generation settings and other files, against the dense model's
- claims.py      `upcycle.json`
- weights.py     every tensor against the dense model, bit for bit
- outputs.py     what both models predict on text, layer by layer

Passed means that the MoE computes the dense function, whoever made it and whatever it says of
itself; what promises less is measured.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import dense_family, is_known, is_moe, is_target
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.wrappers import WRAPPERS, nested_configs, wrapper_of
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.origins import find_merged
from upcycle_cli.old_verification.prompts import TextOptions
from upcycle_cli.old_verification.recipes import Promise, read_record
from upcycle_cli.old_verification.sizes import DamagedError, gather_facts
from upcycle_cli.verification.result import CheckResult, Findings, Report, Status

if TYPE_CHECKING:
    from upcycle_cli.plan.router_file import RouterFile

__all__ = ["CHECK_NAMES", "CheckResult", "Report", "Status", "TextOptions", "verify"]

CHECK_NAMES = ("structure", "files", "claims", "weights", "outputs")
"""The checks, in the order in which they run."""


@dataclass(frozen=True, kw_only=True)
class _Conditions:
    texts: TextOptions
    fail_fast: bool
    allow_inexact: bool
    watch: Watch


def verify(  # noqa: PLR0913 - options, by name
    dense: Path | str,
    moe: Path | str,
    *,
    experts_from: Sequence[Path | str] = (),
    router_init: Path | str | None = None,
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
    REPO or REPO@REVISION. `router_init` is the file that the rows of routers were given in.
    `texts` says what both models are run on. With `fail_fast` nothing is checked after a check that
    failed. An MoE that does not promise equality is measured; `allow_inexact` says that this is
    what is expected, and makes the report `accepted`. `watch` hears how far the checks are.

    Raises UpcycleError when the check cannot be made: an unknown check, a directory, dense model,
    file or prompts that cannot be used, a broken transformers. Damage to the MoE is a finding.
    """
    selected = _selected(checks)
    places = locate_model(dense, dense_revision), locate_model(moe, moe_revision)
    others = [locate_model(*split_revision(str(place))) for place in experts_from]
    how = _Conditions(
        texts=texts or TextOptions(),
        fail_fast=fail_fast,
        allow_inexact=allow_inexact,
        watch=watch or Watch(),
    )
    how.texts.check()
    rows = _read_rows(router_init)
    for place in (*places, *others):
        check_utf8(place.path)
    try:
        # Before gigabytes are downloaded, too.
        _check_kind(places[1].path, moe=True)
        first = _config(places[0].path) or {}
        grown = is_target(first) and is_moe(first) and wrapper_of(first) is None
        if grown and places[0].path.resolve() == places[1].path.resolve():
            raise UpcycleError(
                f"{places[0].path} is given twice.",
                "The dense model comes first, or the MoE that another one was grown from.",
            )
        for odd, words in ((others, "--experts-from"), (router_init, "--router-init")):
            if grown and odd:
                raise UpcycleError(
                    f"an MoE grows from one model, with the routers of that: it takes no {words}.",
                    f"Leave out {words}.",
                )
        for place in () if grown else (places[0], *others):
            _check_kind(place.path, moe=False)
        names = places[1].names()
        paths = download_model(places[0]), download_model(places[1])
        merged = [download_model(place) for place in others]
        try:
            source, converted, *more = _opened(*paths, *merged)
            if not grown:
                _refuse_grown(source, converted)
            if grown:
                report = _run_grown(source, converted, names, selected, how)
            else:
                facts = gather_facts(
                    source, converted, moe_names=names, allow_inexact=how.allow_inexact
                )
                facts = replace(facts, merged=find_merged(facts, more), rows=rows)
                report = _run(facts, selected, how)
        except DamagedError as error:
            report = _damaged(selected, error)
        return replace(report, paths=paths)
    except OSError as error:
        # What the system does not let one read is neither damage nor a bug.
        reason = error.strerror or str(error)
        raise UpcycleError(f"cannot read {error.filename or moe}: {reason}.") from error


def _refuse_grown(dense: Checkpoint, moe: Checkpoint) -> None:
    """Raise UpcycleError where an MoE has grown from another: two steps lie between these two."""
    record = read_record(moe).data
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


def _read_rows(router_init: Path | str | None) -> RouterFile | None:
    if router_init is None:
        return None
    from upcycle_cli.plan.router_file import read_router_file

    return read_router_file(Path(router_init))


def _config(path: Path) -> dict[str, Any] | None:
    """Return what a model's config.json says, None where there is none; UpcycleError."""
    directory = Storage(path)
    there = path.is_dir() and directory.has(CONFIG_NAME)
    return read_json(directory.local(CONFIG_NAME)) if there else None


def _opened(dense: Path, moe: Path, *others: Path) -> list[Checkpoint]:
    """Open the source, the MoE and the other models that it was made of."""
    source, *more = sources = [open_checkpoint(path) for path in (dense, *others)]
    for each in sources:
        outgrown = not is_target(each.config) and dense_family(each.config).has_obsolete_code
        refuse_unsafe_settings(each, outgrown=outgrown, parts=nested_configs(each.config))
    try:
        converted = open_checkpoint(moe)
    except UpcycleError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None
        raise DamagedError(error.message) from error
    for checkpoint in (*sources, converted):
        # Raises OSError where a directory cannot be listed or a file of it cannot be read.
        with os.scandir(checkpoint.path):
            pass
        for name in checkpoint.files:
            with open_regular(checkpoint.path / name) as file:
                file.read(1)
    return [source, converted, *more]


def _selected(checks: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in checks if name not in CHECK_NAMES]
    if unknown or not checks:
        what = f"'{unknown[0]}' is not a check." if unknown else "no check was asked for."
        raise UpcycleError(what, f"Choose from {', '.join(CHECK_NAMES)}.")
    return tuple(name for name in CHECK_NAMES if name in checks)


def _check_kind(path: Path, *, moe: bool) -> None:
    """Raise UpcycleError when a directory is not the MoE, or not the dense model."""
    config = _config(path)
    if config is None:
        hint = f"Give that of {'the MoE' if moe else 'the dense model'}."
        no_model = UpcycleError(f"{path} is not a directory with a {CONFIG_NAME}.", hint)
        raise find_adapter(Storage(path)) or no_model
    known = is_known(config)
    if is_target(config) if moe else known and not is_moe(config):
        return
    types = f"A dense model that upcycle reads has model type {' or '.join((*DENSE, *WRAPPERS))}"
    if moe:
        native = " or ".join(NATIVE)
        types = f"An MoE that upcycle can make has model type {native}, or its own code"
    swapped = known if moe else is_target(config)
    raise UpcycleError(
        f"{path} is not such {'an MoE' if moe else 'a model'}: its model type is "
        f"{shown(config.get('model_type'))}.",
        f"{types}.{' The dense model comes first: upcycle verify DENSE MOE.' if swapped else ''}",
    )


def _damaged(selected: tuple[str, ...], error: UpcycleError) -> Report:
    """Return the report on an MoE that cannot be opened: whichever check comes first fails."""
    first, *others = selected
    reason = f"Not run: the MoE cannot be read (see {first})."
    failed = Findings([error.message]).result(first, "", note="The MoE cannot be read.")
    skipped = (CheckResult(name=name, status=Status.SKIPPED, detail=reason) for name in others)
    return Report(checks=(failed, *skipped))


def _run(facts: Facts, selected: tuple[str, ...], how: _Conditions) -> Report:
    # These import torch, which takes seconds: not before everything cheap has been found in order.
    from upcycle_cli.old_verification.claims import check_claims
    from upcycle_cli.old_verification.companions import check_files
    from upcycle_cli.old_verification.factors import find_objection
    from upcycle_cli.old_verification.headers import header_failures
    from upcycle_cli.old_verification.structure import check_structure

    objection = find_objection(facts)
    by_header = cache(lambda: tuple(header_failures(facts.moe, facts.target)))
    copied: frozenset[int] = frozenset()

    def weights() -> CheckResult:
        from upcycle_cli.old_verification.weights import check_weights

        nonlocal copied
        result, copied = check_weights(facts, how.watch)
        return result

    def outputs() -> CheckResult:
        from upcycle_cli.old_verification.outputs import check_outputs

        return check_outputs(
            facts, how.texts, objection, by_header(), copied=copied, watch=how.watch
        )

    run: dict[str, Callable[[], CheckResult]] = {
        "structure": lambda: check_structure(facts, by_header()),
        "files": lambda: check_files(facts),
        "claims": lambda: check_claims(facts),
        "weights": weights,
        "outputs": outputs,
    }
    results = _results(run, selected, how)
    exact = Promise.EXACT if facts.standard.uniform else Promise.APPROXIMATE
    return Report(
        checks=results,
        promise=str(exact if objection is None else Promise.NONE),
        allow_inexact=how.allow_inexact,
    )


def _run_grown(
    source: Checkpoint,
    moe: Checkpoint,
    names: Sequence[str],
    selected: tuple[str, ...],
    how: _Conditions,
) -> Report:
    from upcycle_cli.old_verification import grown_checks
    from upcycle_cli.old_verification.grown import gather_grown
    from upcycle_cli.old_verification.grown_outputs import check_grown_outputs
    from upcycle_cli.old_verification.grown_weights import check_grown_weights

    facts = gather_grown(source, moe, names)
    by_header = cache(lambda: grown_checks.headers_of_grown(facts))
    run: dict[str, Callable[[], CheckResult]] = {
        "structure": lambda: grown_checks.check_grown_structure(facts, by_header()),
        "files": lambda: grown_checks.check_grown_files(facts),
        "claims": lambda: grown_checks.check_grown_claims(facts),
        "weights": lambda: check_grown_weights(facts, how.watch),
        "outputs": lambda: check_grown_outputs(facts, how.texts, by_header(), how.watch),
    }
    return Report(
        checks=_results(run, selected, how),
        promise=str(Promise.EXACT if facts.objection is None else Promise.NONE),
        grown=True,
        allow_inexact=how.allow_inexact,
    )


def _results(
    run: Mapping[str, Callable[[], CheckResult]], selected: tuple[str, ...], how: _Conditions
) -> tuple[CheckResult, ...]:
    results: list[CheckResult] = []
    for name in selected:
        failed = next((check for check in results if check.status is Status.FAILED), None)
        if how.fail_fast and failed is not None:
            reason = f"Not run: {failed.name} failed."
            results.append(CheckResult(name=name, status=Status.SKIPPED, detail=reason))
            continue
        how.watch.begins(f"checking {name}")
        results.append(run[name]())
    return tuple(results)


def run_outputs(
    source: Checkpoint,
    moe: Checkpoint,
    others: Sequence[Checkpoint],
    names: Sequence[str],
    texts: TextOptions,
    watch: Watch,
) -> CheckResult:
    """Run the check `outputs` by itself, until its new form is here."""
    from upcycle_cli.old_verification.factors import find_objection
    from upcycle_cli.old_verification.headers import header_failures
    from upcycle_cli.old_verification.outputs import check_outputs

    try:
        if is_moe(source.config):
            from upcycle_cli.old_verification import grown_checks
            from upcycle_cli.old_verification.grown import gather_grown
            from upcycle_cli.old_verification.grown_outputs import check_grown_outputs

            grown = gather_grown(source, moe, names)
            return check_grown_outputs(grown, texts, grown_checks.headers_of_grown(grown), watch)
        facts = gather_facts(source, moe, moe_names=names, allow_inexact=True)
        facts = replace(facts, merged=find_merged(facts, others))
        by_header = tuple(header_failures(facts.moe, facts.target))
        return check_outputs(facts, texts, find_objection(facts), by_header, watch=watch)
    except DamagedError as error:
        return Findings([error.message]).result("outputs", "")
