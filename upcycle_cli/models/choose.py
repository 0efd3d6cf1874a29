"""Choose the target that a dense model becomes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import choose_from
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.dense import DenseModel, Pieces
from upcycle_cli.models.layers import parse_layers
from upcycle_cli.models.lookup import dense_model, native_target, shipped_target, targets_of
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.recipe.recipe import SHIPPED


@dataclass(frozen=True, repr=False)
class Family(Compact):
    """A dense model and the target that it becomes."""

    dense: DenseModel
    target: Target
    layers: tuple[int, ...]
    """The layers that become mixtures of experts."""

    @property
    def choice(self) -> str:
        """The value of `target`."""
        return SHIPPED if self.target.ships_code else self.target.model_type

    @property
    def pieces(self) -> Pieces:
        """Dense tensors that the target stores in another form; none for shipped code."""
        return {} if self.target.ships_code else self.dense.family.pieces

    def name(self, source: str) -> str:
        """Return the name in the target of a dense tensor that is copied."""
        here, there = self.dense.family.inside, self.target.inside
        if here is not None and there is not None:
            return here.moved(source, there)
        return self.target.name(source)


def choose(
    config: Mapping[str, Any],
    target: str,
    routing: str | None,
    *,
    layers: str | None = None,
    names: Collection[str] = (),
    shared_experts: int = 0,
) -> Family:
    """Return the family of a source config and a target; "auto" takes the first possible one.

    `names` are the source's tensors. Raises UpcycleError with the reasons if none is possible.
    """
    dense = dense_model(config, names)
    family = dense.family
    chosen = parse_layers(layers, dense.mlp_layers, dense.num_layers)
    options = targets_of(family)
    if target not in ("auto", *options):
        known = f"{family.title} cannot become {target}."
        what = known if target in NATIVE else f"unknown target {target!r}."
        raise UpcycleError(what, choose_from(target, ("auto", *options)))
    mlp = dense.mlp({*dense.shapes, *names}, next(iter(dense.mlp_layers), 0))
    biased = any(weight.is_bias for weight in mlp)
    reasons: dict[str, str] = {}
    for name in options:
        if name == SHIPPED:
            row = shipped_target(family, dense.activation, biased=biased)
        else:
            row = native_target(name, family.inside)
        reason = _objection(row, dense, routing, chosen, biased, shared_experts)
        if reason is not None:
            reasons[name] = reason
        elif target in ("auto", name):
            return Family(dense, row, chosen)
    able = [name for name in options if name not in reasons]
    shown = reasons if target == "auto" else {target: reasons[target]}
    raise UpcycleError(
        " ".join(f"{name} cannot express this model: {why}." for name, why in shown.items()),
        f"{' or '.join(able)} can: use `target` {able[0]}." if able else "No target can yet.",
    )


def _objection(
    target: Target,
    dense: DenseModel,
    routing: str | None,
    layers: Sequence[int],
    biased: bool,  # noqa: FBT001
    shared_experts: int,
) -> str | None:
    """Return why a target cannot express a model, or None if it can."""
    if routing is not None and routing not in target.routings:
        return f"it has no {routing} routing"
    if not dense.mlp_layers:
        return "the model has no layer with a dense MLP"
    if biased and not target.ships_code:
        return "the model's MLPs have biases, but the target's experts have none"
    for name, reason in target.unsupported_tensors.items():
        if dense.has(name):
            return reason.format(model_type=dense.model_type)
    found = (
        _attention_objection(target, dense)
        or target.refusal(dense)
        or target.layers.objection(layers, dense.kinds)
    )
    if found is not None or not shared_experts:
        return found
    shared = target.shared
    return "it has no shared expert" if shared is None else shared.objection(shared_experts)


def _attention_objection(target: Target, dense: DenseModel) -> str | None:
    """Return which setting of attention the target's config has no key for, or None."""
    known, windows = defaults_of(target.model_type), {*dense.windows}
    if target.ships_code or target.model_type == dense.model_type:
        return None
    if dense.rotary_share != 1.0 and "partial_rotary_factor" not in known:
        return "only a part of each head is rotated, but the target rotates whole heads"
    if any(windows) and "sliding_window" not in known:
        return "some layers have a sliding window, but the target supports none"
    if len(windows) > 1 and "layer_types" not in known:
        return "only some layers have a sliding window, but the target treats all layers alike"
    return None
