"""FP8 checkpoints: their weights are those of transformers' own dequantisation, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, read_json
from quantised import Tensors, save_fp8

from upcycle_cli import Options, Recipe, UpcycleError, convert, verify
from upcycle_cli.checkpoint.checkpoint import open_checkpoint
from upcycle_cli.verification.prompts import TextOptions

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
        (lambda _, config: config.pop("quantization_config"), "stored as F8_E4M3, but config"),
        (tensor(SCALE, None), f"{NAME} is FP8, and {SCALE} is missing"),
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
        (tensor(SCALE, torch.full((3, 2), torch.inf)), "not finite in bf16"),
        (tensor(SCALE, torch.full((3, 2), torch.nan)), "not finite in bf16"),
        (tensor(SCALE, torch.full((3, 2), 3e38)), "not finite in bf16"),
    ],
)
def test_refuse(make_dense: MakeDense, tmp_path: Path, edit: Edit, words: str) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8", edit=edit)
    with pytest.raises(UpcycleError) as caught:
        convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    assert words in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4"])
def test_the_hint_has_a_command(make_dense: MakeDense, tmp_path: Path, method: str) -> None:
    dense = save_fp8(make_dense("llama"), tmp_path / "fp8", edit=settings(quant_method=method))
    with pytest.raises(UpcycleError, match=method) as caught:
        open_checkpoint(dense)
    assert 'python -c "from ' in str(caught.value.hint)


def test_fp8_without_a_name_for_it_in_an_moe(make_dense: MakeDense, tmp_path: Path) -> None:
    """Nobody takes an MoE that was quantised later for what convert wrote."""
    dense = make_dense("llama")
    done = convert(dense, tmp_path / "moe", Recipe("E2G2T2"))
    report = verify(dense, save_fp8(done.output, tmp_path / "fp8"), texts=FEW)
    assert report.status == "failed"
