"""FP8 checkpoints that are odd or damaged: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import MakeDense, read_json, write_json
from quantised import save_fp8
from verified import edit_tensors

if TYPE_CHECKING:
    from refusals import Refuses

Damage = Callable[[Path], object]
WEIGHT = "model.layers.0.mlp.up_proj.weight"
SCALE, NORM = f"{WEIGHT}_scale_inv", "model.norm.weight"
LAYOUT = "two sizes"


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor) -> Damage:
    """Replace a tensor, or make it from the scale."""

    def edit(held: dict[str, torch.Tensor]) -> None:
        held[name] = (value(held[SCALE]) if callable(value) else value).clone().contiguous()

    return lambda dense: edit_tensors(dense, edit)


def first(value: float) -> Damage:
    return put(SCALE, lambda scale: torch.cat([torch.full((1, scale.shape[1]), value), scale[1:]]))


def spoilt(code: int) -> Damage:
    """Give one FP8 value another code."""

    def edit(held: dict[str, torch.Tensor]) -> None:
        held[WEIGHT].view(torch.uint8)[0, 0] = code

    return lambda dense: edit_tensors(dense, edit)


def dropped(name: str) -> Damage:
    return lambda dense: edit_tensors(dense, lambda held: held.pop(name))


def settings(**changes: Any) -> Damage:  # noqa: ANN401
    def damage(dense: Path) -> None:
        config = read_json(dense / "config.json")
        write_json(
            dense / "config.json",
            config | {"quantization_config": config["quantization_config"] | changes},
        )

    return damage


def unquantised(dense: Path) -> None:
    config = read_json(dense / "config.json")
    del config["quantization_config"]
    write_json(dense / "config.json", config)


INFINITE, FP8 = float("inf"), torch.float8_e4m3fn
ROWS: tuple[tuple[str, Damage, str], ...] = (
    *((f"scale {value}", first(value), f"{SCALE}|not finite") for value in (INFINITE, -INFINITE)),
    ("scale nan", first(float("nan")), f"{SCALE}|not finite"),
    ("a scale beyond bfloat16", first(1e38), f"{WEIGHT}|finite"),
    ("a code that is nan", spoilt(0x7F), f"{WEIGHT}|not finite"),
    ("no scale", dropped(SCALE), f"{SCALE} is missing"),
    ("no settings", unquantised, "F8_E4M3|quantization_config"),
    ("a scale without a weight", put(f"{NORM}_scale_inv", torch.ones(1)), f"{NORM}_scale_inv"),
    ("a weight that is not FP8", put(WEIGHT, torch.ones(48, 32)), f"{WEIGHT}"),
    ("two scales", put(f"{WEIGHT}_scale", lambda scale: scale), f"{WEIGHT}_scale"),
    ("no values", put(WEIGHT, torch.ones(0, 32).to(FP8)), WEIGHT),
    ("a norm without a scale", put(NORM, torch.ones(32).to(FP8)), f"{NORM}_scale_inv is missing"),
    ("transposed", put(SCALE, lambda scale: scale.T), f"{SCALE}|shape|{WEIGHT} needs"),
    ("flat", put(SCALE, lambda scale: scale.flatten()), f"{SCALE}|shape"),
    ("one scale", put(SCALE, torch.tensor(1.0)), f"{SCALE}|shape []"),
    ("no scales in it", put(SCALE, torch.ones(0)), f"{SCALE}|shape [0]"),
    *(
        (f"scales of {dtype}", put(SCALE, lambda scale, dtype=dtype: scale.to(dtype)), SCALE)  # type: ignore[misc]
        for dtype in (torch.int32, torch.float64, FP8)
    ),
    *(
        (f"blocks {value}", settings(weight_block_size=value), f"weight_block_size|{LAYOUT}")
        for value in ([0, 16], [16], "16", [16.0, 16], [-16, 16], {"a": 1}, [16, 16, 16])
    ),
    ("blocks of another size", settings(weight_block_size=[10**30, 16]), "shape"),
    ("no blocks", settings(weight_block_size=None), "shape"),
)


@pytest.mark.parametrize(("damage", "words"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS])
def test_refuse_odd_scales(
    make_dense: MakeDense, tmp_path: Path, refuses: Refuses, damage: Damage, words: str
) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "dense", (16, 16))
    damage(dense)
    refuses(dense, *words.split("|"), *(() if "finite" in words else (str(dense),)))
