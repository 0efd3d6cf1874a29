"""The code shipped inside a model whose family has no MoE class: it is the dense function."""

# ruff: noqa: ANN401, SLF001 - transformers has no types, and its switches are private.

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, MakeDense, difference, write_json
from safetensors.torch import load_file

from upcycle_cli import Recipe, convert
from upcycle_cli.models import modeling_upcycled as shipped
from upcycle_cli.models.shipped import CODE_NAME, auto_map
from upcycle_cli.recipe.recipe import SHIPPED, Routing

# They differ in the form of their MLP, and by norms behind it (olmo2), LayerNorm1P (nemotron) and
# biases (starcoder2). opt's layers hold the MLP themselves; that of bloom adds the residual.
FAMILIES = ("nemotron", "olmo2", "starcoder2", "opt", "bloom")
IDS = torch.arange(3, 51).view(2, 24) * 5 % 97
Small = Callable[..., tuple[Any, Path]]


@pytest.fixture
def small(make_dense: MakeDense, tmp_path: Path) -> Small:
    """Convert a tiny model, and load the result; softmax-topk selects all, which is exact."""

    def make(
        family: str, routing: str = "topk-softmax", layers: str | None = None, **keys: Any
    ) -> tuple[Any, Path]:
        recipe = "E2G2T4" if routing == "softmax-topk" else "E2G2T2"
        wanted = Recipe(recipe, routing=Routing(routing), layers=layers)
        source, moe = make_dense(family, **OTHER.get(family, {})), tmp_path / "moe"
        convert(source, moe, wanted, target=SHIPPED)
        config = json.loads((moe / "config.json").read_text())
        write_json(moe / "config.json", config | {"virtual_group_size": 1} | keys)
        return load(moe), source

    return make


OTHER: dict[str, dict[str, Any]] = {
    "opt": {"dropout": 0.0},
    "starcoder2": {"use_bias": True, "residual_dropout": 0.0},
}


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    code = (folder / CODE_NAME).exists()
    options = ({"experts_implementation": "eager"} if code else {}) | options
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=code, dtype=dtype, **options
    ).eval()


def mixtures(model: Any) -> list[tuple[str, Any]]:
    return [pair for pair in model.named_modules() if type(pair[1]).__name__ == "UpcycledMoe"]


def count_dropouts(model: Any) -> int:
    """Count the dropouts that change something while a model runs."""
    calls, own = [], torch.nn.functional.dropout

    def counted(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: FBT001, FBT002
        calls.append(p) if training and p else None
        return own(x, p, training, inplace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", counted)
        model(IDS)
    return len(calls)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found.double()


def gradients(model: Any, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(IDS, labels=IDS, **inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_the_dense_model_does(small: Small, family: str) -> None:
    moe, source = small(family, "sigmoid-topk")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = load(source).generate(IDS, **options)
    assert torch.equal(moe.generate(IDS, **options), expected)
    assert torch.equal(moe.train().generate(IDS, **options), expected)


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_change_nothing(
    small: Small, tmp_path: Path, family: str, routing: str
) -> None:
    keys = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    (moe, _), folder = small(family, routing, layers="1", **keys), tmp_path / "moe"
    moe.float().save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "again" / CODE_NAME).read_text() == (folder / CODE_NAME).read_text()
    shutil.rmtree(folder)
    again = load(tmp_path / "again", torch.float32)
    # The same weights lie elsewhere in memory, and BLAS may sum in another order.
    assert difference(logits(again), logits(moe)) < 1e-5
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in (*keys, "routing", "num_experts", "moe_layers", "routed_scaling_factor"):
        assert getattr(again.config, key) == getattr(moe.config, key) == written[key]
    assert written["auto_map"] == auto_map(wrapped=False)
    [(name, _)] = mixtures(moe)
    assert ".1." in name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_computes_the_same(small: Small, tmp_path: Path, family: str) -> None:
    moe = small(family)[0].float()
    expected, (_, mlp) = logits(moe), mixtures(moe)[0]
    for implementation in ("batched_mm", "grouped_mm", "eager"):
        moe.set_experts_implementation(implementation)
        found = getattr(mlp, mlp.experts_name).config._experts_implementation
        assert found == implementation
        assert difference(logits(moe), expected) < 1e-5
    for requested, used in ((None, "grouped_mm"), ("batched_mm", "batched_mm")):
        loaded = load(tmp_path / "moe", torch.float32, experts_implementation=requested)
        assert loaded.config._experts_implementation == used


@pytest.mark.parametrize(
    ("family", "key", "rate"),
    [
        ("bloom", "hidden_dropout", 0.25),
        ("falcon", "hidden_dropout", 0.0),  # its layer drops out, and its MLP only has the rate
        ("gpt2", "resid_pdrop", 0.25),
        ("opt", "dropout", 0.0),  # its layer, too
        ("starcoder2", "residual_dropout", 0.25),
    ],
)
def test_experts_drop_out_what_the_dense_mlp_does(
    make_dense: MakeDense, tmp_path: Path, family: str, key: str, rate: float
) -> None:
    settings: dict[str, Any] = {key: 0.25}
    source = make_dense(family, **settings)
    moe = load(convert(source, tmp_path / "moe", "E2G2T2", target=SHIPPED).output)
    assert {mixture.dropout.p for _, mixture in mixtures(moe)} == {rate}
    dense, found = (load(path).train() for path in (source, tmp_path / "moe"))
    assert count_dropouts(dense) == count_dropouts(found)


@pytest.mark.parametrize("routing", Routing)
def test_training_adds_the_balancing_loss_of_each_layer(small: Small, routing: str) -> None:
    moe, _ = small("nemotron", routing, router_aux_loss_coef=0.5)
    with torch.no_grad():
        plain = moe(IDS, labels=IDS)
        shown = moe(IDS, labels=IDS, output_router_logits=True)
        trained = moe.train()(IDS, labels=IDS)
        as_tuple = moe(IDS, labels=IDS, return_dict=False)
    assert "aux_loss" not in plain
    assert torch.isclose(trained.loss, plain.loss + 0.5 * trained.aux_loss)
    assert torch.equal(shown.loss, trained.loss)
    assert torch.equal(as_tuple[0], trained.loss)
    losses = []
    for logits_TN in shown.router_logits:
        scores_TN = logits_TN.sigmoid() if routing == "sigmoid-topk" else logits_TN.softmax(-1)
        chosen = scores_TN.topk(moe.config.num_experts_per_tok).indices.flatten()
        share_N = torch.bincount(chosen, minlength=4) / len(logits_TN)
        mean_N = (scores_TN / scores_TN.sum(-1, keepdim=True)).mean(0)
        losses.append(4 * (share_N * mean_N).sum())
    assert torch.isclose(trained.aux_loss, torch.stack(losses).mean())
    # Trainers that compute the loss in chunks run the base model alone.
    with torch.no_grad():
        alone = moe.eval().base_model(IDS, output_router_logits=True)
    assert all(map(torch.equal, alone.router_logits, shown.router_logits))


def test_the_balancing_loss_ignores_padding_and_is_weighted_by_tokens(small: Small) -> None:
    moe, mask = small("nemotron")[0].train(), torch.ones_like(IDS)
    mask[:, 10:] = 0
    padded = moe(IDS, mask).aux_loss
    assert torch.isclose(padded, moe(IDS[:, :10]).aux_loss)
    assert not torch.isclose(padded, moe(IDS).aux_loss)
    whole = moe(IDS, labels=IDS)
    half = moe(IDS, labels=IDS, num_items_in_batch=torch.tensor(4 * 23))
    assert torch.isclose(half.loss * 2, whole.loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(small: Small, *, reentrant: bool) -> None:
    moe = small("olmo2", "softmax-topk", router_aux_loss_coef=1.0)[0].train()
    plain, expected = gradients(moe)
    assert expected.keys() == dict(moe.named_parameters()).keys()
    assert all(grad.abs().max() > 0 for name, grad in expected.items() if ".mlp." in name)
    moe.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed, found = gradients(moe, use_cache=False)
    assert torch.equal(checkpointed.loss, plain.loss)
    assert all(torch.allclose(found[name], expected[name]) for name in expected)
    assert all(m.records is None for m in moe.modules() if hasattr(m, "records"))


def test_the_correction_bias_and_routing_stay_float32(small: Small, tmp_path: Path) -> None:
    small("nemotron", "sigmoid-topk")
    moe = load(tmp_path / "moe", torch.bfloat16)
    gate = moe.model.layers[0].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        router_logits, gates, _ = gate(torch.randn(5, gate.weight.shape[1], dtype=torch.bfloat16))
    assert router_logits.dtype == gates.dtype == torch.float32
    assert logits(moe).isfinite().all()


def zero_router(routing: str, num_experts: int, top_k: int) -> Any:
    config = shipped.UpcycledConfig(
        **TINY, num_experts=num_experts, num_experts_per_tok=top_k, routing=routing
    )
    gate = shipped.UpcycledRouter(config)
    torch.nn.init.zeros_(gate.weight)
    return gate


def test_the_correction_bias_selects_but_does_not_weigh() -> None:
    gate = zero_router("sigmoid-topk", 4, 2)
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    _, gates_TK, chosen_TK = gate(torch.randn(3, TINY["hidden_size"]))
    assert chosen_TK.tolist() == [[3, 2]] * 3
    assert gates_TK.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("routing", Routing)
def test_the_lowest_index_wins_a_tie(routing: str) -> None:
    gate = zero_router(routing, 64, 8)
    assert gate(torch.randn(40, TINY["hidden_size"]))[2].tolist() == [list(range(8))] * 40
