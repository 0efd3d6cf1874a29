"""Make the plan of a conversion again from `upcycle.json`.

The record has all options, so the planner decides the same directory again. Values that depend on
data (rows fitted to a text, neuron orders from a file) stay unbound; `unbound.py` fills them in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import printable, shell_line
from upcycle_cli.models.lookup import is_moe
from upcycle_cli.plan.expand import build_growth
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.merge import Merge, NonExpertWeights
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, Prompts, calibration_text
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import Growth, NeuronOrder, Recipe, RouterInit
from upcycle_cli.write.record import FORMAT, described

if TYPE_CHECKING:
    from upcycle_cli.verification.outputs import Expectation

Record = Mapping[str, Any]
Planner = Callable[[Options], Plan]
_Made = TypeVar("_Made", Recipe, Growth, Options)
_OPTIONS = ("dtype", "expert_layout", "max_shard_bytes", "untie_embeddings")
_OTHER_KEYS = {
    **dict.fromkeys(("tool", "source", "routers"), dict),
    **dict.fromkeys(("numpy", "plan_sha256"), str),
    "files": list,
}
"""Keys of a record that do not follow from the plan, and their types."""


class RecordError(Exception):
    """The record is missing or unreadable, so nobody knows how the MoE was made."""


class MismatchError(Exception):
    """The record does not describe a conversion of this dense model."""


def read_record(moe: Checkpoint) -> Record:
    """Return the MoE's record; RecordError if it is missing or has another format."""
    if not moe.storage.has(RECORD_NAME):
        words = "is missing, which is normal after training: use upcycle inspect"
        raise RecordError(f"{RECORD_NAME} {words} with `weights` and `dense`")
    try:
        record = read_json(moe.storage.local(RECORD_NAME))
    except UpcycleError as error:
        raise RecordError(error.message.rstrip(".")) from error
    if record.get("format") != FORMAT:
        found = shown(record.get("format"))
        raise RecordError(f"{RECORD_NAME}: format is {found}, but this version reads {FORMAT}")
    if not isinstance(record.get("growth", record.get("recipe")), dict):
        raise RecordError(f"{RECORD_NAME} has no recipe")
    return record


def rebuild(
    record: Record,
    dense: Checkpoint,
    moe: Checkpoint,
    others: Sequence[Checkpoint] = (),
    given: Inputs | None = None,
) -> Plan:
    """Plan the recorded conversion again.

    `others` are the models beside `dense` that experts were made of. Raises RecordError for an
    incomplete record, MismatchError for a record of another conversion, and UpcycleError if the
    user gave other models or files than the record names.
    """
    given = replace(given or Inputs(), complete=False)
    make = _growth if "growth" in record else _upcycling
    plan = make(record, dense, moe, others, given)
    options = _made(Options, {key: record[key] for key in _OPTIONS if key in record})
    try:
        made = plan(options)
        stored = made.target.stored_layout(moe.tensors, made.config)
        if stored != made.expert_layout:  # transformers can save an MoE in another layout
            made = plan(replace(options, expert_layout=stored))
    except UpcycleError as error:
        if given.rows is not None and error.message.startswith(str(given.rows.path)):
            raise  # the user gave another file; the MoE may be right
        raise MismatchError(error.message) from error
    missing = [key for key in described(made) if key not in record]
    missing += [key for key, kind in _OTHER_KEYS.items() if not isinstance(record.get(key), kind)]
    if "growth" not in record and "calibration" not in record:
        missing.append("calibration")
    if missing:
        raise RecordError(f"{RECORD_NAME} has no {missing[0]}")
    return made


def check_source(record: Record, dense: Checkpoint, moe: Checkpoint, plan: Plan | None) -> None:
    """Raise UpcycleError if the MoE was made from a model of another config and size."""
    match record:
        case {"source": {"name": str(name), "config_sha256": str(digest)}, "parameters": held}:
            same_size = plan is not None and described(plan)["parameters"] == held
            other_config = digest != dense.config_digest and not same_size
            if other_config or ("adapter" in record["source"]) == (dense.adapter is None):
                why = "its config.json differs" if other_config else "one of them has an adapter"
                raise UpcycleError(
                    f"{moe.path} was made from {printable(name)}, not from {dense.path} ({why}).",
                    "The dense model comes first: give the one that it was made from.",
                )


def _made(kind: type[_Made], held: Record, more: Collection[str] = ()) -> _Made:
    """Return a recorded recipe, growth or options, without the fields `more`; RecordError."""
    values = {key: value for key, value in held.items() if key not in more}
    if unknown := values.keys() - {field.name for field in fields(kind)}:
        raise RecordError(f"{RECORD_NAME}: this version does not know {min(unknown)}")
    try:
        return kind(**values)
    except (UpcycleError, TypeError, ValueError, ArithmeticError) as error:
        words = error.message.rstrip(".") if isinstance(error, UpcycleError) else str(error)
        raise RecordError(f"{RECORD_NAME} cannot be used: {words}") from error


def _growth(
    record: Record, dense: Checkpoint, moe: Checkpoint, others: Sequence[Checkpoint], given: Inputs
) -> Planner:
    if not is_moe(dense.config):
        source = record.get("source")
        name = printable(str(source.get("name"))) if isinstance(source, dict) else "SOURCE"
        first = shell_line(["upcycle", "verify", str(dense.path), "SOURCE"])
        second = shell_line(["upcycle", "verify", "SOURCE", str(moe.path)])
        words = f"{moe.path} was not made from a dense model: it grew from the MoE {name} (see its"
        hint = f"Verify each step, where SOURCE is that MoE: {first} && {second}"
        raise UpcycleError(f"{words} {RECORD_NAME}).", hint)
    if others or given != Inputs(complete=False):
        words = "an MoE grows from one model and keeps its routers."
        raise UpcycleError(words, "Leave out `experts_from`, `router_init` and `calibration`.")
    more = {"routing", "source_num_experts", "source_top_k"}
    return partial(
        build_growth, _made(Growth, {**record["growth"], "allow_inexact": True}, more), dense
    )


def _upcycling(
    record: Record, dense: Checkpoint, _moe: Checkpoint, others: Sequence[Checkpoint], given: Inputs
) -> Planner:
    recipe, target = _made(Recipe, record["recipe"], {"name"}), record.get("target")
    if not isinstance(target, str):
        raise RecordError(f"{RECORD_NAME}: target is {shown(target)}")
    merge = _merge(record, others)
    if given.rows is not None and recipe.router_init is not RouterInit.FILE:
        words = f"{RECORD_NAME} says that the routers of this MoE do not come from a file."
        raise UpcycleError(words, "Leave out `router_init`.")
    inputs = replace(given, text=_text(record, given.text))
    return lambda options: build_plan(
        recipe, dense, target=target, options=options, inputs=inputs, merge=merge
    )


def _text(
    record: Record, given: CalibrationText | Prompts | None
) -> CalibrationText | Prompts | None:
    """Return the text of the recorded calibration if available; UpcycleError for another text."""
    held = record.get("calibration")
    if not isinstance(held, dict):
        if given is not None:
            raise UpcycleError(f"{RECORD_NAME} has no calibration.", "Leave out `calibration`.")
        return None
    text = given or calibration_text(BUILTIN)
    if text.digest == held.get("text_sha256"):
        return text
    if given is None:
        return None
    words = f"{given.name} is not the text of the calibration: {RECORD_NAME} has"
    hint = "Give the file that the conversion was calibrated on."
    raise UpcycleError(f"{words} {shown(held.get('text'))} with another SHA-256.", hint)


# Several models -----------------------------------------------------------------------------------


def _merge(record: Record, others: Sequence[Checkpoint]) -> Merge | None:
    """Return which models gave experts, if several; UpcycleError if `others` are not these."""
    held = record.get("experts_from") or {"models": (), "groups": (), "rest": "first"}
    found, missing = list[Checkpoint](), list[str]()
    try:
        models, rest = held["models"], NonExpertWeights(held["rest"])
        names = ", ".join(shown(model["name"]) for model in models)
        for model in models:
            fitting = [each for each in others if _is_recorded(each, model)]
            found += sorted(fitting, key=found.__contains__)[:1]  # another one, if several fit
            missing += [] if fitting else [shown(model["name"])]
        cycle = tuple(map(range(len(models) + 1).index, held["groups"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{RECORD_NAME}: experts_from is incomplete") from error
    if missing:
        words = f"none of the given models is {missing[0]}, which gave experts: their config or"
        hint = f"Name the others with `experts_from`: {names}."
        raise UpcycleError(f"{words} weights differ from {RECORD_NAME}.", hint)
    if strange := [each for each in others if each not in found]:
        words = f"{RECORD_NAME} says that no expert comes from {strange[0].path}."
        raise UpcycleError(words, "Leave it out.")
    return Merge(others=tuple(found), cycle=cycle, rest=rest) if cycle else None


def _is_recorded(model: Checkpoint, recorded: Record) -> bool:
    """Whether a model has the recorded config, headers and weight sample."""
    name, held = recorded["sample"]["tensor"], model.origin
    for one, other in ((recorded, held), (recorded.get("adapter", {}), held.get("adapter", {}))):
        if any(one.get(key) != other.get(key) for key in ("config_sha256", "files")):
            return False
    return name in model.tensors and model.tensor_digest(name) == recorded["sample"]["sha256"]


# What the plan promises -------------------------------------------------------------------------


def is_fitted(plan: Plan) -> bool:
    """Whether only another calibration can prove the unbound values of a plan."""
    if plan.growing is not None:
        return False
    recipe = plan.recipe
    clustered = recipe.neuron_order is NeuronOrder.CLUSTERED and recipe.perturbed
    return clustered or recipe.router_init in (RouterInit.BALANCED, RouterInit.CENTROIDS)


def why_unproven(plan: Plan) -> str | None:
    """Return which missing input could prove the unbound values of a plan, if any."""
    init = None if plan.growing is not None else plan.recipe.router_init
    if init is RouterInit.FILE and plan.inputs.rows is None:
        return "the file of the router rows is not given (`router_init`)"
    if init is RouterInit.PROMPTS:
        return "the prompts that made the router rows are not recorded"
    if is_fitted(plan) and plan.inputs.text is None:
        return "the text of the calibration is not given (`calibration`)"
    return None


def expectation(plan: Plan) -> Expectation:
    """Return the limits of the check `outputs` for a plan, as plain values."""
    from upcycle_cli.verification.outputs import Expectation

    expected = Expectation(
        promise=plan.promise, reason=plan.why_no_promise, is_lossless=not plan.rounded_parts
    )
    if plan.growing is not None:
        size = plan.growing.expand
        return replace(expected, group_size=size, source="smaller MoE")
    recipe = plan.recipe
    size = recipe.group_size if recipe.virtual_groups else 1
    return replace(expected, group_size=size, logit_std=recipe.router_logit_std or 0.0)
