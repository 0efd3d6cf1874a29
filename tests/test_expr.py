"""The expression language: each kind against plain torch, and what the writer relies on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import TORCH, random_bits, same_bits, value_of

from upcycle_cli.checkpoint.checkpoint import raw_bytes
from upcycle_cli.plan.describe import describe
from upcycle_cli.plan.expressions import (
    Cast,
    Concat,
    Expr,
    Full,
    Halves,
    Normal,
    Repeat,
    Scale,
    Select,
    Slice,
    Source,
    Stack,
    TensorType,
    Transpose,
    Zeros,
    contiguous_source,
    leaves,
    num_bytes,
    source_names,
    type_of,
)
from upcycle_cli.write import rounding
from upcycle_cli.write.evaluate import OverflowInCastError, evaluate

HIDDEN = 16
A = Source("a", "BF16", (4, 6))
B = Source("b", "BF16", (4, 6))
WIDE = Source("wide", "F32", (3, 6))
VECTOR = Source("vector", "F16", (6,))
STACK = Source("stack", "BF16", (2, 4, 3))
NORM = Source("norm", "F32", (HIDDEN,))


def normal(**changes: object) -> Normal:
    fields = {
        "seed": 0,
        "stream": "layers.0.router",
        "dtype": "F32",
        "shape": (4, HIDDEN),
        "logit_std": 0.5,
        "norm": NORM,
    }
    return Normal(**fields | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        source.name: random_bits(source.shape, TORCH[source.dtype], generator)
        for source in (A, B, WIDE, VECTOR, STACK)
    }
    return made | {"norm": torch.linspace(0.5, 2, HIDDEN)}


# Bytes of the dense model ------------------------------------------------------------------------

CUBE = Source("cube", "BF16", (1, 4, 6))


@pytest.mark.parametrize(
    ("expr", "stretch"),
    [
        (A, ("a", 0, 48)),
        (VECTOR, ("vector", 0, 12)),
        (Slice(A, 0, 1, 3), ("a", 12, 36)),
        (Slice(Slice(A, 0, 1, 4), 0, 1, 2), ("a", 24, 36)),
        (Slice(Slice(A, 0, 2, 3), 1, 1, 5), ("a", 26, 34)),
        (Slice(CUBE, 1, 1, 2), ("cube", 12, 24)),
        (Slice(A, 0, 4, 4), ("a", 48, 48)),
        (Slice(Slice(A, 0, 2, 2), 0, 0, 0), ("a", 24, 24)),
        (Slice(VECTOR, 0, 2, 5), ("vector", 4, 10)),
        (Select(STACK, 1), ("stack", 24, 48)),
        (Slice(Select(STACK, 1), 0, 1, 3), ("stack", 30, 42)),
        (Slice(Select(STACK, 1), 1, 0, 1), None),
        (Select(Slice(STACK, 1, 0, 1), 0), None),
        (Slice(A, 1, 0, 3), None),
        (Slice(CUBE, 2, 0, 3), None),
        (Slice(Slice(A, 1, 0, 3), 0, 0, 1), None),
        (Cast(A, "F32"), None),
        (Scale(A, 2.0), None),
        (Repeat(A, 1), None),
        (Transpose(A), None),
        (Halves(A, 4, 2), None),
        (Concat((A, B)), None),
        (Stack((A,)), None),
        (Zeros("F32", (2,)), None),
        (normal(), None),
    ],
)
def test_stretches(expr: Expr, stretch: tuple[str, int, int] | None) -> None:
    assert contiguous_source(expr) == stretch
    if stretch is not None:
        name, begin, end = stretch
        source = {item.name: item for item in (A, VECTOR, CUBE, STACK)}[name]
        generator = torch.Generator().manual_seed(0)
        tensor = random_bits(source.shape, TORCH[source.dtype], generator)
        value = evaluate(expr, lambda _: raw_bytes(tensor))
        stored = raw_bytes(tensor)[begin:end]
        assert bytes(value) == bytes(stored)


# Types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "dtype", "shape"),
    [
        (A, "BF16", (4, 6)),
        (Slice(A, 0, 1, 3), "BF16", (2, 6)),
        (Slice(A, 1, 2, 6), "BF16", (4, 4)),
        (Slice(A, 1, 3, 3), "BF16", (4, 0)),
        (Select(A, 3), "BF16", (6,)),
        (Select(Stack((A, B)), 1), "BF16", (4, 6)),
        (Cast(A, "F32"), "F32", (4, 6)),
        (Scale(VECTOR, 3.0), "F16", (6,)),
        (Concat((A, B, A)), "BF16", (12, 6)),
        (Concat((A, Slice(B, 0, 0, 1))), "BF16", (5, 6)),
        (Concat((VECTOR, VECTOR)), "F16", (12,)),
        (Stack((A, B, A)), "BF16", (3, 4, 6)),
        (Repeat(A, 3), "BF16", (12, 6)),
        (Transpose(Concat((A, B))), "BF16", (6, 8)),
        (Halves(A, 2, 2), "BF16", (4, 6)),
        (normal(), "F32", (4, HIDDEN)),
        (Zeros("F16", (2, 3, 4)), "F16", (2, 3, 4)),
        (Full("BF16", (5,), 0.001), "BF16", (5,)),
        (Stack((Concat((A, B)), Concat((B, A)))), "BF16", (2, 8, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_type_is_that_of_the_value(
    tensors: dict[str, torch.Tensor], expr: Expr, dtype: str, shape: tuple[int, ...]
) -> None:
    assert type_of(expr) == TensorType(dtype, shape)
    value = evaluate(expr, lambda name: raw_bytes(tensors[name]))
    assert value.nbytes == num_bytes(expr) == math.prod(shape) * TORCH[dtype].itemsize


@pytest.mark.parametrize(
    "expr",
    [
        Slice(A, 2, 0, 1),  # no such dimension
        Slice(A, 0, 0, 5),
        Slice(A, 0, -1, 2),
        Slice(A, 1, 3, 2),
        Select(A, 4),
        Select(A, -1),
        Select(Select(A, 0), 6),
        Concat((A, WIDE)),  # dtypes differ
        Concat((A, Slice(A, 1, 0, 3))),  # rows differ in length
        Stack((A, Slice(A, 0, 0, 3))),
        Stack((A, Cast(A, "F32"))),
        Scale(Concat((A, WIDE)), 2.0),  # wherever it is inside
        Repeat(Stack((A, Repeat(A, 2))), 2),
        Transpose(VECTOR),
        Transpose(STACK),
        Halves(A, 3, 2),
        Halves(A, 4, 3),
        Halves(A, 2, 4),
    ],
    ids=describe,
)
def test_parts_that_do_not_fit_have_no_type(expr: Expr) -> None:
    with pytest.raises(
        ValueError, match=r"not inside|no entry|cannot concatenate|cannot stack|no heads|no matrix"
    ):
        type_of(expr)


def test_equal_expressions_are_one_key() -> None:
    one = Stack((Scale(Slice(A, 0, 0, 2), 2.0),))
    other = Stack((Scale(Slice(Source("a", "BF16", (4, 6)), 0, 0, 2), 2.0),))
    assert one == other
    assert len({one, other, Stack((Scale(Slice(A, 0, 0, 2), 4.0),))}) == 2


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "compute"),
    [
        (A, lambda t: t["a"]),
        (Slice(A, 0, 1, 3), lambda t: t["a"][1:3]),
        (Slice(A, 1, 2, 5), lambda t: t["a"][:, 2:5]),
        (Cast(WIDE, "BF16"), lambda t: t["wide"].bfloat16()),
        (Cast(WIDE, "F16"), lambda t: t["wide"].half()),
        (Cast(VECTOR, "F32"), lambda t: t["vector"].float()),
        # Scaling takes the product in float32 and rounds once.
        (Scale(A, 1.5874), lambda t: (t["a"].float() * 1.5874).bfloat16()),
        (Scale(VECTOR, 3.0), lambda t: (t["vector"].float() * 3.0).half()),
        (Scale(WIDE, 0.1), lambda t: t["wide"] * torch.tensor(0.1)),
        (
            Scale(Cast(Slice(WIDE, 1, 1, 4), "BF16"), 3.0),
            lambda t: (t["wide"][:, 1:4].bfloat16().float() * 3).bfloat16(),
        ),
        (Concat((A, B)), lambda t: torch.cat([t["a"], t["b"]])),
        (Stack((A, B, A)), lambda t: torch.stack([t["a"], t["b"], t["a"]])),
        (Select(A, 2), lambda t: t["a"][2]),
        (Cast(Slice(Select(STACK, 1), 1, 0, 2), "F32"), lambda t: t["stack"][1, :, :2].float()),
        (Transpose(WIDE), lambda t: t["wide"].T),
        (Transpose(Concat((A, Scale(B, 3.0)))), lambda t: torch.cat([t["a"], t["b"].mul(3.0)]).T),
        (Slice(Transpose(A), 0, 1, 3), lambda t: t["a"].T[1:3]),
        (Repeat(WIDE, 2), lambda t: t["wide"][[0, 0, 1, 1, 2, 2]]),
        (Halves(A, 4, 4), lambda t: t["a"][[0, 2, 1, 3]]),
        (Halves(A, 2, 2), lambda t: t["a"]),
        (Halves(VECTOR, 6, 4), lambda t: t["vector"][[0, 2, 1, 3, 4, 5]]),
        (Cast(Halves(WIDE, 3, 2), "BF16"), lambda t: t["wide"].bfloat16()),
        (
            Halves(Concat((A, B, A, Slice(B, 0, 0, 2))), 7, 6),
            lambda t: torch.cat([t["a"], t["b"], t["a"], t["b"][:2]])[
                [0, 2, 4, 1, 3, 5, 6, 7, 9, 11, 8, 10, 12, 13]
            ],
        ),
        (Zeros("BF16", (3, 2)), lambda _: torch.zeros(3, 2, dtype=torch.bfloat16)),
        (Full("BF16", (5,), 0.001), lambda _: torch.full((5,), 0.001, dtype=torch.bfloat16)),
        (Full("F16", (2, 3), 0.1), lambda _: torch.full((2, 3), 0.1, dtype=torch.float16)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_what_torch_gives(
    tensors: dict[str, torch.Tensor],
    expr: Expr,
    compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> None:
    assert same_bits(value_of(expr, tensors.__getitem__), compute(tensors))


@pytest.mark.parametrize("exponent", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_power_of_two_can_be_taken_out_again(dtype: str, exponent: int) -> None:
    value = random_bits((64, 64), TORCH[dtype], torch.Generator().manual_seed(exponent))
    source = Source("x", dtype, (64, 64))
    scaled = value_of(Scale(source, 2.0**exponent), lambda _: value)
    assert same_bits(scaled / 2.0**exponent, value)


def all_values(dtype: str) -> torch.Tensor:
    """Every finite value of a dtype of 16 bits, one row for each exponent and sign."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(TORCH[dtype])
    words = words.reshape(-1, {"BF16": 128, "F16": 1024}[dtype])
    return words[words.isfinite().all(dim=1)]


@pytest.mark.parametrize("factor", [2.0**-9, 0.5, 1.0, 2.0, 64.0, 2.0**20, 3.0, 1.5874, -2.0])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("zeros", [(), (0.0, -0.0)], ids=["", "among zeros"])
def test_every_value_times_a_factor(
    dtype: str, factor: float, zeros: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = all_values(dtype)
    values = torch.cat([values.new_tensor(zeros).expand(len(values), -1), values], dim=1)
    monkeypatch.setattr(rounding, "PIECE_ITEMS", values.shape[1])  # a row at a time
    wanted = (values.float() * factor).to(TORCH[dtype])
    fits = wanted.isfinite().all(dim=1)
    source = Source("x", dtype, tuple(values[fits].shape))
    found = value_of(Scale(source, factor), lambda _: values[fits])
    assert same_bits(found, wanted[fits])
    for row in values[~fits]:
        with pytest.raises(OverflowInCastError):
            value_of(Scale(Source("x", dtype, (len(row),)), factor), {"x": row}.__getitem__)


@pytest.mark.parametrize(("dtype", "wanted"), [("F16", "BF16"), ("BF16", "F32"), ("F16", "F32")])
def test_every_value_in_another_dtype(dtype: str, wanted: str) -> None:
    values = all_values(dtype)
    source = Source("x", dtype, tuple(values.shape))
    assert same_bits(value_of(Cast(source, wanted), lambda _: values), values.to(TORCH[wanted]))


@pytest.mark.parametrize("expr", [Slice(WIDE, 1, 1, 4), Scale(WIDE, 3.0), Cast(WIDE, "BF16")])
def test_bytes_that_are_not_aligned_can_be_computed_with(
    tensors: dict[str, torch.Tensor], expr: Expr
) -> None:
    shifted = memoryview(b"?" + bytes(raw_bytes(tensors["wide"])))[1:]
    wanted = evaluate(expr, lambda name: raw_bytes(tensors[name]))
    assert bytes(evaluate(expr, lambda _: shifted)) == bytes(wanted)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1, 200_001), (3, 2, 5)])
def test_any_shape_can_be_computed_with(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    source = Source("x", "F32", shape)
    found = value_of(Scale(Cast(source, "BF16"), 3.0), lambda _: values)
    assert same_bits(found, (values.bfloat16().float() * 3).bfloat16())


def trees(depth: int = 3) -> st.SearchStrategy[Expr]:
    """Expressions of type BF16 (4, 6), with joins inside joins above them."""
    factors = st.sampled_from([0.5, 2.0, 3.0])
    matrices: st.SearchStrategy[Expr] = st.recursive(
        st.sampled_from([A, B, Zeros("BF16", (4, 6)), Repeat(Slice(A, 0, 1, 3), 2)]),
        lambda inner: st.builds(Scale, inner, factors),
        max_leaves=3,
    )
    joined = matrices
    for _ in range(depth):
        # Any number of one and the same type can be stacked or concatenated.
        joined = joined | st.builds(
            lambda kind, part, times: kind((part,) * times),
            st.sampled_from([Concat, Stack]),
            joined,
            st.integers(1, 3),
        )
    pairs = st.tuples(matrices, matrices)
    return joined | st.builds(Concat, pairs) | st.builds(lambda p: Stack((Concat(p),) * 2), pairs)


@settings(max_examples=60)
@given(expr=trees())
def test_leaves_are_the_bytes_of_the_whole(expr: Expr) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {name: random_bits((4, 6), torch.bfloat16, generator) for name in "ab"}
    parts = list(leaves(expr))
    assert not any(isinstance(part, Concat | Stack) for part in parts)

    def read(name: str) -> memoryview:
        return raw_bytes(values[name])

    whole = bytes(evaluate(expr, read))
    assert b"".join(bytes(evaluate(part, read)) for part in parts) == whole


def test_sources_are_everything_that_is_read(tensors: dict[str, torch.Tensor]) -> None:
    expr = Stack((Concat((Scale(Slice(A, 0, 0, 2), 2.0), Repeat(Cast(B, "BF16"), 1))),) * 2)
    read: set[str] = set()

    def spy(name: str) -> memoryview:
        read.add(name)
        return raw_bytes(tensors[name])

    evaluate(expr, spy)
    evaluate(normal(), spy)
    assert read == {*source_names(expr), *source_names(normal())} == {"a", "b", "norm"}
    assert list(source_names(Zeros("F32", (1,)))) == []


# Overflow ----------------------------------------------------------------------------------------

BIG_BF16 = 3.3e38


@pytest.mark.parametrize(
    ("value", "dtype", "convert"),
    [
        (70000.0, "F32", lambda x: Cast(x, "F16")),
        (-70000.0, "BF16", lambda x: Cast(x, "F16")),
        (3.4e38, "F32", lambda x: Cast(x, "BF16")),  # rounds up, past the largest bfloat16
        (BIG_BF16, "BF16", lambda x: Scale(x, 2.0)),
        (-BIG_BF16, "F32", lambda x: Scale(x, 2.0)),
        (40000.0, "F16", lambda x: Scale(x, 2.0)),
        (40000.0, "BF16", lambda x: Scale(Cast(x, "F16"), 2.0)),
    ],
)
def test_a_finite_value_must_stay_finite(
    value: float, dtype: str, convert: Callable[[Expr], Expr]
) -> None:
    data = torch.tensor([1.0, value, 2.0]).to(TORCH[dtype])
    expr = convert(Source("x", dtype, (3,)))
    with pytest.raises(OverflowInCastError):
        value_of(expr, lambda _: data)
    # The value that overflows may stand beside an infinity that was there before.
    data[0] = math.inf
    with pytest.raises(OverflowInCastError):
        value_of(expr, lambda _: data)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "convert", [lambda x: Cast(x, "F16"), lambda x: Scale(x, 2.0)], ids=["cast", "scale"]
)
def test_what_is_not_finite_in_the_source_is_no_overflow(
    value: float, convert: Callable[[Expr], Expr]
) -> None:
    data = torch.tensor([1.0, value])
    result = value_of(convert(Source("x", "F32", (2,))), lambda _: data)
    torch.testing.assert_close(result, data.to(result.dtype) * result[0], equal_nan=True)


TINY = 2.0**-30  # nothing to float16
VANISHING: list[tuple[str, str | None, float, list[float], int]] = [
    # before, after (None: not cast), factor, values, how many vanish
    ("F32", "F16", 1.0, [1.0, TINY, -TINY, 0.0, -0.0], 2),
    ("BF16", "F16", 1.0, [1.0, TINY, -TINY, 0.0, -0.0], 2),
    ("F32", "F16", 1.0, [2.0**-24, 2.0**-25, 1.5 * 2.0**-25], 1),  # a tie goes to the even one
    ("F32", "BF16", 1.0, [2.0**-133, 2.0**-135, 2.0**-149, 0.0], 2),
    ("F16", "BF16", 1.0, [2.0**-24, 0.0], 0),
    ("BF16", "F32", 1.0, [2.0**-133, 0.0], 0),
    ("F16", "F32", 0.5, [2.0**-24, 0.0], 0),
    ("F16", None, 0.25, [2.0**-24, 1.0, 0.0, -(2.0**-23)], 2),
    ("F16", None, 0.3, [2.0**-24, 1.0, 0.0], 1),
    ("F16", None, 4.0, [2.0**-24, 0.0], 0),
    ("BF16", None, 0.3, [2.0**-133, 1.0], 1),
    ("F32", None, 0.3, [2.0**-149, 1.0, -0.0], 1),
    ("F32", "F16", 4.0, [TINY, 1.0], 1),  # it is cast first
    ("F32", "F16", 1.0, [float("nan"), float("inf"), TINY], 1),
]


@pytest.mark.parametrize(("before", "after", "factor", "values", "count"), VANISHING, ids=str)
def test_values_that_vanish_are_counted(
    before: str, after: str | None, factor: float, values: list[float], count: int
) -> None:
    # In several pieces, and among many that stay.
    dense = torch.tensor(values + [0.5] * 70_000, dtype=torch.float64).to(TORCH[before])
    expr: Expr = Source("x", before, tuple(dense.shape))
    if after is not None:
        expr = Cast(expr, after)
    if factor != 1.0:
        expr = Scale(expr, factor)
    lost: list[int] = []
    evaluate(expr, lambda _: raw_bytes(dense), lost.append)
    assert sum(lost) == count


def test_the_largest_values_are_no_overflow() -> None:
    data = torch.tensor([65504.0, -65504.0])
    assert value_of(Cast(Source("x", "F32", (2,)), "F16"), lambda _: data).tolist() == [
        65504.0,
        -65504.0,
    ]


# Random rows -------------------------------------------------------------------------------------

GOLDEN = "3cd58368c64e444e4410d1adddcfca777b368ec2feb527182831e59818df9829"


def draw(expr: Normal, norm: torch.Tensor | None = None) -> torch.Tensor:
    weight = torch.linspace(0.5, 2, HIDDEN) if norm is None else norm
    dtype = next(name for name, dtype in TORCH.items() if dtype is weight.dtype)
    assert expr.norm is not None
    expr = replace(expr, norm=replace(expr.norm, dtype=dtype))
    return value_of(expr, lambda _: weight)


def test_a_draw_is_a_function_of_seed_and_stream() -> None:
    torch.manual_seed(1)
    first = draw(normal())
    torch.manual_seed(2)
    torch.rand(7)  # torch's own generator has no part in it
    assert same_bits(draw(normal()), first)
    others = [
        draw(normal(seed=1)),
        draw(normal(seed=2**63 - 1)),
        draw(normal(stream="layers.1.router")),
        draw(normal(stream="layers.0.shared_expert_gate")),
    ]
    for one, other in zip([first, *others], [*others, first], strict=True):
        assert not torch.isclose(one, other).any()


def test_seed_and_stream_are_not_run_together() -> None:
    one, other = draw(normal(seed=1, stream="1x")), draw(normal(seed=11, stream="x"))
    assert not torch.isclose(one, other).any()


def test_drawing_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    draw(normal())
    assert torch.equal(torch.rand(4), wanted)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_do_not_change_a_draw(threads: Callable[[int], None]) -> None:
    expr = normal(shape=(64, 2048), norm=Source("norm", "F32", (2048,)))
    weight = torch.linspace(0.1, 3, 2048)
    drawn = []
    for count in (1, 2, 5):
        threads(count)
        drawn.append(draw(expr, weight))
    assert same_bits(drawn[0], drawn[1])
    assert same_bits(drawn[0], drawn[2])


def test_the_stream_has_not_changed() -> None:
    """A recipe and a seed name one model: every release must draw the same bits for them."""
    rows = draw(normal(seed=1234, stream="layers.3.router"), torch.ones(HIDDEN))
    assert hashlib.sha256(raw_bytes(rows)).hexdigest() == GOLDEN


@pytest.mark.parametrize("logit_std", [1e-3, 1.0])
@pytest.mark.parametrize("scale", [0.03, 1.0, 20.0])
def test_rows_give_logits_of_the_deviation_that_was_asked_for(
    logit_std: float, scale: float
) -> None:
    hidden = 2048
    generator = torch.Generator().manual_seed(0)
    gamma = scale * (1 + 0.5 * torch.randn(hidden, generator=generator))
    expr = normal(shape=(64, hidden), logit_std=logit_std, norm=Source("norm", "F32", (hidden,)))
    rows = draw(expr, gamma)
    length = float(gamma.double().norm())
    # 131,072 numbers estimate their deviation to 0.2 %.
    assert float(rows.double().std()) == pytest.approx(logit_std / length, rel=0.01)
    # An RMSNorm's output has unit RMS before γ. 256 tokens share 64 rows, so this is rougher.
    tokens = torch.randn(256, hidden, generator=generator)
    tokens /= tokens.square().mean(dim=1, keepdim=True).sqrt()
    logits = (tokens * gamma) @ rows.T
    assert float(logits.std()) == pytest.approx(logit_std, rel=0.05)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_draw_is_made_in_float64_and_rounded_once(dtype: str) -> None:
    """The definition, written down once more: float32 draws differ between CPUs."""
    digest = hashlib.sha256(b"7/layers.0.router").digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 32, 4)]
    rows = torch.from_numpy(np.random.RandomState(words).randn(256, HIDDEN))
    drawn = draw(normal(seed=7, dtype=dtype, shape=(256, HIDDEN)), torch.full((HIDDEN,), 3.0))
    assert same_bits(drawn, (rows * (0.5 / 12)).to(TORCH[dtype]))  # ‖γ‖ = 3 · √16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_of_any_dtype_will_do(dtype: torch.dtype) -> None:
    weight = torch.linspace(0.5, 2, HIDDEN).to(dtype)
    assert same_bits(draw(normal(), weight), draw(normal(), weight.float()))


# In words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        (A, "a"),
        (Slice(A, 0, 1, 3), "a[1:3]"),
        (Slice(A, 1, 1, 3), "a[:, 1:3]"),
        (Cast(A, "F32"), "f32(a)"),
        (Scale(A, 1.5874010519681994), "a × 1.5874"),
        (Scale(Slice(A, 0, 0, 2), 4.0), "a[0:2] × 4"),
        (Concat((A, B)), "concat(a, b)"),
        (Stack((A, B, A)), "stack(a, … 3 in all)"),
        (Repeat(A, 8), "a, each row × 8"),
        (Transpose(Slice(A, 0, 1, 3)), "transpose(a[1:3])"),
        (Slice(Select(STACK, 1), 0, 0, 2), "stack[1][0:2]"),
        (Halves(Slice(A, 0, 0, 4), 4, 2), "a[0:4], the even rows first of 2 in each 4"),
        (normal(), "normal(layers.0.router, std 0.5 / ‖norm‖)"),
        (Zeros("F32", (1,)), "zeros"),
        (Full("F32", (1,), 0.001), "0.001 everywhere"),
    ],
)
def test_expressions_in_words(expr: Expr, words: str) -> None:
    assert describe(expr) == words
