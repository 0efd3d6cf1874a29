"""Matrices that lie the other way on disk: as Qwen3-VL-MoE is released, and as it is in memory.

Of the same model both are made, and must hold the same numbers; each is read by transformers, by
`inspect` and by `verify`, whoever has written it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import clone, read_json, read_tensors
from refusals import invoke
from safetensors.torch import save_file
from shapes import TORCH, random_bits, same_bits, value_of
from wrapped import failures, load, save_wrapper

from upcycle_cli import Options, Recipe, UpcycleError, WriteOptions, convert, inspect
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
from upcycle_cli.write import transpose as turning
from upcycle_cli.write.evaluate import evaluate, evaluate_together
from upcycle_cli.write.transpose import in_pieces, pieces

QUICKLY = WriteOptions(workers=1, fsync=False)
EXPERTS = "model.language_model.layers.{}.mlp.experts.{}_proj"
USUAL: Mapping[str, Any] = {"expansion": 2, "granularity": 2, "top_k": 2}
KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sliced": ({}, {}),
    "shuffled": ({"neuron_order": "shuffled"}, {}),
    "rounded": ({"neuron_order": "shuffled"}, {"dtype": "bfloat16"}),
    "noise": ({"noise": 0.05}, {}),
    "reinit": ({"reinit": 0.5, "neuron_order": "shuffled"}, {}),
    "one shard": ({"granularity": 1, "top_k": 1}, {}),
    "some layers": ({"layers": "1"}, {}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_wrapper(tmp_path_factory.mktemp("vl") / "dense", "qwen3_vl", "qwen3_vl_text", {})


def both(dense: Path, folder: Path, kind: str = "sliced", **changes: Any) -> tuple[Path, Path]:  # noqa: ANN401
    """Convert to the layout of released checkpoints, the default, and to that of memory."""
    recipe, options = KINDS[kind]
    wanted = Recipe(**{**USUAL, **recipe, **changes})
    for name, layout in (("released", None), ("memory", ExpertLayout.FUSED)):
        chosen = Options(expert_layout=layout, **options)
        convert(dense, folder / name, wanted, options=chosen, writing=QUICKLY)
    return folder / "released", folder / "memory"


@pytest.fixture(scope="module")
def plain(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The usual one in both layouts; read only."""
    return both(dense, tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_hold_the_same_numbers(dense: Path, tmp_path: Path, kind: str) -> None:
    released, memory = both(dense, tmp_path, kind)
    one, other = read_tensors(released), read_tensors(memory)
    assert one.keys() == other.keys()
    turned = {name for name in one if ".experts." in name}
    assert turned
    for name, held in one.items():
        assert same_bits(held, other[name].mT if name in turned else other[name]), name
    width = 48 // Recipe(**{**USUAL, **KINDS[kind][0]}).granularity
    assert one[EXPERTS.format(1, "gate_up")].shape[1:] == (32, 2 * width)
    assert one[EXPERTS.format(1, "down")].shape[1:] == (width, 32)
    lossy = {*KINDS[kind][0]} & {"noise", "reinit"}
    checks = ("structure", "weights", "claims", *(() if lossy else ("outputs",)))
    for moe, layout in ((released, "stacked"), (memory, "fused")):
        assert inspect(moe).expert_layout == layout
        assert read_json(moe / "upcycle.json")["expert_layout"] == layout
        assert failures(dense, moe, checks) == []


def test_transformers_has_the_same_in_memory(plain: tuple[Path, Path], dense: Path) -> None:
    """Its own loader, whatever this package thinks of layouts: experts are the dense rows."""
    released, memory = (load(path).state_dict() for path in plain)
    assert released.keys() == memory.keys()
    assert all(torch.equal(held, memory[name]) for name, held in released.items())
    source = read_tensors(dense)
    for layer in range(2):
        mlp = f"model.language_model.layers.{layer}.mlp."
        gate, up, down = (source[f"{mlp}{part}_proj.weight"] for part in ("gate", "up", "down"))
        # Gates sum to 1, so that c = G = 2, all of which goes into up.
        for expert in range(4):
            rows = slice(expert % 2 * 24, expert % 2 * 24 + 24)
            held = released[EXPERTS.format(layer, "gate_up")][expert]
            assert torch.equal(held, torch.cat([gate[rows], 2 * up[rows]]))
            assert torch.equal(released[EXPERTS.format(layer, "down")][expert], down[:, rows])


def damaged(moe: Path, path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A copy with other tensors, and without the record of those that it had."""
    clone(moe, path)
    (path / "upcycle.json").unlink()
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_what_transformers_4_and_5_save_is_read(
    plain: tuple[Path, Path], dense: Path, tmp_path: Path
) -> None:
    """4.57 writes what it reads, which was looked at once with 4.57.6; 5 writes its memory."""
    released, memory = plain
    four = damaged(released, tmp_path / "four", read_tensors(released))
    load(released).save_pretrained(tmp_path / "five")
    for moe, layout in ((four, "stacked"), (tmp_path / "five", "fused")):
        assert failures(dense, moe, ["directory", "weights", "outputs"]) == []
        assert inspect(moe).expert_layout == layout
    saved, wanted = read_tensors(tmp_path / "five"), read_tensors(memory)
    assert all(torch.equal(saved[name], held) for name, held in wanted.items())


@pytest.mark.parametrize("kind", ["sliced", "shuffled"])
@pytest.mark.parametrize(
    ("name", "index", "part"),
    [("gate_up", (3, 5, 7), "gate"), ("gate_up", (2, 31, 47), "up"), ("down", (3, 0, 9), "down")],
)
def test_one_bit_is_found_in_its_part(
    dense: Path, tmp_path: Path, kind: str, name: str, index: tuple[int, ...], part: str
) -> None:
    released, _ = both(dense, tmp_path, kind)
    tensors = read_tensors(released)
    held = tensors[EXPERTS.format(1, name)].clone()
    held.view(torch.int32)[index] ^= 1
    bad = damaged(released, tmp_path / "bad", tensors | {EXPERTS.format(1, name): held})
    (finding,) = failures(dense, bad, ["weights"])
    assert EXPERTS.format(1, name) in finding
    assert f"({part})" in finding


def turn(tensors: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    return {
        name: held.mT if name.endswith(tuple(f".experts.{part}_proj" for part in parts)) else held
        for name, held in tensors.items()
    }


def test_half_a_layout_is_none(plain: tuple[Path, Path], dense: Path, tmp_path: Path) -> None:
    released, _ = plain
    bad = damaged(released, tmp_path / "bad", turn(read_tensors(released), "down"))
    for check in ("structure", "weights"):
        (finding, *_) = failures(dense, bad, [check])
        assert EXPERTS.format(0, "down") in finding
        assert "shape" in finding


def test_gate_and_up_are_told_apart(plain: tuple[Path, Path], dense: Path, tmp_path: Path) -> None:
    released, _ = plain
    tensors = read_tensors(released)
    name = EXPERTS.format(0, "gate_up")
    swapped = torch.cat(tensors[name].chunk(2, -1)[::-1], -1)
    bad = damaged(released, tmp_path / "bad", tensors | {name: swapped})
    assert failures(dense, bad, ["weights"])
    assert failures(dense, bad, ["outputs"])


# Square matrices ---------------------------------------------------------------------------------


def test_square_matrices_are_refused(dense: Path, tmp_path: Path) -> None:
    """A reader sees by the shape whether to turn them; of square ones each would have its own."""
    output = tmp_path / "moe"
    for layout in ((), ("--expert-layout", "stacked")):
        found = invoke("convert", dense, output, "--recipe", "E2G3T3", *layout)
        assert found.exit_code == 2
        for words in (
            "mlp.experts.gate_up_proj would be square, 32 by 32",
            "--expert-layout fused",
        ):
            assert words in " ".join(found.stderr.split())
        assert not output.exists()
    fused = Options(expert_layout=ExpertLayout.FUSED)
    convert(dense, output, Recipe(expansion=2, granularity=3, top_k=3), options=fused)
    assert failures(dense, output) == []
    # As transformers 4 would have it: 5 turns one of the two, and takes the other as it is.
    bad = damaged(output, tmp_path / "bad", turn(read_tensors(output), "gate_up", "down"))
    assert inspect(bad).expert_layout == "stacked"
    findings = failures(dense, bad, ["structure"])
    assert any("gate_up_proj has square matrices" in finding for finding in findings)
    assert failures(dense, bad, ["outputs"])


def test_a_layout_that_a_target_has_not(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(UpcycleError, match="has no per-expert layout"):
        convert(
            dense,
            tmp_path / "moe",
            Recipe(**USUAL),
            options=Options(expert_layout=ExpertLayout.PER_EXPERT),
        )


# inspect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sliced", "shuffled", "noise"])
def test_what_weights_say_is_the_same(dense: Path, tmp_path: Path, kind: str) -> None:
    made = both(dense, tmp_path, kind)
    released, memory = (inspect(moe, weights=True, dense=dense) for moe in made)
    one, other = released.weights, memory.weights
    assert one is not None
    assert other is not None
    assert one.factors
    assert one.movement
    assert other.movement
    # Sums are of the same numbers in another order.
    assert replace(one, factors=None, movement=None) == replace(other, factors=None, movement=None)
    assert one.factors == pytest.approx(other.factors)
    assert one.factors["up"] == pytest.approx(2.0, rel=0.01)
    for here, there in zip(one.movement, other.movement, strict=True):
        assert here.moved == pytest.approx(there.moved)
        assert here.apart == pytest.approx(there.apart)


# A few rows at a time ----------------------------------------------------------------------------

SHAPES = ((1, 1), (3, 5), (4, 256), (300, 260), (257, 1028), (512, 8), (0, 4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TORCH)
def test_matrices_of_any_shape_are_turned(shape: tuple[int, int], dtype: str) -> None:
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
    "turned twice": Transpose(Slice(A, 1, 0, 300)),
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
    monkeypatch.setattr(turning, "_PIECE_ITEMS", 1)
    monkeypatch.setattr(turning, "TILE", 64)
    assert in_pieces(expr)
    made = [bytes(piece) for _, piece in evaluate_together([expr], read, lambda _: None)]
    assert len(made) == -(-type_of(expr).shape[0] // 64)
    assert b"".join(made) == whole


def test_pieces_are_small() -> None:
    """Of an MLP of 30 GB that is turned, none takes more than a few megabytes."""
    whole = Source("a", "BF16", (1 << 17, 1 << 16))
    sizes = [
        type_of(piece).shape for piece in pieces(Transpose(Concat((whole, Scale(whole, 2.0)))))
    ]
    assert {rows for rows, _ in sizes} == {1 << 18}
    assert sum(columns for _, columns in sizes) == 1 << 16
    assert max(columns for _, columns in sizes) <= turning.TILE


def test_draws_need_all_that_they_are_upon() -> None:
    expr = Transpose(Concat((AddNoise(A, 0.1, 0, "one"), B)))
    assert not in_pieces(expr)
    assert in_pieces(Transpose(Concat((A, B))))
    assert not in_pieces(A)
