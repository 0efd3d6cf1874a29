"""How an output tensor is made: a small language of frozen expressions.

`type_of` and `describe` need neither data nor numpy, so a plan can be checked and printed without
either; nothing here needs torch, whose import takes longer than converting a small model. Equal
expressions are equal values: whoever evaluates them can do each once. Concat and Stack join along
the first dimension only, so their bytes are their parts' bytes end to end, and `leaves` takes them
apart: no joined tensor is ever held in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from upcycle_cli.checkpoint import ITEM_BYTES
from upcycle_cli.errors import UpcycleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How numpy holds each: bfloat16, which it does not know, as bits."""
_MANTISSA_BITS = {"F16": 10, "BF16": 7}
_PIECE_ITEMS = 1 << 16
"""Few enough that what is computed from them on the way stays in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the dense checkpoint, as it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """Entries [start, stop) along `dim`."""

    of: Expr
    dim: int
    start: int
    stop: int


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
class Repeat:
    """Each row `times` times in a row: (R, …) becomes (R·times, …)."""

    of: Expr
    times: int


@dataclass(frozen=True, slots=True)
class Normal:
    """Random rows that give logits of standard deviation `logit_std` behind a norm.

    The norm's output has unit RMS before its weight γ, so the rows' standard deviation is
    logit_std / ‖γ‖₂. The values are a pure function of (seed, stream) and γ.
    """

    seed: int
    stream: str
    dtype: str
    shape: tuple[int, int]
    logit_std: float
    norm: Source


@dataclass(frozen=True, slots=True)
class Zeros:
    """All zeros."""

    dtype: str
    shape: tuple[int, ...]


Expr: TypeAlias = Source | Slice | Cast | Scale | Concat | Stack | Repeat | Normal | Zeros


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype in safetensors' notation, and a shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive bytes of a dense tensor, from `start` on."""

    name: str
    start: int
    nbytes: int


class OverflowInCastError(ArithmeticError):
    """A finite value became infinite in the output dtype."""


def type_of(expr: Expr) -> TensorType:  # noqa: C901, PLR0911 - one case per kind
    """Return the dtype and shape of an expression; ValueError when its parts do not fit."""
    match expr:
        case Source(dtype=dtype, shape=shape) | Zeros(dtype=dtype, shape=shape):
            return TensorType(dtype, shape)
        case Normal(dtype=dtype, shape=shape):
            return TensorType(dtype, shape)
        case Slice(of, dim, start, stop):
            inner = type_of(of)
            if not (dim < len(inner.shape) and 0 <= start <= stop <= inner.shape[dim]):
                raise ValueError(f"{start}:{stop} of dimension {dim} is not inside {inner}")
            shape = (*inner.shape[:dim], stop - start, *inner.shape[dim + 1 :])
            return TensorType(inner.dtype, shape)
        case Cast(of, dtype):
            return TensorType(dtype, type_of(of).shape)
        case Scale(of):
            return type_of(of)
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
        case Repeat(of, times):
            inner = type_of(of)
            return TensorType(inner.dtype, (inner.shape[0] * times, *inner.shape[1:]))
        case _:
            assert_never(expr)


def num_bytes(expr: Expr) -> int:
    """Return the size of an expression's value in bytes."""
    kind = type_of(expr)
    return ITEM_BYTES[kind.dtype] * math.prod(kind.shape)


def stretch_of(expr: Expr) -> Stretch | None:
    """Return the bytes of the dense model that an expression is, None where it must be computed."""
    match expr:
        case Source(name):
            return Stretch(name, 0, num_bytes(expr))
        case Slice(of, dim, start):
            whole, kind = stretch_of(of), type_of(of)
            if whole is None or math.prod(kind.shape[:dim]) != 1:
                return None
            entry_bytes = ITEM_BYTES[kind.dtype] * math.prod(kind.shape[dim + 1 :])
            return Stretch(whole.name, whole.start + start * entry_bytes, num_bytes(expr))
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


def sources(expr: Expr) -> Iterator[str]:
    """Yield the names of the dense tensors that an expression reads."""
    match expr:
        case Source(name):
            yield name
        case Slice(of) | Cast(of) | Scale(of) | Repeat(of):
            yield from sources(of)
        case Concat(parts) | Stack(parts):
            for part in parts:
                yield from sources(part)
        case Normal(norm=norm):
            yield norm.name
        case Zeros():
            return
        case _:
            assert_never(expr)


def evaluate(expr: Expr, read: Callable[[str], memoryview]) -> memoryview:
    """Return the bytes of an expression's value; `read` gives a dense tensor's bytes by name.

    The result may alias what `read` returned. Raises OverflowInCastError when a finite value does
    not fit the output dtype, UpcycleError when a router cannot be drawn.
    """
    stretch = stretch_of(expr)
    if stretch is not None:
        return read(stretch.name)[stretch.start : stretch.start + stretch.nbytes]
    return _bytes(_value(expr, read))


def describe(expr: Expr) -> str:  # noqa: PLR0911 - one case per kind
    """Return an expression as a person would write it down."""
    match expr:
        case Source(name):
            return name
        case Slice(of, dim, start, stop):
            return f"{describe(of)}[{':, ' * dim}{start}:{stop}]"
        case Cast(of, dtype):
            return f"{dtype.lower()}({describe(of)})"
        case Scale(of, factor):
            return f"{describe(of)} × {factor:.6g}"
        case Concat(parts):
            return f"concat({_listed(parts)})"
        case Stack(parts):
            return f"stack({_listed(parts)})"
        case Repeat(of, times):
            return f"{describe(of)}, each row × {times}"
        case Normal(stream=stream, logit_std=std, norm=norm):
            return f"normal({stream}, std {std:g} / ‖{norm.name}‖)"
        case Zeros():
            return "zeros"
        case _:
            assert_never(expr)


def _listed(parts: tuple[Expr, ...]) -> str:
    if len(parts) <= 2:
        return ", ".join(describe(part) for part in parts)
    return f"{describe(parts[0])}, … {len(parts)} in all"


def _value(  # noqa: PLR0911 - one case per kind
    expr: Expr, read: Callable[[str], memoryview]
) -> NDArray[Any]:
    """Compute an expression as numpy holds it."""
    import numpy as np

    match expr:
        case Source(name, dtype, shape):
            return np.ndarray(shape, _NUMPY_DTYPES[dtype], read(name))
        case Slice(of, dim, start, stop):
            return _value(of, read)[(slice(None),) * dim + (slice(start, stop),)]
        case Cast(of, dtype):
            return _converted(_value(of, read), type_of(of).dtype, dtype)
        case Scale(of, factor):
            dtype = type_of(of).dtype
            return _converted(_value(of, read), dtype, dtype, factor)
        case Concat(parts):
            return np.concatenate([_value(part, read) for part in parts])
        case Stack(parts):
            return np.stack([_value(part, read) for part in parts])
        case Repeat(of, times):
            return _value(of, read).repeat(times, axis=0)
        case Normal(dtype=dtype, shape=shape):
            return _draw(expr, read(expr.norm.name))
        case Zeros(dtype, shape):
            return np.zeros(shape, _NUMPY_DTYPES[dtype])
        case _:
            assert_never(expr)


def _converted(values: NDArray[Any], before: str, after: str, factor: float = 1.0) -> NDArray[Any]:
    """Return the values times a factor in another dtype, or in the same."""
    import numpy as np

    result = np.empty(values.shape, _NUMPY_DTYPES[after])
    if not result.size:
        return result
    rows, out = np.atleast_1d(values), np.atleast_1d(result)
    step = max(1, _PIECE_ITEMS * len(rows) // rows.size)
    for start in range(0, len(rows), step):
        piece, place = rows[start : start + step], out[start : start + step]
        if before != after or not _shift_exponents(piece, after, factor, place):
            _multiply(piece, before, after, factor, place)
    return result


def _shift_exponents(piece: NDArray[Any], dtype: str, factor: float, out: NDArray[Any]) -> bool:
    """Multiply by a power of two through the bits of the exponents, several times as fast.

    Returns False where a value is subnormal or not finite, or would be.
    """
    import numpy as np

    mantissa, exponent = math.frexp(factor)
    if dtype not in _MANTISSA_BITS or mantissa != 0.5:
        return False
    steps, bits = exponent - 1, _MANTISSA_BITS[dtype]
    one, most = 1 << (bits + 1), (1 << (15 - bits)) - 1
    words, target = piece.view("<u2"), out.view("<u2")
    magnitudes = words << 1
    smallest, largest = int(magnitudes.min()), int(magnitudes.max())
    with_zeros = smallest == 0
    if with_zeros:
        smallest = int((magnitudes - 1).min()) + 1  # a zero becomes the largest of all
    if smallest < one * max(1, 1 - steps) or largest >= one * (most - max(0, steps)):
        return False
    np.add(words, np.uint16((steps << bits) & 0xFFFF), out=target)
    if with_zeros:
        np.copyto(target, words, where=magnitudes == 0)
    return True


def _multiply(
    piece: NDArray[Any], before: str, after: str, factor: float, out: NDArray[Any]
) -> None:
    import numpy as np

    wide = _to_float32(piece, before)
    with np.errstate(over="ignore", invalid="ignore"):
        # A product would change the bits of a nan, and of nothing else.
        product = wide if factor == 1.0 else wide * np.float32(factor)
        out[...] = _rounded(product, after)
    infinite = np.isinf(_to_float32(out, after))
    if infinite.any() and (infinite & np.isfinite(wide)).any():
        raise OverflowInCastError


def _draw(expr: Normal, norm_weight: memoryview) -> NDArray[Any]:
    import numpy as np

    # fsum is exactly rounded, so the norm does not depend on the order of summation; and float64
    # draws agree between CPUs where float32 ones do not.
    stored_H = np.frombuffer(norm_weight, _NUMPY_DTYPES[expr.norm.dtype])
    weight_H = _to_float32(stored_H, expr.norm.dtype).astype(np.float64)
    norm = math.sqrt(math.fsum((weight_H * weight_H).tolist()))
    if not (math.isfinite(norm) and norm > 0):
        raise UpcycleError(
            f"{expr.norm.name} is zero or not finite, so no router can be scaled to it."
        )
    digest = hashlib.sha256(f"{expr.seed}/{expr.stream}".encode()).digest()
    # The one generator of which numpy promises that it will never draw anything else.
    generator = np.random.RandomState(np.frombuffer(digest, "<u4"))
    with np.errstate(over="ignore"):
        drawn = _rounded(
            generator.standard_normal(expr.shape) * (expr.logit_std / norm), expr.dtype
        )
    rows = _to_float32(drawn, expr.dtype)
    if not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise UpcycleError(
            f"router logits of standard deviation {expr.logit_std:g} need weights that "
            f"{expr.dtype.lower()} cannot hold ({expr.stream}).",
            "Choose another --router-logit-std, or another --dtype.",
        )
    return drawn


def _to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


def _rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[Any]:
    """Round as torch does, a tie to the even neighbour; what is too large becomes infinite."""
    import numpy as np

    if dtype != "BF16":
        return values.astype(_NUMPY_DTYPES[dtype], copy=False)
    values = values.astype("<f4", copy=False)
    bits = values.view("<u4")
    rounded: NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    invalid = np.isnan(values)
    if invalid.any():
        rounded[invalid] = 0x7FC0  # the sum carried into the sign
    return rounded


def _bytes(values: NDArray[Any]) -> memoryview:
    import numpy as np

    flat = np.ascontiguousarray(values).reshape(-1)
    return memoryview(flat.view("u1"))  # type: ignore[arg-type]  # numpy 1's stubs
