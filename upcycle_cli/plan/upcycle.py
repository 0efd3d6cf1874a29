"""Plans a conversion from a recipe and the headers of a dense checkpoint.

`build_plan` reads no weights, writes nothing and does not import torch. The source must have the
tensors that its config implies; each must be used, or dropped for a stated reason. So an invalid
conversion fails before it writes the first byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, model_of
from upcycle_cli.checkpoint.header import LARGEST, TORCH_DTYPES
from upcycle_cli.checkpoint.made import stored_parts
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.lookup import choose
from upcycle_cli.models.moe_config import moe_config
from upcycle_cli.models.wrappers import nested_configs
from upcycle_cli.plan.calibration import Calibration
from upcycle_cli.plan.expressions import source_names
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.merge import Merge
from upcycle_cli.plan.output import Options, Role, fill_shards
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.tensors import TensorMaker
from upcycle_cli.plan.texts import Prompts
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.recipe import Recipe, Routing, ScaleSplit, Scaling


def build_plan(
    recipe: Recipe,
    source: Checkpoint,
    *,
    target: str = "auto",
    options: Options | None = None,
    inputs: Inputs | None = None,
    merge: Merge | None = None,
) -> Plan:
    """Plan the conversion of a dense checkpoint, or of several by `merge`.

    If the recipe needs a calibration, `bind` fills in the results later. Raises UpcycleError if
    the target cannot express the model, if tensors do not match the config, or if the recipe or the
    inputs do not fit.
    """
    options, inputs = options or Options(), inputs or Inputs()
    source = source.computed_in(options.storage_dtype)
    if merge is not None:
        others = (other.computed_in(options.storage_dtype) for other in merge.others)
        merge = replace(merge, others=(*others,))
    family = choose(
        source.config,
        target,
        recipe.routing,
        layers=recipe.layers,
        names=source.tensors,
        shared_experts=recipe.shared_experts,
    )
    dense, row = family.dense, family.target
    obsolete = dense.family.has_obsolete_code
    refuse_unsafe_settings(source, ignore_code=obsolete, parts=nested_configs(source.config))
    recipe = recipe.resolve(row.routings[0], scales_in_config=row.keys.scale is not None)
    assert recipe.routing is not None
    if recipe.scale_split is ScaleSplit.CONFIG and row.keys.scale is None:
        words = f"the config of {row.model_type} has no factor on the gates."
        raise UpcycleError(words, "Use `scale_split` balanced or down.")
    dropped = {**check_source(source, dense), **source.left_out}
    width, hidden = dense.intermediate_size, dense.hidden_size
    recipe.check_width(width)
    expert_size = width // recipe.granularity
    inputs = inputs.for_recipe(recipe, family.layers, width=width, hidden=hidden)
    if merge is not None:
        merge.check(recipe)
    if isinstance(inputs.text, Prompts):
        if merge is None:
            raise UpcycleError("`positive_prompts` need several models.", "Add `experts_from`.")
        count, models = len(merge.cycle), (source, *merge.others)
        if recipe.expansion != count or recipe.router_rows != count:
            raise UpcycleError(
                f"{recipe.router_rows} router rows need as many models with prompts, not {count}.",
                f"Use an expansion of {count}, and virtual groups.",
            )
        inputs.text.of_groups([models[number] for number in merge.cycle])
    plan = Plan(
        options=options,
        source=source,
        config=moe_config(
            source.config,
            family,
            recipe,
            recipe.factors(dense.mlp_kind).config,
            untie_embeddings=options.untie_embeddings,
            dtype=options.dtype,
        ),
        shards=(),
        target=row,
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        expert_size=expert_size,
        routing=Routing(recipe.routing),
        layers=family.layers,
        num_layers=dense.num_layers,
        shares=recipe.shared_experts > 0,
        expert_layout=row.check_layout(options.expert_layout, expert_size, hidden),
        dense_parameters=source.num_parameters
        - sum(source.tensors[name].num_elements for name in dropped if name in source.tensors),
        upcycles=(recipe, family),
        inputs=inputs,
        merge=merge,
        dropped=dropped,
    )
    plan = _filled(plan)
    _check_router_range(plan)
    used = {model_of(name)[1] for tensor in plan.tensors for name in source_names(tensor.expr)}
    kept = map(source.tensor, source.tensors.keys() - dropped.keys())
    unused = {part.name for tensor in kept for part in stored_parts(tensor)} - used
    assert not unused, f"source tensors neither used nor dropped: {sorted(unused)[:3]}"
    return plan


def bind(plan: Plan, found: Calibration) -> Plan:
    """Fill in a calibration's router rows, neuron orders and measured c; the digest stays."""
    return _bound(plan, found, plan.recipe.group_size / found.gates)


def bind_recorded(plan: Plan, record: Mapping[str, Any]) -> Plan:
    """Fill in the measured c of an existing output from its record."""
    recipe = record.get("recipe")
    scale = recipe.get("scaling") if isinstance(recipe, dict) else None
    measured = not plan.growing and plan.recipe.scaling is Scaling.MEASURED
    return _bound(plan, plan.calibration, scale) if measured and type(scale) is float else plan


def _bound(plan: Plan, found: Calibration | None, scale: float) -> Plan:
    recipe = plan.recipe
    if recipe.scaling is Scaling.MEASURED:
        recipe = replace(recipe, scaling=scale)
    upcycles = (recipe, plan.family)
    return _filled(replace(plan, calibration=found, bound_digest=plan.digest, upcycles=upcycles))


def _filled(plan: Plan) -> Plan:
    """Return a plan with every output tensor; UpcycleError if the inputs do not fit the layers."""
    tensors = tuple(TensorMaker(plan).tensors())
    return replace(plan, shards=fill_shards(tensors, plan.options.max_shard_bytes))


def _check_router_range(plan: Plan) -> None:
    """Raise UpcycleError for a logit std that can overflow the routers' dtype."""
    std = plan.recipe.router_logit_std or 0.0
    for tensor in (each for each in plan.tensors if each.role is Role.ROUTER):
        # The norm's output has length √H; a row can be twice as long as the average.
        most = LARGEST[tensor.dtype] / (2 * math.sqrt(tensor.shape[-1]))
        if std > most:
            words = f"router logits of standard deviation {std:g} overflow"
            hint = f"Use a `router_logit_std` below {most:.3g}, or another `dtype`."
            raise UpcycleError(f"{words} {TORCH_DTYPES[tensor.dtype]}.", hint)
