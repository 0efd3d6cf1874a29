"""The plan: every file that will be written, and the facts for the record and the card.

`build_plan` upcycles dense models and `build_growth` expands an MoE; both return a `Plan`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upcycle_cli.checkpoint.card_metadata import CardMetadata
from upcycle_cli.checkpoint.checkpoint import Checkpoint, Reader, open_reader
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME, INDEX_NAME
from upcycle_cli.core.display import Compact
from upcycle_cli.models.engines import Engine, Trainer, Traits, engines, trainers, traits_of
from upcycle_cli.models.lookup import Family
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import CODE_NAME, modeling_code
from upcycle_cli.plan.expressions import loses_bits
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.merge import Merge, merged_card_metadata
from upcycle_cli.plan.output import Options, OutputTensor, Role, Shard
from upcycle_cli.recipe.recipe import ExpertLayout, Promise, Recipe, Routing
from upcycle_cli.recipe.scaling import Factors, is_power_of_two

if TYPE_CHECKING:
    from upcycle_cli.plan.calibration import Calibration, LayerFound

_EXPRESSIONS_VERSION = 2
"""Increased whenever the same expression gives other bytes: 2 since numpy draws routers."""


@dataclass(frozen=True, kw_only=True)
class Growing:
    """How an MoE grows: the copies of each expert, and N and T of the source."""

    expand: int
    source_num_experts: int
    source_top_k: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Compact):
    """Everything that will be written, decided before the first byte."""

    options: Options
    source: Checkpoint
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    target: Target
    """The architecture of the output."""
    num_experts: int
    """N, the routed experts of one layer."""
    top_k: int
    """T, the experts that a token uses."""
    expert_size: int
    """The intermediate size of an expert."""
    routing: Routing
    layers: tuple[int, ...]
    """The layers that are mixtures of experts."""
    num_layers: int
    shares: bool
    """Whether a shared expert computes something."""
    expert_layout: ExpertLayout
    dense_parameters: int
    """Parameters of the source, without the tensors that are dropped."""
    upcycles: tuple[Recipe, Family] | None = None
    """The recipe, with the target's defaults filled in, and the dense model with its target."""
    growing: Growing | None = None
    """How an MoE grows; None for a plan that upcycles."""
    inputs: Inputs = field(default_factory=Inputs)
    merge: Merge | None = None
    """The other models that give experts."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Source tensors that are not used, each with the reason."""
    calibration: Calibration | None = None
    """The results of the calibration, once it has run."""
    bound_digest: str | None = None
    """The digest before a calibration was bound to the plan."""

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; only for a plan that upcycles."""
        assert self.upcycles is not None, "this plan grows an MoE"
        return self.upcycles[0]

    @property
    def family(self) -> Family:
        """The dense model and its target; only for a plan that upcycles."""
        assert self.upcycles is not None, "this plan grows an MoE"
        return self.upcycles[1]

    @cached_property
    def factors(self) -> Factors:
        """What the expert matrices are multiplied by; only for a plan that upcycles."""
        return self.recipe.factors(self.family.dense.mlp_kind)

    @cached_property
    def _promised(self) -> tuple[Promise, str]:
        if self.merge is not None:
            words = "its experts come from several models, which compute different functions"
            return Promise.NONE, words
        if self.growing is None:
            return self.recipe.promise(self.factors, self.family.dense.mlp_kind)
        exact = self.growing.expand * self.growing.source_top_k
        if self.top_k == exact:
            return Promise.EXACT, ""
        words = f"top-k is {self.top_k}, but only {exact} chooses all copies of the same experts"
        return Promise.NONE, words

    @property
    def promise(self) -> Promise:
        """The guaranteed equality with the source."""
        return self._promised[0]

    @property
    def why_no_promise(self) -> str:
        """Why no equality is guaranteed; "" if one is."""
        return self._promised[1]

    def found(self, layer: int) -> LayerFound | None:
        """Return the results of the calibration for a layer, once it has run."""
        return None if self.calibration is None else self.calibration.layers[layer]

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All checkpoints that tensors are read from, the source first."""
        return (self.source, *(() if self.merge is None else self.merge.others))

    @cached_property
    def card_metadata(self) -> CardMetadata:
        """The metadata that the new card takes over from the sources' cards."""
        return merged_card_metadata(self.sources)

    def with_sources(self, sources: Sequence[Checkpoint]) -> Plan:
        """Return the same plan for copies of the sources elsewhere."""
        source, *others = sources
        merge = self.merge and replace(self.merge, others=tuple(others))
        return replace(self, source=source, merge=merge)

    def reader(self) -> AbstractContextManager[Reader]:
        """Open the sources' files; the reader takes the names that expressions use."""
        return open_reader(self.sources)

    @property
    def how(self) -> dict[str, Any]:
        """How the output is made, in JSON values for the record."""
        if self.growing is not None:
            made = {"top_k": self.top_k, "routing": self.routing}
            return {"growth": {**asdict(self.growing), **made}}
        inputs, found, merge = self.inputs, self.calibration, self.merge
        stated: dict[str, Any] = {
            "recipe": {"name": self.recipe.name, **asdict(self.recipe)},
            "factors": asdict(self.factors),
            "calibration": None,
        }
        if inputs.text is not None and found is not None:
            stated["calibration"] = {
                "text": inputs.text.name,
                "text_sha256": inputs.text.digest,
                "tokens": found.tokens,
                "sha256": found.digest,
                "layers": list(found.summary()),
            }
        if merge is not None:
            models = [{"name": each.name, "revision": each.revision} for each in merge.others]
            groups = list(merge.of_groups(self.recipe.expansion))  # 0 is the source
            stated["experts_from"] = {"models": models, "groups": groups, "rest": merge.rest}
        if inputs.rows is not None:
            stated["router_file"] = inputs.rows.record
        if inputs.orders is not None:
            stated["order_file"] = inputs.orders.record
        return stated

    @property
    def code(self) -> str | None:
        """The modeling code to ship with the output, if any."""
        if not self.target.ships_code:
            return None
        row = self.family.dense.family
        return modeling_code(row.classes, text_model=row.text_model)

    @property
    def file_names(self) -> list[str]:
        """The files of the output beside its record, card and checksums."""
        extra = [INDEX_NAME] if len(self.shards) > 1 else []
        extra += [CODE_NAME] if self.target.ships_code else []
        names = [shard.name for shard in self.shards]
        return [CONFIG_NAME, *extra, *names, *(file.name for file in self.source.companions)]

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All output tensors in file order."""
        for shard in self.shards:
            yield from shard.tensors

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
        """Parameters that one token uses: all except the experts that it does not choose."""
        experts = sum(t.num_elements for t in self.tensors if t.role is Role.EXPERT)
        idle = self.num_experts - self.top_k
        return self.total_parameters - experts // self.num_experts * idle

    @property
    def multiplied(self) -> tuple[int, int]:
        """The parameters in a text token's matrix products, of the MoE and the dense model.

        An embedding is a lookup, and counts only if it is tied to the head.
        """
        row, tensors = self.family.dense.family, self.source.tensors
        lookup, untied = tensors[row.embedding].num_elements, row.head in tensors
        # Text tokens do not meet a vision tower, and some families have a second lookup table.
        by_layer = f"{row.embedding.removesuffix('.weight')}_per_layer.weight"
        around = sum(
            t.num_elements for t in tensors.values() if not row.has(t.name) or t.name == by_layer
        )
        moe = self.active_parameters - lookup * (untied or self.options.untie_embeddings) - around
        return moe, self.dense_parameters - lookup * untied - around

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the MoE's matrix products on a token, forward.

        Two for each parameter (2N of Kaplan et al., arXiv 2001.08361, section 2.1). Attention
        scores, which depend on the context length, are left out.
        """
        return 2 * self.multiplied[0]

    @property
    def flops_ratio(self) -> float:
        """The FLOPs per token as a multiple of the dense model's."""
        moe, dense = self.multiplied
        return moe / dense

    @property
    def expert_dtype(self) -> str:
        """The dtype of the experts' matrices, in safetensors' notation."""
        return next(t.dtype for t in self.tensors if t.role is Role.EXPERT)

    @property
    def rounded_parts(self) -> tuple[str, ...]:
        """The parts of an expert that scaling rounds, since their factor is no power of two."""
        held = {part for t in self.tensors if t.role is Role.EXPERT for part in t.parts}
        scaled = () if self.growing else sorted(held)
        return tuple(part for part in scaled if not is_power_of_two(self.factors.of(part)))

    @cached_property
    def rounded_to(self) -> str | None:
        """The dtype that source weights are rounded to; None if they keep every bit."""
        # Copies share one expression, which is looked at once.
        for tensor in {id(tensor.expr): tensor for tensor in self.tensors}.values():
            if tensor.role is not Role.ADDED and loses_bits(tensor.expr):
                return TORCH_DTYPES[tensor.dtype]
        return None

    @property
    def lossless(self) -> bool:
        """Whether the source weights can be recovered bit for bit."""
        return self.rounded_to is None and not (self.growing is None and self.recipe.perturbed)

    @property
    def traits(self) -> Traits:
        """What this output has that software may not support."""
        return traits_of(
            self.target,
            self.config,
            self.routing,
            fused=self.expert_layout is ExpertLayout.FUSED,
            layers=self.layers,
            shared=self.shares,
        )

    @property
    def engines(self) -> tuple[Engine, ...]:
        """What is known of each inference engine and this output."""
        return engines(self.target.title, self.traits)

    @property
    def trainers(self) -> tuple[Trainer, ...]:
        """What is known of each trainer and this output."""
        return trainers(self.target, self.traits, num_experts=self.num_experts)

    @cached_property
    def digest(self) -> str:
        """Identify the output: equal digests mean equal files.

        It covers the size and modification time of each source file, or the commit on the Hub,
        since models of one shape have equal headers. It covers a calibration's text rather than the
        results, so it is known before the calibration runs.
        """
        if self.bound_digest is not None:
            return self.bound_digest
        text = self.inputs.text
        options = replace(self.options, expert_layout=self.expert_layout)
        content = {
            "expressions": _EXPRESSIONS_VERSION,
            "options": asdict(options),
            "config": self.config,
            "how": {key: value for key, value in self.how.items() if key != "calibration"},
            "calibration": None if text is None else text.digest,
            "sources": [source.identity for source in self.sources],
            "shards": [
                [shard.name, [(t.name, t.dtype, t.shape, repr(t.expr)) for t in shard.tensors]]
                for shard in self.shards
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
