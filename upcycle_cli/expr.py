"""How an output tensor is made: a small language of frozen expressions.

`type_of` and `describe` need neither data nor torch, so a plan can be checked and printed without
either. Equal expressions are equal values: whoever evaluates them can do each once. Concat and
Stack join along the first dimension only, so their bytes are their parts' bytes end to end, and
`leaves` takes them apart: no joined tensor is ever held in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from upcycle_cli.checkpoint import ITEM_BYTES, TORCH_DTYPES, raw_bytes
from upcycle_cli.errors import UpcycleError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2"}


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


def needs_torch(expr: Expr) -> bool:
    """Whether an expression takes arithmetic on the dense model's values."""
    match expr:
        case Normal() | Zeros():
            return False
        case Repeat(of):
            return needs_torch(of)
        case _:
            return stretch_of(expr) is None


def stored_bytes(expr: Expr, read: Callable[[str], memoryview]) -> memoryview:
    """Return the bytes of an expression that `needs_torch` says needs none.

    `read` gives a dense tensor's bytes by name; the result may alias them.
    """
    match expr:
        case Normal():
            return _draw(expr, read(expr.norm.name))
        case Repeat(of, times):
            return _repeated(stored_bytes(of, read), type_of(of).shape[0], times)
        case Zeros():
            return memoryview(bytes(num_bytes(expr)))
        case _:
            stretch = stretch_of(expr)
            assert stretch is not None
            return read(stretch.name)[stretch.start : stretch.start + stretch.nbytes]


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


def evaluate(  # noqa: PLR0911 - one case per kind
    expr: Expr, read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Compute an expression; `read` gives a dense tensor by name.

    The result may alias what `read` returned. Raises OverflowInCastError when a finite value does
    not fit the output dtype.
    """
    import torch

    match expr:
        case Source(name):
            return read(name)
        case Slice(of, dim, start, stop):
            return evaluate(of, read).narrow(dim, start, stop - start)
        case Cast(of, dtype):
            value = evaluate(of, read)
            return _checked(value, value.to(getattr(torch, TORCH_DTYPES[dtype])))
        case Scale(of, factor):
            value = evaluate(of, read)
            return _checked(value, value * factor)
        case Concat(parts):
            return torch.cat([evaluate(part, read) for part in parts])
        case Stack(parts):
            return torch.stack([evaluate(part, read) for part in parts])
        case Repeat(of, times):
            return evaluate(of, read).repeat_interleave(times, dim=0)
        case Normal(dtype=dtype, shape=shape):
            data = _draw(expr, raw_bytes(read(expr.norm.name)))
            return torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[dtype])).reshape(shape)
        case Zeros(dtype, shape):
            return torch.zeros(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]))
        case _:
            assert_never(expr)


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


def _checked(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    # One quick pass: a NaN or an infinity anywhere is among the extremes.
    if after.numel() == 0 or all(extreme.isfinite() for extreme in after.aminmax()):
        return after
    infinite = after.isinf()
    if infinite.any() and (infinite & before.isfinite()).any():
        raise OverflowInCastError
    return after


def _draw(expr: Normal, norm_weight: memoryview) -> memoryview:
    import numpy as np

    # fsum is exactly rounded, so the norm does not depend on the order of summation; and float64
    # draws agree between CPUs where float32 ones do not.
    weight_H = _to_float64(norm_weight, expr.norm.dtype)
    norm = math.sqrt(math.fsum((weight_H * weight_H).tolist()))
    if not (math.isfinite(norm) and norm > 0):
        raise UpcycleError(
            f"{expr.norm.name} is zero or not finite, so no router can be scaled to it."
        )
    digest = hashlib.sha256(f"{expr.seed}/{expr.stream}".encode()).digest()
    # The one generator of which numpy promises that it will never draw anything else.
    generator = np.random.RandomState(np.frombuffer(digest, "<u4"))
    rows = generator.standard_normal(expr.shape) * (expr.logit_std / norm)
    data = _from_float64(rows, expr.dtype)
    rounded = _to_float64(data, expr.dtype).reshape(expr.shape)
    if not np.isfinite(rounded).all() or not rounded.any(axis=1).all():
        raise UpcycleError(
            f"router logits of standard deviation {expr.logit_std:g} need weights that "
            f"{expr.dtype.lower()} cannot hold ({expr.stream}).",
            "Choose another --router-logit-std, or another --dtype.",
        )
    return data


def _repeated(data: memoryview, rows: int, times: int) -> memoryview:
    import numpy as np

    return _bytes(np.frombuffer(data, np.uint8).reshape(rows, -1).repeat(times, axis=0))


def _to_float64(data: memoryview, dtype: str) -> NDArray[np.float64]:
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, _NUMPY_DTYPES[dtype]).astype(np.float64)


def _from_float64(values: NDArray[np.float64], dtype: str) -> memoryview:
    """Round as torch does, a tie to the even neighbour; what is too large becomes infinite."""
    import numpy as np

    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = values.astype("<f4").view("<u4")
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        else:
            rounded = values.astype(_NUMPY_DTYPES[dtype])
    return _bytes(rounded)


def _bytes(values: NDArray[Any]) -> memoryview:
    return memoryview(values.reshape(-1).view("u1"))  # type: ignore[arg-type]  # numpy 1's stubs
