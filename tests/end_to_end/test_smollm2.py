"""The promises of the method on a real pretrained model, in the numbers that it was built for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from smollm2 import make_smollm2, missing

from upcycle_cli import Options, Recipe, convert, verify
from upcycle_cli.verification.prompts import TextOptions

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}: tests/smollm2.py"),
]

FEW = TextOptions(tokens=256)
"""For what does not depend on how much text there is, which is most of the time it takes."""
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
    """Its first six layers, for what real weights show in any of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("smollm2") / "short"
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", num_hidden_layers=6)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(dense).save_pretrained(path)
    return path


def greedy(path: Path, dtype: str) -> list[int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    ids = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    output: list[int] = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    return output


EXACT: tuple[tuple[str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("E8G1T2", {}, "mixtral", {}),
    ("E4G8T16", {"neuron_order": "shuffled"}, "mixtral", {}),
    ("E4G4T4", {"shared_experts": 2, "routing": "topk-softmax"}, "qwen2_moe", {}),
    ("E4G4T4", {"shared_experts": 2}, "glm4_moe", {}),
    ("E4G1T2", {}, "mixtral", {"dtype": "float16", "expert_layout": "fused"}),
)


@pytest.mark.parametrize(("name", "settings", "target", "options"), EXACT)
def test_gates_that_sum_to_one_are_exact(
    short: Path,
    tmp_path: Path,
    name: str,
    settings: dict[str, Any],
    target: str,
    options: dict[str, Any],
) -> None:
    moe = tmp_path / "moe"
    convert(short, moe, Recipe(name, **settings), target=target, options=Options(**options))
    report = verify(short, moe, texts=FEW)
    assert report.passed, report.to_json()
    assert float(report.checks[2].metrics["kl_mean_conversion" if options else "kl_mean"]) < 1e-9


def test_the_whole_model_is_exact_and_writes_the_same_text(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", "E4G8T8")
    report = verify(dense, tmp_path / "moe")
    assert report.passed, report.to_json()
    metrics = report.checks[2].metrics
    assert float(metrics["kl_mean"]) < 1e-9
    assert float(metrics["top1_agreement"]) == 1.0
    assert greedy(tmp_path / "moe", "float32") == greedy(dense, "float32")
    # In bfloat16 ties can split groups, unless each is one expert.
    convert(dense, tmp_path / "whole", "E8G1T2")
    assert greedy(tmp_path / "whole", "bfloat16") == greedy(dense, "bfloat16")


@pytest.mark.parametrize("name", ["E8G1T2", "E8G8T8"])
def test_softmax_topk_is_close(dense: Path, tmp_path: Path, name: str) -> None:
    convert(dense, tmp_path / "moe", Recipe(name, routing="softmax-topk"), target="qwen2_moe")
    report = verify(dense, tmp_path / "moe", texts=FEW)
    assert report.passed, report.to_json()
    metrics = report.checks[2].metrics
    assert float(metrics["kl_mean_whole"]) < 1e-4
    assert float(metrics["split_token_layers"]) < 1e-3
    assert float(metrics["top1_agreement"]) >= 0.99
