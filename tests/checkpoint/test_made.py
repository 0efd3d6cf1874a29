"""Computed tensors: their arithmetic against exact fractions, and any part of them alone."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shapes import TORCH, same_bits, value_of

from upcycle_cli.checkpoint import made as made_module
from upcycle_cli.checkpoint.checkpoint import raw_bytes
from upcycle_cli.checkpoint.made import (
    Dequantize,
    LowRank,
    Made,
    Source,
    product,
    renamed,
    stored_parts,
)
from upcycle_cli.plan import expressions as ex
from upcycle_cli.write import evaluate as module
from upcycle_cli.write.evaluate import evaluate_together

Floats = NDArray[np.float32]
FP8 = torch.float8_e4m3fn


def exact(value: float) -> Fraction:
    return Fraction(float(value))


def rounded_once(total: Fraction) -> float:
    """Return the float32 next to a fraction, ties to even."""
    guess = np.float32(float(total))
    around = (
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    )
    near = sorted(around, key=lambda x: (abs(exact(x) - total), int(x.view(np.uint32)) & 1))
    return float(near[0])


def hard(kind: str) -> tuple[Floats, Floats]:
    """Return two matrices. Rounding their product twice would give a wrong value."""
    rng = np.random.default_rng(0)
    b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 6)))
    if kind == "cancels":  # only the last product is left of the sum
        b[:, 4:], a[4:] = b[:, :4], -a[:4]
        b[:, 0], a[0] = 1e-20, rng.standard_normal(6) * 1e-20
    if kind == "ties":  # halfway between two float32 but for one tiny product
        b[:], a[:] = 0, 0
        b[:, 0], a[0] = 1, 1 + 2.0**-23
        b[:, 1], a[1] = 2.0**-24, [1, 1, 1, -1, -1, 0]
        b[:, 2], a[2] = 2.0**-60, [1, -1, 0, 1, -1, 1]
    if kind == "of 16 bits":  # some sums lie halfway between two float32
        drawn = (torch.from_numpy(rng.standard_normal((12, 12)) * 0.02) for _ in "ba")
        b, a = (each.bfloat16().float().numpy() for each in drawn)
    if kind == "huge":
        b *= np.float32(1e30)
    return b, a


@pytest.mark.parametrize("kind", ["plain", "cancels", "ties", "of 16 bits", "huge"])
def test_a_product_is_rounded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b, a = hard(kind)
    if kind == "of 16 bits":  # float64 holds these sums exactly
        monkeypatch.setattr(made_module, "_exact_sum", pytest.fail)
    found = product(b, a)
    for o in range(len(b)):
        for i in range(a.shape[1]):
            total = sum(
                (exact(x) * exact(y) for x, y in zip(b[o], a[:, i], strict=True)), Fraction()
            )
            assert found[o, i] == rounded_once(total), (o, i)
    assert np.array_equal(product(b, a[:, 2:3])[:, 0], found[:, 2])


ROWS, COLUMNS, RANK = 40, 24, 3
WEIGHT, SCALE = Source("w", "F8_E4M3", (ROWS, COLUMNS)), Source("s", "F32", (5, 3))
PLAIN, PLAIN_T = Source("p", "BF16", (ROWS, COLUMNS)), Source("t", "BF16", (COLUMNS, ROWS))
A, B = Source("a", "F32", (RANK, COLUMNS)), Source("b", "F32", (ROWS, RANK))
BY_BLOCK = Dequantize(WEIGHT, SCALE, (8, 8), "BF16")
STACK = Dequantize(
    Source("stack", "F8_E4M3", (2, 20, COLUMNS)), Source("z", "F32", (2, 3, 3)), (8, 8), "BF16"
)
MADE: tuple[Made, ...] = (
    BY_BLOCK,
    Dequantize(WEIGHT, Source("row", "BF16", (ROWS, 1)), (1, COLUMNS), "F16"),
    Dequantize(WEIGHT, Source("one", "F32", (1, 1)), (ROWS, COLUMNS), "F32"),
    Dequantize(WEIGHT, Source("e", "U8", (5, 3)), (8, 8), "BF16"),
    Dequantize(PLAIN, None, (1, 1), "F16"),
    LowRank(PLAIN, A, B, 0.3, False, "BF16"),
    LowRank(PLAIN_T, A, B, 0.3, True, "F32"),
    LowRank(Dequantize(WEIGHT, SCALE, (8, 8), "F32"), A, B, -2.0, False, "BF16"),
)  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "w": draw(ROWS, COLUMNS).to(FP8),
        "stack": draw(2, 20, COLUMNS).to(FP8),
        "p": draw(ROWS, COLUMNS).bfloat16(),
        "t": draw(COLUMNS, ROWS).bfloat16(),
        "s": draw(5, 3),
        "z": draw(2, 3, 3),
        "row": draw(ROWS, 1).bfloat16(),
        "one": draw(1, 1),
        "e": torch.randint(120, 130, (5, 3), generator=generator, dtype=torch.uint8),
        "a": draw(RANK, COLUMNS),
        "b": draw(ROWS, RANK),
    }


def by_torch(made: Source | Made, held: dict[str, torch.Tensor]) -> torch.Tensor:
    match made:
        case Source(name):
            return held[name].float()
        case Dequantize(of, scale, (rows, columns)):
            if scale is None:
                return held[of.name].float()
            scales = held[scale.name]
            wide = 2.0 ** (scales.float() - 127) if scale.dtype == "U8" else scales.float()
            wide = wide.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
            return held[of.name].float() * wide[..., : of.shape[-2], : of.shape[-1]]
        case LowRank(of, a, b, factor, turned):
            added = torch.from_numpy(product(held[b.name].numpy(), held[a.name].numpy())) * factor
            return by_torch(of, held) + (added.T if turned else added)


ORDER = ex.Permutation(16, "x", 1)
EXPRESSIONS: tuple[ex.Expr, ...] = (
    *MADE,
    *(ex.Slice(made, 0, 5, 19) for made in MADE),
    *(ex.Slice(made, 1, 3, 22) for made in MADE),
    *(ex.Gather(made, dim, ORDER, 2, 13, 4) for made in MADE for dim in (0, 1)),
    ex.Gather(ex.Slice(BY_BLOCK, 0, 4, 30), 0, ex.Permutation(26, "x", 1), 0, 26),
    ex.Slice(ex.Gather(BY_BLOCK, 0, ex.Permutation(ROWS, "x", 1), 3, 30), 1, 2, 9),
    *(ex.Scale(ex.Slice(made, 0, 1, 20), 0.75) for made in MADE),
    *(ex.Cast(made, "F32") for made in MADE),
    *(ex.Transpose(ex.Slice(made, 0, 1, 23)) for made in MADE),
    ex.Transpose(ex.Concat((ex.Slice(BY_BLOCK, 0, 1, 33), ex.Slice(BY_BLOCK, 0, 0, 8)))),
    ex.Select(STACK, 1),
    ex.Select(BY_BLOCK, 3),  # a bias of experts
    ex.Slice(ex.Select(STACK, 1), 0, 3, 11),
    STACK,
    ex.RotaryRows(BY_BLOCK, 8, 8),
    ex.Repeat(ex.Slice(BY_BLOCK, 0, 3, 5), 3),
    ex.Mean((MADE[7], MADE[5]), "BF16"),
)  # fmt: skip


def stored(value: Any, held: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401
    """Return an expression with computed tensors as stored ones, which `held` gets."""
    if isinstance(value, Dequantize | LowRank):
        name = f"stored {len(held)}"
        held[name] = by_torch(value, held).to(TORCH[value.dtype])
        return Source(name, value.dtype, value.shape)
    if isinstance(value, tuple):
        return tuple(stored(each, held) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{f.name: stored(getattr(value, f.name), held) for f in fields(value)})


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=ex.describe)
def test_an_expression_of_a_computed_tensor(
    tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, expr: ex.Expr
) -> None:
    """The value is the one that torch computes, in pieces of any size."""
    held = dict(tensors)
    wanted = value_of(stored(expr, held), held.__getitem__)
    for items in (1 << 20, 4):
        for name in ("_PIECE_ITEMS", "_TRANSPOSED_ITEMS", "_TOGETHER_ITEMS"):
            monkeypatch.setattr(module, name, items)
        assert same_bits(value_of(expr, held.__getitem__), wanted)
        found = evaluate_together([expr], lambda name: raw_bytes(held[name]))
        assert b"".join(piece for _, piece in found) == raw_bytes(wanted)


@pytest.mark.parametrize("made", MADE)
def test_gather_columns_together(tensors: dict[str, torch.Tensor], made: Made) -> None:
    order = ORDER
    exprs = [ex.Scale(ex.Gather(made, 1, order, at, at + 4, 4), 0.5) for at in (0, 4, 12)]
    found = [b""] * len(exprs)
    for number, piece in evaluate_together(exprs, lambda name: raw_bytes(tensors[name])):
        found[number] += piece
    wanted = [raw_bytes(value_of(expr, tensors.__getitem__)) for expr in exprs]
    assert found == wanted


def test_rename_and_list_what_is_stored() -> None:
    made = renamed(MADE[7], "model 1: {}".format)
    assert [each.name for each in stored_parts(made)] == [f"model 1: {x}" for x in "wsab"]
    assert [*ex.source_names(ex.Slice(made, 0, 0, 1))] == [f"model 1: {x}" for x in "wsab"]
