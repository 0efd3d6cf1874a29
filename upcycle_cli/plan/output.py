"""The output: its tensors, its files, and the options for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.checkpoint.header import COUNTERS, TORCH_DTYPES, Tensor
from upcycle_cli.checkpoint.storage import WEIGHTS_NAME
from upcycle_cli.core.display import Compact
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import choose_from
from upcycle_cli.plan.expressions import Cast, Expr, type_of
from upcycle_cli.recipe.options import ExpertLayout, check_types

DEFAULT_SHARD_BYTES = 5_000_000_000


class Role(StrEnum):
    """What an output tensor is for."""

    COPIED = "copied"
    ROUTER = "router"
    CORRECTION_BIAS = "correction_bias"
    ADDED = "added"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ZERO_BIAS = "zero_bias"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class OutputTensor(Tensor):
    """A tensor to write, and the expression that makes it."""

    expr: Expr
    role: Role
    layer: int | None = None
    expert: int | None = None
    parts: tuple[str, ...] = ()
    """The parts of the dense MLP that it holds for one expert, or for all of them."""

    @classmethod
    def of(
        cls,
        name: str,
        expr: Expr,
        role: Role,
        layer: int | None = None,
        expert: int | None = None,
        parts: tuple[str, ...] = (),
    ) -> OutputTensor:
        """Return the tensor that an expression makes; UpcycleError if it joins dtypes."""
        kind = type_of(expr)
        return cls(name, kind.dtype, kind.shape, expr, role, layer, expert, parts)


@dataclass(frozen=True, slots=True, repr=False)
class Shard(Compact):
    """One weight file of the output, with its final name and its tensors in order."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def fill_shards(tensors: Sequence[OutputTensor], max_bytes: int) -> tuple[Shard, ...]:
    """Fill shards in order; a tensor larger than `max_bytes` gets its own shard."""
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the output is stored.

    `dtype` is bfloat16, float16 or float32; None keeps the dtype of each tensor. `expert_layout` is
    "per-expert", "stacked" or "fused"; None means the layout of the target's released models.
    """

    dtype: str | None = None
    expert_layout: ExpertLayout | str | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    untie_embeddings: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype is not None and self.dtype not in TORCH_DTYPES.values():
            hint = choose_from(self.dtype, TORCH_DTYPES.values())
            raise UpcycleError(f"`dtype` cannot be {self.dtype!r}.", hint)
        if self.max_shard_bytes < 1:
            size = self.max_shard_bytes
            raise UpcycleError(f"the size of shards must be positive, not {size}.")

    @property
    def storage_dtype(self) -> str | None:
        """The dtype in safetensors' notation, or None to keep the dtype of each tensor."""
        names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        return None if self.dtype is None else names[self.dtype]

    def cast(self, expr: Expr) -> Expr:
        """Return an expression in the chosen dtype."""
        dtype = self.storage_dtype
        if dtype is None or type_of(expr).dtype in (dtype, *COUNTERS):
            return expr
        return Cast(expr, dtype)
