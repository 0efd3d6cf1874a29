"""The expression language: each kind against plain torch, and what the writer relies on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import TORCH, random_bits, same_bits, value_of

from upcycle_cli.checkpoint.checkpoint import raw_bytes
from upcycle_cli.checkpoint.header import OverflowInCastError
from upcycle_cli.plan.expressions import (
    Cast,
    Concat,
    Expr,
    Full,
    Normal,
    Repeat,
    RotaryRows,
    Scale,
    Select,
    Slice,
    Source,
    Stack,
    TensorType,
    Transpose,
    describe,
    num_bytes,
    type_of,
)
from upcycle_cli.write import evaluate as module
from upcycle_cli.write.evaluate import evaluate

HIDDEN = 16
A, B = Source("a", "BF16", (4, 6)), Source("b", "BF16", (4, 6))
WIDE, VECTOR = Source("wide", "F32", (3, 6)), Source("vector", "F16", (6,))
STACK = Source("stack", "BF16", (2, 4, 3))
NORM = Source("norm", "F32", (HIDDEN,))
SOURCES = (A, B, WIDE, VECTOR, STACK)
Tensors = dict[str, torch.Tensor]
Compute = Callable[[Tensors], torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    made = {s.name: random_bits(s.shape, TORCH[s.dtype], generator) for s in SOURCES}
    return made | {"norm": torch.linspace(0.5, 2, HIDDEN)}


# fmt: off
VALUES: tuple[tuple[Expr, Compute], ...] = (
    (Cast(WIDE, "BF16"), lambda t: t["wide"].bfloat16()),
    (Cast(WIDE, "F16"), lambda t: t["wide"].half()),
    (Cast(VECTOR, "F32"), lambda t: t["vector"].float()),
    (Slice(A, 1, 2, 5), lambda t: t["a"][:, 2:5]),
    (Slice(A, 1, 3, 3), lambda t: t["a"][:, 3:3]),
    (Scale(A, 1.5874), lambda t: (t["a"].float() * 1.5874).bfloat16()),  # rounded once
    (Scale(VECTOR, 3.0), lambda t: (t["vector"].float() * 3.0).half()),
    (Scale(WIDE, 0.1), lambda t: t["wide"] * torch.tensor(0.1)),
    (Scale(Cast(Slice(WIDE, 1, 1, 4), "BF16"), 3.0),
     lambda t: (t["wide"][:, 1:4].bfloat16().float() * 3).bfloat16()),
    (Concat((A, B)), lambda t: torch.cat([t["a"], t["b"]])),
    (Concat((A, Slice(B, 0, 0, 1))), lambda t: torch.cat([t["a"], t["b"][:1]])),
    (Stack((A, B, A)), lambda t: torch.stack([t["a"], t["b"], t["a"]])),
    (Stack((Concat((A, B)), Concat((B, A)))),
     lambda t: torch.stack([torch.cat([t["a"], t["b"]]), torch.cat([t["b"], t["a"]])])),
    (Cast(Slice(Select(STACK, 1), 1, 0, 2), "F32"), lambda t: t["stack"][1, :, :2].float()),
    (Transpose(WIDE), lambda t: t["wide"].T),
    (Transpose(Concat((A, Scale(B, 3.0)))), lambda t: torch.cat([t["a"], t["b"].mul(3.0)]).T),
    (Slice(Slice(A, 0, 2, 3), 1, 1, 5), lambda t: t["a"][2:3, 1:5]),  # bytes of the dense model
    (Slice(Select(STACK, 1), 0, 1, 3), lambda t: t["stack"][1, 1:3]),
    (Slice(Select(STACK, 1), 1, 0, 1), lambda t: t["stack"][1, :, :1]),
    (Select(Slice(STACK, 1, 0, 1), 0), lambda t: t["stack"][0, :1]),
    (Slice(Transpose(A), 0, 1, 3), lambda t: t["a"].T[1:3]),
    (Repeat(WIDE, 2), lambda t: t["wide"][[0, 0, 1, 1, 2, 2]]),
    (RotaryRows(A, 4, 4), lambda t: t["a"][[0, 2, 1, 3]]),
    (RotaryRows(A, 2, 2), lambda t: t["a"]),
    (RotaryRows(VECTOR, 6, 4), lambda t: t["vector"][[0, 2, 1, 3, 4, 5]]),
    (RotaryRows(Concat((A, B)), 8, 6, interleave=True),
     lambda t: torch.cat([t["a"], t["b"]])[[0, 3, 1, 4, 2, 5, 6, 7]]),
    (RotaryRows(Concat((A, B, A, Slice(B, 0, 0, 2))), 7, 6),
     lambda t: torch.cat([t["a"], t["b"], t["a"], t["b"][:2]])[
         [0, 2, 4, 1, 3, 5, 6, 7, 9, 11, 8, 10, 12, 13]]),
    (Full("BF16", (3, 2)), lambda _: torch.zeros(3, 2, dtype=torch.bfloat16)),
    (Full("BF16", (5,), 0.001), lambda _: torch.full((5,), 0.001, dtype=torch.bfloat16)),
    (Full("F16", (2, 3), 0.1), lambda _: torch.full((2, 3), 0.1, dtype=torch.float16)),
)
# fmt: on


def in_words(value: object) -> str:
    return describe(value) if isinstance(value, Expr) else ""


@pytest.mark.parametrize(("expr", "compute"), VALUES, ids=in_words)
def test_values_and_types_are_those_of_torch(
    tensors: Tensors, expr: Expr, compute: Compute
) -> None:
    found, wanted = value_of(expr, tensors.__getitem__), compute(tensors)
    assert same_bits(found, wanted)
    assert TORCH[type_of(expr).dtype] is wanted.dtype
    assert type_of(expr).shape == wanted.shape
    assert num_bytes(expr) == wanted.nbytes
    # Bytes that are not aligned can be computed with, too.
    shifted = {n: memoryview(b"?" + bytes(raw_bytes(t)))[1:] for n, t in tensors.items()}
    assert bytes(evaluate(expr, shifted.__getitem__)) == bytes(raw_bytes(wanted.contiguous()))


# Rounding ----------------------------------------------------------------------------------------


def all_values(dtype: str) -> torch.Tensor:
    """Return every finite value of a dtype of 16 bits, a row for each exponent and sign."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(TORCH[dtype])
    words = words.reshape(-1, {"BF16": 128, "F16": 1024}[dtype])
    return words[words.isfinite().all(dim=1)]


@pytest.mark.parametrize("factor", [2.0**-9, 0.5, 1.0, 64.0, 2.0**20, 3.0, 1.5874, -2.0])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("zeros", [(), (0.0, -0.0)], ids=["", "among zeros"])
def test_every_value_times_a_factor(
    dtype: str, factor: float, zeros: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = all_values(dtype)
    values = torch.cat([values.new_tensor(zeros).expand(len(values), -1), values], dim=1)
    monkeypatch.setattr(module, "_PIECE_ITEMS", values.shape[1])  # a row at a time
    wanted = (values.float() * factor).to(TORCH[dtype])
    fits = wanted.isfinite().all(dim=1)
    source = Source("x", dtype, tuple(values[fits].shape))
    assert same_bits(value_of(Scale(source, factor), lambda _: values[fits]), wanted[fits])
    for row in values[~fits]:
        with pytest.raises(OverflowInCastError):
            value_of(Scale(Source("x", dtype, (len(row),)), factor), {"x": row}.__getitem__)


@pytest.mark.parametrize(("dtype", "wanted"), [("F16", "BF16"), ("BF16", "F32"), ("F16", "F32")])
def test_every_value_in_another_dtype(dtype: str, wanted: str) -> None:
    values = all_values(dtype)
    source = Source("x", dtype, tuple(values.shape))
    assert same_bits(value_of(Cast(source, wanted), lambda _: values), values.to(TORCH[wanted]))


@pytest.mark.parametrize(
    ("value", "dtype", "convert"),
    [
        (70000.0, "F32", lambda x: Cast(x, "F16")),
        (-70000.0, "BF16", lambda x: Cast(x, "F16")),
        (3.4e38, "F32", lambda x: Cast(x, "BF16")),  # rounds up, past the largest bfloat16
        (3.3e38, "BF16", lambda x: Scale(x, 2.0)),
        (-3.3e38, "F32", lambda x: Scale(x, 2.0)),
        (40000.0, "BF16", lambda x: Scale(Cast(x, "F16"), 2.0)),
    ],
)
def test_a_finite_value_must_stay_finite(
    value: float, dtype: str, convert: Callable[[Expr], Expr]
) -> None:
    expr = convert(Source("x", dtype, (3,)))
    for first in (1.0, math.inf):  # what was infinite before is no overflow, nor hides one
        data = torch.tensor([first, value, 2.0]).to(TORCH[dtype])
        with pytest.raises(OverflowInCastError):
            value_of(expr, {"x": data}.__getitem__)
        kept = torch.tensor([first, 1.0, 2.0]).to(TORCH[dtype])
        assert value_of(expr, {"x": kept}.__getitem__).isinf()[0] == (first == math.inf)


@pytest.mark.parametrize(
    ("before", "after", "factor", "values", "count"),
    [
        ("F32", "F16", 1.0, [1.0, 2.0**-30, -(2.0**-30), 0.0, -0.0], 2),
        ("F32", "F16", 1.0, [2.0**-24, 2.0**-25, 1.5 * 2.0**-25], 1),  # a tie goes to the even one
        ("F16", None, 0.25, [2.0**-24, 1.0, 0.0, -(2.0**-23)], 2),
        ("BF16", None, 0.3, [2.0**-133, 1.0], 1),
        ("F32", "F16", 4.0, [2.0**-30, 1.0], 1),  # it is cast first
        ("F32", "F16", 1.0, [math.nan, math.inf, 2.0**-30], 1),
    ],
    ids=str,
)
def test_values_that_vanish_are_counted(
    before: str, after: str | None, factor: float, values: list[float], count: int
) -> None:
    # In several pieces, and among many that stay.
    dense = torch.tensor(values + [0.5] * 70_000, dtype=torch.float64).to(TORCH[before])
    expr: Expr = Source("x", before, tuple(dense.shape))
    expr = expr if after is None else Cast(expr, after)
    expr = expr if factor == 1.0 else Scale(expr, factor)
    lost: list[int] = []
    evaluate(expr, lambda _: raw_bytes(dense), lost.append)
    assert sum(lost) == count


# Random rows -------------------------------------------------------------------------------------


def normal(**changes: object) -> Normal:
    fields = {"seed": 0, "stream": "layers.0.router", "dtype": "F32", "shape": (4, HIDDEN)}
    return Normal(**fields | {"logit_std": 0.5, "norm": NORM} | changes)  # type: ignore[arg-type]


def draw(expr: Normal, norm: torch.Tensor | None = None) -> torch.Tensor:
    weight = torch.linspace(0.5, 2, HIDDEN) if norm is None else norm
    dtype = next(name for name, dtype in TORCH.items() if dtype is weight.dtype)
    assert expr.norm is not None
    return value_of(replace(expr, norm=replace(expr.norm, dtype=dtype)), lambda _: weight)


def test_a_draw_is_a_function_of_seed_and_stream() -> None:
    first, before = draw(normal()), torch.get_rng_state()
    torch.rand(7)  # torch's own generator has no part in it
    after = torch.get_rng_state()
    assert same_bits(draw(normal()), first)
    assert torch.equal(torch.get_rng_state(), after)  # and is left alone
    torch.set_rng_state(before)
    others = [
        draw(normal(**changes))
        for changes in (
            *({"seed": 1}, {"seed": 2**63 - 1}, {"stream": "layers.1.router"}),
            *({"seed": 1, "stream": "1x"}, {"seed": 11, "stream": "x"}),  # not run together
        )
    ]
    for one, other in zip([first, *others], [*others, first], strict=True):
        assert not torch.isclose(one, other).any()


@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_draw_is_made_in_float64_and_rounded_once(dtype: str) -> None:
    """The definition, written down once more: float32 draws differ between CPUs."""
    digest = hashlib.sha256(b"7/layers.0.router").digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 32, 4)]
    rows = torch.from_numpy(np.random.RandomState(words).randn(256, HIDDEN))
    drawn = draw(normal(seed=7, dtype=dtype, shape=(256, HIDDEN)), torch.full((HIDDEN,), 3.0))
    assert same_bits(drawn, (rows * (0.5 / 12)).to(TORCH[dtype]))  # ‖γ‖ = 3 · √16
    assert type_of(normal(dtype=dtype)) == TensorType(dtype, (4, HIDDEN))
