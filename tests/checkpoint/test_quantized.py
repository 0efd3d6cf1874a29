"""FP8 checkpoints: their weights are those of transformers' own dequantisation, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import MakeDense, RunOnHub, read_json
from quantised import Tensors, save_fp8
from shapes import write_orders
from verified import text_of

from upcycle_cli import (
    MergeRequest,
    Options,
    Recipe,
    UpcycleError,
    convert,
    inspect,
    verify,
)
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.checkpoint.made import part
from upcycle_cli.run.lazy_weights import unread
from upcycle_cli.verification.prompts import TextOptions

if TYPE_CHECKING:
    from hub.server import Hub

FEW = TextOptions(tokens=64)
Scheme = tuple[int, int] | str
Edit = Callable[[Tensors, dict[str, Any]], object]
WRITTEN: tuple[tuple[Scheme, str], ...] = (
    *(((16, 16), name) for name in ("transformers", "compressed-tensors", "vllm")),
    *((scheme, "transformers") for scheme in ((128, 128), (5, 7), "tensor")),
    *((scheme, "compressed-tensors") for scheme in ("tensor", "channel")),
    *((scheme, "vllm") for scheme in ("tensor", "channel")),
)


@pytest.mark.parametrize(("scheme", "writer"), WRITTEN, ids=str)
def test_convert_and_verify(
    make_dense: MakeDense, tmp_path: Path, scheme: Scheme, writer: str
) -> None:
    dense = save_fp8(make_dense("qwen3"), tmp_path / "fp8", scheme, writer)
    done = convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    report = verify(dense, done.output, texts=FEW)
    assert (report.status, report.promise) == ("passed", "exact"), report
    assert "quantization_config" not in read_json(done.output / "config.json")


def test_keep_a_tensor_that_is_called_like_a_scale(make_dense: MakeDense, tmp_path: Path) -> None:
    """gemma3n has altup.correct_output_scale."""
    dense = save_fp8(make_dense("gemma3n_text"), tmp_path / "fp8")
    assert not open_checkpoint(dense).left_out
    made = convert(dense, tmp_path / "moe", Recipe("E2G2T2"), verify=True)
    assert made.report is not None
    assert made.report.passed


@pytest.mark.parametrize(
    ("scheme", "writer"),
    [
        *((scheme, "transformers") for scheme in ((16, 16), (8, 16), "tensor")),
        *((scheme, "compressed-tensors") for scheme in ((16, 16), "tensor", "channel")),
    ],
    ids=str,
)
def test_the_bits_are_transformers_own(
    make_dense: MakeDense, tmp_path: Path, scheme: Scheme, writer: str
) -> None:
    from transformers import AutoModelForCausalLM

    def dequantize(_: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"]["dequantize"] = True

    dense = save_fp8(make_dense("llama"), tmp_path / "fp8", scheme, writer, dequantize)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    expected, source = model.state_dict(), open_checkpoint(dense)
    with source.reader() as reader:
        for name in source.made:
            assert torch.equal(reader.tensor(name), expected[name]), name
    assert len(source.made) == 14


def test_a_lookup_computes_its_rows_only(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the outputs check looks tokens up in an embedding that an adapter changes."""
    source, sizes = open_checkpoint(save_fp8(make_dense("llama"), tmp_path / "fp8")), list[int]()

    def watched(*args: Any) -> Any:  # noqa: ANN401
        values = part(*args)
        sizes.append(len(values))
        return values

    monkeypatch.setattr("upcycle_cli.checkpoint.checkpoint.part", watched)
    with source.reader() as reader:
        name = "model.layers.0.self_attn.q_proj.weight"
        held, whole = unread(source, reader, name), reader.tensor(name)
        for chosen in (torch.tensor([3, 0, 31]), slice(5, 9), slice(7, 7)):
            assert torch.equal(held[chosen], whole[chosen])
    assert sizes == [32, 3, 4, 0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_once_to_another_dtype(make_dense: MakeDense, tmp_path: Path, dtype: str) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8")
    done = convert(dense, tmp_path / "moe", Recipe("E2G2T2"), options=Options(dtype=dtype))
    report = verify(dense, done.output, texts=FEW)
    assert report.status == "passed", report
    name = "model.layers.0.self_attn.q_proj.weight"
    made, source = open_checkpoint(done.output), open_checkpoint(dense)
    with made.reader() as reader, source.reader() as stored:
        scale = torch.frombuffer(bytearray(stored.mapped(f"{name}_scale_inv")), dtype=torch.float32)
        weight = torch.frombuffer(bytearray(stored.mapped(name)), dtype=torch.float8_e4m3fn)
        whole = weight.float().reshape(2, 16, 2, 16) * scale.reshape(2, 1, 2, 1)
        wanted = whole.reshape(32, 32).to(getattr(torch, dtype))
        assert torch.equal(reader.tensor(name), wanted)


NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


def settings(**changes: object) -> Edit:
    return lambda _, config: config["quantization_config"].update(changes)


def tensor(name: str, value: torch.Tensor | None) -> Edit:
    return lambda tensors, _: tensors.pop(name) if value is None else tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda _, config: config.pop("quantization_config"), "stored as F8_E4M3, without a"),
        (tensor(SCALE, None), f"{NAME} is FP8, but it is no matrix or {SCALE} is missing"),
        (tensor(SCALE, torch.ones(3, 1)), f"{SCALE} has shape [3, 1]"),
        (tensor(SCALE, torch.ones(2, 3)), f"{SCALE} has shape [2, 3]"),
        (tensor(SCALE, torch.ones(())), f"{SCALE} has shape []"),
        (tensor(SCALE, torch.ones(3, 2).to(torch.int32)), f"{SCALE} is stored as I32"),
        (tensor("lm_head.weight_scale_inv", torch.ones(1)), "scale of no FP8 weight"),
        (tensor(f"{NAME}_scale", torch.ones(3, 2)), "_scale is the scale of no FP8 weight"),
        (settings(weight_block_size=None), "_scale_inv has shape [2, 3]"),
        (settings(weight_block_size=[0, 16]), "weight_block_size is [0, 16]"),
        (settings(weight_block_size="16"), "weight_block_size is '16'"),
        (settings(config_groups={"a": {"weights": {"group_size": 8}}}), "several sizes"),
        (settings(expert_dtype="fp4"), "quantised (fp8 in"),
        (settings(transform_config={"a": {}}), "quantised (fp8 in"),
        *(
            (settings(quant_method=method), f"quantised ({method} in")
            for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "quark", "modelopt")
        ),
        (settings(quant_method="compressed-tensors", format="pack-quantized"), "quantised"),
        (tensor(SCALE, torch.full((3, 2), torch.inf)), "not finite in bfloat16"),
        (tensor(SCALE, torch.full((3, 2), torch.nan)), "not finite in bfloat16"),
        (tensor(SCALE, torch.full((3, 2), 3e38)), "not finite in bfloat16"),
    ],
)
def test_refuse(make_dense: MakeDense, tmp_path: Path, edit: Edit, words: str) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8", edit=edit)
    with pytest.raises(UpcycleError) as caught:
        convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    assert words in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        *((method, 'python -c "from ') for method in ("gptq", "awq", "bitsandbytes")),
        ("mxfp4", "two values in a byte"),
        ("quark", "bf16 or fp16 release"),
    ],
)
def test_say_what_to_do_instead(
    make_dense: MakeDense, tmp_path: Path, method: str, words: str
) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8", edit=settings(quant_method=method))
    with pytest.raises(UpcycleError, match=method) as caught:
        open_checkpoint(dense)
    assert words in str(caught.value.hint)


def test_fp8_without_a_name_for_it_in_an_moe(make_dense: MakeDense, tmp_path: Path) -> None:
    """Nobody takes an MoE that was quantised later for what convert wrote."""
    dense = make_dense("llama")
    done = convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    report = verify(dense, save_fp8(done.output, tmp_path / "fp8"), texts=FEW)
    for words in ("quantization_config is", "w1.weight_scale_inv should not be there"):
        assert words in text_of(report)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Recipe("E4G2T4", router_init="balanced", neuron_order="clustered"), {}),
        (Recipe("E4G4T8", neuron_order="shuffled", layers="1"), {}),
        (Recipe("E2G2T2", neuron_order="file"), {}),
        (Recipe("E4G2T4", noise=0.01), {}),
        (Recipe("E4G1T2", reinit=0.5), {}),
        (Recipe("E2G4T2", shared_experts=2), {"target": "glm4_moe"}),
        (Recipe("E4G2T4"), {"options": Options(untie_embeddings=True, expert_layout="fused")}),
    ],
    ids=str,
)
def test_every_way_to_make_experts(
    make_dense: MakeDense, tmp_path: Path, recipe: Recipe, options: dict[str, Any]
) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8")
    if recipe.neuron_order == "file":
        options = {"neuron_orders": write_orders(tmp_path / "orders.safetensors", alike=0)}
    done = convert(dense, tmp_path / "moe", recipe, **options)
    report = verify(dense, done.output, checks="weights", allow_inexact=True)
    assert report.checks[0].status == "passed", report
    drift = inspect(done.output, weights=True, dense=dense).weights
    assert drift is not None
    assert drift.movement is not None


def test_inspect_compares_with_what_convert_computed(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8")
    done = convert(dense, tmp_path / "moe", "E2G2T2", options=Options(dtype="float32"))
    drift = inspect(done.output, weights=True, dense=dense).weights
    assert drift is not None
    assert drift.movement is not None
    assert not any(any(layer.moved) for layer in drift.movement)


def card_of(output: Path) -> str:
    return (output / "README.md").read_text()


@pytest.mark.parametrize("rest", ["first", "mean"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_experts_of_several_models(
    make_dense: MakeDense, tmp_path: Path, rest: str, dtype: str | None
) -> None:
    """A mean is taken of values that are not rounded."""
    models = [save_fp8(make_dense("llama", seed=seed), tmp_path / f"fp8 {seed}") for seed in (0, 1)]
    merge, options = MergeRequest(experts_from=models[1:], rest=rest), Options(dtype=dtype)
    done = convert(models[0], tmp_path / "moe", Recipe("E2G2T2"), merge=merge, options=options)
    report = verify(models[0], done.output, experts_from=models[1:], texts=FEW, allow_inexact=True)
    assert not [check for check in report.checks if check.failures], report
    assert f"| source weights | FP8, computed in {dtype or 'bfloat16'}" in card_of(done.output)
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = []
    for source in (open_checkpoint(model).computed_in("F32") for model in models):
        with source.reader() as reader:
            wide.append(reader.tensor(name).clone())
    wanted = (wide[0] + wide[1]) / 2 if rest == "mean" else wide[0]
    with (made := open_checkpoint(done.output)).reader() as reader:
        kind = torch.float32 if dtype else torch.bfloat16
        assert torch.equal(reader.tensor(name), wanted.to(kind))
    assert made.tensors[name].shape == (32, 32)


def test_name_the_models_whose_weights_are_fp8(make_dense: MakeDense, tmp_path: Path) -> None:
    plain, fp8 = (
        make_dense("llama", dtype="bfloat16"),
        save_fp8(make_dense("llama"), tmp_path / "a"),
    )
    done = convert(plain, tmp_path / "moe", "E2G2T2", merge=MergeRequest(experts_from=fp8))
    assert "| source weights | FP8 of a, computed in bfloat16; the output" in card_of(done.output)


def test_a_repo_like_a_directory(
    make_dense: MakeDense, tmp_path: Path, hub: Hub, run: RunOnHub
) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8")
    hub.store.upload("org/fp8", dense)
    assert "FP8 computed in bfloat16" in run("inspect", "org/fp8").stdout
    run("convert", "org/fp8", tmp_path / "moe", "--recipe", "E2G2T2", "--dtype", "float16")
    options = Options(dtype="float16")
    local = convert(dense, tmp_path / "local", Recipe("E2G2T2"), options=options).output
    one, other = (path / "model.safetensors" for path in (tmp_path / "moe", local))
    assert one.read_bytes() == other.read_bytes()
    assert read_json(local / "upcycle.json")["source"]["dequantized_to"] == "float16"
    assert "| source weights | FP8, computed in float16" in card_of(local)
