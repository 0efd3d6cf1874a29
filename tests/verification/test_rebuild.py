"""Every kind of conversion is rebuilt from its record, and what the record cannot say is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense, clone, read_json, save_companions, write_json
from safetensors.numpy import save_file as save_arrays
from shapes import write_orders
from verified import EXPERT, Tensors, edit_tensors, save_llama, text_of

from upcycle_cli import Growth, MergeRequest, Options, Recipe, UpcycleError, convert, verify
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.plan.merge import NonExpertWeights
from upcycle_cli.recipe.recipe import ExpertLayout, RouterInit, Routing
from upcycle_cli.verification.prompts import TextOptions
from upcycle_cli.verification.result import Status

COMPARED = ("directory", "weights")
G2: Callable[..., Recipe] = partial(Recipe, expansion=2, granularity=2, top_k=2)
G4: Callable[..., Recipe] = partial(Recipe, expansion=3, granularity=4, top_k=4)

KINDS: tuple[tuple[str, str, Recipe, dict[str, Any], str], ...] = (
    # dense model, target, recipe, options, why nothing is promised; contracts/ has exact ones
    ("llama", "mixtral", G2(scale_split="down"), {"dtype": "float32"}, ""),
    ("llama", "mixtral", G2(), {"max_shard_bytes": 20_000}, ""),
    ("llama", "qwen2_moe", G2(layers="1"), {}, ""),
    ("llama", "qwen2_moe", G2(), {"untie_embeddings": True}, ""),
    ("gpt2", "upcycled", G4(neuron_order="shuffled"), {"dtype": "bfloat16"}, ""),
    ("qwen3", "qwen3_moe", G2(routing="softmax-topk"), {"expert_layout": "fused"}, ""),
    ("llama", "mixtral", G2(scaling="none"), {}, "scaling none"),
    ("qwen2", "qwen2_moe", G2(scaling="paper"), {}, "scaling paper"),
    ("llama", "mixtral", G2(scaling=1.5), {"dtype": "float16"}, "the experts are scaled by 1.5"),
    ("llama", "mixtral", G4(neuron_order="shuffled", noise=0.1), {}, "noise of 0.1"),
    ("llama", "mixtral", G4(neuron_order="clustered", noise=0.1), {}, "noise of 0.1"),
    ("gpt2", "upcycled", G2(reinit=0.5), {}, "50 % of each expert"),
    ("llama", "mixtral", G2(top_k=1, allow_inexact=True), {}, "top-k 1 is not a multiple of G"),
    ("llama", "mixtral", G2(virtual_groups=False), {}, "without virtual groups"),
    ("llama", "qwen2_moe", G2(routing="softmax-topk", router_logit_std=2.0), {}, "deviation 2"),
    ("llama", "qwen2_moe", G2(routing="softmax-topk", scaling="measured"), {}, ""),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "target", "recipe", "options", "reason"), KINDS)
def test_what_convert_wrote_is_what_verify_rebuilds(
    make_dense: MakeDense,
    tmp_path: Path,
    kind: str,
    target: str,
    recipe: Recipe,
    options: dict[str, Any],
    reason: str,
) -> None:
    dense, moe = make_dense(kind), tmp_path / "moe"
    convert(dense, moe, recipe, target=target, options=Options(**options))
    report = verify(dense, moe, texts=TextOptions(tokens=64))
    last = "measured" if reason else "passed"
    assert [check.status for check in report.checks] == ["passed", "passed", last], text_of(report)
    assert report.promise == read_json(moe / "upcycle.json")["promise"]
    assert (report.promise == "none") is bool(reason)
    assert report.accepted is not bool(reason)
    assert reason in report.checks[2].detail


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", dtype="bfloat16")


# Files that the record names ----------------------------------------------------------------------


def test_rows_of_a_file_need_the_file(dense: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [f"layers.{layer}.router" for layer in range(2)]
    files = []
    for name in ("rows", "others"):
        rows = {each: generator.standard_normal((2, 32)).astype("f4") for each in names}
        save_arrays(rows, tmp_path / name)
        files.append(tmp_path / name)
    moe = tmp_path / "moe"
    convert(dense, moe, G2(router_init="file"), router_rows=files[0])
    report = verify(dense, moe, checks=COMPARED)
    assert [check.status for check in report.checks] == ["passed", "measured"]
    assert "`router_init`" in report.checks[1].detail
    assert not report.accepted
    assert verify(dense, moe, checks=COMPARED, router_init=files[0]).accepted
    assert verify(dense, moe, checks=COMPARED, router_init=files[1]).status is Status.FAILED
    save_arrays({each: np.ones((4, 32), "f4") for each in names}, files[1])
    with pytest.raises(UpcycleError, match="has shape"):
        verify(dense, moe, router_init=files[1])
    convert(dense, tmp_path / "plain", G2())
    with pytest.raises(UpcycleError, match="do not come from a file"):
        verify(dense, tmp_path / "plain", router_init=files[0])


def test_rows_fitted_to_a_text_need_the_text(dense: Path, tmp_path: Path) -> None:
    text, other, moe = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "moe"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    other.write_text("Another text.")
    made = convert(dense, moe, G2(router_init="balanced"), calibration=text, verify=True)
    assert made.report is not None
    assert made.report.passed
    record = read_json(moe / "upcycle.json")["calibration"]
    assert record["text"] == "text.txt"
    report = verify(dense, moe, checks=COMPARED)
    assert [check.status for check in report.checks] == ["passed", "measured"]
    assert "`calibration`" in report.checks[1].detail
    assert verify(dense, moe, checks=COMPARED, calibration=text).accepted
    with pytest.raises(UpcycleError, match=r"other.txt is not the text of the calibration"):
        verify(dense, moe, calibration=other)


@pytest.mark.parametrize("layout", [ExpertLayout.PER_EXPERT, ExpertLayout.FUSED])
def test_orders_of_a_file_are_found_by_their_neurons(
    make_dense: MakeDense, tmp_path: Path, layout: ExpertLayout
) -> None:
    """Also where neurons are twins, dead, or differ in one of their matrices only."""
    source = clone(make_dense("llama"), tmp_path / "dense")

    def spoil(held: Tensors) -> None:
        for layer, (matrix, dim) in product(range(2), (("gate", 0), ("up", 0), ("down", 1))):
            weight = held[f"model.layers.{layer}.mlp.{matrix}_proj.weight"]
            for twin, other in ((3, 30), (4, 31)):
                weight.select(dim, other).copy_(weight.select(dim, twin))
            weight.narrow(dim, 8, 6).zero_()
            if matrix == "down":
                weight[-1, 31] += 1

    edit_tensors(source, spoil)
    orders = write_orders(tmp_path / "orders", alike=0, shape=(3, 2, 48))
    recipe = G2(expansion=3, neuron_order="file")
    options = Options(expert_layout=layout)
    convert(source, tmp_path / "moe", recipe, options=options, neuron_orders=orders)
    assert read_json(tmp_path / "moe" / "upcycle.json")["order_file"]["name"] == "orders"
    report = verify(source, tmp_path / "moe", checks=COMPARED)
    assert report.accepted, text_of(report)
    assert "6 neuron orders were found" in report.checks[1].detail


# Several models, and growth -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for seed in range(3):
        path = tmp_path_factory.mktemp("dense") / f"llama-{seed}"
        paths.append(save_llama(path, seed))
        save_companions(path)
    return paths


@pytest.mark.parametrize("rest", ["first", "mean"])
def test_several_models_are_told_apart(models: list[Path], tmp_path: Path, rest: str) -> None:
    moe, (first, *others) = tmp_path / "moe", models
    recipe = Recipe("E3G2T2")
    convert(
        first, moe, recipe, merge=MergeRequest(experts_from=others, rest=NonExpertWeights(rest))
    )
    report = verify(first, moe, experts_from=others[::-1])
    assert [check.status for check in report.checks] == ["passed", "passed", "measured"]
    assert "several models" in report.checks[2].detail
    for given, words in (
        ((), "Name the others with `experts_from`"),
        (others[:1], "none of the given models"),
        ((*others, first), "no expert comes from"),
    ):
        with pytest.raises(UpcycleError) as caught:
            verify(first, moe, experts_from=given)
        assert words in str(caught.value)
    record = read_json(moe / "upcycle.json")
    record["experts_from"]["groups"] = [0, 2, 1]
    write_json(moe / "upcycle.json", record)
    report = verify(first, moe, experts_from=others, checks=["weights"])
    assert report.status is Status.FAILED


def test_three_models_with_rows_made_of_prompts(models: list[Path], tmp_path: Path) -> None:
    """As of mergekit's file; the rows are in one plane, since their mean is taken out."""
    words = {"good": "sums and proofs", "bad": "rhymes and verses", "ugly": "tests and bugs"}
    prompts = {model.name: [text] for model, text in zip(models, words.values(), strict=True)}
    write_json(tmp_path / "prompts.json", prompts)
    moe, recipe = tmp_path / "moe", Recipe("E3G1T2")
    convert(
        models[0],
        moe,
        replace(recipe, router_init=RouterInit.PROMPTS),
        merge=MergeRequest(experts_from=models, source_too=False),
        positive_prompts=tmp_path / "prompts.json",
    )
    report = verify(models[0], moe, experts_from=models[1:])
    assert [check.status for check in report.checks] == ["passed", "measured", "measured"]
    assert "the prompts that made" in report.checks[1].detail


@pytest.mark.parametrize(
    ("growth", "statuses"),
    [
        (Growth(expand=2), ["passed"] * 3),
        (Growth(expand=2, top_k=2, allow_inexact=True), ["passed", "passed", "measured"]),
    ],
    ids=["exact", "inexact"],
)
def test_a_grown_model_is_verified_by_the_same_path(
    dense: Path, tmp_path: Path, growth: Growth, statuses: list[str]
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    convert(dense, small, G2())
    convert(small, large, growth)
    report = verify(small, large)
    assert [check.status for check in report.checks] == statuses, text_of(report)
    with pytest.raises(UpcycleError, match="was not made from a dense model") as caught:
        verify(dense, large)
    assert "&& upcycle verify" in str(caught.value)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_tensors(large, lambda held: held[name][0, 0].add_(1))
    report = verify(small, large, checks=["weights"])
    assert "layer 1, expert 3 differs in 1 of" in text_of(report)


# What transformers writes -------------------------------------------------------------------------


def saved_again(moe: Path, again: Path, **how: Any) -> Path:  # noqa: ANN401
    """Load and save a model and its tokenizer by transformers, with the record copied beside."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(moe, dtype="auto").save_pretrained(again, **how)
    AutoTokenizer.from_pretrained(moe).save_pretrained(again)
    (again / "upcycle.json").write_bytes((moe / "upcycle.json").read_bytes())
    return again


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_what_transformers_saves_in_another_form_passes(
    make_dense: MakeDense, tmp_path: Path, target: str
) -> None:
    """contracts/test_every_row.py has what it saves of every target in the usual form."""
    kind = next(name for name, row in DENSE.items() if target in row.targets)
    dense, moe = make_dense(kind, dtype="bfloat16"), tmp_path / "moe"
    routing = next(each for each in NATIVE[target].routings if each is not Routing.SOFTMAX_TOPK)
    convert(dense, moe, G2(routing=routing), target=target)
    forms: dict[str, Any] = {"max_shard_size": "20KB", "save_original_format": False}
    for name, value in forms.items():
        again = saved_again(moe, tmp_path / name, **{name: value})
        report = verify(dense, again, checks=COMPARED)
        assert report.accepted, (name, text_of(report))


def test_generation_settings_that_transformers_adds(dense: Path, tmp_path: Path) -> None:
    source = clone(dense, tmp_path / "dense")
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "moe", G2())
    again = saved_again(tmp_path / "moe", tmp_path / "again")
    assert (again / "generation_config.json").exists()
    assert verify(source, again, checks=COMPARED).accepted
    write_json(again / "generation_config.json", {"eos_token_id": 5})
    assert verify(source, again, checks=["directory"]).status is Status.FAILED


def test_tensors_that_are_stored_wider_are_compared_wider(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(dense, moe, G2(neuron_order="clustered", router_init="balanced"))
    edit_tensors(moe, lambda held: held.update({n: each.float() for n, each in held.items()}))
    write_json(moe / "config.json", read_json(moe / "config.json") | {"dtype": "float32"})
    report = verify(dense, moe, checks=COMPARED)
    assert report.accepted, text_of(report)
    assert "wider dtype than planned" in report.checks[1].detail
    edit_tensors(moe, lambda held: held[EXPERT][3, 3].add_(torch.finfo().eps))
    assert verify(dense, moe, checks=["weights"]).status is Status.FAILED


def test_another_version_of_upcycle_is_named(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    convert(dense, moe, G2())
    record = read_json(moe / "upcycle.json")
    write_json(moe / "upcycle.json", record | {"tool": {"name": "upcycle-cli", "version": "0.0.1"}})
    assert verify(dense, moe, checks=COMPARED).accepted
    write_json(moe / "config.json", read_json(moe / "config.json") | {"use_cache": 3})
    report = verify(dense, moe, checks=["directory"])
    assert report.status is Status.FAILED
    assert "upcycle 0.0.1 made it" in report.checks[0].detail
