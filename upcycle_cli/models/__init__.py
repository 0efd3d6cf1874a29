"""The model types that can be upcycled, and the choice between their targets.

A family is a row of data: `dense.py` has those that can be upcycled, `moe.py` what they can become.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.dense import DenseFamily, DenseModel, read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.layers import parse_layers
from upcycle_cli.models.moe import IN_MEMORY, Target
from upcycle_cli.models.moe_rows import FURTHER, NATIVE
from upcycle_cli.models.refused import REFUSED
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.models.shipped_row import shipped
from upcycle_cli.models.tensor_pieces import Pieces
from upcycle_cli.models.wrappers import (
    INSIDE,
    Inside,
    as_loaded,
    inner,
    native_target,
    wrapped_family,
    wrapper_of,
)
from upcycle_cli.recipe.recipe import SHIPPED, Routing

_LISTED = "`upcycle families` lists what can be."


@dataclass(frozen=True)
class Family:
    """A dense model, what its config means, and the target it is to become."""

    dense: DenseModel
    target: Target
    layers: tuple[int, ...]
    """Those that become mixtures of experts."""

    @property
    def choice(self) -> str:
        """The target as --target has it."""
        return SHIPPED if self.target.ships_code else self.target.model_type

    @property
    def rotary_share(self) -> float:
        """The part of each head that positions turn in the target's own attention."""
        return 1.0 if self.target.ships_code else self.dense.rotary_share

    @property
    def pieces(self) -> Pieces:
        """Dense tensors that the target holds in another form."""
        return pieces_of(self.dense.family, self.target)

    def name(self, source: str) -> str:
        """Return what a dense tensor is called that is copied."""
        here, there = self.dense.family.inside, self.target.inside
        if here is not None and there is not None:
            return here.moved(source, there)
        return self.target.name(source)


def pieces_of(family: DenseFamily, target: Target) -> Pieces:
    """Return the dense tensors that a target holds in another form; shipped code keeps all."""
    return {} if target.ships_code else family.pieces


def targets_of(family: DenseFamily) -> tuple[str, ...]:
    """Return the names of what a family can become; that which most software loads comes first."""
    return (*family.targets, *((SHIPPED,) if family.classes else ()))


def dense_family(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseFamily:
    """Return the family of a dense config, of a wrapper that of its text model.

    Inside of a wrapper, how names begin is taken from `names`, those of the source's tensors.
    Raises UpcycleError for an MoE, a quantised model, or a model type that is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UpcycleError("config.json has no model_type.", _LISTED)
    if is_moe(config):
        raise UpcycleError(
            f"this is a mixture of experts already (model_type {model_type}).",
            "Only a dense model can be upcycled. --expand 2, without a recipe, doubles the experts "
            "of this one; `upcycle inspect` shows what it holds.",
        )
    is_wrapper = wrapper_of(config) is not None
    if model_type not in DENSE and not is_wrapper:
        why = f": {REFUSED[model_type]}." if model_type in REFUSED else " yet."
        raise UpcycleError(f"model type '{model_type}' cannot be upcycled{why}", _LISTED)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UpcycleError(
            f"the weights are quantised ({method or 'quantization_config'} in config.json).",
            "Convert the bf16 or fp16 release of the model, and quantise the result.",
        )
    return wrapped_family(config, names) if is_wrapper else DENSE[model_type]


def dense_model(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseModel:
    """Return what a dense config means; `names` and errors are as for `dense_family`."""
    return read_dense(dense_family(config, names), inner(config))


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a type that can be upcycled, or a wrapper around one."""
    return str(config.get("model_type")) in DENSE or wrapper_of(config) is not None


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a mixture of experts, of whatever architecture."""
    config = inner(config)
    model_type = str(config.get("model_type"))
    if model_type in DENSE and model_type in NATIVE:
        try:
            return bool(NATIVE[model_type].moe_layers(config, 1))
        except ValueError:
            return False  # which is said when it is read
    if config.get("is_moe") is False:
        return False
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
    return is_target(config) or any(config.get(key) for key in keys)


def is_target(config: Mapping[str, Any]) -> bool:
    """Whether an MoE's config is of a type that upcycle makes, or grows."""
    model_type = str(config.get("model_type"))
    if model_type in FURTHER:
        return True
    wrapper = wrapper_of(config)
    if wrapper is not None:
        text_type = inner(config)["model_type"]
        if model_type == wrapper.upcycled:
            return text_type in wrapper.texts
        native, _ = wrapper.natives.get(text_type, (None, None))
        return native == model_type and (text_type not in wrapper.texts or is_moe(config))
    if model_type in NATIVE:
        return model_type not in DENSE or is_moe(config)
    name = model_type.removeprefix(UPCYCLED_PREFIX)
    return name != model_type and name in DENSE and DENSE[name].classes is not None


def target_of(config: Mapping[str, Any], names: Collection[str]) -> Target:
    """Return the target that an MoE is of; `names` are those of its tensors.

    It must be one, as `is_target` has it. Raises UpcycleError when the config of shipped code makes
    no sense.
    """
    model_type = str(config["model_type"])
    wrapper = wrapper_of(config)
    if wrapper is not None and model_type != wrapper.upcycled:
        return native_target(inner(config)["model_type"], Inside(wrapper, wrapper.form(names)))
    released = {**NATIVE, **FURTHER}.get(model_type)
    if released is not None:
        # Where there are both, it is the released names, and the others are surplus.
        kinds = released, replace(released, layer=IN_MEMORY)
        held = (row for row in kinds if any(name.startswith(row.root) for name in names))
        return next(held, released)
    family = upcycled_family(config, names)
    biased = any(name.endswith("_proj_bias") for name in names)
    return shipped(as_loaded(family), read_dense(family, inner(config)).activation, biased=biased)


def upcycled_family(config: Mapping[str, Any], names: Collection[str] = ()) -> DenseFamily:
    """Return the family that shipped code was made for; `names` as for `dense_family`."""
    if wrapper_of(config) is not None:
        return wrapped_family(config, names)
    return DENSE[str(config["model_type"]).removeprefix(UPCYCLED_PREFIX)]


def choose(
    config: Mapping[str, Any],
    target: str,
    routing: Routing | None,
    *,
    layers: str | None = None,
    names: Collection[str] = (),
    shared_experts: int = 0,
) -> Family:
    """Return the family for a source config; `target` may be "auto": the first that can express it.

    With the routing, the choice of layers and the shared experts that are asked for. `names` are
    those of the source's tensors. Raises UpcycleError when none can, saying why of each.
    """
    dense = dense_model(config, names)
    family = dense.family
    chosen = parse_layers(layers, dense.mlp_layers, dense.num_layers)
    options = targets_of(family)
    if target not in ("auto", *options):
        known = target in {*NATIVE, *INSIDE, SHIPPED}
        raise UpcycleError(
            f"{family.title} cannot become {target}."
            if known
            else f"--target '{target}' is not a target.",
            f"{'It' if known else family.title} can become {' or '.join(options)}.",
        )
    mlp = dense.mlp({*dense.shapes, *names}, next(iter(dense.mlp_layers), 0))
    biased = any(weight.is_bias for weight in mlp)
    reasons: dict[str, str] = {}
    for name in options:
        if name == SHIPPED:
            row = shipped(as_loaded(family), dense.activation, biased=biased)
        else:
            row = native_target(name, family.inside)
        reason = _objection(
            row, dense, routing, chosen, biased=biased, shared_experts=shared_experts
        )
        if reason is not None:
            reasons[name] = reason
        elif target in ("auto", name):
            return Family(dense, row, chosen)
    able = [name for name in options if name not in reasons]
    shown = reasons if target == "auto" else {target: reasons[target]}
    raise UpcycleError(
        " ".join(f"{name} cannot express this model: {why}." for name, why in shown.items()),
        f"{' or '.join(able)} can: pass --target {able[0]}." if able else "No target can yet.",
    )


def _objection(
    target: Target,
    dense: DenseModel,
    routing: Routing | None,
    layers: Sequence[int],
    *,
    biased: bool,
    shared_experts: int,
) -> str | None:
    if routing is not None and routing not in target.routings:
        return f"it has no {routing} routing"
    if not dense.mlp_layers:
        return "it has no layer with a dense MLP"
    if biased and not target.ships_code:
        return "the MLPs have biases, and its experts have none"
    for name, reason in target.lacks.items():
        if dense.has(name):
            return reason.format(model_type=dense.model_type)
    found = target.refusal(dense) or target.layers.objection(layers, dense.num_layers)
    if found is not None or not shared_experts:
        return found
    shared = target.shared
    return "it has no shared expert" if shared is None else shared.objection(shared_experts)
