"""How an output tensor is made: a small language of frozen expressions.

Nothing here needs data or numpy, so a plan can be checked and printed without either. Equal
expressions have equal values, so each needs to be evaluated only once. Concat and Stack join along
the first dimension, so their bytes are their parts' bytes end to end: `leaves` yields the parts,
and no joined tensor is ever held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias, assert_never

from upcycle_cli.checkpoint import made
from upcycle_cli.checkpoint.header import ITEM_BYTES
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.recipe.scaling import is_power_of_two

Source = made.Source
Dequantize = made.Dequantize
LowRank = made.LowRank
Held: TypeAlias = made.Source | made.Made
"""A tensor of the source, as it is stored or computed from what is stored."""


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of tensors of one shape: summed in order and divided in float32, rounded once."""

    parts: tuple[Held, ...]
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
    """Entry `index` of the first dimension, without that dimension: one matrix of a stack."""

    of: Expr
    index: int


@dataclass(frozen=True, slots=True)
class Permutation:
    """A permutation of `size` neurons: drawn by (seed, stream), or with fixed `indices`.

    Fixed indices are 32-bit integers, and None until a calibration finds them. `origin` identifies
    them in comparisons: it is their digest, or the digest of the calibration's text.
    """

    size: int
    stream: str
    seed: int | None = None
    origin: str = ""
    indices: bytes | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """Return its stream, which tells it apart from the others of a plan."""
        return self.stream


@dataclass(frozen=True, slots=True)
class Gather:
    """Entries along `dim` at places [start, stop) of a permutation that starts at offset."""

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
    """Each row `times` times, one after the other: (R, …) becomes (R·times, …)."""

    of: Expr
    times: int


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """Of every `size` rows, the first `rotary` reordered: the even ones, then the odd ones.

    With `interleave` it is the reverse: rows of the first and the second half take turns.
    """

    of: Expr
    size: int
    rotary: int
    interleave: bool = False


@dataclass(frozen=True, slots=True)
class Normal:
    """Random rows that give logits of standard deviation `logit_std` behind a norm.

    The norm's output has unit RMS before its weight γ (the stored weight plus `offset`), so the
    rows' standard deviation is logit_std / ‖γ‖₂; without a norm, γ is all ones.
    """

    seed: int
    stream: str
    dtype: str
    shape: tuple[int, int]
    logit_std: float
    norm: Held | Mean | None
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Constant:
    """Values that come with the plan: router rows fitted to a calibration, or read from a file.

    `origin` identifies them in comparisons: it is the digest of the file's rows, or of the
    calibration's text, before which `data` is None.
    """

    stream: str
    dtype: str
    shape: tuple[int, int]
    origin: str
    data: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class RandomLike:
    """Random values of another tensor's root mean square, by (seed, stream) and that tensor."""

    seed: int
    stream: str
    shape: tuple[int, ...]
    of: Expr


@dataclass(frozen=True, slots=True)
class AddNoise:
    """Gaussian noise added, `std` times the values' standard deviation, by (seed, stream)."""

    of: Expr
    std: float
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Reinit:
    """The first `count` entries of a permutation along `dim` initialised again.

    New values are normal with the mean and std of the old ones, by (seed, stream).
    """

    of: Expr
    dim: int
    order: Permutation
    count: int
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Full:
    """A constant, rounded to float32 and then to the dtype."""

    dtype: str
    shape: tuple[int, ...]
    value: float = 0.0


Given: TypeAlias = Held | Normal | Constant | Full
Joined: TypeAlias = Mean | Concat | Stack
Arranged: TypeAlias = Slice | Select | Gather | Transpose | Repeat | RotaryRows
Changed: TypeAlias = Cast | Scale | RandomLike | AddNoise | Reinit
Expr: TypeAlias = Given | Joined | Arranged | Changed


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype in safetensors' notation, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    def resized(self, dim: int, size: int) -> TensorType:
        """Return the type with another size of one dimension."""
        return TensorType(self.dtype, (*self.shape[:dim], size, *self.shape[dim + 1 :]))


def type_of(expr: Expr) -> TensorType:  # noqa: C901, PLR0911, PLR0912 - one case per kind
    """Return the dtype and shape of an expression; UpcycleError if it joins dtypes."""
    match expr:
        case Source() | Dequantize() | LowRank() | Full() | Normal() | Constant():
            return TensorType(expr.dtype, expr.shape)
        case Mean(parts, dtype):
            return TensorType(dtype, parts[0].shape)
        case RandomLike(shape=shape, of=of):
            return TensorType(type_of(of).dtype, shape)
        case Slice(of, dim, start, stop) | Gather(of, dim, start=start, stop=stop):
            return type_of(of).resized(dim, stop - start)
        case Select(of):
            inner = type_of(of)
            return TensorType(inner.dtype, inner.shape[1:])
        case Cast(of, dtype):
            return TensorType(dtype, type_of(of).shape)
        case Scale(of) | AddNoise(of) | Reinit(of) | RotaryRows(of):
            return type_of(of)
        case Concat(parts) | Stack(parts):
            first, *others = map(type_of, parts)
            for other in others:
                if other.dtype != first.dtype:
                    words = f"one tensor cannot hold matrices of {first.dtype} and {other.dtype}."
                    hint = "Choose one with `dtype`, or use `expert_layout` per-expert."
                    raise UpcycleError(words, hint)
            if isinstance(expr, Stack):
                return TensorType(first.dtype, (len(parts), *first.shape))
            return first.resized(0, sum(each.shape[0] for each in (first, *others)))
        case Transpose(of):
            inner = type_of(of)
            return TensorType(inner.dtype, inner.shape[::-1])
        case Repeat(of, times):
            inner = type_of(of)
            return inner.resized(0, inner.shape[0] * times)
        case _:
            assert_never(expr)


def scaled(expr: Expr, factor: float) -> Expr:
    """Return an expression times a factor: itself for 1."""
    return expr if factor == 1.0 else Scale(expr, factor)


def joined(parts: Sequence[Expr]) -> Expr:
    """Return parts joined along their first dimension, or the single part."""
    return Concat(tuple(parts)) if len(parts) > 1 else parts[0]


def num_bytes(expr: Expr) -> int:
    """Return the size of an expression's value in bytes."""
    kind = type_of(expr)
    return ITEM_BYTES[kind.dtype] * math.prod(kind.shape)


def leaves(expr: Expr) -> Iterator[Expr]:
    """Yield the parts of an expression; their bytes, end to end, are its bytes."""
    match expr:
        case Concat(parts) | Stack(parts):
            for part in parts:
                yield from leaves(part)
        case _:
            yield expr


def gather_input(expr: Expr) -> Expr | None:
    """Return the rows, cast and scaled, from which an expression gathers columns; else None."""
    match expr:
        case Gather(of, 1, order, _, _, offset):
            return Slice(of, 1, offset, offset + order.size)
        case Cast(of) | Scale(of):
            inner = gather_input(of)
            return None if inner is None else replace(expr, of=inner)
        case _:
            return None


def operands(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct inputs of an expression."""
    match expr:
        case Source() | Constant() | Full():
            return ()
        case Normal(norm=norm):
            return () if norm is None else (norm,)
        case Concat(parts) | Stack(parts) | Mean(parts):
            return parts
        case Dequantize() | LowRank():
            return (*made.inputs(expr).values(),)
        case _:
            return (expr.of,)


def held(expr: Expr) -> Iterator[Held]:
    """Yield the tensors of the source that an expression reads."""
    if isinstance(expr, Held):
        yield expr
        return
    for operand in operands(expr):
        yield from held(operand)


def source_names(expr: Expr) -> Iterator[str]:
    """Yield the names of the stored tensors that an expression reads."""
    return (part.name for tensor in held(expr) for part in made.stored_parts(tensor))


def loses_bits(expr: Expr) -> bool:
    """Whether an expression rounds values of the source: by a cast, a scale or a mean."""
    match expr:
        case Normal() | RandomLike() | Dequantize() | LowRank():
            return False  # a computed tensor is the source
        case Mean():
            return True
        case Scale(_, factor) if not is_power_of_two(factor):
            return True
        # bfloat16 and float16 each hold values that the other lacks; float32 holds all of both.
        case Cast(of, dtype) if dtype not in {type_of(of).dtype, "F32"} and any(source_names(of)):
            return True
        case _:
            return any(map(loses_bits, operands(expr)))


def describe(expr: Expr) -> str:
    """Return an expression as a formula, such as `concat(a, b)`."""
    match expr:
        case Source(name):
            return name
        case Dequantize() | LowRank():
            return f"{type(expr).__name__.lower()}({describe(expr.of)})"
        case Slice(of, dim, start, stop):
            return f"{describe(of)}[{':, ' * dim}{start}:{stop}]"
        case Scale(of, factor):
            return f"{describe(of)} × {factor:.6g}"
        case Concat(parts) | Stack(parts) | Mean(parts) if len(parts) > 2:
            shown: list[object] = [parts[0], f"… {len(parts)} in all"]
        case Concat(parts) | Stack(parts) | Mean(parts):
            shown = [*parts]
        case _:
            shown = [getattr(expr, field.name) for field in fields(expr) if field.repr]
    inside = ", ".join(describe(each) if isinstance(each, Expr) else str(each) for each in shown)
    return f"{type(expr).__name__.lower()}({inside})"
