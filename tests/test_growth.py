"""Growing an MoE: the same function from several copies of each expert, and proof that it is.

Sources are tiny MoEs that transformers makes and saves, of each type that can be grown and each
routing that it can have; what grew is run by transformers and read by safetensors' own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from conftest import (
    REMOVED,
    TINY,
    MakeDense,
    RunCli,
    clone,
    contents,
    difference,
    logits,
    random_ids,
    random_weight,
    read_json,
    read_tensors,
    save_companions,
    validate_json,
    write_json,
)
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import (
    Growth,
    Options,
    Recipe,
    UpcycleError,
    WriteOptions,
    convert,
    inspect,
    verify,
)
from upcycle_cli.api import Request, carry_out
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.core.callbacks import Hooks
from upcycle_cli.models.growable import GROWABLE
from upcycle_cli.publish.manifest import read_manifest
from upcycle_cli.recipe.options import ExpertLayout, Routing
from upcycle_cli.training import tie_virtual_groups
from upcycle_cli.verification.prompts import TextOptions

N, T = 4, 2
_SIGMOID: Mapping[str, Any] = {
    "n_routed_experts": N,
    "num_experts_per_tok": T,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "norm_topk_prob": True,
}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": N},
    "qwen2_moe": {
        "num_experts": N,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "qwen3_moe": {"num_experts": N, "moe_intermediate_size": 24, "head_dim": 8},
    "granitemoe": {"num_local_experts": N},
    "glm4_moe": {**_SIGMOID, "head_dim": 8},
    "olmoe": {"num_experts": N},
    "flex_olmo": {"num_experts": N},
    "deepseek_v3": {**_SIGMOID, **_LATENT},
    "dots1": {**_SIGMOID, "head_dim": 8},
    "solar_open": {**_SIGMOID, "head_dim": 8, "num_hidden_layers": 2},
}
BY_NORM = ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo")
KINDS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in SIZES if name not in BY_NORM] + [
    (name, {"norm_topk_prob": norm}) for name in BY_NORM for norm in (True, False)
]
FEW = TextOptions(tokens=64)


class MakeMoe(Protocol):
    """Makes an MoE with random weights, once per set of arguments. Read only: it is shared."""

    def __call__(self, model_type: str = "qwen3_moe", **config: Any) -> Path: ...  # noqa: ANN401


@pytest.fixture(scope="session")
def make_moe(tmp_path_factory: pytest.TempPathFactory) -> MakeMoe:
    made: dict[str, Path] = {}

    def make(model_type: str = "qwen3_moe", **config: Any) -> Path:  # noqa: ANN401
        key = f"{model_type} {config}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type) / "source"
            _save(made[key], model_type, config)
        return made[key]

    return make


def _save(path: Path, model_type: str, config: Mapping[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    sizes = {**TINY, **tokens, "num_experts_per_tok": T, **SIZES[model_type], **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    generator = torch.Generator().manual_seed(0)
    biases = [held for held in model.named_buffers() if held[0].endswith("correction_bias")]
    for name, tensor in [*model.named_parameters(), *biases]:
        tensor.data = random_weight(name, tensor.shape, generator).to(tensor.dtype)
    model.config.dtype = torch.float32
    model.save_pretrained(path)
    save_companions(path)


# The same function --------------------------------------------------------------------------------


def test_each_type_that_can_be_grown_is_tried() -> None:
    assert {*SIZES} == {*GROWABLE}


@pytest.mark.parametrize(("model_type", "config"), KINDS, ids=str)
@pytest.mark.parametrize("expand", [2, 3])
def test_a_grown_moe_computes_the_same(
    make_moe: MakeMoe, tmp_path: Path, model_type: str, config: dict[str, Any], expand: int
) -> None:
    source, ids = make_moe(model_type, **config), random_ids(length=48)
    made = convert(source, tmp_path / "moe", Growth(expand=expand)).output
    wanted, got = (logits(path, ids, torch.float32) for path in (source, made))
    assert difference(got, wanted) < 1e-5
    before, after = (read_json(path / "config.json") for path in (source, made))
    changed = {key: after[key] for key in after if after[key] != before[key]}
    counts = {
        "num_local_experts": expand * N,
        "num_experts": expand * N,
        "n_routed_experts": expand * N,
        "num_experts_per_tok": expand * T,
    }
    assert changed.items() <= counts.items()
    assert len(changed) == 2 + ("num_experts" in before and "num_local_experts" in before)
    assert before.keys() == after.keys()
    if expand == 2:
        report = verify(source, made, texts=FEW)
        assert (report.status, report.promise) == ("passed", "exact"), report
        assert {check.status for check in report.checks} == {"passed"}


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "glm4_moe"])
def test_any_layout_becomes_any(make_moe: MakeMoe, tmp_path: Path, model_type: str) -> None:
    source, ids = make_moe(model_type), random_ids()
    wanted = logits(source, ids, torch.float32)
    native = ExpertLayout.STACKED if model_type == "granitemoe" else ExpertLayout.PER_EXPERT
    fused = convert(
        source,
        tmp_path / "fused",
        Growth(expand=2),
        options=Options(expert_layout=ExpertLayout.FUSED),
    ).output
    assert inspect(fused).expert_layout == "fused"
    again = convert(
        fused,
        tmp_path / "again",
        Growth(expand=2),
        options=Options(expert_layout=native),
    ).output
    kept = convert(fused, tmp_path / "kept", Growth(expand=2)).output
    assert (inspect(again).expert_layout, inspect(kept).expert_layout) == (native, "fused")
    for origin, made in ((source, fused), (fused, again), (fused, kept)):
        assert difference(logits(made, ids, torch.float32), wanted) < 1e-5
        assert verify(origin, made, texts=FEW).passed
    assert (inspect(again).num_experts, inspect(again).top_k) == (4 * N, 4 * T)


def test_copies_lie_side_by_side_and_all_else_is_the_source_s(
    make_moe: MakeMoe, tmp_path: Path
) -> None:
    source = make_moe("glm4_moe")
    held = read_tensors(source)
    made = read_tensors(convert(source, tmp_path / "moe", Growth(expand=3)).output)
    for name, tensor in made.items():
        if name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
            assert torch.equal(tensor, held[name].repeat_interleave(3, 0))
        elif ".experts." in name:
            before, after = name.split(".experts.")
            number, matrix = after.split(".", 1)
            assert torch.equal(tensor, held[f"{before}.experts.{int(number) // 3}.{matrix}"])
        else:
            assert torch.equal(tensor, held[name])
    assert len(made) - len(held) == 2 * 2 * N * 3  # in two layers, of three matrices each


@pytest.mark.parametrize("model_type", ["qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_where_that_is_asked_for(
    make_moe: MakeMoe, tmp_path: Path, model_type: str, dtype: str
) -> None:
    source = make_moe(model_type)
    options = Options(dtype=dtype, max_shard_bytes=40_000)
    made = convert(source, tmp_path / "moe", Growth(expand=2), options=options).output
    dtypes = {name: held.dtype for name, held in read_tensors(made).items()}
    wide = {name for name, held in dtypes.items() if held == torch.float32}
    # What moves by little keeps what it has.
    assert all(name.endswith("e_score_correction_bias") for name in wide)
    assert {*dtypes.values()} - {torch.float32} == {getattr(torch, dtype)}
    report = verify(source, made, texts=FEW)
    assert report.passed, report
    assert report.checks[-1].metrics["kl_mean_rounding"] != 0


def test_a_tied_head_is_written_where_that_is_asked_for(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = make_moe(tie_word_embeddings=True)
    options = Options(untie_embeddings=True)
    made = convert(source, tmp_path / "moe", Growth(expand=2), options=options).output
    held = read_tensors(made)
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    assert verify(source, made, texts=FEW).passed


def test_copies_get_equal_gradients(make_moe: MakeMoe, tmp_path: Path) -> None:
    """What the note says: nothing in training tells them apart."""
    from transformers import AutoModelForCausalLM

    made = convert(make_moe("mixtral"), tmp_path / "moe", Growth(expand=2)).output
    model = AutoModelForCausalLM.from_pretrained(made, experts_implementation="eager")
    ids = random_ids()
    model(ids, labels=ids, output_router_logits=True).loss.backward()
    for layer in model.model.layers:
        for held in (layer.mlp.experts.gate_up_proj, layer.mlp.gate.weight):
            grad = held.grad
            assert grad.abs().max() > 0
            assert torch.allclose(grad[::2], grad[1::2], rtol=1e-4, atol=1e-7)


def test_an_moe_of_upcycle_s_own_keeps_its_groups_whole(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    """A group of G experts becomes one of k·G that has each shard k times."""
    from transformers import AutoModelForCausalLM

    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    first = convert(make_dense("llama"), tmp_path / "moe", recipe).output
    made = convert(first, tmp_path / "grown", Growth(expand=2)).output
    assert verify(first, made, texts=FEW).passed
    tied = tie_virtual_groups(AutoModelForCausalLM.from_pretrained(made))
    assert tied.granularity == 4
    record = read_json(made / "upcycle.json")
    assert "recipe" not in record
    assert record["growth"]["expand"] == 2


@pytest.mark.parametrize(
    ("target", "shared", "routing"),
    [
        ("qwen2_moe", "mlp.shared_expert", Routing.TOPK_SOFTMAX),
        ("glm4_moe", "mlp.shared_experts", Routing.SIGMOID_TOPK),
    ],
)
def test_shards_that_are_shared_stay_one_expert(
    llama: Path, tmp_path: Path, target: str, shared: str, routing: Routing
) -> None:
    recipe = Recipe(expansion=2, granularity=4, top_k=2, shared_experts=2, routing=routing)
    first = convert(llama, tmp_path / "moe", recipe, target=target).output
    made, ids = convert(first, tmp_path / "grown", Growth(expand=2)).output, random_ids(length=48)
    before, after = read_tensors(first), read_tensors(made)
    held = [name for name in before if shared in name and "expert_gate" not in name]
    assert len(held) == 3 * 2
    assert all(torch.equal(after[name], before[name]) for name in held)
    assert difference(logits(made, ids), logits(llama, ids)) < 1e-5
    report = verify(first, made, texts=FEW)
    assert (report.status, report.promise) == ("passed", "exact"), report
    found, source = (inspect(path, load="builtin", weights=True) for path in (made, first))
    assert found.weights is not None
    assert found.weights.distinct_experts == 2
    assert found.load is not None
    assert source.load is not None
    for grown, of in zip(found.load.layers, source.load.layers, strict=True):
        assert [*grown.load] == [load for load in of.load for _ in range(2)]
    spoil(made, held[0])
    assert verify(first, made, checks=["weights"]).status == "failed"


def test_a_dense_model_is_told_what_lies_between(llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(expansion=2, granularity=2, top_k=2)
    first = convert(llama, tmp_path / "first", recipe).output
    made = convert(first, tmp_path / "so grown", Growth(expand=2)).output
    result = invoke("verify", llama, made)
    steps = f"upcycle verify {llama} first && upcycle verify first '{made}'"
    assert_refused(result, "has grown from the MoE first", steps)


def test_layers_that_predict_further_tokens_grow_too(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = clone(make_moe("glm4_moe"), tmp_path / "source", num_nextn_predict_layers=1)
    held = read_tensors(source)
    more = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in held.items()
        if "layers.2." in name
    } | {"model.layers.3.eh_proj.weight": torch.randn(32, 64)}
    save_file(held | more, source / "model.safetensors", metadata={"format": "pt"})
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    assert f"model.layers.3.mlp.experts.{2 * N - 1}.up_proj.weight" in read_tensors(made)
    assert verify(source, made, texts=FEW).passed
    spoil(made, "model.layers.3.mlp.experts.3.up_proj.weight")
    assert verify(source, made, texts=FEW, checks=["weights"]).status == "failed"


# Another top-k ------------------------------------------------------------------------------------


def test_another_top_k_is_measured_and_not_passed(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = make_moe()
    with pytest.raises(UpcycleError, match="top-k 2 is not 2 times the source's 2"):
        convert(source, tmp_path / "moe", Growth(expand=2, top_k=T))
    growth = Growth(expand=2, top_k=T, allow_inexact=True)
    done = convert(source, tmp_path / "moe", growth, verify=True)
    assert done.published
    assert read_json(done.output / "config.json")["num_experts_per_tok"] == T
    report = verify(source, done.output, texts=FEW)
    assert (report.status, report.promise) == ("measured", "none")
    assert 1e-6 < float(report.checks[-1].metrics["kl_mean"]) < 10


# Damage -------------------------------------------------------------------------------------------


def spoil(path: Path, name: str, change: Callable[[torch.Tensor], object] | None = None) -> None:
    """Change a tensor of a checkpoint in one file, a little unless said otherwise."""
    tensors = read_tensors(path)
    held = tensors[name]
    (change or (lambda tensor: tensor.view(-1)[0].add_(1e-3)))(held)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def swap(*experts: int) -> Callable[[torch.Tensor], object]:
    def change(held: torch.Tensor) -> object:
        held[[*experts]] = held[[*reversed(experts)]].clone()
        return held

    return change


_LAYER = "model.layers.1.mlp"
DAMAGE: Mapping[str, tuple[str, Callable[[torch.Tensor], object] | None, str]] = {
    "expert": (f"{_LAYER}.experts.3.up_proj.weight", None, "3.up_proj.weight: no copy of what"),
    "router": (f"{_LAYER}.gate.weight", None, "mlp.gate.weight[0]: no copy"),
    "rows in another order": (f"{_LAYER}.gate.weight", swap(1, 2), "no copy"),
    "one expert too often": (
        f"{_LAYER}.gate.weight",
        lambda held: held.copy_(held[[0, 0, 0, 0, 4, 5, 6, 7]]),
        "no copy",
    ),
    "bias": (f"{_LAYER}.gate.e_score_correction_bias", None, "correction_bias[0]: no copy"),
    "shared expert": (
        f"{_LAYER}.shared_experts.up_proj.weight",
        None,
        "is not the source's tensor",
    ),
    "dense layer": ("model.layers.0.mlp.up_proj.weight", None, "is not the source's tensor"),
    "norm": ("model.norm.weight", None, "is not the source's tensor"),
    "sign of zero": (
        "model.layers.0.mlp.up_proj.weight",
        lambda held: held.view(-1)[0].fill_(-0.0),
        "is not the source's tensor",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_tensor_of_each_role_is_found(
    make_moe: MakeMoe, tmp_path: Path, damage: str
) -> None:
    name, change, words = DAMAGE[damage]
    source = make_moe("glm4_moe")
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    spoil(made, name, change)
    report = verify(source, made, texts=FEW, checks=["weights"])
    assert report.status == "failed"
    assert words in report.checks[0].failures[0]


def test_experts_may_lie_in_any_order(make_moe: MakeMoe, tmp_path: Path) -> None:
    """Whoever made it: what counts is that each is there, with its row, as often as it must be."""
    source = make_moe("granitemoe")
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    (made / "upcycle.json").unlink()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    prefix = "model.layers.1.block_sparse_moe"
    for name in ("input_linear", "output_linear", "router.layer"):
        spoil(made, f"{prefix}.{name}.weight", lambda held: held.copy_(held[order]))
    report = verify(source, made, texts=FEW)
    assert report.passed, report
    spoil(made, f"{prefix}.router.layer.weight", lambda held: held.copy_(held[order]))
    found = verify(source, made, texts=FEW)
    assert [check.name for check in found.checks if check.status == "failed"] == [
        "weights",
        "outputs",
    ]


def test_a_copy_too_many_of_one_and_too_few_of_another(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = make_moe("granitemoe")
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    order = [0, 0, 0, 3, 4, 5, 6, 7]
    for name in ("input_linear", "output_linear", "router.layer"):
        full = f"model.layers.0.block_sparse_moe.{name}.weight"
        spoil(made, full, lambda held: held.copy_(held[order]))
    report = verify(source, made, checks=["weights"])
    assert report.checks[0].failures == (
        "layer 0: expert 0 of the source is there 3 times with its router row, and 2 are wanted",
        "layer 0: expert 1 of the source is there 1 times with its router row, and 2 are wanted",
    )


CONFIG_DAMAGE: Mapping[str, tuple[dict[str, Any], str]] = {
    "rms_norm_eps": ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, in the source's"),
    "a key more": ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    "a key less": ({"hidden_act": REMOVED}, "hidden_act is 'absent', in the source's 'silu'"),
    "true for 1": ({"norm_topk_prob": 1}, "norm_topk_prob"),
    "experts": ({"num_experts": 2 * N + 1}, "9 experts are no multiple"),
    "as many": ({"num_experts": N}, "4 experts are no multiple, twice or more, of the source's 4"),
    "dtype": ({"dtype": "bfloat16"}, "is not the dtype of all tensors"),
    "top-k": ({"num_experts_per_tok": 40}, "num_experts_per_tok 40 is more than"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damage_to_the_config_is_found(make_moe: MakeMoe, tmp_path: Path, damage: str) -> None:
    changes, words = CONFIG_DAMAGE[damage]
    source = make_moe(norm_topk_prob=True)
    convert(source, tmp_path / "moe", Growth(expand=2))
    spoiled = clone(tmp_path / "moe", tmp_path / "spoiled", **changes)
    report = verify(source, spoiled, texts=FEW, checks=["directory"])
    assert report.status == "failed"
    assert any(words in failure for failure in report.checks[0].failures), report.checks[0].failures


RECORD_DAMAGE: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "expand": lambda record: record["growth"].update(expand=3),
    "top_k": lambda record: record["growth"].update(top_k=2),
    "routing": lambda record: record["growth"].update(routing="softmax-topk"),
    "source_num_experts": lambda record: record["growth"].update(source_num_experts=8),
    "source_top_k": lambda record: record["growth"].update(source_top_k=1),
    "growth": lambda record: record.pop("growth"),
    "promise": lambda record: record.update(promise="none"),
    "moe_layers": lambda record: record.update(moe_layers=[1]),
    "expert_layout": lambda record: record.update(expert_layout="fused"),
    "dtype": lambda record: record.update(dtype="bfloat16"),
    "parameters.active": lambda record: record["parameters"].update(active=1),
    "parameters.source": lambda record: record["parameters"].update(source=1),
    "source_type": lambda record: record.update(source_type="mixtral"),
    "routers": lambda record: record["routers"].popitem(),
    "another checkpoint": lambda record: record["source"].update(config_sha256="0" * 64),
    "files": lambda record: record["files"].clear(),
    "format": lambda record: record.update(format=2),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_what_the_record_says_is_checked(make_moe: MakeMoe, tmp_path: Path, damage: str) -> None:
    source = make_moe(norm_topk_prob=True)
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    record = read_json(made / "upcycle.json")
    RECORD_DAMAGE[damage](record)
    write_json(made / "upcycle.json", record)
    report = verify(source, made, checks=["directory"])
    assert report.status == "failed"
    words = {"growth": "expand"}.get(damage, damage)
    assert any(words in failure for failure in report.checks[0].failures), report.checks[0].failures


def test_another_source_is_none(make_moe: MakeMoe, tmp_path: Path) -> None:
    made = convert(make_moe(), tmp_path / "moe", Growth(expand=2)).output
    for other, words in (
        (make_moe(num_hidden_layers=3), "num_hidden_layers is 2, in the source's 3"),
        (make_moe("mixtral"), "model_type is qwen3_moe, the source's is mixtral"),
    ):
        report = verify(other, made, texts=FEW)
        assert report.status == "failed"
        assert any(words in failure for failure in report.checks[0].failures)
    with pytest.raises(UpcycleError, match=r"experts\.0\.up_proj\.weight is missing"):
        verify(_without(make_moe(), tmp_path / "odd", "0.mlp.experts.0.up_proj"), made)


# What is refused ----------------------------------------------------------------------------------


def _without(source: Path, path: Path, part: str) -> Path:
    clone(source, path)
    kept = {name: held for name, held in read_tensors(source).items() if part not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _with(source: Path, path: Path, name: str, tensor: torch.Tensor) -> Path:
    clone(source, path)
    save_file(
        {**read_tensors(source), name: tensor},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, "tokens choose 1 of 2 groups of experts"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob must be True, not False"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ("mixtral", {"num_experts_per_tok": 9}, "more than the 4 experts"),
        ("mixtral", {"num_hidden_layers": 3}, "lacks layer 2"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer is a mixture of experts"),
        ("mixtral", {"intermediate_size": 24}, "but config.json implies [24, 32]"),
        ("mixtral", {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ("mixtral", {"model_type": "jamba"}, "model type jamba cannot be grown yet"),
    ],
)
def test_a_config_that_cannot_be_grown(
    make_moe: MakeMoe, tmp_path: Path, model_type: str, changes: dict[str, Any], words: str
) -> None:
    source = clone(make_moe(model_type), tmp_path / "source", **changes)
    with pytest.raises(UpcycleError) as refused:
        convert(source, tmp_path / "moe", Growth(expand=2))
    assert words in str(refused.value)
    assert not (tmp_path / "moe").exists()


def test_all_groups_chosen_are_as_good_as_one(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = make_moe("glm4_moe", n_group=2, topk_group=2)
    made = convert(source, tmp_path / "moe", Growth(expand=2)).output
    assert verify(source, made, texts=FEW).passed


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (lambda a, b: _without(a, b, "layers.1.block_sparse_moe.gate"), "lacks model.layers.1."),
        (lambda a, b: _without(a, b, "layers.1.block_sparse_moe.experts.2.w1"), "experts.2.w1"),
        (
            lambda a, b: _without(a, b, "layers.1.self_attn.q_proj"),
            "one alone has self_attn.q_proj",
        ),
        (lambda a, b: _without(a, b, "embed_tokens"), "lacks model.embed_tokens.weight"),
        (lambda a, b: _without(a, b, "lm_head"), "lacks lm_head.weight"),
        (
            lambda a, b: _with(
                a, b, "model.layers.0.block_sparse_moe.experts.0.w1.scale", torch.ones(1)
            ),
            "unknown tensor model.layers.0.block_sparse_moe.experts.0.w1.scale",
        ),
        (
            lambda a, b: _with(a, b, "model.layers.0.block_sparse_moe.gate.bias", torch.ones(N)),
            "unknown tensor model.layers.0.block_sparse_moe.gate.bias",
        ),
        (
            lambda a, b: _with(
                a, b, "model.norm.weight", torch.ones(32, dtype=torch.float8_e4m3fn)
            ),
            "is stored as F8_E4M3",
        ),
    ],
)
def test_tensors_that_are_not_as_they_should_be(
    make_moe: MakeMoe, tmp_path: Path, spoiled: Callable[[Path, Path], Path], words: str
) -> None:
    source = spoiled(make_moe("mixtral"), tmp_path / "source")
    with pytest.raises(UpcycleError) as refused:
        convert(source, tmp_path / "moe", Growth(expand=2))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--expand", "1"), "--expand must be at least 2, not 1"),
        (("--expand", "2000"), "makes 8000 experts per layer of 4"),
        (
            ("--expand", "2", "--top-k", "9", "--allow-inexact"),
            "top-k 9 is more than the 8 experts",
        ),
        (("--expand", "2", "--top-k", "0"), "top-k (T) must be at least 1"),
        (("--expand", "2", "--top-k", "2"), "Leave out --top-k, which then is 4"),
        (("--expand", "2", "-r", "E2G2T2"), "without --recipe"),
        (("--expand", "2", "--routing", "auto", "--seed", "1"), "without --routing, --seed"),
        (("--expand", "2", "--target", "qwen3_moe"), "without --target"),
        (("--expand", "2", "--expert-layout", "stacked"), "qwen3_moe has no stacked layout"),
        (("--expand", "two"), "Input should be a valid integer"),
        (("-r", "E2G1T1"), "--expand 2"),
        (("--expand", "2", "--experts-from", "other"), "cannot add those of other models"),
        ((), "--expand 2"),
    ],
)
def test_options_that_make_no_sense(
    make_moe: MakeMoe, run_cli: RunCli, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = run_cli("convert", make_moe(norm_topk_prob=True), tmp_path / "moe", *options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "moe").exists()


def test_a_dense_model_does_not_grow(llama: Path, run_cli: RunCli, tmp_path: Path) -> None:
    for command in (("convert", llama, tmp_path / "moe"), ("inspect", llama)):
        done = run_cli(*command, "--expand", "2")
        assert done.returncode == 2
        assert "this is a dense llama model" in done.stderr
        assert "--recipe" in done.stderr


# The machinery ------------------------------------------------------------------------------------


def test_the_command_line_grows_verifies_and_tells(
    make_moe: MakeMoe, run_cli: RunCli, tmp_path: Path
) -> None:
    source, output = make_moe("olmoe"), tmp_path / "moe"
    command = ("convert", source, output, "--expand", "2", "--checksums")
    saved = ("--save-config", tmp_path / "grow.json")
    planned = validate_json("convert", run_cli(*command, "--dry-run", "--json", *saved).stdout)
    assert (planned["status"], planned["promise"]) == ("planned", "exact")
    assert not output.exists()
    assert read_json(tmp_path / "grow.json").keys() >= {"expand", "top-k", "expert-layout"}
    done = run_cli(*command, "--verify", "--json")
    made = validate_json("convert", done.stdout)
    assert (made["status"], made["verification"]["status"]) == ("converted", "passed")
    assert made["plan_sha256"] == planned["plan_sha256"]
    again = run_cli(*command, "--json")
    assert validate_json("convert", again.stdout)["status"] == "already done"
    by_file = run_cli("convert", "--config", tmp_path / "grow.json", "--dry-run", *saved)
    assert by_file.returncode == 0, by_file.stderr
    found = validate_json("inspect", run_cli("inspect", output, "--json", "--expand", "2").stdout)
    assert (found["num_experts"], found["plan"]["num_experts"]) == (2 * N, 4 * N)
    shown = run_cli("inspect", output).stdout
    assert "grown: each expert 2 times, from source" in shown
    page = tmp_path / "page.html"
    report = run_cli("verify", source, output, "--tokens", "64", "--report", page, "--json")
    assert validate_json("verify", report.stdout)["status"] == "passed"
    assert "the smaller one it was made from" in page.read_text(encoding="utf-8")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "each of its experts, and its row of the router, is there 2 times" in card
    assert "| weights | passed |" in card


def test_an_engine_that_takes_what_grew_for_something_else_is_warned_of(
    make_moe: MakeMoe, run_cli: RunCli, tmp_path: Path
) -> None:
    source = make_moe("qwen3_moe", norm_topk_prob=False)
    done = run_cli("convert", source, tmp_path / "moe", "--expand", "2", "--dry-run")
    words = "llama.cpp loads qwen3_moe with softmax-topk but computes something else"
    assert words in " ".join(done.stderr.split())


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral"])
def test_what_grew_is_complete_to_a_push(
    make_moe: MakeMoe, tmp_path: Path, model_type: str
) -> None:
    made = convert(make_moe(model_type), tmp_path / "moe", Growth(expand=2), checksums=True).output
    moe = open_checkpoint(made)
    assert read_manifest(moe).failures == ()
    spoil(made, next(name for name in moe.tensors if name.endswith("gate.weight")))
    assert read_manifest(open_checkpoint(made)).failures


def test_two_runs_and_a_run_that_was_cut_short_give_the_same(
    make_moe: MakeMoe, tmp_path: Path
) -> None:
    class Cutting(Hooks[Any, Any]):
        def advance(self, num_bytes: int) -> None:
            self.left -= num_bytes
            if self.left < 0:
                raise KeyboardInterrupt

        left = 120_000

    source, options = make_moe("mixtral"), Options(max_shard_bytes=50_000)
    growth = Growth(expand=2)
    first = convert(source, tmp_path / "first", growth, options=options).output
    request = Request(
        source=source,
        output=tmp_path / "second",
        recipe=growth,
        options=options,
        writing=WriteOptions(workers=1),
    )
    with pytest.raises(KeyboardInterrupt):
        carry_out(request, hooks=Cutting())
    assert (tmp_path / "second.partial").exists()
    done = carry_out(request)
    assert done.reused_bytes > 0
    assert contents(first) == contents(done.output)
