"""The code shipped inside a model whose family has no MoE class: it is the dense function."""

# ruff: noqa: ANN401, SLF001 - transformers has no types, and its switches are private.

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, difference
from safetensors.torch import load_file, save_file

from upcycle_cli.models import modeling_upcycled as shipped
from upcycle_cli.models.shipped import CODE_NAME, auto_map, modeling_code

# They differ in the form of their MLP, and by norms behind it (olmo2), LayerNorm1P (nemotron) and
# biases (starcoder2).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nemotron": ("Nemotron", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {"use_bias": True, "residual_dropout": 0.0}),
}
ROUTINGS = ("topk-softmax", "softmax-topk", "sigmoid-topk")
IDS = torch.arange(3, 51).view(2, 24) * 5 % 97


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the copies of the code that transformers imports a directory of their own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def dense_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY, **FAMILIES[family][1])
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def expert_weights(mlp: Any, expansion: int, granularity: int) -> dict[str, torch.Tensor]:
    """Expert g·G + s holds shard s of the neurons."""
    G = granularity
    gated = hasattr(mlp, "gate_proj")
    up, down = (mlp.c_fc, mlp.c_proj) if hasattr(mlp, "c_fc") else (mlp.up_proj, mlp.down_proj)
    first, name = ([mlp.gate_proj, up], "gate_up_proj") if gated else ([up], "up_proj")
    shards = {
        name: torch.cat([part.weight.unflatten(0, (G, -1)) for part in first], 1),
        "down_proj": down.weight.unflatten(1, (G, -1)).transpose(0, 1),
    }
    if down.bias is not None:
        shards[f"{name}_bias"] = torch.cat([part.bias.unflatten(0, (G, -1)) for part in first], 1)
        shards["down_proj_bias"] = (down.bias / G).expand(G, -1)
    return {name: torch.cat([tensor] * expansion) for name, tensor in shards.items()}


def write(
    dense: Any, folder: Path, routing: str, recipe: tuple[int, int, int] = (2, 2, 2), **keys: Any
) -> Path:
    """Write a model as experts by (E, G, T); softmax-topk selects all of them, which is exact."""
    expansion, granularity, top_k = recipe
    num_experts, family = expansion * granularity, dense.config.model_type
    folder.mkdir()
    state = dict(dense.state_dict())
    for layer in keys.setdefault("moe_layers", [0, 1]):
        mlp = f"model.layers.{layer}.mlp"
        state = {name: tensor for name, tensor in state.items() if not name.startswith(mlp)}
        rows = torch.randn(expansion, dense.config.hidden_size, dtype=torch.float64)
        state[f"{mlp}.gate.weight"] = rows.repeat_interleave(granularity, 0)
        if routing == "sigmoid-topk":
            state[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(num_experts)
        experts = f"{mlp}.experts" if family == "olmo2" else f"{mlp}.expert_mlps"
        weights = expert_weights(dense.model.layers[layer].mlp, expansion, granularity)
        state |= {f"{experts}.{name}": tensor for name, tensor in weights.items()}
    if dense.config.tie_word_embeddings:
        del state["lm_head.weight"]
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    config = dense.config.to_diff_dict() | {
        "model_type": f"upcycled_{family}",
        "architectures": ["UpcycledForCausalLM"],
        "auto_map": auto_map(wrapped=False),
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts if routing == "softmax-topk" else top_k,
        "moe_intermediate_size": dense.config.intermediate_size // granularity,
        "routing": routing,
        "routed_scaling_factor": float(granularity),
        **keys,
    }
    (folder / "config.json").write_text(json.dumps(config))
    name = FAMILIES[family][0]
    code = modeling_code((f"{name}Config", f"{name}Model", f"{name}ForCausalLM"))
    (folder / CODE_NAME).write_text(code, encoding="utf-8")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"experts_implementation": "eager"} | options
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, **options
    ).eval()


def small(tmp_path: Path, family: str, routing: str = "topk-softmax", **keys: Any) -> Any:
    return load(write(dense_model(family), tmp_path / "moe", routing, **keys))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found.double()


def gradients(model: Any, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(IDS, labels=IDS, **inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", [(2, 2, 2), (4, 2, 4), (2, 3, 3)])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_dense_models(
    family: str, routing: str, recipe: tuple[int, int, int], tmp_path: Path
) -> None:
    dense = dense_model(family)
    folder = write(dense, tmp_path / "moe", routing, recipe)
    moe = load(folder)
    assert type(moe.model.layers[1].mlp).__name__ == "UpcycledMoe"
    assert difference(logits(moe), logits(dense)) < 1e-12
    # Compare MLPs too: a norm behind them hides errors of scale.
    x = torch.randn(1, 40, dense.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        assert difference(moe.model.layers[1].mlp(x), dense.model.layers[1].mlp(x)) < 1e-12
    assert difference(logits(load(folder, torch.float32)), logits(dense.float())) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_loads_by_itself(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    moe = small(tmp_path, family)
    base = AutoModel.from_pretrained(
        tmp_path / "moe",
        trust_remote_code=True,
        dtype=torch.float64,
        experts_implementation="eager",
    )
    assert type(base).__name__ == "UpcycledModel"
    with torch.no_grad():
        states = base(IDS).last_hidden_state
        assert torch.equal(states, moe.model(IDS).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_the_dense_model_does(family: str, tmp_path: Path) -> None:
    dense = dense_model(family)
    moe = load(write(dense, tmp_path / "moe", "sigmoid-topk"))
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(IDS, **options)
    assert torch.equal(moe.generate(IDS, **options), expected)
    assert torch.equal(moe.train().generate(IDS, **options), expected)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_change_nothing(family: str, routing: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
    keys["moe_layers"] = [1]
    moe, folder = small(tmp_path, family, routing, **keys), tmp_path / "moe"
    moe.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "again" / CODE_NAME).read_text() == (folder / CODE_NAME).read_text()
    shutil.rmtree(folder)
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(moe))
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in (*keys, "routing", "num_experts", "num_experts_per_tok", "routed_scaling_factor"):
        assert getattr(again.config, key) == getattr(moe.config, key) == written[key]
    assert written["auto_map"] == auto_map(wrapped=False)


def test_other_layers_stay_dense(tmp_path: Path) -> None:
    dense = dense_model("nemotron")
    moe = load(write(dense, tmp_path / "moe", "topk-softmax", moe_layers=[1]))
    kinds = [type(layer.mlp).__name__ for layer in moe.model.layers]
    assert kinds == ["NemotronMLP", "UpcycledMoe"]
    assert difference(logits(moe), logits(dense)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_computes_the_same(family: str, tmp_path: Path) -> None:
    moe = small(tmp_path, family).float()
    expected, mlp = logits(moe), moe.model.layers[0].mlp
    for implementation in ("batched_mm", "grouped_mm", "eager"):
        moe.set_experts_implementation(implementation)
        found = getattr(mlp, mlp.experts_name).config._experts_implementation
        assert found == implementation
        assert difference(logits(moe), expected) < 1e-5
    for requested, used in ((None, "grouped_mm"), ("batched_mm", "batched_mm")):
        loaded = load(tmp_path / "moe", torch.float32, experts_implementation=requested)
        assert loaded.config._experts_implementation == used


@pytest.mark.parametrize("routing", ROUTINGS)
def test_training_adds_the_balancing_loss_of_each_layer(routing: str, tmp_path: Path) -> None:
    moe = small(tmp_path, "nemotron", routing, router_aux_loss_coef=0.5)
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


def test_the_base_model_returns_router_logits(tmp_path: Path) -> None:
    """Trainers that compute the loss in chunks run it alone."""
    moe = small(tmp_path, "olmo2")
    with torch.no_grad():
        whole, alone = (run(IDS, output_router_logits=True) for run in (moe, moe.base_model))
        plain = moe.base_model(IDS)
    pairs = zip(alone.router_logits, whole.router_logits, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(alone.last_hidden_state, plain.last_hidden_state)
    assert "router_logits" not in plain


def test_the_balancing_loss_ignores_padding_and_is_weighted_by_tokens(tmp_path: Path) -> None:
    moe, mask = small(tmp_path, "nemotron").train(), torch.ones_like(IDS)
    mask[:, 10:] = 0
    padded = moe(IDS, mask).aux_loss
    assert torch.isclose(padded, moe(IDS[:, :10]).aux_loss)
    assert not torch.isclose(padded, moe(IDS).aux_loss)
    whole = moe(IDS, labels=IDS)
    half = moe(IDS, labels=IDS, num_items_in_batch=torch.tensor(4 * 23))
    assert torch.isclose(half.loss * 2, whole.loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, *, reentrant: bool) -> None:
    moe = small(tmp_path, "olmo2", router_aux_loss_coef=1.0).train()
    plain, expected = gradients(moe)
    moe.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed, found = gradients(moe, use_cache=False)
    assert torch.equal(checkpointed.loss, plain.loss)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name]) for name in found)
    assert all(m.records is None for m in moe.modules() if hasattr(m, "records"))


def test_gradients_reach_routers_and_experts(tmp_path: Path) -> None:
    moe = small(tmp_path, "starcoder2", "softmax-topk").train()
    _, found = gradients(moe)
    assert found.keys() == dict(moe.named_parameters()).keys()
    assert all(grad.abs().max() > 0 for name, grad in found.items() if ".mlp." in name)


def test_the_correction_bias_and_routing_stay_float32(tmp_path: Path) -> None:
    folder = write(dense_model("nemotron"), tmp_path / "moe", "sigmoid-topk")
    moe = load(folder, torch.bfloat16)
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


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_lowest_index_wins_a_tie(routing: str) -> None:
    gate = zero_router(routing, 64, 8)
    assert gate(torch.randn(40, TINY["hidden_size"]))[2].tolist() == [list(range(8))] * 40


def test_new_weights_are_random() -> None:
    config = shipped.UpcycledConfig(**TINY, num_experts=4, routing="sigmoid-topk")
    torch.manual_seed(0)
    moe = shipped.UpcycledForCausalLM(config)
    for name, tensor in moe.model.layers[0].mlp.state_dict().items():
        std = 0.0 if name.endswith("bias") else config.initializer_range
        assert float(tensor.std()) == pytest.approx(std, rel=0.3)


def test_an_unknown_routing_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown routing 'topk'"):
        shipped.UpcycledConfig(**TINY, routing="topk")


def test_only_the_imports_of_the_text_differ() -> None:
    text = Path(shipped.__file__).read_text(encoding="utf-8")
    assert modeling_code(("NemotronConfig", "NemotronModel", "NemotronForCausalLM")) == text
    other = modeling_code(("Olmo2Config", "Olmo2Model", "Olmo2ForCausalLM"))
    pairs = zip(text.splitlines(), other.splitlines(), strict=True)
    assert [after for before, after in pairs if before != after] == [
        "from transformers import Olmo2Config as DenseConfig",
        "from transformers import Olmo2ForCausalLM as DenseForCausalLM",
        "from transformers import Olmo2Model as DenseModel",
    ]
