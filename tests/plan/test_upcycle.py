"""Plans of released models at their full sizes, from headers alone.

The numbers are worked out by hand below, from the sizes in the fixtures' config.json files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYOUTS, MakeDense
from shapes import big_config, hollow_plan, tiny_config, write_hollow

from upcycle_cli import Options, Recipe, build_plan, open_checkpoint
from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.plan import upcycle
from upcycle_cli.plan.calibration import Calibration, LayerFound, RouterStatistics
from upcycle_cli.plan.expressions import Constant, Gather, Repeat
from upcycle_cli.plan.inputs import Inputs
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.texts import calibration_text
from upcycle_cli.plan.upcycle import bind
from upcycle_cli.recipe.recipe import ExpertLayout, Promise, Routing, Scaling


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    folder, names = tmp_path_factory.mktemp("big"), ("mistral-7b-v0.1", "qwen3-32b")
    return {n: open_checkpoint(write_hollow(folder / n, big_config(n))) for n in names}


# Parameters --------------------------------------------------------------------------------------

# Per layer: q and o, k and v, gate and up and down, two norms (and norms on heads).
MISTRAL_7B_MLP = 3 * 4096 * 14336
MISTRAL_7B = (
    2 * 32000 * 4096 + 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + MISTRAL_7B_MLP + 2 * 4096)
)
QWEN3_32B_MLP = 3 * 5120 * 25600
QWEN3_32B_ATTENTION = 2 * 5120 * 8192 + 2 * 5120 * 1024 + 2 * 128
QWEN3_32B = 2 * 151936 * 5120 + 5120 + 64 * (QWEN3_32B_ATTENTION + QWEN3_32B_MLP + 2 * 5120)
# qwen2_moe insists on a shared expert, 64 wide, and its gate; 32 query heads and 2 · 8 of keys and
# values get zero biases.
MISTRAL_8_GROUPS = MISTRAL_7B + 32 * (64 * 4096 + 3 * 64 * 4096 + 4096 + 4096 + 2 * 1024)


def test_dense_parameters_are_the_published_ones(big: Mapping[str, Checkpoint]) -> None:
    published = {"mistral-7b-v0.1": 7_241_732_096, "qwen3-32b": 32_762_123_264}
    assert [*published.values()] == [MISTRAL_7B, QWEN3_32B]
    for name, count in published.items():
        plan = build_plan(Recipe("E2G1T1"), big[name])
        assert plan.dense_parameters == big[name].num_parameters == count


@pytest.mark.parametrize(
    ("name", "recipe", "target", "one_group", "mlps"),
    [
        ("mistral-7b-v0.1", "E8G1T2", "mixtral", MISTRAL_7B + 32 * 8 * 4096, 32 * MISTRAL_7B_MLP),
        ("mistral-7b-v0.1", "E8G8T16", "qwen2_moe", MISTRAL_8_GROUPS, 32 * MISTRAL_7B_MLP),
        ("qwen3-32b", "E16G4T4", "qwen3_moe", QWEN3_32B + 64 * 64 * 5120, 64 * QWEN3_32B_MLP),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_bytes(
    big: Mapping[str, Checkpoint],
    name: str,
    recipe: str,
    target: str,
    one_group: int,
    mlps: int,
    layout: ExpertLayout,
) -> None:
    options, wanted = Options(expert_layout=layout), Recipe(recipe)
    plan = build_plan(wanted, big[name], target=target, options=options)
    assert plan.total_parameters == one_group + (wanted.expansion - 1) * mlps
    assert plan.active_parameters == one_group + (wanted.top_k // wanted.granularity - 1) * mlps
    assert plan.nbytes == 2 * plan.total_parameters


def test_top_k_of_a_part_of_a_group(big: Mapping[str, Checkpoint]) -> None:
    recipe = Recipe("E8G8T2", allow_inexact=True)
    plan = build_plan(recipe, big["mistral-7b-v0.1"])
    idle = MISTRAL_7B_MLP * 6 // 8  # two of the eight eighths are used
    assert plan.active_parameters == MISTRAL_7B + 32 * (64 * 4096 - idle)


def test_copies_are_equal_expressions(tmp_path: Path) -> None:
    """So the writer computes each once, however many experts there are."""
    few, many = (hollow_plan(tmp_path, name) for name in ("E2G3T3", "E16G3T3"))
    unique = [{t.expr for t in plan.tensors if t.role is Role.EXPERT} for plan in (few, many)]
    assert unique[0] == unique[1]
    assert len(unique[0]) == 2 * 3 * 3  # layers, matrices, shards


# Compute -----------------------------------------------------------------------------------------

# tiny_config: attention 8·8 q, 2 · 4·8 k and v, 8·8 o; MLP 3·12·8; norms 2·8; embedding 11·8.
TINY_MLP = 3 * 12 * 8
TINY_LAYERS = 2 * (2 * 8 * 8 + 2 * 4 * 8 + TINY_MLP + 2 * 8) + 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("recipe", "copies"), [("E4G2T2", 1), ("E4G2T6", 3), ("E2G1T2", 2)])
def test_flops_leave_out_the_lookup(
    tmp_path: Path, recipe: str, copies: int, *, tied: bool
) -> None:
    plan = hollow_plan(tmp_path, recipe, config={"tie_word_embeddings": tied})
    # The head is a product whether it is a tensor of its own or the embedding once more.
    dense = TINY_LAYERS + 11 * 8
    routers = 2 * plan.recipe.num_experts * 8
    moe = dense + 2 * (copies - 1) * TINY_MLP + routers
    assert plan.flops_ratio == moe / dense


def test_looking_up_a_second_embedding_costs_nothing_either(make_dense: MakeDense) -> None:
    source = open_checkpoint(make_dense("gemma4_text"))
    plan = build_plan(Recipe("E2G2T2"), source)
    table = source.tensors["model.embed_tokens_per_layer.weight"].num_elements
    assert plan.multiplied == (plan.active_parameters - table, plan.dense_parameters - table)


# Shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_bytes", [5_000_000_000, 1_000_000_000, 100_000_000])
def test_no_shard_is_too_large_but_for_a_lone_tensor(
    big: Mapping[str, Checkpoint], layout: ExpertLayout, max_bytes: int
) -> None:
    options = Options(expert_layout=layout, max_shard_bytes=max_bytes)
    plan = build_plan(Recipe("E8G8T8"), big["mistral-7b-v0.1"], options=options)
    count = len(plan.shards)
    assert [shard.name for shard in plan.shards] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    assert all(s.nbytes <= max_bytes or len(s.tensors) == 1 for s in plan.shards)
    assert sum(shard.nbytes for shard in plan.shards) == plan.nbytes
    # No two neighbours would have fitted into one.
    for one, other in zip(plan.shards, plan.shards[1:], strict=False):
        assert one.nbytes + other.tensors[0].nbytes > max_bytes


# The digest --------------------------------------------------------------------------------------

RECIPE = Recipe("E2G2T2")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = write_hollow(tmp_path / "dense", tiny_config("llama"))
    (path / "tokenizer.json").write_text("{}")
    return path


def digest(path: Path, recipe: Recipe = RECIPE, **settings: Any) -> str:  # noqa: ANN401
    return build_plan(recipe, open_checkpoint(path), **settings).digest


def test_the_same_again_has_the_same_digest(dense: Path, tmp_path: Path) -> None:
    first = digest(dense)
    assert digest(dense) == first
    assert digest(dense, options=Options()) == first
    # What auto chose, said in so many words.
    assert digest(dense, target="mixtral") == first
    settings: dict[str, Any] = {"routing": Routing.TOPK_SOFTMAX, "router_logit_std": 1.0}
    assert digest(dense, dataclasses.replace(RECIPE, **settings)) == first
    # Nor does it matter where the source lies, and what lies beside it.
    (dense / "notes.txt").write_text("new")
    shutil.copytree(dense, tmp_path / "elsewhere" / dense.name)
    assert digest(tmp_path / "elsewhere" / dense.name) == first


def test_any_change_of_the_source_changes_the_digest(dense: Path) -> None:
    """Headers alone cannot tell two models of one shape apart."""
    digests = [digest(dense)]
    for name, text in (
        ("model.safetensors", None),  # another time alone
        ("tokenizer.json", None),
        ("tokenizer.json", "{ }"),
        ("config.json", json.dumps(tiny_config("llama", rms_norm_eps=1e-3))),
        ("config.json", json.dumps(tiny_config("llama", rms_norm_eps=1e-3, unknown_key=1))),
        ("chat_template.jinja", ""),
    ):
        before = (dense / name).stat().st_mtime_ns if (dense / name).exists() else 0
        if text is not None:
            (dense / name).write_text(text)
        os.utime(dense / name, ns=(before, before + (text is None)))
        digests.append(digest(dense))
    assert len({*digests}) == len(digests)


def test_any_choice_and_any_option_changes_the_digest(dense: Path) -> None:
    choices: list[dict[str, Any]] = [
        *({"seed": 1}, {"expansion": 4}, {"granularity": 1}, {"top_k": 4}, {"scaling": 2.5}),
        *({"virtual_groups": False}, {"router_logit_std": 0.5}, {"scale_split": "down"}),
    ]
    options = [
        *(Options(), Options(max_shard_bytes=1000), Options(max_shard_bytes=4_999_999_999)),
        *(Options(dtype="float32"), Options(expert_layout=ExpertLayout.FUSED)),
    ]
    digests = {digest(dense, options=chosen) for chosen in options}
    digests |= {digest(dense, dataclasses.replace(RECIPE, **changes)) for changes in choices}
    assert len(digests | {digest(dense, target="qwen2_moe")}) == len(options) + len(choices) + 1


# Calibrations ------------------------------------------------------------------------------------


def test_bind_fills_in_a_calibration_without_planning_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"routing": Routing.SOFTMAX_TOPK, "scaling": Scaling.MEASURED}
    settings |= {"router_init": "balanced", "neuron_order": "clustered"}
    plan = hollow_plan(tmp_path, "E2G2T2", model_type="qwen3", **settings)
    assert plan.inputs == Inputs(text=calibration_text("builtin"))
    numbers = dict.fromkeys(("mean_share", "logit_std", "logit_spread", "load_cv"), 0.0)
    layers = {
        layer: LayerFound(
            statistics=RouterStatistics(layer=layer, idle=0, gates=0.5, **numbers),
            activity=np.zeros(12, np.float32),
            rows=b"rows",
            order=b"order",
        )
        for layer in plan.layers
    }
    monkeypatch.delattr(upcycle, "choose")  # nothing is decided again
    bound = bind(plan, Calibration(tokens=7, layers=layers))
    assert bound.digest == plan.digest
    assert (bound.factors.c, bound.recipe.scaling) == (4.0, 4.0)
    tensors, before = ({t.name: t.expr for t in each.tensors} for each in (bound, plan))
    rows = tensors["model.layers.0.mlp.gate.weight"]
    assert isinstance(rows, Repeat)
    assert isinstance(rows.of, Constant)
    assert rows.of.data == b"rows"
    gate = tensors["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert isinstance(gate, Gather)
    assert gate.order.indices == b"order"
    # Comparisons leave out what the calibration found.
    assert rows == before["model.layers.0.mlp.gate.weight"]
    assert gate == before["model.layers.0.mlp.experts.0.gate_proj.weight"]


@pytest.mark.parametrize(("model_type", "biased"), [("phi", True), ("llama", False)])
def test_a_scaled_down_bias_counts_as_rounded(
    make_dense: MakeDense, model_type: str, *, biased: bool
) -> None:
    """A factor in the config leaves matrices alone, but a down bias is scaled by 1/G."""
    source = open_checkpoint(make_dense(model_type, dtype="bfloat16"))
    plan = build_plan(Recipe("E2G3T3"), source, target="upcycled")
    assert plan.factors.config == 3.0
    assert plan.promise is Promise.EXACT
    assert plan.rounded_parts == (("down_bias",) if biased else ())
    assert plan.rounded_to == ("bfloat16" if biased else None)
    assert plan.lossless is not biased
