"""From a recipe and a dense checkpoint's headers to everything that is to be written.

`build_plan` is pure: it reads no weight, writes nothing and imports no torch. It fails before the
first byte is written, since planning is type checking: every output's type must be what the target
expects from its own config, and every source tensor must be used or dropped for a stated reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

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
from upcycle_cli.families import Family, choose
from upcycle_cli.families.dense import dense_shapes
from upcycle_cli.families.engines import Engine, engines
from upcycle_cli.families.target import (
    ExpertLayout,
    expected,
    has_plain_attention,
    moe_config,
)
from upcycle_cli.front_matter import Carried, carried_over
from upcycle_cli.outputs import EXPERT_ROLES, Options, OutputTensor, Role, output_tensors
from upcycle_cli.recipe import Factors, Promise, Recipe
from upcycle_cli.redirects import refuse_redirects

_MEANING = 2
"""Another number whenever an expression comes to mean other bytes: 2 since numpy draws routers."""

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

    def with_source(self, source: Checkpoint) -> Plan:
        """Return the same plan for the same source, brought to another place."""
        if source is self.source:
            return self
        return replace(self, source=source, carried=carried_over(source.path, CARD_NAME))

    @property
    def file_names(self) -> list[str]:
        """What the output consists of, beside its record, card and checksums."""
        index = [INDEX_NAME] if len(self.shards) > 1 else []
        names = [shard.name for shard in self.shards]
        return [CONFIG_NAME, *index, *names, *(file.name for file in self.source.companions)]

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """All output tensors in file order."""
        for shard in self.shards:
            yield from shard.tensors

    @property
    def factors(self) -> Factors:
        """What each expert matrix is multiplied by."""
        return self.recipe.factors()

    @property
    def promise(self) -> Promise:
        """What the output owes the dense model."""
        return self.recipe.promise()

    @cached_property
    def rounded_to(self) -> str | None:
        """The dtype that dense weights are rounded to, or None when no bit of them is lost."""
        for tensor in self.tensors:
            # What is drawn at random has nothing to lose.
            drawn = tensor.role in (Role.ROUTER, Role.SHARED_EXPERT)
            for name in () if drawn else sources(tensor.expr):
                if _narrows(self.source.tensors[name].dtype, tensor.dtype):
                    return TORCH_DTYPES[tensor.dtype]
        return None if self.factors.lossless else self._expert_dtype

    @property
    def lossless(self) -> bool:
        """Whether the dense weights can be recovered bit for bit."""
        return self.rounded_to is None

    @property
    def _expert_dtype(self) -> str:
        return TORCH_DTYPES[next(t.dtype for t in self.tensors if t.role in EXPERT_ROLES)]

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
        experts = sum(t.num_elements for t in self.tensors if t.role in EXPERT_ROLES)
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
        decoder = self.family.decoder
        # Looking up an embedding costs nothing; a tied one is used once more, as the head.
        lookup = decoder.vocab_size * decoder.hidden_size
        tied_dense = decoder.tie_word_embeddings and "lm_head.weight" not in self.source.tensors
        tied_moe = tied_dense and not self.options.untie_embeddings
        dense = self.dense_parameters - (0 if tied_dense else lookup)
        return (self.active_parameters - (0 if tied_moe else lookup)) / dense

    @property
    def engines(self) -> tuple[Engine, ...]:
        """What is known of each inference engine and this output."""
        routing = self.recipe.routing
        assert routing is not None
        return engines(
            self.family.target.model_type,
            routing,
            tied=self.config["tie_word_embeddings"],
            fused=self.options.expert_layout is ExpertLayout.FUSED,
            plain_attention=has_plain_attention(self.config),
        )

    @cached_property
    def digest(self) -> str:
        """Identify the output: equal digests mean equal files.

        It covers each source file's size and modification time, since headers alone cannot tell
        two models of one shape apart; of a commit on the Hub, the commit can.
        """
        pinned = self.source.revision is not None
        content = {
            "meaning": _MEANING,
            "recipe": asdict(self.recipe),
            "options": asdict(self.options),
            "config": self.config,
            "source_name": self.source.name,
            "source_config": self.source.config_digest,
            "source_revision": self.source.revision,
            "source": [
                {
                    "name": file.name,
                    "size": file.size,
                    "mtime_ns": 0 if pinned else file.mtime_ns,
                    "digest": file.digest,
                }
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
) -> Plan:
    """Plan the conversion of a dense checkpoint.

    Raises UpcycleError when the model cannot be expressed by the target, when its tensors are not
    what its config says, or when the recipe does not fit its sizes.
    """
    options = options or Options()
    family = choose(source.config, target, recipe.routing)
    refuse_redirects(source.config, source.tokenizer_config(), source.storage.names())
    recipe = recipe.resolve(family.target.routings[0])
    dropped = _check_source(source, family)
    _check_granularity(recipe, family.decoder.intermediate_size)
    config = moe_config(
        source.config,
        family.decoder,
        family.target,
        recipe,
        untie_embeddings=options.untie_embeddings,
        dtype=options.dtype,
    )
    tensors = tuple(output_tensors(recipe, options, family, source))
    _check_types(tensors, family, config, options)
    _check_router_range(recipe, tensors)
    _check_all_used(tensors, source, dropped)
    shards = _shards(tensors, options.max_shard_bytes)
    carried = carried_over(source.path, CARD_NAME)
    return Plan(recipe, options, family, source, config, shards, dropped, carried)


def _narrows(source: str, output: str) -> bool:
    # bf16 and fp16 each hold values that the other does not; fp32 holds all of both.
    return output not in {source, "F32"}


def _check_granularity(recipe: Recipe, intermediate_size: int) -> None:
    granularity = recipe.granularity
    if intermediate_size % granularity == 0:
        return
    divisors = [d for d in range(1, intermediate_size + 1) if intermediate_size % d == 0]
    below = max(d for d in divisors if d < granularity)
    above = min((d for d in divisors if d > granularity), default=None)
    raise UpcycleError(
        f"intermediate size {intermediate_size} is not divisible by granularity {granularity}.",
        f"Try {below}." if above is None else f"Try {below} or {above}.",
    )


def _check_router_range(recipe: Recipe, tensors: tuple[OutputTensor, ...]) -> None:
    """Raise UpcycleError for logits that fit into the routers' dtype by chance only, if at all."""
    std = recipe.router_logit_std or 0.0
    for tensor in tensors:
        # What leaves the norm has a length of √H: no token has a larger logit than this.
        most = LARGEST[tensor.dtype] / (math.sqrt(tensor.shape[-1]) * _LONGEST_ROW)
        if tensor.role is Role.ROUTER and std > most:
            raise UpcycleError(
                f"router logits of standard deviation {std:g} overflow "
                f"{TORCH_DTYPES[tensor.dtype]}, which ends at {LARGEST[tensor.dtype]:g}.",
                f"Use a --router-logit-std below {most:.3g}, or another --dtype.",
            )


def _check_source(source: Checkpoint, family: Family) -> dict[str, str]:
    """Compare the source's tensors with what its config implies; return those to drop."""
    shapes = dense_shapes(family.decoder)
    if "lm_head.weight" in source.tensors:
        # A tied model may carry its head; copied, it means to every engine what it meant before.
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    missing = [name for name in shapes if name not in source.tensors]
    if missing:
        raise UpcycleError(
            f"{source.path} lacks {_some(missing)}, which its config.json implies.",
            "Only whole causal language models can be upcycled, not adapters or bare encoders.",
        )
    dropped: dict[str, str] = {}
    for name, entry in source.tensors.items():
        if name not in shapes:
            dropped[name] = _reason_to_drop(name, source, family)
        elif entry.shape != shapes[name]:
            raise UpcycleError(
                f"{source.path}: {name} has shape {list(entry.shape)}, "
                f"but config.json implies {list(shapes[name])}."
            )
        elif entry.dtype not in TORCH_DTYPES:
            raise UpcycleError(
                f"{source.path}: {name} is stored as {entry.dtype}; the weights are quantised, "
                "or of a dtype that no model is trained in.",
                f"Only {', '.join(TORCH_DTYPES)} can be converted.",
            )
    return dropped


def _reason_to_drop(name: str, source: Checkpoint, family: Family) -> str:
    for pattern, reason in family.dense.ignored:
        if pattern.fullmatch(name):
            return reason
    raise UpcycleError(
        f"{source.path}: unknown tensor {name}.",
        f"A {family.dense.model_type} model has no such tensor, so dropping it could change the "
        "model. If it is not needed, remove it from the checkpoint.",
    )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return names[0] + rest


def _check_types(
    tensors: tuple[OutputTensor, ...],
    family: Family,
    config: Mapping[str, Any],
    options: Options,
) -> None:
    wanted = expected(family.decoder, config, family.target, options.expert_layout)
    planned = {tensor.name: tensor.shape for tensor in tensors}
    if "lm_head.weight" in planned and config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = planned["lm_head.weight"]
    if planned != wanted:
        wrong = [name for name in planned | wanted if planned.get(name) != wanted.get(name)]
        raise AssertionError(f"the plan and {family.target.model_type} disagree on {wrong[:3]}")
    assert len(planned) == len(tensors), "a tensor is planned twice"


def _check_all_used(
    tensors: tuple[OutputTensor, ...], source: Checkpoint, dropped: Mapping[str, str]
) -> None:
    used = {name for tensor in tensors for name in sources(tensor.expr)}
    unused = source.tensors.keys() - used - dropped.keys()
    assert not unused, f"source tensors neither used nor dropped: {sorted(unused)[:3]}"


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
