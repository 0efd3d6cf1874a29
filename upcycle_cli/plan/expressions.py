"""How an output tensor is made: a small language of frozen expressions.

Nothing here needs data or numpy, so a plan can be checked and printed without either. Equal
expressions are equal values: whoever evaluates them can do each once. Concat and Stack join along
the first dimension only, so their bytes are their parts' bytes end to end, and `leaves` takes them
apart: no joined tensor is ever held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

from upcycle_cli.checkpoint.header import ITEM_BYTES
from upcycle_cli.recipe.scaling import is_power_of_two


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the dense checkpoint, as it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of tensors of one shape: summed in order and divided in float32, rounded once."""

    parts: tuple[Source, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Entries [start, stop) along `dim`."""

    of: Expr
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Select:
    """Entry `index` of the first dimension, without that dimension: one of a stack."""

    of: Expr
    index: int


@dataclass(frozen=True, slots=True)
class Permutation:
    """A permutation of `size` neurons: drawn, a pure function of (seed, stream), or given.

    Of a given one, `origin` is a digest of the indices, or of the text that a calibration finds
    them in; they themselves, 32-bit integers, are no part of what is compared, and may become known
    later.
    """

    size: int
    stream: str
    seed: int | None = None
    origin: str = ""
    indices: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Gather:
    """Entries along `dim`, the first dimension or the second, by an order of `order.size` of them.

    Those of its places [start, stop); the order counts from entry `offset` on.
    """

    of: Expr
    dim: int
    order: Permutation
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Cast:
    """The same values rounded to another dtype; finite values must stay finite."""

    of: Expr
    dtype: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Each value times `factor`, the product taken in float32 and rounded to the dtype."""

    of: Expr
    factor: float


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts joined along their first dimension."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """Equal shapes under a new first dimension."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """A matrix with its rows as columns: (R, C) becomes (C, R)."""

    of: Expr


@dataclass(frozen=True, slots=True)
class Repeat:
    """Each row `times` times in a row: (R, …) becomes (R·times, …)."""

    of: Expr
    times: int


@dataclass(frozen=True, slots=True)
class Halves:
    """Of every `size` rows, the first `rotary` by their parity: the even ones, then the odd."""

    of: Expr
    size: int
    rotary: int


@dataclass(frozen=True, slots=True)
class Normal:
    """Random rows that give logits of standard deviation `logit_std` behind a norm.

    The norm's output has unit RMS before its weight γ, the stored one plus `offset`, so the rows'
    standard deviation is logit_std / ‖γ‖₂; without a norm, γ is taken to be all ones. The values
    are a pure function of (seed, stream) and γ.
    """

    seed: int
    stream: str
    dtype: str
    shape: tuple[int, int]
    logit_std: float
    norm: Source | Mean | None
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Constant:
    """Values that come with the plan: rows fitted to a calibration, or read from a file.

    `origin`, a digest, stands for all that they follow from beside what the plan says of itself;
    the values may become known only after that, and are no part of what is compared.
    """

    stream: str
    dtype: str
    shape: tuple[int, int]
    origin: str
    data: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class RandomLike:
    """Random values as large as another tensor's: a pure function of (seed, stream) and that."""

    seed: int
    stream: str
    shape: tuple[int, ...]
    of: Expr


@dataclass(frozen=True, slots=True)
class AddNoise:
    """Each value plus a normal one of `std` times their deviation, by (seed, stream) and them."""

    of: Expr
    std: float
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Reinit:
    """The first `count` entries of an order along `dim` drawn anew, all others as they are.

    What is new is normal, of the mean and the standard deviation of what it replaces, and a pure
    function of (seed, stream) and that.
    """

    of: Expr
    dim: int
    order: Permutation
    count: int
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Zeros:
    """All zeros."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Full:
    """One value everywhere, rounded to float32 and then to the dtype."""

    dtype: str
    shape: tuple[int, ...]
    value: float


Expr: TypeAlias = (
    Source
    | Mean
    | Slice
    | Select
    | Gather
    | Cast
    | Scale
    | Concat
    | Stack
    | Transpose
    | Repeat
    | Halves
    | Normal
    | Constant
    | RandomLike
    | AddNoise
    | Reinit
    | Zeros
    | Full
)


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype in safetensors' notation, and a shape."""

    dtype: str
    shape: tuple[int, ...]


def type_of(expr: Expr) -> TensorType:  # noqa: C901, PLR0911, PLR0912 - one case per kind
    """Return the dtype and shape of an expression; ValueError when its parts do not fit."""
    match expr:
        case Source() | Zeros() | Full() | Normal() | Constant():
            return TensorType(expr.dtype, expr.shape)
        case Mean(parts, dtype):
            return TensorType(dtype, parts[0].shape)
        case RandomLike(shape=shape, of=of):
            return TensorType(type_of(of).dtype, shape)
        case Slice(of, dim, start, stop):
            inner = type_of(of)
            if not (dim < len(inner.shape) and 0 <= start <= stop <= inner.shape[dim]):
                raise ValueError(f"{start}:{stop} of dimension {dim} is not inside {inner}")
            shape = (*inner.shape[:dim], stop - start, *inner.shape[dim + 1 :])
            return TensorType(inner.dtype, shape)
        case Select(of, index):
            inner = type_of(of)
            if not (inner.shape and 0 <= index < inner.shape[0]):
                raise ValueError(f"there is no entry {index} in {inner}")
            return TensorType(inner.dtype, inner.shape[1:])
        case Gather(of, dim, order, start, stop, offset):
            inner = type_of(of)
            inside = dim < len(inner.shape) <= 2 and offset + order.size <= inner.shape[dim]
            if not (inside and 0 <= start <= stop <= order.size):
                raise ValueError(f"{order.size} of dimension {dim} from {offset} not in {inner}")
            shape = (*inner.shape[:dim], stop - start, *inner.shape[dim + 1 :])
            return TensorType(inner.dtype, shape)
        case Cast(of, dtype):
            return TensorType(dtype, type_of(of).shape)
        case Scale(of) | AddNoise(of):
            return type_of(of)
        case Reinit(of, dim, order, count):
            inner = type_of(of)
            if not (dim < len(inner.shape) <= 2 and order.size == inner.shape[dim] >= count):
                raise ValueError(f"{count} of {order.size} of dimension {dim} are not in {inner}")
            return inner
        case Concat(parts):
            types = [type_of(part) for part in parts]
            if len({(item.dtype, item.shape[1:]) for item in types}) != 1:
                raise ValueError(f"cannot concatenate {types}")
            rows = sum(item.shape[0] for item in types)
            return TensorType(types[0].dtype, (rows, *types[0].shape[1:]))
        case Stack(parts):
            types = [type_of(part) for part in parts]
            if len(set(types)) != 1:
                raise ValueError(f"cannot stack {types}")
            return TensorType(types[0].dtype, (len(parts), *types[0].shape))
        case Transpose(of):
            inner = type_of(of)
            if len(inner.shape) != 2:
                raise ValueError(f"{inner} is no matrix")
            return TensorType(inner.dtype, inner.shape[::-1])
        case Repeat(of, times):
            inner = type_of(of)
            return TensorType(inner.dtype, (inner.shape[0] * times, *inner.shape[1:]))
        case Halves(of, size, rotary):
            inner = type_of(of)
            if inner.shape[0] % size or rotary % 2 or not 0 < rotary <= size:
                raise ValueError(f"{inner} has no heads of {size} rows, {rotary} of them rotary")
            return inner
        case _:
            assert_never(expr)


def num_bytes(expr: Expr) -> int:
    """Return the size of an expression's value in bytes."""
    kind = type_of(expr)
    return ITEM_BYTES[kind.dtype] * math.prod(kind.shape)


def contiguous_source(expr: Expr) -> tuple[str, int, int] | None:
    """Return the dense tensor that has an expression's bytes in one piece, from where to where."""
    match expr:
        case Source(name):
            return name, 0, num_bytes(expr)
        case Slice(of, dim, start):
            whole, kind = contiguous_source(of), type_of(of)
            if whole is None or math.prod(kind.shape[:dim]) != 1:
                return None
            name, begin, _ = whole
            begin += start * ITEM_BYTES[kind.dtype] * math.prod(kind.shape[dim + 1 :])
            return name, begin, begin + num_bytes(expr)
        case Select(of, index):
            return contiguous_source(Slice(of, 0, index, index + 1))
        case _:
            return None


def leaves(expr: Expr) -> Iterator[Expr]:
    """Yield the expressions whose bytes, end to end, are the bytes of this one."""
    match expr:
        case Concat(parts) | Stack(parts):
            for part in parts:
                yield from leaves(part)
        case _:
            yield expr


def gather_input(expr: Expr) -> Expr | None:
    """Return what an expression gathers columns from, cast and scaled; None where it does not.

    Expressions of which that is equal are made together, in whatever order each has its columns: a
    row is then read, cast and scaled once for all.
    """
    match expr:
        case Gather(of, 1, order, _, _, offset):
            return Slice(of, 1, offset, offset + order.size)
        case Cast(of) | Scale(of):
            inner = gather_input(of)
            return None if inner is None else replace(expr, of=inner)
        case _:
            return None


def source_names(expr: Expr) -> Iterator[str]:
    """Yield the names of the dense tensors that an expression reads."""
    match expr:
        case Source(name):
            yield name
        case Slice(of) | Select(of) | Gather(of) | Cast(of) | Scale(of) | AddNoise(of):
            yield from source_names(of)
        case Transpose(of) | Repeat(of) | Halves(of) | RandomLike(of=of) | Reinit(of):
            yield from source_names(of)
        case Concat(parts) | Stack(parts) | Mean(parts):
            for part in parts:
                yield from source_names(part)
        case Normal(norm=norm):
            yield from () if norm is None else source_names(norm)
        case Zeros() | Full() | Constant():
            return
        case _:
            assert_never(expr)


def loses_bits(expr: Expr) -> bool:  # noqa: PLR0911 - one case per kind
    """Whether an expression rounds values of the source: by a cast, a scale or a mean."""
    match expr:
        case Source() | Normal() | Constant() | RandomLike() | Zeros() | Full():
            return False
        case Mean():
            return True
        case Scale(of, factor):
            return not is_power_of_two(factor) or loses_bits(of)
        case Cast(of, dtype):
            # bfloat16 and float16 each hold values that the other lacks; float32 holds all of both.
            narrows = dtype not in {type_of(of).dtype, "F32"} and any(source_names(of))
            return narrows or loses_bits(of)
        case Concat(parts) | Stack(parts):
            return any(map(loses_bits, parts))
        case Slice(of) | Select(of) | Gather(of) | Transpose(of) | Repeat(of) | Halves(of):
            return loses_bits(of)
        case AddNoise(of) | Reinit(of):
            return loses_bits(of)
        case _:
            assert_never(expr)
