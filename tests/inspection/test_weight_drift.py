"""What inspect measures against the dense models, for each way to make experts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import clone, validate_json
from refusals import assert_refused, invoke
from safetensors.torch import load_file, save_file
from shapes import write_orders

from upcycle_cli import MergeRequest, Options, Recipe, convert, inspect
from upcycle_cli.inspection.experts import WeightFacts
from upcycle_cli.recipe.recipe import NeuronOrder

SIZES: Mapping[str, Any] = {"expansion": 2, "granularity": 3, "top_k": 3, "allow_inexact": True}
STEP = 0.01
"""How far `train` moves each matrix, relative to its norm."""
SHARED: dict[str, Any] = {"shared_experts": 1, "top_k": 2}
SHUFFLED, CLUSTERED, FILE = NeuronOrder.SHUFFLED, NeuronOrder.CLUSTERED, NeuronOrder.FILE


def train(path: Path, size: float, only: str) -> Path:
    """Add noise to the tensors whose names contain `only`."""
    generator, tensors = torch.Generator().manual_seed(5), load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if only in name:
            noise = torch.randn(tensor.shape, generator=generator)
            step = size * tensor.float().norm() * noise / noise.norm()
            tensors[name] = (tensor + step).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three fine-tuned models of one base. Read only."""
    path = tmp_path_factory.mktemp("models")
    others = [train(clone(llama, path / name), s, "mlp") for name, s in (("b", 0.1), ("c", 0.2))]
    return [llama, *others]


def weights_of(moe: Path, sources: Sequence[Path]) -> WeightFacts:
    found = inspect(moe, weights=True, dense=sources).weights
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("settings", "others", "moved", "unlike"),
    [
        ({}, 0, 0, 0),
        ({"_dtype": "bfloat16"}, 0, 0, 0),  # c = 3 is rounded
        ({"neuron_order": SHUFFLED}, 0, 0, 0),
        ({"neuron_order": FILE}, 0, 0, 0),
        (SHARED, 0, 0, 0),
        (SHARED | {"neuron_order": CLUSTERED}, 0, 0, 0),
        ({"shared_experts": 2, "top_k": 1, "neuron_order": FILE}, 0, 0, 0),
        ({"expansion": 3, "neuron_order": SHUFFLED}, 2, 0, 0),
        ({"noise": 0.05}, 0, 0.05, 0),
        ({"noise": 0.05, "neuron_order": SHUFFLED}, 0, 0.05, 0),
        ({"reinit": 0.5, "neuron_order": SHUFFLED}, 0, 0, 0.5),
        ({"reinit": 1.0}, 0, 1.4, 1),
    ],
    ids=str,
)
def test_measure_factors_and_drift(
    models: list[Path],
    tmp_path: Path,
    settings: dict[str, Any],
    others: int,
    moved: float,
    unlike: float,
) -> None:
    recipe = {**SIZES, **settings}
    orders = None
    if recipe.get("neuron_order") is FILE:
        orders = write_orders(tmp_path / "orders.safetensors", alike=32)
    options = Options(dtype=recipe.pop("_dtype", None))
    done = convert(
        models[0],
        tmp_path / "moe",
        Recipe(**recipe),
        target="qwen2_moe" if "shared_experts" in recipe else "mixtral",
        options=options,
        neuron_orders=orders,
        merge=MergeRequest(experts_from=models[1:]) if others else None,
    )
    sources = models[: 1 + others]
    found = weights_of(done.output, sources)
    assert found.factors is not None
    for part, factor in found.factors.items():
        assert factor == pytest.approx(getattr(done.plan.factors, part), rel=0.1 if moved else 1e-9)
    assert found.movement is not None
    if not others:
        assert found.diverged == (found.num_experts if moved or unlike else 0)
    for layer in found.movement:
        assert layer.unlike == unlike
        assert layer.models == tuple(g % len(sources) for g in range(recipe["expansion"]))
        assert layer.moved == pytest.approx([moved] * len(layer.moved), rel=0.15)
        assert bool(layer.apart) == bool(moved)
    if moved:
        return
    train(done.output, STEP, "experts.")
    after = weights_of(done.output, sources).movement
    assert after is not None
    for layer in after:
        assert layer.unlike == unlike
        assert layer.moved == pytest.approx([STEP] * len(layer.moved), rel=0.5)
        # Of several models, each gave one group, which has no copies.
        assert (layer.apart > STEP / 10) == (not others)
        assert layer.apart < 2 * STEP


def test_require_all_dense_models_of_a_merged_one(models: list[Path], tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(models[0], moe, Recipe(**SIZES), merge=MergeRequest(experts_from=models[1:2]))
    look = ("inspect", moe, "--weights", "--dense", models[0])
    assert_refused(invoke(*look), "experts of several models", "--experts-from")
    shown = invoke(*look, "--experts-from", models[1])
    assert shown.exit_code == 0, shown.stderr
    assert "2 groups of b" in shown.stdout
    printed = invoke(*look, "--experts-from", models[1], "--json")
    weights = validate_json("inspect", printed.stdout)["weights"]
    assert weights["sources"] == [models[0].name, "b"]
    assert [layer["models"] for layer in weights["movement"]] == [[0, 1]] * 2
