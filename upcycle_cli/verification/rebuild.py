"""From `upcycle.json` back to the plan of the conversion.

The record says what convert was told, so the planner can decide the same directory again. What a
plan cannot know before it has seen data (rows that were fitted to a text, an order of neurons from
a file) stays open here; `unknowns.py` fills it in.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import Tensor
from upcycle_cli.checkpoint.storage import RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import printable
from upcycle_cli.models.lookup import dense_model, is_moe
from upcycle_cli.plan.expand import build_growth
from upcycle_cli.plan.expressions import Permutation
from upcycle_cli.plan.facts import why_no_promise
from upcycle_cli.plan.merge import Merge, NonExpertWeights
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.router_inputs import RouterInputs
from upcycle_cli.plan.tensor_files import PermutationFile, RouterFile, RouterRows, order_name
from upcycle_cli.plan.texts import BUILTIN, CalibrationText, ModelPrompts, Prompts, calibration_text
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import ExpertLayout, Growth, NeuronOrder, Promise, Recipe, RouterInit
from upcycle_cli.write.record import FORMAT, described, origin

if TYPE_CHECKING:
    from upcycle_cli.verification.outputs import Expectation

Record = Mapping[str, Any]
Planner = Callable[[Options], Plan]


class RecordError(Exception):
    """The record is missing or cannot be read, so nothing says how the MoE was made."""


class MismatchError(Exception):
    """The record can be read, but describes no conversion of this dense model."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user hands to verify beside the models: a file of router rows, a text."""

    router_file: RouterFile | None = None
    text: CalibrationText | None = None


def read_record(moe: Checkpoint) -> Record:
    """Return the MoE's record; RecordError where it is missing or no record of this format."""
    if not moe.storage.has(RECORD_NAME):
        raise RecordError(f"there is no {RECORD_NAME}, so nothing says how it was made")
    try:
        record = read_json(moe.storage.local(RECORD_NAME))
    except UpcycleError as error:
        raise RecordError(error.message.rstrip(".")) from error
    if record.get("format") != FORMAT:
        found = shown(record.get("format"))
        raise RecordError(f"{RECORD_NAME}: format is {found}, and only {FORMAT} is known")
    if not isinstance(record.get("growth", record.get("recipe")), dict):
        raise RecordError(f"{RECORD_NAME} has no recipe")
    return record


def rebuild(
    record: Record,
    dense: Checkpoint,
    moe: Checkpoint,
    others: Sequence[Checkpoint] = (),
    given: Given | None = None,
) -> Plan:
    """Plan the recorded conversion again.

    `others` are the models that experts were made of beside `dense`. Raises RecordError for a
    record that lacks something, MismatchError where it cannot be a record of this conversion, and
    UpcycleError where the user gave other models or files than those that it names.
    """
    given = given or Given()
    if "growth" in record:
        if not is_moe(dense.config):
            source = record.get("source")
            name = printable(str(source.get("name"))) if isinstance(source, dict) else "SOURCE"
            pairs = (str(dense.path), name), (name, str(moe.path))
            steps = (shlex.join(["upcycle", "verify", *pair]) for pair in pairs)
            raise UpcycleError(
                f"{moe.path} was not made from a dense model: it has grown from the MoE {name}, "
                f"says its {RECORD_NAME}.",
                f"Each step is proven by itself, with that MoE's directory: {' && '.join(steps)}",
            )
        if others or given != Given():
            raise UpcycleError(
                "an MoE grows from one model, with that model's routers.",
                "Leave out --experts-from, --router-init and --calibration.",
            )
        growth = _made(Growth, record["growth"], {"routing", "source_num_experts", "source_top_k"})
        plan: Planner = partial(build_growth, growth, dense)
    else:
        plan = _upcycling(record, dense, others, given)
    try:
        options = Options(
            dtype=record.get("dtype"),
            expert_layout=record.get("expert_layout"),
            max_shard_bytes=record.get("max_shard_bytes", Options.max_shard_bytes),
            untie_embeddings=record.get("untie_embeddings") is True,
        )
    except (UpcycleError, TypeError) as error:
        raise RecordError(f"{RECORD_NAME}: {error}") from error
    shapes = _shapes(moe.tensors.values())
    try:
        made = plan(options)
        for layout in made.target.layouts:  # transformers can save an MoE in another layout
            if shapes != _shapes(made.tensors):
                other = plan(replace(options, expert_layout=ExpertLayout(layout)))
                made = other if shapes == _shapes(other.tensors) else made
    except UpcycleError as error:
        raise MismatchError(error.message) from error
    whole = [*described(made), "tool", "source", "plan_sha256", "files"]
    if missing := [key for key in whole if key not in record]:
        raise RecordError(f"{RECORD_NAME} has no {missing[0]}")
    return made


def _shapes(tensors: Iterable[Tensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def _upcycling(
    record: Record, dense: Checkpoint, others: Sequence[Checkpoint], given: Given
) -> Planner:
    """Return the planner of a recorded recipe, for some options."""
    recipe, target = _made(Recipe, record["recipe"], {"name"}), record.get("target")
    if not isinstance(target, str):
        raise RecordError(f"{RECORD_NAME}: target is {shown(target)}")
    merge = _merge(record, recipe, others)
    from_file = recipe.router_init is RouterInit.FILE
    if given.router_file is not None and not from_file:
        raise UpcycleError(
            f"the routers of this MoE were not given in a file, says its {RECORD_NAME}.",
            "Leave out --router-init.",
        )
    rows = given.router_file or (_UnknownRows(Path(), {}, {}, "") if from_file else None)
    text: CalibrationText | Prompts | None = text_at_hand(record, given.text)
    if recipe.router_init is RouterInit.PROMPTS and merge is not None:
        models = [(dense, *merge.others)[group] for group in merge.cycle]
        text = Prompts("", tuple(ModelPrompts(model.name, ("",)) for model in models))
    elif text is None and record.get("calibration"):
        text = CalibrationText("", ())  # stands for one that is not at hand
    orders = None
    if recipe.neuron_order is NeuronOrder.FILE:
        size = dense_model(dense.config, dense.tensors).intermediate_size
        orders = _UnknownOrders(Path(), {}, {}, "", size=size)
    return lambda options: build_plan(
        recipe,
        dense,
        target=target,
        options=replace(options, neuron_orders=orders),
        inputs=RouterInputs(text=text, rows=rows),
        merge=merge,
    )


def text_at_hand(record: Record, given: CalibrationText | None) -> CalibrationText | None:
    """Return the text that a calibration was run on, None where it is not here.

    Raises UpcycleError where the user gave another text than the recorded one.
    """
    held = record.get("calibration")
    if not isinstance(held, dict):
        if given is not None:
            raise UpcycleError(f"{RECORD_NAME} records no calibration.", "Leave out --calibration.")
        return None
    digest = held.get("text_sha256")
    if given is not None:
        if given.digest != digest:
            raise UpcycleError(
                f"{given.name} is not the text of the calibration: {RECORD_NAME} names "
                f"{shown(held.get('text'))} with another SHA-256.",
                "Give the file that was given to convert --calibration.",
            )
        return given
    builtin = calibration_text(BUILTIN)
    return builtin if builtin.digest == digest else None


_TEXT, _NUMBER, _NONE = (str,), (int, float), type(None)
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("virtual_groups", "allow_inexact"), (bool,)),
    **dict.fromkeys(("neuron_order", "router_init", "routing", "scale_split"), _TEXT),
    **dict.fromkeys(("noise", "reinit"), _NUMBER),
    "scaling": (*_TEXT, *_NUMBER),
    "layers": (*_TEXT, _NONE),
    "router_logit_std": (*_NUMBER, _NONE),
}
"""The JSON types of the fields of a recipe or growth that are no integers."""
_Made = TypeVar("_Made", Recipe, Growth)


def _made(kind: type[_Made], held: Record, more: Collection[str]) -> _Made:
    """Return a recorded recipe or growth; RecordError for unknown fields, or values of no use.

    `more` are the fields that only the record has.
    """
    found = {key: value for key, value in held.items() if key not in more}
    for key, value in found.items():
        if key not in kind.__dataclass_fields__:
            raise RecordError(f"{RECORD_NAME}: {key} is unknown to this version")
        if type(value) not in _TYPES.get(key, (int,)):
            raise RecordError(f"{RECORD_NAME}: {key} is {shown(value)}")
    try:
        return kind(**{"allow_inexact": kind is Growth} | found)
    except (UpcycleError, TypeError) as error:  # TypeError: a field is missing
        words = error.message if isinstance(error, UpcycleError) else str(error)
        raise RecordError(f"{RECORD_NAME}: {words.rstrip('.')}") from error


# Several models -----------------------------------------------------------------------------------


def _merge(record: Record, recipe: Recipe, others: Sequence[Checkpoint]) -> Merge | None:
    held = record.get("experts_from")
    if held is None:
        if others:
            raise _not_of(others[0])
        return None
    found = held if isinstance(held, dict) else {}
    models: list[Any] = found.get("models") or []
    groups: list[Any] = found.get("groups") or []
    rest: Any = found.get("rest")
    if not (
        isinstance(models, list)
        and all(isinstance(each, dict) for each in models)
        and isinstance(groups, list)
        and all(type(group) is int and 0 <= group <= len(models) for group in groups)
        and len(groups) == recipe.expansion
        and rest in [*NonExpertWeights]
    ):
        raise RecordError(f"{RECORD_NAME}: experts_from is incomplete")
    if not others:
        raise UpcycleError(
            f"{RECORD_NAME} says that experts were made of several models, and only one is given.",
            "Name the others with --experts-from, once for each: "
            f"{', '.join(shown(each.get('name')) for each in models)}.",
        )
    return Merge(
        others=tuple(_in_order(models, others)), cycle=tuple(groups), rest=NonExpertWeights(rest)
    )


def _in_order(models: Sequence[Record], others: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the given models in the order of the record; UpcycleError for any others."""
    left, found = list(others), []
    for model in models:
        fits = next((each for each in left if _is_recorded(each, model)), None)
        if fits is None:
            raise UpcycleError(
                f"none of the given models is {shown(model.get('name'))}, of which experts were "
                f"made: their config or weights differ from what {RECORD_NAME} records.",
                "Name each model with --experts-from.",
            )
        left.remove(fits)
        found.append(fits)
    if left:
        raise _not_of(left[0])
    return found


def _not_of(model: Checkpoint) -> UpcycleError:
    return UpcycleError(f"no expert is made of {model.path}, says {RECORD_NAME}.", "Leave it out.")


def _is_recorded(model: Checkpoint, recorded: Record) -> bool:
    """Whether a model has the recorded config, headers and sample of its weights."""
    sample = recorded.get("sample")
    name = str(sample.get("tensor")) if isinstance(sample, dict) else ""
    if name not in model.tensors:
        return False
    held = origin(model) | {"sample": {"tensor": name, "sha256": model.tensor_digest(name)}}
    return all(recorded.get(key) == held[key] for key in ("config_sha256", "files", "sample"))


# What only the MoE knows -----------------------------------------------------------------------


class _UnknownRows(RouterFile):
    """Stands for a file of router rows that the user did not give: their values stay open."""

    def rows(self, layers: Collection[int], shape: tuple[int, int]) -> RouterRows:  # noqa: ARG002
        return RouterRows(origin="")


@dataclass(frozen=True, eq=False)
class _UnknownOrders(PermutationFile):
    """Stands for a file of neuron orders: which permutation each group has stays open."""

    size: int = 0

    def check(self, layers: Collection[int], recipe: Recipe, size: int) -> None:
        """Accept any layers."""

    def of_layer(self, layer: int, expansion: int) -> list[Permutation | None]:
        return [Permutation(self.size, order_name(layer, group)) for group in range(expansion)]


# What the plan promises -------------------------------------------------------------------------


def expectation(plan: Plan) -> Expectation:
    """Return what the check `outputs` holds the MoE to, as plain values."""
    from upcycle_cli.verification.outputs import Expectation

    reason = why_no_promise(plan) if plan.promise is Promise.NONE else ""
    if plan.growing is not None:
        return Expectation(
            promise=plan.promise,
            reason=reason,
            group_size=plan.growing.growth.expand,
            source="smaller MoE",
        )
    recipe = plan.recipe
    tied = recipe.virtual_groups and recipe.group_size > 1
    return Expectation(
        promise=plan.promise,
        reason=reason,
        group_size=recipe.group_size if tied else 1,
        logit_std=recipe.router_logit_std or 0.0,
        is_lossless=not plan.rounded_parts,
    )
