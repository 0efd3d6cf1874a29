"""The shapes of NVIDIA's models, counted by hand and by transformers.

The numbers are worked out here once more, apart from `nemotron_shapes`; the terms of a sum come in
the order of the comment above it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nemotron_shapes import MLP, NAMES, dense_shapes, layer_kinds, released, write_dense

from upcycle_cli import Recipe, build_plan, convert, verify
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.recipe.recipe import Promise, Routing, ScaleSplit, Scaling
from upcycle_cli.recipe.scaling import MlpKind

if TYPE_CHECKING:
    from conftest import MakeDense

# Two embeddings, the last norm, and for each layer q and o, k and v, up and down, two norms; each
# norm with a bias.
NEMOTRON_4_15B = (
    2 * 256_000 * 6_144
    + 2 * 6_144
    + 32 * (2 * 6_144 * 6_144 + 2 * 1_024 * 6_144 + 2 * 24_576 * 6_144 + 4 * 6_144)
)
NEMOTRON_4_340B = (
    2 * 256_000 * 18_432
    + 2 * 18_432
    + 96 * (2 * 18_432 * 18_432 + 2 * 1_536 * 18_432 + 2 * 73_728 * 18_432 + 4 * 18_432)
)
MINITRON_4B = (
    2 * 256_000 * 3_072
    + 2 * 3_072
    + 32 * (2 * 3_072 * 3_072 + 2 * 1_024 * 3_072 + 2 * 9_216 * 3_072 + 4 * 3_072)
)
# Two embeddings, a norm for each layer and the last one; the attention layers' q and o, k and v;
# the MLPs' up and down; and the Mamba layers' in (gate, x, B and C of 8 groups, dt), convolution
# of width 4 with a bias, out, gated norm, and A, D and dt's bias for each head.
NEMOTRON_H_8B = (
    2 * 131_072 * 4_096
    + 53 * 4_096
    + 4 * (2 * 4_096 * 4_096 + 2 * 1_024 * 4_096)
    + 24 * (2 * 21_504 * 4_096)
    + 24
    * (
        (8_192 + 8_192 + 2 * 8 * 128 + 128) * 4_096
        + (8_192 + 2 * 8 * 128) * 5
        + 4_096 * 8_192
        + 8_192
        + 3 * 128
    )
)
NEMOTRON_H_47B = (
    2 * 131_072 * 8_192
    + 99 * 8_192
    + 5 * (2 * 8_192 * 8_192 + 2 * 1_024 * 8_192)
    + 48 * (2 * 30_720 * 8_192)
    + 45
    * (
        (16_384 + 16_384 + 2 * 8 * 256 + 256) * 8_192
        + (16_384 + 2 * 8 * 256) * 5
        + 8_192 * 16_384
        + 16_384
        + 3 * 256
    )
)
NEMOTRON_NANO_9B = (
    2 * 131_072 * 4_480
    + 57 * 4_480
    + 4 * (2 * 5_120 * 4_480 + 2 * 1_024 * 4_480)
    + 25 * (2 * 15_680 * 4_480)
    + 27
    * (
        (10_240 + 10_240 + 2 * 8 * 128 + 128) * 4_480
        + (10_240 + 2 * 8 * 128) * 5
        + 4_480 * 10_240
        + 10_240
        + 3 * 128
    )
)
TOTALS = {
    "nemotron-4-15b": NEMOTRON_4_15B,
    "nemotron-4-340b": NEMOTRON_4_340B,
    "minitron-4b-base": MINITRON_4B,
    "nemotron-h-8b-base-8k": NEMOTRON_H_8B,
    "nemotron-h-47b-base-8k": NEMOTRON_H_47B,
    "nvidia-nemotron-nano-9b-v2": NEMOTRON_NANO_9B,
}
MLP_LAYERS = {
    "nemotron-4-15b": 32,
    "nemotron-4-340b": 96,
    "minitron-4b-base": 32,
    "nemotron-h-8b-base-8k": 24,
    "nemotron-h-47b-base-8k": 48,
    "nvidia-nemotron-nano-9b-v2": 25,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_counted_by_hand(name: str) -> None:
    model = released(name)
    shapes = dense_shapes(model.config)
    assert sum(map(math.prod, shapes.values())) == TOTALS[name] == model.dense_parameters


def test_the_parameters_are_those_that_were_published() -> None:
    # Of the 9B model by its files, of the 8B by who counted them; the reports round the others.
    assert NEMOTRON_NANO_9B == 8_888_227_328
    assert NEMOTRON_H_8B == 8_100_852_736
    for total, embedding, others in ((NEMOTRON_4_15B, 3.2, 12.5), (NEMOTRON_4_340B, 9.4, 331.6)):
        embeddings = 2 * 256_000 * {3.2: 6_144, 9.4: 18_432}[embedding]
        assert abs(embeddings / 1e9 - embedding) < 0.06
        assert abs((total - embeddings) / 1e9 - others) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_as_many_layers_have_an_mlp_as_the_fixture_says(name: str) -> None:
    model = released(name)
    shapes = dense_shapes(model.config)
    assert sum(tensor.endswith("up_proj.weight") for tensor in shapes) == model.mlp_layers
    assert model.mlp_layers == MLP_LAYERS[name]
    if model.config["model_type"] == "nemotron_h":
        assert layer_kinds(model.config).count(MLP) == model.mlp_layers


@pytest.mark.parametrize("name", NAMES)
def test_transformers_has_the_same_tensors(name: str) -> None:
    config = dict(released(name).config)
    assert _on_disk(_tensors_of_transformers(config)) == dense_shapes(config)


def _tensors_of_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _on_disk(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if "model.embed_tokens.weight" in shapes:
        return shapes
    # The names of a nemotron_h are changed on loading, and back on saving.
    renamed = {name.replace("model.", "backbone.", 1): shape for name, shape in shapes.items()}
    assert len(renamed) == len(shapes)
    return renamed


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_it_opens(name: str, tmp_path: Path) -> None:
    model = released(name)
    checkpoint = open_checkpoint(write_dense(tmp_path / name, model.config))
    assert checkpoint.num_parameters == TOTALS[name]
    assert checkpoint.nbytes == 2 * TOTALS[name]
    assert {entry.name: entry.shape for entry in checkpoint.tensors.values()} == dense_shapes(
        model.config
    )
    on_disk = sum(file.stat().st_blocks * 512 for file in (tmp_path / name).iterdir())
    assert on_disk < 10_000_000


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "tie_word_embeddings": False,
}
TINY_NEMOTRON = {**TINY, "num_hidden_layers": 2}
TINY_NEMOTRON_H = {
    **TINY,
    "hybrid_override_pattern": "M-*M--",
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 8,
    "conv_kernel": 3,
}


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("nemotron", TINY_NEMOTRON), ("nemotron_h", TINY_NEMOTRON_H)]
)
def test_save_pretrained_writes_these_names(
    model_type: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    written = {entry.name: entry.shape for entry in checkpoint.tensors.values()}
    assert written == dense_shapes(checkpoint.config)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "hybrid_override_pattern" not in config
    if model_type == "nemotron_h":
        assert layer_kinds(config) == sizes["hybrid_override_pattern"]


# Plans -------------------------------------------------------------------------------------------

# What is added to the dense model, for each layer with an MLP: seven more MLPs of up and down, or
# for one token one more (two of eight) or none (eight of 64 eighths); the routers' rows; and in a
# nemotron_h the bias on the choice and a shared expert, 64 wide.
E8G1T2 = {
    "nemotron-4-15b": (
        NEMOTRON_4_15B + 32 * (7 * 2 * 24_576 * 6_144 + 8 * 6_144),
        NEMOTRON_4_15B + 32 * (1 * 2 * 24_576 * 6_144 + 8 * 6_144),
    ),
    "nemotron-4-340b": (
        NEMOTRON_4_340B + 96 * (7 * 2 * 73_728 * 18_432 + 8 * 18_432),
        NEMOTRON_4_340B + 96 * (1 * 2 * 73_728 * 18_432 + 8 * 18_432),
    ),
    "minitron-4b-base": (
        MINITRON_4B + 32 * (7 * 2 * 9_216 * 3_072 + 8 * 3_072),
        MINITRON_4B + 32 * (1 * 2 * 9_216 * 3_072 + 8 * 3_072),
    ),
    "nemotron-h-8b-base-8k": (
        NEMOTRON_H_8B + 24 * (7 * 2 * 21_504 * 4_096 + 8 * 4_096 + 8 + 2 * 64 * 4_096),
        NEMOTRON_H_8B + 24 * (1 * 2 * 21_504 * 4_096 + 8 * 4_096 + 8 + 2 * 64 * 4_096),
    ),
    "nemotron-h-47b-base-8k": (
        NEMOTRON_H_47B + 48 * (7 * 2 * 30_720 * 8_192 + 8 * 8_192 + 8 + 2 * 64 * 8_192),
        NEMOTRON_H_47B + 48 * (1 * 2 * 30_720 * 8_192 + 8 * 8_192 + 8 + 2 * 64 * 8_192),
    ),
    "nvidia-nemotron-nano-9b-v2": (
        NEMOTRON_NANO_9B + 25 * (7 * 2 * 15_680 * 4_480 + 8 * 4_480 + 8 + 2 * 64 * 4_480),
        NEMOTRON_NANO_9B + 25 * (1 * 2 * 15_680 * 4_480 + 8 * 4_480 + 8 + 2 * 64 * 4_480),
    ),
}
E8G8T8 = {
    "nemotron-4-15b": (
        NEMOTRON_4_15B + 32 * (7 * 2 * 24_576 * 6_144 + 64 * 6_144),
        NEMOTRON_4_15B + 32 * 64 * 6_144,
    ),
    "nemotron-4-340b": (
        NEMOTRON_4_340B + 96 * (7 * 2 * 73_728 * 18_432 + 64 * 18_432),
        NEMOTRON_4_340B + 96 * 64 * 18_432,
    ),
    "minitron-4b-base": (
        MINITRON_4B + 32 * (7 * 2 * 9_216 * 3_072 + 64 * 3_072),
        MINITRON_4B + 32 * 64 * 3_072,
    ),
    "nemotron-h-8b-base-8k": (
        NEMOTRON_H_8B + 24 * (7 * 2 * 21_504 * 4_096 + 64 * 4_096 + 64 + 2 * 64 * 4_096),
        NEMOTRON_H_8B + 24 * (64 * 4_096 + 64 + 2 * 64 * 4_096),
    ),
    "nemotron-h-47b-base-8k": (
        NEMOTRON_H_47B + 48 * (7 * 2 * 30_720 * 8_192 + 64 * 8_192 + 64 + 2 * 64 * 8_192),
        NEMOTRON_H_47B + 48 * (64 * 8_192 + 64 + 2 * 64 * 8_192),
    ),
    "nvidia-nemotron-nano-9b-v2": (
        NEMOTRON_NANO_9B + 25 * (7 * 2 * 15_680 * 4_480 + 64 * 4_480 + 64 + 2 * 64 * 4_480),
        NEMOTRON_NANO_9B + 25 * (64 * 4_480 + 64 + 2 * 64 * 4_480),
    ),
}
FINE = Recipe(expansion=8, granularity=8, top_k=8)
COARSE = Recipe(expansion=8, granularity=1, top_k=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all of them, of headers alone."""
    folder = tmp_path_factory.mktemp("nemotron")
    for name in NAMES:
        write_dense(folder / name, released(name).config)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("recipe", "counted"), [(COARSE, E8G1T2), (FINE, E8G8T8)])
def test_a_plan_has_the_parameters_that_were_counted_by_hand(
    name: str, recipe: Recipe, counted: dict[str, tuple[int, int]], sources: Path
) -> None:
    plan = build_plan(recipe, open_checkpoint(sources / name))
    assert (plan.total_parameters, plan.active_parameters) == counted[name]
    assert plan.dense_parameters == TOTALS[name]
    assert plan.lossless
    assert plan.promise is Promise.EXACT
    layers = {tensor.layer for tensor in plan.tensors if tensor.role is Role.ROUTER}
    assert len(layers) == MLP_LAYERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_mlp_is_copied(name: str, sources: Path) -> None:
    source = open_checkpoint(sources / name)
    plan = build_plan(COARSE, source)
    copied = {tensor.name for tensor in plan.tensors if tensor.role is Role.COPIED}
    mlps = {tensor for tensor in source.tensors if "up_proj" in tensor or "down_proj" in tensor}
    assert copied == source.tensors.keys() - mlps


def planned(sources: Path, name: str, recipe: Recipe) -> Plan:
    return build_plan(recipe, open_checkpoint(sources / name))


SOFTMAX, RENORMALISED = Routing.SOFTMAX_TOPK, Routing.TOPK_SOFTMAX
FINE_SOFTMAX = Recipe(expansion=8, granularity=8, top_k=8, routing=SOFTMAX)


@pytest.mark.parametrize(
    ("recipe", "c", "factor"),
    [
        # The paper's: c = E·G²/T, and its cube root on up and on down.
        (FINE_SOFTMAX, 64.0, 4.0),
        (Recipe(expansion=8, granularity=1, top_k=2, routing=SOFTMAX), 4.0, 1.587401),
        (Recipe(expansion=8, granularity=8, top_k=8, routing=RENORMALISED), 8.0, 2.0),
    ],
)
def test_the_papers_factors(recipe: Recipe, c: float, factor: float, sources: Path) -> None:
    plan = planned(sources, "nemotron-4-15b", with_scaling(recipe, Scaling.PAPER))
    assert plan.factors.c == c
    assert plan.factors.up == plan.factors.down == pytest.approx(factor, rel=1e-6)
    assert (plan.factors.gate, plan.factors.config) == (1.0, 1.0)
    # up² · down = c: what the paper does is exact for a squared ReLU.
    assert plan.factors.up**2 * plan.factors.down == pytest.approx(c, rel=1e-12)
    assert plan.family.dense.mlp_kind == MlpKind(gated=False, degree=2)
    wanted = Promise.APPROXIMATE if recipe.routing is SOFTMAX else Promise.EXACT
    assert plan.promise is wanted


def with_scaling(recipe: Recipe, scaling: Scaling) -> Recipe:
    return replace(recipe, scaling=scaling)


def test_exact_scaling_is_the_papers_where_that_is_lossless(sources: Path) -> None:
    balanced = replace(FINE_SOFTMAX, scale_split=ScaleSplit.BALANCED)
    exact, paper = (
        planned(sources, "nemotron-4-15b", recipe).factors
        for recipe in (balanced, with_scaling(FINE_SOFTMAX, Scaling.PAPER))
    )
    assert (exact.up, exact.down) == (paper.up, paper.down) == (4.0, 4.0)


def test_the_usual_place_of_the_factor_is_the_config(sources: Path) -> None:
    for name, routing, c in (("nemotron-4-15b", SOFTMAX, 64.0), ("nemotron-h-8b-base-8k", None, 8)):
        recipe = Recipe(expansion=8, granularity=8, top_k=8, routing=routing)
        plan = planned(sources, name, recipe)
        assert (plan.factors.up, plan.factors.down) == (1.0, 1.0)
        assert plan.config["routed_scaling_factor"] == plan.factors.config == c


@pytest.mark.parametrize(
    ("top_k", "routing", "promise"),
    [
        (2, SOFTMAX, Promise.APPROXIMATE),
        (4, SOFTMAX, Promise.EXACT),
        (2, RENORMALISED, Promise.EXACT),
        (2, Routing.SIGMOID_TOPK, Promise.EXACT),
    ],
)
def test_verify_takes_the_papers_scaling_of_a_nemotron(
    make_dense: MakeDense, tmp_path: Path, top_k: int, routing: Routing, promise: Promise
) -> None:
    dense = make_dense("nemotron")
    recipe = Recipe(expansion=2, granularity=2, top_k=top_k, routing=routing, scaling=Scaling.PAPER)
    done = convert(dense, tmp_path / "moe", recipe)
    assert done.plan.promise is promise
    report = verify(dense, tmp_path / "moe")
    assert report.passed, report
    assert report.promise == promise
