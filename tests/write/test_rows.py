"""Experts that are stored transposed: the same numbers, made a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import assert_refused, invoke
from shapes import TORCH, random_bits, same_bits, value_of
from wrapped import save_wrapper

from upcycle_cli import Options, Recipe, convert
from upcycle_cli.checkpoint.checkpoint import raw_bytes
from upcycle_cli.plan.expressions import (
    AddNoise,
    Cast,
    Concat,
    Expr,
    Gather,
    Permutation,
    Scale,
    Slice,
    Source,
    Transpose,
    type_of,
)
from upcycle_cli.recipe.recipe import ExpertLayout
from upcycle_cli.write import evaluate as module
from upcycle_cli.write.evaluate import evaluate, evaluate_together
from upcycle_cli.write.file_layout import bundles

RECIPE = Recipe("E2G2T2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper(tmp_path_factory.mktemp("vl") / "dense", "qwen3_vl", "qwen3_vl_text", {})


def test_square_matrices_are_refused(dense: Path, tmp_path: Path) -> None:
    """Readers tell by the shape whether to transpose; a square one leaves it open."""
    for layout in ((), ("--expert-layout", "stacked")):
        done = invoke("convert", dense, tmp_path / "moe", "--recipe", "E2G3T3", *layout)
        words = ("mlp.experts.gate_up_proj would be square, 32 by 32", "--expert-layout fused")
        assert_refused(done, *words)
    fused = Options(expert_layout=ExpertLayout.FUSED)
    convert(dense, tmp_path / "moe", replace(RECIPE, granularity=3, top_k=3), options=fused)


# A few rows at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (4, 256), (300, 260), (257, 1028), (512, 8), (0, 4)]
)
@pytest.mark.parametrize("dtype", TORCH)
def test_matrices_of_any_shape_are_transposed(shape: tuple[int, int], dtype: str) -> None:
    held = random_bits(shape, TORCH[dtype], torch.Generator().manual_seed(1))
    expr = Transpose(Source("a", dtype, shape))
    assert same_bits(value_of(expr, {"a": held}.__getitem__), held.mT)


def order(size: int) -> Permutation:
    return Permutation(size, "order", 0)


ROWS, COLUMNS = 48, 600
A, B = (Source(name, "F32", (ROWS, COLUMNS)) for name in "ab")
STREAMED: Mapping[str, Expr] = {
    "gate and up": Concat((Slice(A, 0, 8, 24), Scale(Slice(B, 0, 8, 24), 2.0))),
    "down": Scale(Cast(Slice(A, 1, 100, 500), "BF16"), 3.0),
    "rows in order": Concat(tuple(Gather(each, 0, order(ROWS), 8, 24) for each in (A, B))),
    "columns in order": Cast(Gather(A, 1, order(500), 30, 400, 100), "F16"),
    "transposed twice": Transpose(Slice(A, 1, 0, 300)),
}


@pytest.mark.parametrize("name", STREAMED)
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {each: torch.randn(ROWS, COLUMNS, generator=generator) for each in "ab"}

    def read(wanted: str) -> memoryview:
        return raw_bytes(tensors[wanted])

    expr = Transpose(STREAMED[name])
    whole = bytes(evaluate(expr, read))
    rows, columns = type_of(expr).shape
    before = np.frombuffer(evaluate(expr.of, read), f"u{len(whole) // (rows * columns)}")
    assert whole == before.reshape(columns, rows).T.tobytes()
    monkeypatch.setattr(module, "_TRANSPOSED_ITEMS", 1)
    monkeypatch.setattr(module, "TILE", 64)
    made = [bytes(piece) for _, piece in evaluate_together([expr], read)]
    assert len(made) == -(-type_of(expr).shape[0] // 64)
    assert b"".join(made) == whole


@pytest.mark.parametrize("cast", [None, "BF16"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_columns_that_are_gathered_together_are_those_that_are_gathered_alone(
    cast: str | None, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))

    def expert(start: int) -> Expr:
        part: Expr = Gather(A, 1, order(500), start, start + 100, 50)
        part = part if cast is None else Cast(part, cast)
        return part if factor == 1.0 else Scale(part, factor)

    exprs = [expert(start) for start in range(0, 500, 100)]
    assert bundles([*exprs, A]) == [exprs, [A]]
    monkeypatch.setattr(module, "_TOGETHER_ITEMS", 7 * 500)
    made = [b""] * len(exprs)
    for number, piece in evaluate_together(exprs, lambda _: raw_bytes(tensor)):
        made[number] += bytes(piece)
    assert made == [bytes(evaluate(expr, lambda _: raw_bytes(tensor))) for expr in exprs]


def test_draws_need_the_whole_matrix() -> None:
    tensor = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    expr = Transpose(Concat((AddNoise(A, 0.1, 0, "one"), B)))
    assert len([*evaluate_together([expr], lambda _: raw_bytes(tensor))]) == 1
