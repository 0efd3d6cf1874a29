"""From a recipe and a dense checkpoint's headers to everything that is to be written.

`build_plan` is pure: it reads no weight, writes nothing and imports no torch. It fails before the
first byte is written, since planning is type checking: the source must have the tensors that its
config implies, in their shapes, and each must be used or dropped for a stated reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    LARGEST,
    TORCH_DTYPES,
    WEIGHTS_NAME,
    Checkpoint,
)
from upcycle_cli.errors import UpcycleError
from upcycle_cli.expr import sources
from upcycle_cli.factors import Factors
from upcycle_cli.families import Family, choose
from upcycle_cli.families.engines import Engine, engines
from upcycle_cli.families.mlp import parts_of
from upcycle_cli.families.shipped import CODE_NAME
from upcycle_cli.families.translate import has_plain_attention, moe_config
from upcycle_cli.families.wrappers import inner, parts
from upcycle_cli.front_matter import Carried, carried_over
from upcycle_cli.intact import check_source
from upcycle_cli.order_file import check_orders
from upcycle_cli.recipe import SHIPPED, ExpertLayout, Promise, Recipe, ScaleSplit, Scaling
from upcycle_cli.redirects import refuse_redirects
from upcycle_cli.router_inputs import RouterInputs
from upcycle_cli.tensors import (
    Options,
    OutputTensor,
    Role,
    output_tensors,
)

if TYPE_CHECKING:
    from upcycle_cli.calibration.found import Calibration

_MEANING = 2
"""Another number whenever an expression comes to mean other bytes: 2 since numpy draws routers."""
_DRAWN = (Role.ROUTER, Role.CORRECTION_BIAS, Role.SHARED_EXPERT)
_LONGEST_ROW = 2
"""Times what a row's length is on average."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output, with its final name and its tensors in order."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will write, and what is to be said about it."""

    recipe: Recipe
    options: Options
    family: Family
    source: Checkpoint
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    dropped: Mapping[str, str]
    """Source tensors that are not used, each with the reason."""
    carried: Carried
    """What the source's card says that the new one takes over."""
    inputs: RouterInputs
    """What the routers are made from beside the recipe."""
    calibration: Calibration | None = None
    """What was found in the text, once the dense model has been run on it."""
    announced: str | None = None
    """The digest that the plan had before that."""

    def with_source(self, source: Checkpoint) -> Plan:
        """Return the same plan for the same source, brought to another place."""
        if source is self.source:
            return self
        return replace(self, source=source, carried=carried_over(source.path, CARD_NAME))

    @property
    def file_names(self) -> list[str]:
        """What the output consists of, beside its record, card and checksums."""
        extra = [INDEX_NAME] if len(self.shards) > 1 else []
        extra += [CODE_NAME] if self.family.target.ships_code else []
        names = [shard.name for shard in self.shards]
        return [CONFIG_NAME, *extra, *names, *(file.name for file in self.source.companions)]

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All output tensors in file order."""
        for shard in self.shards:
            yield from shard.tensors

    @property
    def factors(self) -> Factors:
        """What each expert matrix is multiplied by."""
        return self.recipe.factors(self.family.dense.mlp_kind)

    @property
    def promise(self) -> Promise:
        """What the output owes the dense model."""
        return self.recipe.promise(self.family.dense.mlp_kind)

    @property
    def expert_size(self) -> int:
        """I/G, the intermediate size of an expert."""
        return self.family.dense.intermediate_size // self.recipe.granularity

    @property
    def expert_layout(self) -> ExpertLayout:
        """How the experts are named on disk."""
        return self.family.target.layout(self.options.expert_layout)

    @cached_property
    def rounded_to(self) -> str | None:
        """The dtype that dense weights are rounded to, or None when no bit of them is lost."""
        for tensor in self.tensors:
            # What is drawn at random has nothing to lose.
            drawn = tensor.role in _DRAWN
            for name in () if drawn else sources(tensor.expr):
                # bf16 and fp16 each hold values that the other does not; fp32 holds all of both.
                if tensor.dtype not in {self.source.tensors[name].dtype, "F32"}:
                    return TORCH_DTYPES[tensor.dtype]
        return None if self.factors.lossless else TORCH_DTYPES[self.expert_dtype]

    @property
    def lossless(self) -> bool:
        """Whether the dense weights can be recovered bit for bit."""
        return self.rounded_to is None

    @property
    def expert_dtype(self) -> str:
        """The dtype of the experts' matrices."""
        return next(t.dtype for t in self.tensors if t.role is Role.EXPERT)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def total_parameters(self) -> int:
        """Parameters of the MoE."""
        return sum(tensor.num_elements for tensor in self.tensors)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts that were not chosen."""
        experts = sum(t.num_elements for t in self.tensors if t.role is Role.EXPERT)
        idle = self.recipe.num_experts - self.recipe.top_k
        return self.total_parameters - experts // self.recipe.num_experts * idle

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters of the dense model, without what is dropped."""
        return self.source.num_parameters - sum(
            self.source.tensors[name].num_elements for name in self.dropped
        )

    @property
    def flops_ratio(self) -> float:
        """FLOPs per token of the MoE's matrix products, as a multiple of the dense model's.

        Attention scores, which depend on the context length, are left out of both.
        """
        moe, dense = self.multiplied
        return moe / dense

    @property
    def multiplied(self) -> tuple[int, int]:
        """The parameters that a token of text meets, of the MoE and of the dense model."""
        # Looking up an embedding costs nothing; a tied one is used once more, as the head.
        row, tensors = self.family.dense.family, self.source.tensors
        lookup, untied = tensors[row.embedding].num_elements, row.head in tensors
        # What sees pictures has nothing to do with a token of text.
        around = sum(t.num_elements for t in tensors.values() if not row.has(t.name))
        moe = self.active_parameters - lookup * (untied or self.options.untie_embeddings) - around
        return moe, self.dense_parameters - lookup * untied - around

    @property
    def engines(self) -> tuple[Engine, ...]:
        """What is known of each inference engine and this output."""
        routing = self.recipe.routing
        assert routing is not None
        return engines(
            self.family.target.model_type,
            routing,
            tied=self.config["tie_word_embeddings"],
            fused=self.expert_layout is ExpertLayout.FUSED,
            plain_attention=has_plain_attention(
                inner(self.config), rotary_share=self.family.rotary_share
            ),
            every_layer=self.family.layers == self.family.dense.mlp_layers,
            wrapped=self.family.target.inside is not None,
        )

    @cached_property
    def digest(self) -> str:
        """Identify the output: equal digests mean equal files.

        What a calibration finds follows from that, so that the digest is known before it runs.
        It covers each source file's size and modification time, since headers alone cannot tell
        two models of one shape apart; of a commit on the Hub, the commit can.
        """
        if self.announced is not None:
            return self.announced
        pinned = self.source.revision is not None
        text = self.inputs.text
        content = {
            "meaning": _MEANING,
            "recipe": asdict(self.recipe),
            "options": asdict(replace(self.options, expert_layout=self.expert_layout))
            | {"neuron_orders": None},  # which the expressions have, by a digest
            "config": self.config,
            "calibration": None if text is None else text.digest,
            "source_name": self.source.name,
            "source_config": self.source.config_digest,
            "source_revision": self.source.revision,
            "source": [
                {"name": file.name, "size": file.size, "digest": file.digest}
                | {"mtime_ns": 0 if pinned else file.mtime_ns}
                for file in self.source.shards + self.source.companions
            ],
            "shards": [
                [shard.name, [(t.name, t.dtype, t.shape, repr(t.expr)) for t in shard.tensors]]
                for shard in self.shards
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_plan(
    recipe: Recipe,
    source: Checkpoint,
    *,
    target: str = "auto",
    options: Options | None = None,
    inputs: RouterInputs | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Plan the conversion of a dense checkpoint.

    `inputs` is what routers are made from beside the recipe. What needs a calibration is planned
    before there is one, and made of the plan that `calibrated` returns.

    Raises UpcycleError when the model cannot be expressed by the target, when its tensors are not
    what its config says, or when the recipe does not fit its sizes.
    """
    options, names = options or Options(), source.tensors
    family = choose(source.config, target, recipe.routing, layers=recipe.layers, names=names)
    outgrown = family.dense.family.outgrown_code
    refuse_redirects(source, outgrown=outgrown, parts=parts(source.config))
    row = family.target
    recipe = recipe.resolve(row.routings[0], scales_in_config=row.keys.scale is not None)
    if recipe.scale_split is ScaleSplit.CONFIG and row.keys.scale is None:
        raise UpcycleError(
            f"{row.model_type} has no factor on its gates in its config.",
            "Use --scale-split balanced or down.",
        )
    row.layout(options.expert_layout)  # raises
    dropped = check_source(source, family.dense)
    recipe.check_width(family.dense.intermediate_size)
    check_orders(options.neuron_orders, recipe, family.layers, family.dense.intermediate_size)
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
    rows = inputs.rows_for(recipe, family.layers, family.dense.hidden_size, calibration)
    tensors = tuple(output_tensors(recipe, options, family, source, used, rows))
    _check_router_range(recipe, tensors)
    mlp = family.dense.mlp(names, family.layers[0])
    _check_all_used(tensors, source, dropped, parts_of(mlp))
    shards = _shards(tensors, options.max_shard_bytes)
    carried = carried_over(source.path, CARD_NAME)
    return Plan(
        recipe, options, family, source, config, shards, dropped, carried, inputs, calibration
    )


def calibrated(plan: Plan, found: Calibration) -> Plan:
    """Return a plan with what a calibration has found: rows, and c where it is measured."""
    return _with_found(plan, plan.recipe.granularity / found.gates, found)


def as_recorded(plan: Plan, record: Mapping[str, Any]) -> Plan:
    """Return the plan of an output that is there, with what was measured when it was made."""
    recipe = record.get("recipe")
    c = recipe.get("scaling") if isinstance(recipe, dict) else None
    if plan.recipe.scaling is not Scaling.MEASURED or not isinstance(c, float):
        return plan
    return _with_found(plan, c, plan.calibration)


def _with_found(plan: Plan, c: float, found: Calibration | None) -> Plan:
    recipe = plan.recipe
    if recipe.scaling is Scaling.MEASURED:
        recipe = replace(recipe, scaling=c)
    target = SHIPPED if plan.family.target.ships_code else plan.family.target.model_type
    made = build_plan(
        recipe,
        plan.source,
        target=target,
        options=plan.options,
        inputs=plan.inputs,
        calibration=found,
    )
    return replace(made, announced=plan.digest)


def _check_router_range(recipe: Recipe, tensors: tuple[OutputTensor, ...]) -> None:
    """Raise UpcycleError for logits that fit into the routers' dtype by chance only, if at all."""
    std = recipe.router_logit_std or 0.0
    for tensor in tensors:
        if tensor.role is not Role.ROUTER:
            continue
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
) -> None:
    used = {name for tensor in tensors for name in sources(tensor.expr)}
    unused = source.tensors.keys() - used - dropped.keys()
    assert not unused, f"source tensors neither used nor dropped: {sorted(unused)[:3]}"
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is planned twice"
    # A shared expert is drawn at the scale of a part that the experts may still lack.
    made = {part for tensor in tensors for part in tensor.holds}
    assert {*parts} <= made, f"no expert holds {sorted({*parts} - made)}"


def _shards(tensors: tuple[OutputTensor, ...], max_bytes: int) -> tuple[Shard, ...]:
    """Fill shards in order; a tensor larger than `max_bytes` gets one of its own."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return (Shard(WEIGHTS_NAME, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    )
