"""The promises of the method on a real pretrained model, in the numbers that it was built for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from smollm2 import benchmark, make_smollm2, missing

from upcycle_cli import Options, Recipe, convert, verify
from upcycle_cli.api import Conversion
from upcycle_cli.recipe.recipe import ExpertLayout, NeuronOrder, Routing, Scaling
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import CheckResult, Status

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}: tests/smollm2.py"),
]

FEW = TextOptions(tokens=256)
"""For what does not depend on how much text there is, which is most of the time it takes."""
SHORT = 6
PROMPT = "The lighthouse keeper climbed the stairs and"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if made := os.environ.get("SMOLLM2"):
        return Path(made)
    path = tmp_path_factory.mktemp("smollm2") / "dense"
    make_smollm2(path)
    return path


@pytest.fixture(scope="module")
def short(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first layers, for what real weights show in any of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("smollm2") / "short"
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", num_hidden_layers=SHORT)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(dense).save_pretrained(path)
    return path


def _convert(dense: Path, tmp_path: Path, recipe: Recipe, **options: Any) -> Conversion:  # noqa: ANN401
    return convert(dense, tmp_path / "moe", recipe, **options)


def _checks(dense: Path, moe: Path, texts: TextOptions = FEW) -> dict[str, CheckResult]:
    return {check.name: check for check in verify(dense, moe, texts=texts).checks}


def _greedy(path: Path, dtype: str) -> list[int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    ids = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    output: list[int] = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    return output


@pytest.mark.parametrize(
    ("model", "sizes", "texts"), [("short", (8, 1, 2), FEW), ("dense", (4, 8, 8), TextOptions())]
)
def test_topk_softmax_is_exact(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model: str,
    sizes: tuple[int, int, int],
    texts: TextOptions,
) -> None:
    dense: Path = request.getfixturevalue(model)
    expansion, granularity, top_k = sizes
    recipe = Recipe(expansion=expansion, granularity=granularity, top_k=top_k)
    moe = _convert(dense, tmp_path, recipe).output
    checks = _checks(dense, moe, texts)
    assert {check.status for check in checks.values()} == {Status.PASSED}
    metrics = checks["outputs"].metrics
    assert float(metrics["tokens"]) >= 512
    assert float(metrics["kl_mean"]) < 1e-9
    assert float(metrics["top1_agreement"]) == 1.0
    assert checks["weights"].metrics["lossless"] is True
    assert _greedy(moe, "float32") == _greedy(dense, "float32")


def test_experts_that_differ_are_exact(short: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=4, granularity=8, top_k=16, neuron_order=NeuronOrder.SHUFFLED)
    checks = _checks(short, _convert(short, tmp_path, recipe).output)
    assert {check.status for check in checks.values()} == {Status.PASSED}
    assert checks["weights"].metrics["reordered_groups"] == 3 * SHORT
    assert float(checks["outputs"].metrics["kl_mean"]) < 1e-9


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_shards_that_every_token_meets(short: Path, tmp_path: Path, target: str) -> None:
    routing = Routing.TOPK_SOFTMAX if target == "qwen2_moe" else None
    order = NeuronOrder.SHUFFLED if target == "qwen2_moe" else NeuronOrder.SLICED
    recipe = Recipe(
        expansion=4,
        granularity=4,
        shared_experts=2,
        top_k=4,
        routing=routing,
        neuron_order=order,
    )
    moe = _convert(short, tmp_path, recipe, target=target).output
    checks = _checks(short, moe)
    assert {check.status for check in checks.values()} == {Status.PASSED}
    assert float(checks["outputs"].metrics["kl_mean"]) < 1e-9


@pytest.mark.parametrize(("model", "seed"), [("dense", 0), ("short", 1)])
@pytest.mark.parametrize("granularity", [1, 8])
def test_softmax_topk_is_close(
    request: pytest.FixtureRequest, tmp_path: Path, granularity: int, model: str, seed: int
) -> None:
    dense: Path = request.getfixturevalue(model)
    recipe = Recipe(
        expansion=8,
        granularity=granularity,
        top_k=max(2, granularity),
        routing=Routing.SOFTMAX_TOPK,
        seed=seed,
    )
    done = _convert(dense, tmp_path, recipe, target="qwen2_moe")
    texts = TextOptions() if granularity == 8 and not seed else FEW
    report = verify(dense, done.output, checks=["weights", "outputs", "claims"], texts=texts)
    assert report.passed, report.to_json()
    metrics = report.checks[-1].metrics
    assert float(metrics["kl_mean_whole"]) < 1e-4
    assert float(metrics["split_token_layers"]) < 1e-3
    assert float(metrics["top1_agreement"]) >= 0.995


def test_paper_scaling_has_golden_factors_and_promises_nothing(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=8, top_k=8, scaling=Scaling.PAPER)
    done = _convert(dense, tmp_path, recipe)
    assert done.plan.factors.gate == done.plan.factors.up == done.plan.factors.down == 2.0
    checks = _checks(dense, done.output)
    assert checks["weights"].status is Status.PASSED
    for matrix in ("gate", "up", "down"):
        assert checks["weights"].metrics[f"{matrix}_factor"] == 2.0
    outputs = checks["outputs"]
    assert "does not promise equality" in outputs.detail
    assert "SwiGLU" in outputs.detail
    assert float(outputs.metrics["kl_mean"]) > 0.1


def test_whole_experts_give_the_same_text_in_bfloat16(dense: Path, tmp_path: Path) -> None:
    # Ties in bf16 choose between copies of one expert, so G = 1 is unaffected by them; the sum of
    # two gated copies still rounds, which greedy text of this length does not show.
    moe = _convert(dense, tmp_path, Recipe(expansion=8, granularity=1, top_k=2)).output
    assert _greedy(moe, "bfloat16") == _greedy(dense, "bfloat16")


def test_float16_and_fused_experts(short: Path, tmp_path: Path) -> None:
    options = Options(dtype="float16", expert_layout=ExpertLayout.FUSED)
    recipe = Recipe(expansion=4, granularity=1, top_k=2)
    moe = _convert(short, tmp_path, recipe, options=options).output
    assert verify(short, moe, texts=FEW).passed


def test_scaled_experts_overflow_float16_and_verify_says_so(dense: Path, tmp_path: Path) -> None:
    # SmolLM2's MLPs reach 22,522; eight times that is beyond float16, though every weight fits.
    options = Options(dtype="float16")
    recipe = Recipe(expansion=2, granularity=8, top_k=8)
    moe = _convert(dense, tmp_path, recipe, options=options).output
    (outputs,) = verify(dense, moe, checks=["outputs"], texts=FEW).checks
    assert outputs.status is Status.FAILED
    assert float(outputs.metrics["max_float16_value"]) > 65504


def test_balanced_routers_are_chosen_evenly_on_other_text(dense: Path) -> None:
    routers = benchmark("routers")
    plans = [routers.plan_for(dense, "E64G1T4", init) for init in ("normal", "balanced")]
    rows = [routers.rows_of(plan) for plan in plans]
    for text in routers.held_out().values():
        inputs = routers.mlp_inputs(dense, text, 1024)
        normal, balanced = (routers.load_of(plans[0], each, inputs) for each in rows)
        assert balanced.cv <= 0.65 * normal.cv
        assert balanced.idle <= normal.idle / 8
