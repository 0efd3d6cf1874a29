"""From a recipe and a dense checkpoint's headers to everything that is to be written.

`build_plan` is pure: it reads no weight, writes nothing and imports no torch. It fails before the
first byte is written, since planning is type checking: the source must have the tensors that its
config implies, in their shapes, and each must be used or dropped for a stated reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader
from upcycle_cli.checkpoint.header import LARGEST, TORCH_DTYPES, TensorEntry
from upcycle_cli.checkpoint.unsafe_settings import refuse_unsafe_settings
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.choose import Family, choose
from upcycle_cli.models.mlp import parts_of
from upcycle_cli.models.moe_config import moe_config
from upcycle_cli.models.wrappers import nested_configs
from upcycle_cli.plan.base import Planned, fill_shards
from upcycle_cli.plan.compatibility import carried, check_dtypes
from upcycle_cli.plan.expressions import sources
from upcycle_cli.plan.merge import Merge, MergedReader, Rest, model_of, open_readers
from upcycle_cli.plan.permutation_file import check_orders
from upcycle_cli.plan.prompts import Prompts
from upcycle_cli.plan.router_inputs import RouterInputs
from upcycle_cli.plan.tensors import Options, OutputTensor, Role, output_tensors
from upcycle_cli.plan.validate import check_source
from upcycle_cli.recipe.recipe import Promise, Recipe, ScaleSplit, Scaling
from upcycle_cli.recipe.scaling import Factors

if TYPE_CHECKING:
    from upcycle_cli.plan.calibration import Calibration

_DRAWN = (Role.ROUTER, Role.CORRECTION_BIAS, Role.SHARED_EXPERT, Role.ADDED)
_LONGEST_ROW = 2
"""Times what a row's length is on average."""


@dataclass(frozen=True)
class Plan(Planned):
    """Everything that a conversion will write, and what is to be said about it."""

    recipe: Recipe
    family: Family
    dropped: Mapping[str, str]
    """Source tensors that are not used, each with the reason."""
    inputs: RouterInputs
    """What the routers, and orders of neurons, are made from beside the recipe."""
    calibration: Calibration | None = None
    """What was found in the text, once the dense model has been run on it."""
    merge: Merge | None = None
    """What else there is to make experts of, beside the source."""
    announced: str | None = None
    """The digest that the plan had before its calibration was run."""

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All models that tensors are read of, the source first."""
        return (self.source, *(() if self.merge is None else self.merge.others))

    def with_sources(self, sources: Sequence[Checkpoint]) -> Plan:
        """Return the same plan for the same sources, brought to another place."""
        if all(one is other for one, other in zip(sources, self.sources, strict=True)):
            return self
        source, *others = sources
        merge = self.merge and replace(self.merge, others=tuple(others))
        return replace(self, source=source, merge=merge, carried=carried(source, merge))

    def entry(self, name: str) -> TensorEntry:
        """Return the dense tensor that an expression names."""
        model, own = model_of(name) if self.merge is not None else (0, name)
        return self.sources[model].tensors[own]

    def reader(self) -> AbstractContextManager[Reader | MergedReader]:
        """Map the sources' files as they are asked for, by the names that expressions have."""
        return self.source.reader() if self.merge is None else open_readers(self.sources)

    @property
    def rotary_share(self) -> float:
        """As the family has it."""
        return self.family.rotary_share

    @property
    def factors(self) -> Factors:
        """What each expert matrix is multiplied by."""
        return self.recipe.factors(self.family.dense.mlp_kind)

    @property
    def promise(self) -> Promise:
        """What the output owes the dense model."""
        promise = self.recipe.promise(self.family.dense.mlp_kind)
        return promise if self.merge is None else Promise.NONE

    @property
    def how(self) -> dict[str, Any]:
        """The recipe, the factors, what was found in a calibration, and whose rows routers have."""
        rows, orders = self.inputs.rows, self.options.neuron_orders
        return {
            "recipe": {"name": self.recipe.name, **self.recipe.stated()},
            "factors": asdict(self.factors),
            "calibration": self.calibration_record,
            **({} if rows is None else {"router_file": rows.record}),
            **({} if orders is None else {"order_file": orders.record}),
        }

    @property
    def calibration_record(self) -> dict[str, Any] | None:
        """What the dense model was run on, and what was found; None where it was not run."""
        text, found = self.inputs.text, self.calibration
        if text is None or found is None:
            return None
        return {
            "text": text.name,
            "text_sha256": text.digest,
            "tokens": found.tokens,
            "sha256": found.digest,
            "layers": list(found.summary()),
        }

    @property
    def expert_size(self) -> int:
        """I/G, the intermediate size of an expert."""
        return self.family.dense.intermediate_size // self.recipe.granularity

    @cached_property
    def rounded_to(self) -> str | None:
        """The dtype that dense weights are rounded to, or None when no bit of them is lost."""
        if self.merge is not None and self.merge.rest is Rest.MEAN:
            return TORCH_DTYPES[self.expert_dtype]
        # What is drawn at random has nothing to lose.
        narrowed = self.narrowed(_DRAWN)
        return narrowed if self.factors.lossless else narrowed or TORCH_DTYPES[self.expert_dtype]

    @property
    def lossless(self) -> bool:
        """Whether the dense weights can be recovered bit for bit."""
        return self.rounded_to is None and not self.recipe.perturbed

    @property
    def expert_dtype(self) -> str:
        """The dtype of the experts' matrices."""
        return next(t.dtype for t in self.tensors if t.role is Role.EXPERT)

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters of the dense model, without what is dropped."""
        return self.source.num_parameters - sum(
            self.source.tensors[name].num_elements for name in self.dropped
        )

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the MoE's matrix products on a token, forward.

        A multiplication and an addition a parameter (2N of Kaplan et al., arXiv 2001.08361, section
        2.1). Attention scores, which depend on the context length, are left out.
        """
        return 2 * self.multiplied[0]

    @property
    def flops_ratio(self) -> float:
        """The same as a multiple of the dense model's."""
        moe, dense = self.multiplied
        return moe / dense

    @property
    def multiplied(self) -> tuple[int, int]:
        """The parameters that a token of text meets, of the MoE and of the dense model."""
        # Looking up an embedding costs nothing; a tied one is used once more, as the head.
        row, tensors = self.family.dense.family, self.source.tensors
        lookup, untied = tensors[row.embedding].num_elements, row.head in tensors
        # What sees pictures has nothing to do with a token of text, and some have a second table.
        by_layer = f"{row.embedding.removesuffix('.weight')}_per_layer.weight"
        around = sum(
            t.num_elements for t in tensors.values() if not row.has(t.name) or t.name == by_layer
        )
        moe = self.active_parameters - lookup * (untied or self.options.untie_embeddings) - around
        return moe, self.dense_parameters - lookup * untied - around

    @cached_property
    def digest(self) -> str:
        """Identify the output: equal digests mean equal files.

        What a calibration finds follows from that, so that the digest is known before it runs.
        """
        if self.announced is not None:
            return self.announced
        text = self.inputs.text
        content = self.identity() | {
            "recipe": self.recipe.stated(),
            "calibration": None if text is None else text.digest,
        }
        if self.merge is not None:
            content["others"] = [other.identity for other in self.merge.others]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_plan(
    recipe: Recipe,
    source: Checkpoint,
    *,
    target: str = "auto",
    options: Options | None = None,
    inputs: RouterInputs | None = None,
    calibration: Calibration | None = None,
    merge: Merge | None = None,
) -> Plan:
    """Plan the conversion of a dense checkpoint, or of several.

    `inputs` is what routers are made from beside the recipe. What needs a calibration is planned
    before there is one, and made of the plan that `calibrated` returns. `merge` is what else
    experts are made of; its models have been checked when it was opened. Raises UpcycleError when
    the target cannot express the model, when tensors are not what the config says, or when the
    recipe does not fit.
    """
    options, names = options or Options(), source.tensors
    family = choose(
        source.config,
        target,
        recipe.routing,
        layers=recipe.layers,
        names=names,
        shared_experts=recipe.shared_experts,
    )
    outgrown = family.dense.family.has_obsolete_code
    refuse_unsafe_settings(source, outgrown=outgrown, parts=nested_configs(source.config))
    row = family.target
    recipe = recipe.resolve(row.routings[0], scales_in_config=row.keys.scale is not None)
    assert recipe.routing is not None
    if recipe.scale_split is ScaleSplit.CONFIG and row.keys.scale is None:
        raise UpcycleError(
            f"{row.model_type} has no factor on its gates in its config.",
            "Use --scale-split balanced or down.",
        )
    dropped = check_source(source, family.dense)
    size, hidden_size = family.dense.intermediate_size, family.dense.hidden_size
    recipe.check_width(size)
    layout = row.check_layout(options.expert_layout, size // recipe.granularity, hidden_size)
    check_orders(options.neuron_orders, recipe, family.layers, size)
    config = moe_config(
        source.config,
        family.dense,
        row,
        recipe,
        family.layers,
        untie_embeddings=options.untie_embeddings,
        dtype=options.dtype,
    )
    used = [name for name in names if name not in dropped]
    inputs = (inputs or RouterInputs()).for_recipe(recipe)
    if isinstance(inputs.text, Prompts):
        _check_prompts(inputs.text, recipe, source, merge)
    rows = inputs.rows_for(recipe, family.layers, hidden_size, calibration)
    orders = inputs.orders_for(recipe, family.layers, size, calibration)
    mlp = family.dense.mlp(names, family.layers[0])
    if merge is not None and recipe.shared_experts:
        raise UpcycleError(
            "what is shared is one for all groups, and several models have nothing in common.",
            "Leave out --shared-experts, or --experts-from.",
        )
    if merge is not None and recipe.perturbed:
        raise UpcycleError(
            "experts of several models differ already.", "Leave out --noise and --reinit."
        )
    if merge is not None and options.dtype is None:
        prefixes = map(family.dense.prefix, family.layers)
        check_dtypes(source, merge.others, (p + w.name for p in prefixes for w in mlp))
    tensors = tuple(output_tensors(recipe, options, family, source, used, rows, orders, merge))
    _check_router_range(recipe, tensors)
    _check_all_used(tensors, source, dropped, parts_of(mlp), merge)
    return Plan(
        options=options,
        source=source,
        config=config,
        shards=fill_shards(tensors, options.max_shard_bytes),
        carried=carried(source, merge),
        target=row,
        num_experts=recipe.num_experts,
        top_k=recipe.top_k,
        routing=recipe.routing,
        layers=family.layers,
        every_layer=family.layers == family.dense.mlp_layers,
        shares=recipe.shared_experts > 0,
        expert_layout=layout,
        recipe=recipe,
        family=family,
        dropped=dropped,
        inputs=inputs,
        calibration=calibration,
        merge=merge,
    )


def _check_prompts(
    prompts: Prompts, recipe: Recipe, source: Checkpoint, merge: Merge | None
) -> None:
    """Raise UpcycleError for prompts that are not those of each group's model."""
    if merge is None:
        raise UpcycleError("prompts tell models apart, and there is one.", "Add --experts-from.")
    merge.check_prompts(recipe)
    models = (source, *merge.others)
    prompts.of_groups([models[number] for number in merge.cycle])


def calibrated(plan: Plan, found: Calibration) -> Plan:
    """Return a plan with what a calibration has found: rows, and c where it is measured."""
    return _with_found(plan, plan.recipe.group_size / found.gates, found)


def as_recorded(plan: Planned, record: Mapping[str, Any]) -> Planned:
    """Return the plan of an output that is there, with what was measured when it was made."""
    if not isinstance(plan, Plan):
        return plan
    recipe = record.get("recipe")
    c = recipe.get("scaling") if isinstance(recipe, dict) else None
    if plan.recipe.scaling is not Scaling.MEASURED or not isinstance(c, float):
        return plan
    return _with_found(plan, c, plan.calibration)


def _with_found(plan: Plan, c: float, found: Calibration | None) -> Plan:
    recipe = plan.recipe
    if recipe.scaling is Scaling.MEASURED:
        recipe = replace(recipe, scaling=c)
    made = build_plan(
        recipe,
        plan.source,
        target=plan.family.choice,
        options=plan.options,
        inputs=plan.inputs,
        calibration=found,
        merge=plan.merge,
    )
    return replace(made, announced=plan.digest)


def _check_router_range(recipe: Recipe, tensors: tuple[OutputTensor, ...]) -> None:
    """Raise UpcycleError for logits that fit into the routers' dtype by chance only, if at all."""
    std = recipe.router_logit_std or 0.0
    for tensor in (each for each in tensors if each.role is Role.ROUTER):
        # What leaves the norm has a length of √H: no token has a larger logit than this.
        most = LARGEST[tensor.dtype] / (math.sqrt(tensor.shape[-1]) * _LONGEST_ROW)
        if std > most:
            raise UpcycleError(
                f"router logits of standard deviation {std:g} overflow "
                f"{TORCH_DTYPES[tensor.dtype]}, which ends at {LARGEST[tensor.dtype]:g}.",
                f"Use a --router-logit-std below {most:.3g}, or another --dtype.",
            )


def _check_all_used(
    tensors: tuple[OutputTensor, ...],
    source: Checkpoint,
    dropped: Mapping[str, str],
    parts: Collection[str],
    merge: Merge | None,
) -> None:
    used = {name for tensor in tensors for name in sources(tensor.expr)}
    if merge is not None:  # each model has the same tensors: all are used, if not of each model
        used = {model_of(name)[1] for name in used}
    unused = source.tensors.keys() - used - dropped.keys()
    assert not unused, f"source tensors neither used nor dropped: {sorted(unused)[:3]}"
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is planned twice"
    # A shared expert is drawn at the scale of a part that the experts may still lack.
    made = {part for tensor in tensors for part in tensor.holds}
    assert {*parts} <= made, f"no expert holds {sorted({*parts} - made)}"
