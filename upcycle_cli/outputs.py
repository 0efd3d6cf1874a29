"""The output tensors: what each is for, and the expression that makes it.

The one place that knows where the parts of a dense MLP go: expert e = g·G + s holds shard s of
virtual group g, rows [s·I/G, (s+1)·I/G) of gate and up and the same columns of down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.checkpoint import ITEM_BYTES, TORCH_DTYPES, Checkpoint
from upcycle_cli.errors import UpcycleError
from upcycle_cli.expr import (
    Cast,
    Concat,
    Expr,
    Normal,
    Repeat,
    Scale,
    Slice,
    Source,
    Stack,
    Zeros,
    type_of,
)
from upcycle_cli.families import Family
from upcycle_cli.families.dense import shared_shapes
from upcycle_cli.families.target import ExpertLayout
from upcycle_cli.recipe import Recipe

DEFAULT_SHARD_BYTES = 5_000_000_000


class Role(StrEnum):
    """What an output tensor is for."""

    COPIED = "copied"
    ROUTER = "router"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate_up"
    SHARED_EXPERT = "shared_expert"
    ZERO_BIAS = "zero_bias"
    HEAD = "head"


EXPERT_ROLES = {Role.GATE, Role.UP, Role.DOWN, Role.GATE_UP}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to write: its type, what it is, and how it is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    expr: Expr
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user wants of the files, beside the recipe."""

    dtype: str | None = None
    """bfloat16, float16 or float32 for every tensor, or None to keep each one's own."""
    expert_layout: ExpertLayout = ExpertLayout.PER_EXPERT
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    untie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.expert_layout not in set(ExpertLayout):
            raise UpcycleError(
                f"'{self.expert_layout}' is not an expert layout.",
                f"Choose from {', '.join(ExpertLayout)}.",
            )
        # Python callers may write "fused"; it must not compare unequal to the member.
        object.__setattr__(self, "expert_layout", ExpertLayout(self.expert_layout))
        if self.dtype is not None and self.dtype not in TORCH_DTYPES.values():
            raise UpcycleError(
                f"'{self.dtype}' is not a dtype for weights.",
                f"Use one of {', '.join(TORCH_DTYPES.values())}.",
            )
        if self.max_shard_bytes < 1:
            raise UpcycleError(
                f"the largest shard size must be positive, not {self.max_shard_bytes}."
            )

    @property
    def storage_dtype(self) -> str | None:
        """The dtype in safetensors' notation, or None to keep each tensor's own."""
        names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        return None if self.dtype is None else names[self.dtype]


def output_tensors(
    recipe: Recipe, options: Options, family: Family, source: Checkpoint
) -> Iterator[OutputTensor]:
    """Yield every tensor of the MoE, in the order in which they are written."""
    maker = _Maker(recipe, options, family, source)
    shared = list(shared_shapes(family.decoder))
    if "lm_head.weight" in source.tensors and "lm_head.weight" not in shared:
        shared.append("lm_head.weight")
    yield maker.copied("model.embed_tokens.weight")
    for layer in range(family.decoder.num_layers):
        prefix = f"model.layers.{layer}."
        for name in (name for name in shared if name.startswith(prefix)):
            yield maker.copied(name, layer)
        yield from maker.zero_biases(layer)
        yield maker.router(layer)
        yield from maker.experts(layer)
        yield from maker.shared_expert(layer)
    yield maker.copied("model.norm.weight")
    if "lm_head.weight" in shared:
        yield maker.copied("lm_head.weight")
    elif options.untie_embeddings:
        head = maker.source("model.embed_tokens.weight")
        yield maker.output("lm_head.weight", head, Role.HEAD)


@dataclass(frozen=True)
class _Maker:
    """Writes down the expression of each output tensor of one conversion."""

    recipe: Recipe
    options: Options
    family: Family
    checkpoint: Checkpoint

    def source(self, name: str) -> Expr:
        """A dense tensor in the output dtype."""
        entry = self.checkpoint.tensors[name]
        expr = Source(name, entry.dtype, entry.shape)
        dtype = self.options.storage_dtype
        return expr if dtype in (None, entry.dtype) else Cast(expr, dtype)

    def output(
        self,
        name: str,
        expr: Expr,
        role: Role,
        layer: int | None = None,
        expert: int | None = None,
    ) -> OutputTensor:
        try:
            kind = type_of(expr)
        except ValueError as error:
            raise UpcycleError(
                f"{name} would join matrices of different dtypes.",
                "Choose one with --dtype, or write --expert-layout per-expert.",
            ) from error
        return OutputTensor(name, kind.dtype, kind.shape, expr, role, layer, expert)

    def copied(self, name: str, layer: int | None = None) -> OutputTensor:
        return self.output(name, self.source(name), Role.COPIED, layer)

    def zero_biases(self, layer: int) -> Iterator[OutputTensor]:
        if not self.family.target.forced_qkv_bias or self.family.decoder.qkv_bias:
            return
        for matrix in ("q_proj", "k_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{matrix}"
            weight = type_of(self.source(f"{prefix}.weight"))
            bias = Zeros(weight.dtype, weight.shape[:1])
            yield self.output(f"{prefix}.bias", bias, Role.ZERO_BIAS, layer)

    def router(self, layer: int) -> OutputTensor:
        recipe, names = self.recipe, self.family.target.names
        rows = recipe.expansion if recipe.virtual_groups else recipe.num_experts
        expr: Expr = self._normal(layer, "router", rows, recipe.router_logit_std or 1.0)
        if recipe.virtual_groups and recipe.granularity > 1:
            expr = Repeat(expr, recipe.granularity)
        fused = self.options.expert_layout is ExpertLayout.FUSED
        template = names.fused_router if fused else names.router
        return self.output(template.format(layer=layer), expr, Role.ROUTER, layer)

    def _normal(self, layer: int, purpose: str, rows: int, logit_std: float) -> Normal:
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        entry = self.checkpoint.tensors[name]
        mlp = type_of(self.source(f"model.layers.{layer}.mlp.gate_proj.weight"))
        return Normal(
            seed=self.recipe.seed,
            stream=f"layers.{layer}.{purpose}",
            dtype=mlp.dtype,
            shape=(rows, self.family.decoder.hidden_size),
            logit_std=logit_std,
            norm=Source(name, entry.dtype, entry.shape),
        )

    def experts(self, layer: int) -> Iterator[OutputTensor]:
        recipe, names = self.recipe, self.family.target.names
        shards = [self._shard_matrices(layer, s) for s in range(recipe.granularity)]
        if self.options.expert_layout is ExpertLayout.FUSED:
            # Expert e = g·G + s holds shard s of group g.
            gate_up = Stack(tuple(Concat((gate, up)) for gate, up, _ in shards) * recipe.expansion)
            down = Stack(tuple(down for _, _, down in shards) * recipe.expansion)
            name = names.fused_gate_up.format(layer=layer)
            yield self.output(name, gate_up, Role.GATE_UP, layer)
            yield self.output(names.fused_down.format(layer=layer), down, Role.DOWN, layer)
            return
        for expert in range(recipe.num_experts):
            matrices = shards[expert % recipe.granularity]
            templates = (names.gate, names.up, names.down)
            roles = (Role.GATE, Role.UP, Role.DOWN)
            for template, role, expr in zip(templates, roles, matrices, strict=True):
                name = template.format(layer=layer, expert=expert)
                yield self.output(name, expr, role, layer, expert)

    def _shard_matrices(self, layer: int, shard: int) -> tuple[Expr, Expr, Expr]:
        """Return gate, up and down of shard s: rows of gate and up, columns of down."""
        size = self.family.decoder.intermediate_size // self.recipe.granularity
        factors = self.recipe.factors()
        result = []
        for matrix, dim, factor in (
            ("gate_proj", 0, factors.gate),
            ("up_proj", 0, factors.up),
            ("down_proj", 1, factors.down),
        ):
            expr = self.source(f"model.layers.{layer}.mlp.{matrix}.weight")
            if self.recipe.granularity > 1:
                expr = _sliced(expr, dim, shard * size, (shard + 1) * size)
            result.append(expr if factor == 1.0 else Scale(expr, factor))
        gate, up, down = result
        return gate, up, down

    def shared_expert(self, layer: int) -> Iterator[OutputTensor]:
        names, size = self.family.target.names, self.family.target.shared_expert_size
        if size is None:
            return
        dtype = self._normal(layer, "", 1, 1.0).dtype
        hidden = self.family.decoder.hidden_size
        for template, shape in (
            (names.shared_gate, (size, hidden)),
            (names.shared_up, (size, hidden)),
            (names.shared_down, (hidden, size)),
        ):
            assert template is not None
            name = template.format(layer=layer)
            yield self.output(name, Zeros(dtype, shape), Role.SHARED_EXPERT, layer)
        assert names.shared_router is not None
        row = self._normal(layer, "shared_expert_gate", 1, 1.0)
        name = names.shared_router.format(layer=layer)
        yield self.output(name, row, Role.SHARED_EXPERT, layer)


def _sliced(expr: Expr, dim: int, start: int, stop: int) -> Expr:
    # Slicing before casting touches only the bytes that are needed.
    if isinstance(expr, Cast):
        return Cast(Slice(expr.of, dim, start, stop), expr.dtype)
    return Slice(expr, dim, start, stop)
