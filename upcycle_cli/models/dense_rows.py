"""The dense model types: a row of data for each that can be upcycled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.models.dense import DenseFamily
from upcycle_cli.models.mlp import Weight, linear_layers, swiglu
from upcycle_cli.models.tensor_pieces import GATE_UP, INTERLEAVED, QKV
from upcycle_cli.models.windows import (
    all_but_each_fourth,
    all_slide,
    by_kinds,
    some_slide,
    three_of_four,
)


def _two_thirds(values: Mapping[str, Any]) -> int:
    """Return I by lfm2's rule, which is that of the first llama's code."""
    width = int(values["intermediate_size"])
    if not values["block_auto_adjust_ff_dim"]:
        return width
    width, multiple = int(2 * width / 3), values["block_multiple_of"]
    if values["block_ffn_dim_multiplier"] is None:
        return width
    width = int(values["block_ffn_dim_multiplier"] * width)
    return multiple * -(-width // multiple)  # type: ignore[no-any-return]


def _one_width(values: Mapping[str, Any]) -> int:
    """Return I of gemma4_text, where it is that of all layers."""
    if values["use_double_wide_mlp"] and values["num_kv_shared_layers"]:
        raise UpcycleError(
            "config.json: use_double_wide_mlp makes some MLPs twice as wide as others, and the "
            "experts of all layers have one size."
        )
    return int(values["intermediate_size"])


_UP_DOWN = linear_layers("", "mlp.up_proj", "mlp.down_proj")
_GATE_UP = (
    Weight("mlp.gate_up_proj.weight", ("gate", "up"), 0),
    Weight("mlp.down_proj.weight", ("down",), 1),
)
_H_TO_4H = linear_layers("", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_C_FC = linear_layers("", "mlp.c_fc", "mlp.c_proj")
_FC1_FC2 = linear_layers("", "mlp.fc1", "mlp.fc2")
_FC_IN_OUT = linear_layers("", "mlp.fc_in", "mlp.fc_out")
_W123 = linear_layers("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
_OLD_LAYER = "transformer.h.{layer}."
_GPT: Any = {
    "layer": _OLD_LAYER,
    "embedding": "transformer.wte.weight",
    "activation": "activation_function",
    "keys": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
}
_GPT_NEO_KEYS = {
    "intermediate_size": "intermediate_size",  # null is 4·H to it, too
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}
_MIXED: Any = {"layers_differ": True, "activation": None}
_SHARED = "input_layernorm.weight"  # attention and MLP run side by side
_GEMMA: Any = {
    "norm": "pre_feedforward_layernorm.weight",
    "norm_offset": 1.0,
    "activation": "hidden_activation",
}
_LLAMA = ("LlamaModel", "LlamaForCausalLM")  # as the last two classes

_ROWS: Sequence[DenseFamily] = (
    DenseFamily(
        "llama", targets=("mixtral", "qwen2_moe", "glm4_moe", "solar_open"), classes="Llama"
    ),
    DenseFamily("mistral", windows=all_slide, targets=("mixtral", "qwen2_moe"), classes="Mistral"),
    DenseFamily("qwen2", windows=some_slide, targets=("qwen2_moe", "glm4_moe"), classes="Qwen2"),
    DenseFamily(
        "qwen3",
        windows=some_slide,
        targets=("qwen3_moe", "glm4_moe", "dots1", "hy_v3", "mellum"),
        classes="Qwen3",
    ),
    DenseFamily("apertus", mlp=_UP_DOWN, norm="feedforward_layernorm.weight", classes="Apertus"),
    DenseFamily(
        "apertus1p5_text",
        mlp=_UP_DOWN,
        norm="feedforward_layernorm.weight",
        classes="Apertus1p5Text",
    ),
    DenseFamily("arcee", mlp=_UP_DOWN, classes="Arcee"),
    DenseFamily(
        "bamba",
        mlp=swiglu("feed_forward"),
        norm="pre_ff_layernorm.weight",
        layers_differ=True,
        classes="Bamba",
    ),
    DenseFamily("codegen", mlp=_FC_IN_OUT, norm="ln_1.weight", **_GPT, classes="CodeGen"),
    DenseFamily("cohere", norm=_SHARED, classes="Cohere"),
    DenseFamily(
        "cohere2",
        norm=_SHARED,
        windows=all_but_each_fourth,
        targets=("cohere2_moe",),
        classes="Cohere2",
    ),
    DenseFamily("cwm", classes="Cwm"),
    DenseFamily("diffllama", classes="DiffLlama"),
    DenseFamily("doge", classes="Doge"),
    DenseFamily("ernie4_5", targets=("ernie4_5_moe",), classes="Ernie4_5"),
    DenseFamily("exaone4", norm=None, classes="Exaone4"),
    DenseFamily(
        "falcon",
        mlp=_H_TO_4H,
        norm=("ln_mlp.weight", "post_attention_layernorm.weight", "input_layernorm.weight"),
        layer=_OLD_LAYER,
        embedding="transformer.word_embeddings.weight",
        activation="activation",
        keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        classes="Falcon",
    ),
    DenseFamily("gemma", norm_offset=1.0, classes="Gemma"),
    DenseFamily("gemma2", **_GEMMA, classes="Gemma2"),
    DenseFamily(
        "gemma3_text",
        **_GEMMA,
        attention_was_tested=True,
        classes=("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"),
    ),
    DenseFamily(
        "gemma4_text",
        norm="pre_feedforward_layernorm.weight",
        activation="hidden_activation",
        width=_one_width,
        layers_differ=True,  # in the heads, and in whose keys they take
        attention_was_tested=True,
        targets=("gemma4_text",),
        classes=("Gemma4TextConfig", "Gemma4TextModel", "Gemma4ForCausalLM"),
    ),
    DenseFamily(
        "glm", mlp=_GATE_UP, pieces={**INTERLEAVED, **GATE_UP}, targets=("glm4_moe",), classes="Glm"
    ),
    DenseFamily("glm4", mlp=_GATE_UP, classes="Glm4"),
    DenseFamily(
        "gpt2",
        mlp=linear_layers("", "mlp.c_fc", "mlp.c_proj", transposed=True),
        norm="ln_2.weight",
        **_GPT,
        classes=("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
    ),
    DenseFamily("gpt_bigcode", mlp=_C_FC, norm="ln_2.weight", **_GPT, classes="GPTBigCode"),
    DenseFamily(
        "gpt_neo",
        mlp=_C_FC,
        norm="ln_2.weight",
        **_GPT | {"keys": _GPT_NEO_KEYS},
        classes="GPTNeo",
    ),
    DenseFamily(
        "gpt_neox",
        mlp=_H_TO_4H,
        layer="gpt_neox.layers.{layer}.",
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        renamed=(("embed_out.", "lm_head."),),
        classes="GPTNeoX",
    ),
    DenseFamily(
        "gpt_neox_japanese",
        mlp=_H_TO_4H,
        layer="gpt_neox_japanese.layers.{layer}.",
        embedding="gpt_neox_japanese.embed_in.weight",
        head="embed_out.weight",
        keys={"intermediate_size": "intermediate_multiple_size"},
        width=lambda values: int(values["hidden_size"] * values["intermediate_size"]),
        layers_differ=True,  # attention in the last layer has a bias
        classes="GPTNeoXJapanese",
    ),
    DenseFamily("gptj", mlp=_FC_IN_OUT, norm="ln_1.weight", **_GPT, classes="GPTJ"),
    DenseFamily("granite", targets=("granitemoe", "granitemoehybrid"), classes="Granite"),
    DenseFamily(
        "granite_swa", windows=three_of_four, targets=("granitemoe_swa",), classes="GraniteSWA"
    ),
    DenseFamily(
        "granitemoehybrid",
        mlp=(
            Weight("shared_mlp.input_linear.weight", ("gate", "up"), 0),
            Weight("shared_mlp.output_linear.weight", ("down",), 1),
        ),
        keys={"intermediate_size": "shared_intermediate_size"},
        layers_differ=True,
        targets=("granitemoehybrid",),
    ),
    DenseFamily("helium", classes="Helium"),
    DenseFamily("hunyuan_v1_dense", targets=("hunyuan_v1_moe",), classes="HunYuanDenseV1"),
    DenseFamily("hyperclovax", classes="HyperCLOVAX"),
    DenseFamily("internlm3", classes=("InternLM3Config", *_LLAMA)),
    DenseFamily(
        "iquestcoder",
        targets=("mixtral", "qwen2_moe", "glm4_moe"),
        classes=("IQuestCoderConfig", *_LLAMA),
    ),
    DenseFamily("jais2", mlp=_UP_DOWN, classes="Jais2"),
    DenseFamily(
        "lfm2",
        mlp=_W123,
        norm="ffn_norm.weight",
        **_MIXED,
        old_keys={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        width=_two_thirds,
        targets=("lfm2_moe",),
        classes="Lfm2",
    ),
    DenseFamily(
        "lfm3",
        mlp=_W123,
        norm="ffn_norm.weight",
        **_MIXED,
        renamed=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        classes="Lfm3",
    ),
    DenseFamily("minicpm3", classes="MiniCPM3"),
    DenseFamily("ministral", windows=by_kinds, targets=("qwen2_moe",), classes="Ministral"),
    DenseFamily("ministral3", classes="Ministral3"),
    DenseFamily(
        "modernbert-decoder",
        mlp=(
            Weight("mlp.Wi.weight", ("gate", "up"), 0),
            Weight("mlp.Wo.weight", ("down",), 1),
            Weight("mlp.Wi.bias", ("gate_bias", "up_bias"), 0),
            Weight("mlp.Wo.bias", ("down_bias",), None),
        ),
        norm="mlp_norm.weight",
        embedding="model.embeddings.tok_embeddings.weight",
        head="decoder.weight",
        activation="hidden_activation",
        layers_differ=True,  # the first layer has no norm before its attention
        classes="ModernBertDecoder",
    ),
    DenseFamily("nanochat", mlp=_FC1_FC2, norm=None, classes="NanoChat"),
    DenseFamily("olmo", norm=None, classes="Olmo"),
    DenseFamily("olmo2", norm=None, targets=("flex_olmo",), classes="Olmo2"),
    DenseFamily("olmo3", norm=None, classes="Olmo3"),
    DenseFamily("persimmon", mlp=_H_TO_4H, classes="Persimmon"),
    DenseFamily("phi", mlp=_FC1_FC2, norm=_SHARED, classes="Phi"),
    DenseFamily(
        "phi3", mlp=_GATE_UP, windows=all_slide, pieces=QKV, targets=("mixtral",), classes="Phi3"
    ),
    DenseFamily(
        "qwen3_5_text",
        norm_offset=1.0,
        layers_differ=True,
        targets=("qwen3_5_moe_text",),
        classes=("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3_5ForCausalLM"),
    ),
    DenseFamily("seed_oss", targets=("qwen2_moe",), classes="SeedOss"),
    DenseFamily("smollm3", classes="SmolLM3"),
    DenseFamily(
        "stablelm",
        norm=("post_attention_layernorm.weight", "input_layernorm.weight"),
        classes="StableLm",
    ),
    DenseFamily("starcoder2", mlp=_C_FC, classes="Starcoder2"),
    DenseFamily("vaultgemma", **_GEMMA, classes="VaultGemma"),
    DenseFamily("youtu", targets=("deepseek_v3",), classes="Youtu"),
    DenseFamily("nemotron", mlp=_UP_DOWN, norm_offset=1.0, classes="Nemotron"),
    DenseFamily(
        "nemotron_h",
        mlp=linear_layers("", "mixer.up_proj", "mixer.down_proj"),
        norm="norm.weight",
        layer="backbone.layers.{layer}.",
        embedding="backbone.embeddings.weight",
        activation="mlp_hidden_act",
        mlp_block="mlp",
        targets=("nemotron_h",),
        has_obsolete_code=True,
    ),
)
DENSE: Mapping[str, DenseFamily] = {row.model_type: row for row in _ROWS}
