"""Growing an MoE: the same function from several copies of each expert.

Sources are tiny MoEs that transformers makes and saves, of each type that can be grown and with
each routing that it can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    MakeDense,
    clone,
    difference,
    logits,
    random_ids,
    read_json,
    read_tensors,
    validate_json,
)
from quantised import save_fp8
from refusals import assert_refused, invoke
from safetensors.torch import save_file

from upcycle_cli import Growth, Options, Recipe, UpcycleError, convert, inspect, verify
from upcycle_cli.models.lookup import GROWABLE
from upcycle_cli.recipe.options import ExpertLayout
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
    "head_dim": 4,
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
    "qwen3_moe": {"num_experts": N, "moe_intermediate_size": 24},
    "granitemoe": {"num_local_experts": N},
    "glm4_moe": _SIGMOID,
    "olmoe": {"num_experts": N},
    "flex_olmo": {"num_experts": N},
    "deepseek_v3": {**_SIGMOID, **_LATENT},
    "dots1": _SIGMOID,
    "solar_open": {**_SIGMOID, "num_hidden_layers": 2},
}
BY_NORM = ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo")
KINDS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in SIZES if name not in BY_NORM] + [
    (name, {"norm_topk_prob": norm}) for name in BY_NORM for norm in (True, False)
]
FEW = TextOptions(tokens=64)


MakeMoe = Callable[..., Path]


@pytest.fixture(scope="session")
def make_moe(make_dense: MakeDense) -> MakeMoe:
    def make(model_type: str = "qwen3_moe", **config: Any) -> Path:  # noqa: ANN401
        sizes = {"num_experts_per_tok": T, **SIZES[model_type], **config}
        return make_dense(model_type, **sizes)

    return make


def test_every_growable_type_has_sizes() -> None:
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
    names = {"num_local_experts", "num_experts", "n_routed_experts"} & before.keys()
    assert changed == dict.fromkeys(names, expand * N) | {"num_experts_per_tok": expand * T}
    assert before.keys() == after.keys()
    if expand == 2:
        report = verify(source, made, texts=FEW)
        assert (report.status, report.promise) == ("passed", "exact"), report
        assert {check.status for check in report.checks} == {"passed"}


@pytest.mark.parametrize(
    ("model_type", "native"),
    [("mixtral", ExpertLayout.PER_EXPERT), ("granitemoe", ExpertLayout.STACKED)],
)
def test_grow_into_another_layout_and_back(
    make_moe: MakeMoe, tmp_path: Path, model_type: str, native: ExpertLayout
) -> None:
    source, ids, made = make_moe(model_type), random_ids(), [make_moe(model_type)]
    for layout in (ExpertLayout.FUSED, None, native):
        options, output = Options(expert_layout=layout), tmp_path / f"{len(made)}"
        made.append(convert(made[-1], output, Growth(expand=2), options=options).output)
        assert inspect(output).expert_layout == (layout or "fused")
        assert verify(made[-2], output, texts=FEW).passed
        assert difference(*(logits(path, ids, torch.float32) for path in (output, source))) < 1e-5
    assert (inspect(made[-1]).num_experts, inspect(made[-1]).top_k) == (8 * N, 8 * T)


def test_copies_lie_side_by_side_and_everything_else_is_copied(
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_weights_on_demand(make_moe: MakeMoe, tmp_path: Path, dtype: str) -> None:
    source = make_moe("glm4_moe")
    options = Options(dtype=dtype, max_shard_bytes=40_000)
    made = convert(source, tmp_path / "moe", Growth(expand=2), options=options).output
    dtypes = {name: held.dtype for name, held in read_tensors(made).items()}
    wide = {name for name, held in dtypes.items() if held == torch.float32}
    # The correction bias moves by small steps, and keeps its dtype.
    assert all(name.endswith("e_score_correction_bias") for name in wide)
    assert {*dtypes.values()} - {torch.float32} == {getattr(torch, dtype)}
    report = verify(source, made, texts=FEW)
    assert report.passed, report
    assert report.checks[-1].metrics["kl_mean_rounding"] != 0


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


def test_another_top_k_is_measured(make_moe: MakeMoe, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, "tokens choose 1 of 2 groups of experts"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob must be True, not False"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ("mixtral", {"num_experts_per_tok": 9}, "more than the 4 experts"),
        ("mixtral", {"num_hidden_layers": 3}, "lacks model.layers.2."),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer is a mixture of experts"),
        ("mixtral", {"intermediate_size": 24}, "but config.json implies [24, 32]"),
        ("mixtral", {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ("mixtral", {"model_type": "jamba"}, "model type jamba cannot be grown yet"),
    ],
)
def test_refuse_a_config_that_cannot_be_grown(
    make_moe: MakeMoe, tmp_path: Path, model_type: str, changes: dict[str, Any], words: str
) -> None:
    source = clone(make_moe(model_type), tmp_path / "source", **changes)
    with pytest.raises(UpcycleError) as refused:
        convert(source, tmp_path / "moe", Growth(expand=2))
    assert words in str(refused.value)
    assert not (tmp_path / "moe").exists()


def test_grow_what_upcycle_made_and_name_the_two_steps(llama: Path, tmp_path: Path) -> None:
    """A group of G experts becomes one of k·G that has each shard k times."""
    recipe = Recipe("E2G4T2", shared_experts=2)
    first = convert(llama, tmp_path / "first", recipe, target="glm4_moe").output
    made, ids = (
        convert(first, tmp_path / "so grown", Growth(expand=2)).output,
        random_ids(length=48),
    )
    assert difference(logits(made, ids), logits(llama, ids)) < 1e-5
    report = verify(first, made, texts=FEW)
    assert (report.status, report.promise) == ("passed", "exact"), report
    steps = f"upcycle verify {llama} SOURCE && upcycle verify SOURCE '{made}'"
    assert_refused(invoke("verify", llama, made), "it grew from the MoE first", steps)


def test_grow_an_fp8_moe(make_moe: MakeMoe, tmp_path: Path) -> None:
    source = save_fp8(make_moe("qwen3_moe"), tmp_path / "fp8", "tensor", "vllm")
    done = convert(source, tmp_path / "moe", Growth(expand=2))
    assert len(done.plan.dropped) == len(done.plan.source.made)  # the scales of activations
    report = verify(source, done.output, texts=FEW)
    assert (report.status, report.promise) == ("passed", "exact"), report


MOE = "model.layers.0.block_sparse_moe"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        # None takes the tensor out.
        ("model.layers.1.block_sparse_moe.gate.weight", None, "lacks"),
        ("model.layers.1.block_sparse_moe.experts.2.w1.weight", None, "lacks"),
        ("model.layers.1.self_attn.q_proj.weight", None, "lacks"),
        ("model.embed_tokens.weight", None, "lacks"),
        ("lm_head.weight", None, "lacks"),
        (f"{MOE}.experts.0.w1.scale", torch.ones(1), "unknown tensor"),
        (f"{MOE}.gate.bias", torch.ones(N), "unknown tensor"),
        ("model.norm.weight", torch.ones(32, dtype=torch.float8_e4m3fn), "is stored as F8_E4M3"),
    ],
)
def test_refuse_tensors_that_the_config_does_not_imply(
    make_moe: MakeMoe, tmp_path: Path, name: str, tensor: torch.Tensor | None, words: str
) -> None:
    source = clone(make_moe("mixtral"), tmp_path / "source")
    held = {**read_tensors(source), name: tensor}
    given = {key: value for key, value in held.items() if value is not None}
    save_file(given, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError) as refused:
        convert(source, tmp_path / "moe", Growth(expand=2))
    assert words in refused.value.message
    assert name in refused.value.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--expand", "2000"), "makes 8000 experts per layer of 4"),
        (("--expand", "2", "-T", "9", "--allow-inexact"), "top-k 9 is more than the 8 experts"),
        (("--expand", "2", "--top-k", "2"), "Leave out --top-k to use 4"),
        (("--expand", "2", "-r", "E2G2T2"), "--recipe"),
        (("--expand", "2", "--target", "qwen3_moe"), "--target"),
        (("--expand", "2", "--expert-layout", "stacked"), "qwen3_moe has no stacked layout"),
        (("-r", "E2G1T1"), "--expand 2"),
        ((), "--expand 2"),
    ],
    ids=str,
)
def test_refuse_options(
    make_moe: MakeMoe, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = invoke("convert", make_moe(norm_topk_prob=True), tmp_path / "moe", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "moe").exists()


def test_grow_verify_and_inspect_on_the_command_line(make_moe: MakeMoe, tmp_path: Path) -> None:
    source, output = make_moe("olmoe"), tmp_path / "moe"
    command = ("convert", source, output, "--expand", "2", "--checksums")
    saved = ("--save-config", tmp_path / "grow.json")
    planned = validate_json("convert", invoke(*command, "--dry-run", "--json", *saved).stdout)
    assert (planned["status"], planned["promise"]) == ("planned", "exact")
    assert read_json(tmp_path / "grow.json").keys() >= {"expand", "top-k", "expert-layout"}
    made = validate_json("convert", invoke(*command, "--verify", "--json").stdout)
    assert (made["status"], made["verification"]["status"]) == ("converted", "passed")
    assert made["plan_sha256"] == planned["plan_sha256"]
    again = validate_json("convert", invoke(*command, "--json").stdout)
    assert again["status"] == "already done"
    found = validate_json("inspect", invoke("inspect", output, "--json", "--expand", "2").stdout)
    assert (found["num_experts"], found["plan"]["num_experts"]) == (2 * N, 4 * N)
    assert "| weights | passed |" in (output / "README.md").read_text(encoding="utf-8")
