"""The dense model types: a row of data for each that can be upcycled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_cli.errors import UpcycleError
from upcycle_cli.families.dense import DenseFamily
from upcycle_cli.families.mlp import Weight, separate
from upcycle_cli.families.pieces import GATE_UP, INTERLEAVED, QKV
from upcycle_cli.families.windows import (
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


_SWIGLU = separate("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_UP_DOWN = separate("", "mlp.up_proj", "mlp.down_proj")
_GATE_UP = (
    Weight("mlp.gate_up_proj.weight", ("gate", "up"), 0),
    Weight("mlp.down_proj.weight", ("down",), 1),
)
_H_TO_4H = separate("", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_C_FC = separate("", "mlp.c_fc", "mlp.c_proj")
_FC_IN_OUT = separate("", "mlp.fc_in", "mlp.fc_out")
_W123 = separate("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
_OLD_LAYER = "transformer.h.{layer}."
_GPT: Any = {
    "layer": _OLD_LAYER,
    "embedding": "transformer.wte.weight",
    "activation": "activation_function",
}
_N_KEYS: Any = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_MIXED: Any = {"mixed": True, "activation": None}
_SHARED = "input_layernorm.weight"  # attention and MLP run side by side
_GEMMA: Any = {
    "mlp": _SWIGLU,
    "norm": "pre_feedforward_layernorm.weight",
    "norm_offset": 1.0,
    "activation": "hidden_activation",
}
_LLAMA = ("LlamaModel", "LlamaForCausalLM")  # as the last two classes

_ROWS: Sequence[DenseFamily] = (
    DenseFamily(
        model_type="llama",
        mlp=_SWIGLU,
        targets=("mixtral", "qwen2_moe", "glm4_moe", "solar_open"),
        classes="Llama",
    ),
    DenseFamily(
        model_type="mistral",
        mlp=_SWIGLU,
        windows=all_slide,
        targets=("mixtral", "qwen2_moe"),
        classes="Mistral",
    ),
    DenseFamily(
        model_type="qwen2",
        mlp=_SWIGLU,
        windows=some_slide,
        targets=("qwen2_moe", "glm4_moe"),
        classes="Qwen2",
    ),
    DenseFamily(
        model_type="qwen3",
        mlp=_SWIGLU,
        windows=some_slide,
        targets=("qwen3_moe", "glm4_moe", "dots1", "hy_v3"),
        classes="Qwen3",
    ),
    DenseFamily(
        model_type="apertus",
        mlp=_UP_DOWN,
        norm="feedforward_layernorm.weight",
        classes="Apertus",
    ),
    DenseFamily(
        model_type="apertus1p5_text",
        mlp=_UP_DOWN,
        norm="feedforward_layernorm.weight",
        classes="Apertus1p5Text",
    ),
    DenseFamily(model_type="arcee", mlp=_UP_DOWN, classes="Arcee"),
    DenseFamily(
        model_type="bamba",
        mlp=separate("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
        norm="pre_ff_layernorm.weight",
        mixed=True,
        classes="Bamba",
    ),
    DenseFamily(
        model_type="codegen",
        mlp=_FC_IN_OUT,
        norm="ln_1.weight",
        **_GPT,
        keys=_N_KEYS,
        classes="CodeGen",
    ),
    DenseFamily(model_type="cohere", mlp=_SWIGLU, norm=_SHARED, classes="Cohere"),
    DenseFamily(
        model_type="cohere2",
        mlp=_SWIGLU,
        norm=_SHARED,
        windows=all_but_each_fourth,
        targets=("cohere2_moe",),
        classes="Cohere2",
    ),
    DenseFamily(model_type="cwm", mlp=_SWIGLU, classes="Cwm"),
    DenseFamily(model_type="diffllama", mlp=_SWIGLU, classes="DiffLlama"),
    DenseFamily(model_type="doge", mlp=_SWIGLU, classes="Doge"),
    DenseFamily(model_type="ernie4_5", mlp=_SWIGLU, targets=("ernie4_5_moe",), classes="Ernie4_5"),
    DenseFamily(model_type="exaone4", mlp=_SWIGLU, norm=None, classes="Exaone4"),
    DenseFamily(
        model_type="falcon",
        mlp=_H_TO_4H,
        norm=("ln_mlp.weight", "post_attention_layernorm.weight", "input_layernorm.weight"),
        layer=_OLD_LAYER,
        embedding="transformer.word_embeddings.weight",
        activation="activation",
        keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        classes="Falcon",
    ),
    DenseFamily(model_type="gemma", mlp=_SWIGLU, norm_offset=1.0, classes="Gemma"),
    DenseFamily(model_type="gemma2", **_GEMMA, classes="Gemma2"),
    DenseFamily(
        model_type="gemma3_text",
        **_GEMMA,
        classes=("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"),
    ),
    DenseFamily(
        model_type="gemma4_text",
        mlp=_SWIGLU,
        norm="pre_feedforward_layernorm.weight",
        activation="hidden_activation",
        width=_one_width,
        mixed=True,  # in the heads, and in whose keys they take
        targets=("gemma4_text",),
        classes=("Gemma4TextConfig", "Gemma4TextModel", "Gemma4ForCausalLM"),
    ),
    DenseFamily(
        model_type="glm",
        mlp=_GATE_UP,
        pieces={**INTERLEAVED, **GATE_UP},
        targets=("glm4_moe",),
        classes="Glm",
    ),
    DenseFamily(model_type="glm4", mlp=_GATE_UP, classes="Glm4"),
    DenseFamily(
        model_type="gpt2",
        mlp=separate("", "mlp.c_fc", "mlp.c_proj", transposed=True),
        norm="ln_2.weight",
        **_GPT,
        keys=_N_KEYS,
        classes=("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
    ),
    DenseFamily(
        model_type="gpt_bigcode",
        mlp=_C_FC,
        norm="ln_2.weight",
        **_GPT,
        keys=_N_KEYS,
        classes="GPTBigCode",
    ),
    DenseFamily(
        model_type="gpt_neo",
        mlp=_C_FC,
        norm="ln_2.weight",
        **_GPT,
        keys={
            "intermediate_size": "intermediate_size",  # null is 4·H to it, too
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
        },
        classes="GPTNeo",
    ),
    DenseFamily(
        model_type="gpt_neox",
        mlp=_H_TO_4H,
        layer="gpt_neox.layers.{layer}.",
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        renamed=(("embed_out.", "lm_head."),),
        classes="GPTNeoX",
    ),
    DenseFamily(
        model_type="gpt_neox_japanese",
        mlp=_H_TO_4H,
        layer="gpt_neox_japanese.layers.{layer}.",
        embedding="gpt_neox_japanese.embed_in.weight",
        head="embed_out.weight",
        keys={"intermediate_size": "intermediate_multiple_size"},
        width=lambda values: int(values["hidden_size"] * values["intermediate_size"]),
        mixed=True,  # attention in the last layer has a bias
        classes="GPTNeoXJapanese",
    ),
    DenseFamily(
        model_type="gptj",
        mlp=_FC_IN_OUT,
        norm="ln_1.weight",
        **_GPT,
        keys=_N_KEYS,
        classes="GPTJ",
    ),
    DenseFamily(
        model_type="granite",
        mlp=_SWIGLU,
        targets=("granitemoe", "granitemoehybrid"),
        classes="Granite",
    ),
    DenseFamily(
        model_type="granite_swa",
        mlp=_SWIGLU,
        windows=three_of_four,
        targets=("granitemoe_swa",),
        classes="GraniteSWA",
    ),
    DenseFamily(
        model_type="granitemoehybrid",
        mlp=(
            Weight("shared_mlp.input_linear.weight", ("gate", "up"), 0),
            Weight("shared_mlp.output_linear.weight", ("down",), 1),
        ),
        keys={"intermediate_size": "shared_intermediate_size"},
        mixed=True,
        targets=("granitemoehybrid",),
    ),
    DenseFamily(model_type="helium", mlp=_SWIGLU, classes="Helium"),
    DenseFamily(
        model_type="hunyuan_v1_dense",
        mlp=_SWIGLU,
        targets=("hunyuan_v1_moe",),
        classes="HunYuanDenseV1",
    ),
    DenseFamily(model_type="hyperclovax", mlp=_SWIGLU, classes="HyperCLOVAX"),
    DenseFamily(model_type="internlm3", mlp=_SWIGLU, classes=("InternLM3Config", *_LLAMA)),
    DenseFamily(
        model_type="iquestcoder",
        mlp=_SWIGLU,
        targets=("mixtral", "qwen2_moe", "glm4_moe"),
        classes=("IQuestCoderConfig", *_LLAMA),
    ),
    DenseFamily(model_type="jais2", mlp=_UP_DOWN, classes="Jais2"),
    DenseFamily(
        model_type="lfm2",
        mlp=_W123,
        norm="ffn_norm.weight",
        **_MIXED,
        older={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        width=_two_thirds,
        targets=("lfm2_moe",),
        classes="Lfm2",
    ),
    DenseFamily(
        model_type="lfm3",
        mlp=_W123,
        norm="ffn_norm.weight",
        **_MIXED,
        renamed=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        classes="Lfm3",
    ),
    DenseFamily(model_type="minicpm3", mlp=_SWIGLU, classes="MiniCPM3"),
    DenseFamily(
        model_type="ministral",
        mlp=_SWIGLU,
        windows=by_kinds,
        targets=("qwen2_moe",),
        classes="Ministral",
    ),
    DenseFamily(model_type="ministral3", mlp=_SWIGLU, classes="Ministral3"),
    DenseFamily(
        model_type="modernbert-decoder",
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
        mixed=True,  # the first layer has no norm before its attention
        classes="ModernBertDecoder",
    ),
    DenseFamily(
        model_type="nanochat", mlp=separate("", "mlp.fc1", "mlp.fc2"), norm=None, classes="NanoChat"
    ),
    DenseFamily(model_type="olmo", mlp=_SWIGLU, norm=None, classes="Olmo"),
    DenseFamily(
        model_type="olmo2", mlp=_SWIGLU, norm=None, targets=("flex_olmo",), classes="Olmo2"
    ),
    DenseFamily(model_type="olmo3", mlp=_SWIGLU, norm=None, classes="Olmo3"),
    DenseFamily(model_type="persimmon", mlp=_H_TO_4H, classes="Persimmon"),
    DenseFamily(
        model_type="phi", mlp=separate("", "mlp.fc1", "mlp.fc2"), norm=_SHARED, classes="Phi"
    ),
    DenseFamily(
        model_type="phi3",
        mlp=_GATE_UP,
        windows=all_slide,
        pieces=QKV,
        targets=("mixtral",),
        classes="Phi3",
    ),
    DenseFamily(
        model_type="qwen3_5_text",
        mlp=_SWIGLU,
        norm_offset=1.0,
        mixed=True,
        targets=("qwen3_5_moe_text",),
        classes=("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3_5ForCausalLM"),
    ),
    DenseFamily(model_type="seed_oss", mlp=_SWIGLU, targets=("qwen2_moe",), classes="SeedOss"),
    DenseFamily(model_type="smollm3", mlp=_SWIGLU, classes="SmolLM3"),
    DenseFamily(
        model_type="stablelm",
        mlp=_SWIGLU,
        norm=("post_attention_layernorm.weight", "input_layernorm.weight"),
        classes="StableLm",
    ),
    DenseFamily(model_type="starcoder2", mlp=_C_FC, classes="Starcoder2"),
    DenseFamily(model_type="vaultgemma", **_GEMMA, classes="VaultGemma"),
    DenseFamily(model_type="youtu", mlp=_SWIGLU, targets=("deepseek_v3",), classes="Youtu"),
    DenseFamily(model_type="nemotron", mlp=_UP_DOWN, norm_offset=1.0, classes="Nemotron"),
    DenseFamily(
        model_type="nemotron_h",
        mlp=separate("", "mixer.up_proj", "mixer.down_proj"),
        norm="norm.weight",
        layer="backbone.layers.{layer}.",
        embedding="backbone.embeddings.weight",
        activation="mlp_hidden_act",
        blocks="mlp",
        targets=("nemotron_h",),
        outgrown_code=True,
    ),
)
DENSE: Mapping[str, DenseFamily] = {row.model_type: row for row in _ROWS}
