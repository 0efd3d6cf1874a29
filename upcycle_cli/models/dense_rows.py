"""The supported dense model types, one row of data each. A row states what differs from llama."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.defaults import ConfigValues
from upcycle_cli.models.dense import FULL, SLIDING, DenseFamily, Pieces, Windows, rope_layers
from upcycle_cli.models.layers import block_types
from upcycle_cli.models.mlp import Weight, gated_linear, linear_layers, swiglu
from upcycle_cli.recipe.recipe import SHIPPED


def _lfm2_width(values: Mapping[str, Any]) -> int:
    """Return I by the rule of lfm2, which the first llama's code also has."""
    width = int(values["intermediate_size"])
    if not values["block_auto_adjust_ff_dim"]:
        return width
    width, multiple = int(2 * width / 3), int(values["block_multiple_of"])
    if values["block_ffn_dim_multiplier"] is None:
        return width
    width = int(values["block_ffn_dim_multiplier"] * width)
    return multiple * -(-width // multiple)


def _gemma4_width(values: Mapping[str, Any]) -> int:
    """Return I if all layers have the same."""
    if values.get("use_double_wide_mlp") and values["num_kv_shared_layers"]:
        words = "use_double_wide_mlp makes some MLPs twice as wide, but all experts need one size"
        raise UpcycleError(f"config.json: {words}.")
    return int(values["intermediate_size"])


def _sparse_layers(values: ConfigValues) -> Sequence[str]:
    """Return the kinds of Gemma 3n's layers: sparse MLPs drop gates by the mean of all gates."""
    count, shares = values["num_hidden_layers"], values["activation_sparsity_pattern"]
    if shares is None:
        shares = [0.95 if layer < 10 < count else 0.0 for layer in range(count)]
    if not isinstance(shares, list) or [type(share) for share in shares] != [float] * count:
        words = f"activation_sparsity_pattern must hold a share for each of {count} layers"
        raise UpcycleError(f"config.json: {words}, not {shown(shares)}.")
    return ["sparse" if share else "layer" for share in shares]


def _alike(values: ConfigValues, count: int) -> Windows:
    """All layers have the same window, or none."""
    return (values["sliding_window"],) * count


def _sliding(slides: Callable[[ConfigValues, int], bool]) -> Callable[[ConfigValues, int], Windows]:
    """Return a rule for windows: `layer_types` states which layers slide, or else `slides`."""

    def windows(values: ConfigValues, count: int) -> Windows:
        is_used = "use_sliding_window" not in values.defaults or values["use_sliding_window"]
        window = values["sliding_window"] if is_used else None
        kinds = values.config.get("layer_types")
        if kinds is None:
            return tuple(window if window and slides(values, i) else None for i in range(count))
        able = (FULL,) if window is None else (FULL, SLIDING)
        if not isinstance(kinds, list) or len(kinds) != count or any(k not in able for k in kinds):
            words = f"layer_types must hold {' or '.join(able)} for each of {count} layers"
            used = "" if window else ", since no sliding_window is in use"
            raise UpcycleError(f"config.json: {words}{used}, not {shown(kinds)}.")
        return tuple(window if kind == SLIDING else None for kind in kinds)

    return windows


def _keys(own: str) -> dict[str, str]:
    """Return a type's keys of H, of I (where null means 4·H), of heads and of layers."""
    common = "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
    return dict(zip(common, own.split(), strict=True))


def _places(layers: str, embedding: str) -> Any:  # noqa: ANN401
    root = layers.rpartition(".")[0]
    return {"layer": f"{layers}.{{layer}}.", "embedding": f"{root}.{embedding}.weight"}


_ALL_SLIDE = _sliding(lambda *_: True)
_ALL_BUT_EACH_FOURTH = _sliding(lambda _, layer: layer % 4 != 0)
_LAST_SLIDE = _sliding(lambda values, layer: layer >= values["max_window_layers"])
_WITHOUT_ROPE_SLIDE = _sliding(
    lambda values, layer: not rope_layers(values.known, values["num_hidden_layers"])[layer]
)
_BY_PATTERN = _sliding(
    lambda values, layer: (layer + 1) % values.config.get("sliding_window_pattern", 4) != 0
)

_HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
_QKV_ROWS = {f"self_attn.{part}_proj.weight": f"{n}*head_dim" for part, n in _HEADS.items()}
_QKV: Pieces = {"self_attn.qkv_proj.weight": _QKV_ROWS}
_HALVES = {f"mlp.{part}_proj.weight": "intermediate_size" for part in ("gate", "up")}
_GATE_UP_ROWS: Pieces = {"mlp.gate_up_proj.weight": _HALVES}
"""For layers that stay dense."""

_UP_DOWN = linear_layers("", "mlp.up_proj", "mlp.down_proj")
_GATE_UP = gated_linear("mlp.gate_up_proj", "mlp.down_proj")
_H_TO_4H = linear_layers("", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_C_FC = linear_layers("", "mlp.c_fc", "mlp.c_proj")
_CONV1D = linear_layers("", "mlp.c_fc", "mlp.c_proj", transposed=True)
_FC1_FC2 = linear_layers("", "mlp.fc1", "mlp.fc2")
_IN_LAYER: Any = {
    "mlp": linear_layers("", "fc1", "fc2"),
    "norm": "final_layer_norm.weight",
    "activation": "activation_function",
}
_FC_IN_OUT = linear_layers("", "mlp.fc_in", "mlp.fc_out")
_W123 = linear_layers("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
_GPT: Any = {
    **_places("transformer.h", "wte"),
    "activation": "activation_function",
    "keys": _keys("n_embd n_inner n_head n_layer"),
}
_GPT_NEO: Any = {**_GPT, "keys": _keys("hidden_size intermediate_size num_heads num_layers")}
_LFM: Any = {"mlp": _W123, "norm": "ffn_norm.weight", "layers_differ": True, "activation": None}
_FEEDFORWARD_NORM: Any = {"mlp": _UP_DOWN, "norm": "feedforward_layernorm.weight"}
_PARALLEL = "input_layernorm.weight"  # attention and MLP share a norm
_GEMMA: Any = {
    "norm": "pre_feedforward_layernorm.weight",
    "norm_offset": 1.0,
    "activation": "hidden_activation",
}
# Layers differ in heads, and in which keys they share.
_GEMMA4: Any = _GEMMA | {"norm_offset": 0.0, "width": _gemma4_width, "layers_differ": True}

_pairs = re.compile(r"(\S+) > (\S+)").findall
_EXAONE_KEYS = """
activation_function > hidden_act  layer_norm_epsilon > rms_norm_eps  num_layers > num_hidden_layers
"""
_EXAONE_NAMES = """
transformer.wte. > model.embed_tokens.  transformer.h. > model.layers.  .ln_1. > .input_layernorm.
transformer.ln_f. > model.norm.  .attn.attention. > .self_attn.  .ln_2. > .post_attention_layernorm.
.out_proj. > .o_proj.  .c_fc_0. > .gate_proj.  .c_fc_1. > .up_proj.  .c_proj. > .down_proj.
"""

_AS_LLAMA = ("cwm", "diffllama", "doge", "hyperclovax", "internlm3", "minicpm3", "ministral3")
_LIKE_LLAMA = ("ernie4_5_moe", "granitemoe", "granitemoehybrid")
_LIKE_MISTRAL = ("glm4_moe", "solar_open", *_LIKE_LLAMA)

_ROWS: Sequence[DenseFamily] = (
    DenseFamily(
        "llama", targets=("mixtral", "qwen2_moe", "glm4_moe", "solar_open", SHIPPED, *_LIKE_LLAMA)
    ),
    DenseFamily(
        "mistral", windows=_alike, targets=("mixtral", "qwen2_moe", SHIPPED, *_LIKE_MISTRAL)
    ),
    DenseFamily("qwen2", windows=_LAST_SLIDE, targets=("qwen2_moe", "glm4_moe")),
    DenseFamily(
        "qwen3", windows=_LAST_SLIDE, targets=("qwen3_moe", "glm4_moe", "dots1", "hy_v3", "mellum")
    ),
    *map(DenseFamily, _AS_LLAMA),
    DenseFamily("apertus", **_FEEDFORWARD_NORM),
    DenseFamily("apertus1p5_text", **_FEEDFORWARD_NORM),
    DenseFamily("arcee", mlp=_UP_DOWN),
    DenseFamily(
        "bamba", mlp=swiglu("feed_forward"), norm="pre_ff_layernorm.weight", layers_differ=True
    ),
    DenseFamily(
        "biogpt",
        **_IN_LAYER | _places("biogpt.layers", "embed_tokens") | {"activation": "hidden_act"},
        head="output_projection.weight",
    ),
    DenseFamily(
        "bloom",
        mlp=_H_TO_4H,
        **_places("transformer.h", "word_embeddings"),
        activation=None,
        keys=_keys("hidden_size n_inner n_head n_layer"),
        old_keys={"n_embed": "hidden_size", "num_attention_heads": "n_head"},
    ),
    DenseFamily("codegen", mlp=_FC_IN_OUT, norm="ln_1.weight", **_GPT),
    DenseFamily("cohere", norm=_PARALLEL),
    DenseFamily(
        "cohere2",
        norm=_PARALLEL,
        windows=_BY_PATTERN,
        interleaved_rope=True,
        targets=("cohere2_moe",),
    ),
    DenseFamily("cohere_compass_text", norm=_PARALLEL),
    DenseFamily("ernie4_5", interleaved_rope=True, targets=("ernie4_5_moe",)),
    DenseFamily(
        "exaone",
        mlp=linear_layers("mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"),
        norm="ln_2.weight",
        **_places("transformer.h", "wte"),
        old_keys=dict(_pairs(_EXAONE_KEYS)),
        renamed=tuple(_pairs(_EXAONE_NAMES)),
        targets=("mixtral", "glm4_moe", SHIPPED),
        has_obsolete_code=True,
    ),
    DenseFamily("exaone4", norm=None),
    DenseFamily(
        "falcon",
        mlp=_H_TO_4H,
        norm=("ln_mlp.weight", "post_attention_layernorm.weight", "input_layernorm.weight"),
        **_places("transformer.h", "word_embeddings"),
        activation="activation",
        keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
    ),
    DenseFamily("gemma", norm_offset=1.0),
    DenseFamily("gemma2", **_GEMMA),
    DenseFamily("gemma3_text", **_GEMMA),
    DenseFamily("gemma3n_text", **_GEMMA4, kinds=_sparse_layers),
    DenseFamily("gemma4_text", **_GEMMA4, targets=("gemma4_text",)),
    DenseFamily("gemma4_unified_text", **_GEMMA4),
    DenseFamily(
        "glm", mlp=_GATE_UP, pieces=_GATE_UP_ROWS, interleaved_rope=True, targets=("glm4_moe",)
    ),
    DenseFamily("glm4", mlp=_GATE_UP),
    DenseFamily("gpt2", mlp=_CONV1D, norm="ln_2.weight", **_GPT),
    DenseFamily("gpt_bigcode", mlp=_C_FC, norm="ln_2.weight", **_GPT),
    DenseFamily("gpt_neo", mlp=_C_FC, norm="ln_2.weight", **_GPT_NEO),
    DenseFamily(
        "gpt_neox",
        mlp=_H_TO_4H,
        **_places("gpt_neox.layers", "embed_in"),
        head="embed_out.weight",
        renamed=(("embed_out.", "lm_head."),),
    ),
    DenseFamily(
        "gpt_neox_japanese",
        mlp=_H_TO_4H,
        **_places("gpt_neox_japanese.layers", "embed_in"),
        head="embed_out.weight",
        keys={"intermediate_size": "intermediate_multiple_size"},
        width=lambda values: int(values["hidden_size"] * values["intermediate_size"]),
        layers_differ=True,  # the last one has attention biases
    ),
    DenseFamily("gptj", mlp=_FC_IN_OUT, norm="ln_1.weight", **_GPT),
    DenseFamily("granite", targets=("granitemoe", "granitemoehybrid")),
    DenseFamily("granite_swa", windows=_ALL_BUT_EACH_FOURTH, targets=("granitemoe_swa",)),
    DenseFamily(
        "granitemoehybrid",
        can_ship_code=False,
        mlp=gated_linear("shared_mlp.input_linear", "shared_mlp.output_linear"),
        keys={"intermediate_size": "shared_intermediate_size"},
        layers_differ=True,
        targets=("granitemoehybrid",),
    ),
    DenseFamily(
        "helium", interleaved_rope=True, targets=(SHIPPED, "mixtral", "glm4_moe", "ernie4_5_moe")
    ),
    DenseFamily("hunyuan_v1_dense", targets=("hunyuan_v1_moe",)),
    DenseFamily("iquestcoder", targets=("mixtral", "qwen2_moe", "glm4_moe", SHIPPED, *_LIKE_LLAMA)),
    DenseFamily("jais2", mlp=_UP_DOWN),
    DenseFamily(
        "lfm2",
        **_LFM,
        old_keys={"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"},
        width=_lfm2_width,
        targets=("lfm2_moe",),
    ),
    DenseFamily("lfm3", **_LFM, renamed=((".self_attn.gate_proj.", ".self_attn.g_proj."),)),
    DenseFamily(
        "ministral", windows=_ALL_SLIDE, targets=("qwen2_moe", SHIPPED, "mixtral", *_LIKE_MISTRAL)
    ),
    DenseFamily(
        "modernbert-decoder",
        mlp=(
            *gated_linear("mlp.Wi", "mlp.Wo"),
            Weight("mlp.Wi.bias", ("gate_bias", "up_bias"), 0),
            Weight("mlp.Wo.bias", ("down_bias",), None),
        ),
        norm="mlp_norm.weight",
        embedding="model.embeddings.tok_embeddings.weight",
        head="decoder.weight",
        activation="hidden_activation",
        layers_differ=True,  # the first one has no norm before attention
    ),
    DenseFamily(
        "mpt",
        mlp=linear_layers("", "ffn.up_proj", "ffn.down_proj"),
        norm="norm_2.weight",
        **_places("transformer.blocks", "wte"),
        activation=None,
        keys=_keys("d_model n_inner n_heads n_layers"),
        has_obsolete_code=True,
    ),
    DenseFamily("nanochat", mlp=_FC1_FC2, norm=None),
    DenseFamily("olmo", norm=None),
    DenseFamily("olmo2", norm=None, targets=("flex_olmo",)),
    DenseFamily("olmo3", norm=None),
    DenseFamily(
        "openai-gpt",
        mlp=_CONV1D,
        norm="ln_1.weight",
        **_GPT | {"embedding": "transformer.tokens_embed.weight", "activation": "afn"},
    ),
    DenseFamily(
        "opt",
        **_IN_LAYER | _places("model.decoder.layers", "embed_tokens"),
        keys={"intermediate_size": "ffn_dim"},
    ),
    DenseFamily("persimmon", mlp=_H_TO_4H),
    DenseFamily("phi", mlp=_FC1_FC2, norm=_PARALLEL),
    DenseFamily(
        "phi3",
        mlp=_GATE_UP,
        windows=_alike,
        pieces={**_QKV, **_GATE_UP_ROWS},
        targets=("mixtral", SHIPPED, "glm4_moe", "ernie4_5_moe"),
    ),
    DenseFamily("qwen3_5_text", norm_offset=1.0, layers_differ=True, targets=("qwen3_5_moe_text",)),
    DenseFamily(
        "recurrent_gemma",
        mlp=swiglu("mlp_block"),
        **_GEMMA | {"norm": "channel_pre_norm.weight"},
        width=lambda values: int(values["intermediate_size"]) // 2,
        layers_differ=True,
    ),
    DenseFamily("seed_oss", targets=("qwen2_moe", SHIPPED, "glm4_moe")),
    DenseFamily("smollm3", windows=_WITHOUT_ROPE_SLIDE, targets=(SHIPPED, "granitemoe_swa")),
    DenseFamily("stablelm", norm=("post_attention_layernorm.weight", "input_layernorm.weight")),
    DenseFamily("starcoder2", mlp=_C_FC),
    DenseFamily("vaultgemma", **_GEMMA),
    DenseFamily("xglm", **_IN_LAYER, keys=_keys("d_model ffn_dim attention_heads num_layers")),
    DenseFamily("youtu", targets=("deepseek_v3",)),
    DenseFamily("nemotron", mlp=_UP_DOWN, norm_offset=1.0),
    DenseFamily(
        "nemotron_h",
        can_ship_code=False,
        mlp=linear_layers("", "mixer.up_proj", "mixer.down_proj"),
        norm="norm.weight",
        **_places("backbone.layers", "embeddings"),
        activation="mlp_hidden_act",
        kinds=lambda values: block_types(values.config),
        mlp_layer="mlp",
        targets=("nemotron_h",),
        has_obsolete_code=True,
    ),
)
DENSE: Mapping[str, DenseFamily] = {row.model_type: row for row in _ROWS}
_TEXT_ROWS: Sequence[DenseFamily] = (
    *(DenseFamily(name, mlp=_GATE_UP) for name in ("glm4v_text", "glm_ocr_text")),
    DenseFamily("granite4_vision_text", has_obsolete_code=True),
    *map(DenseFamily, ("granite_docling_text", "hunyuan_vl_text")),
    DenseFamily("muse_glimmer_text", **_GEMMA),
    DenseFamily("paddleocr_vl_text", has_obsolete_code=True),
    *(DenseFamily(name, windows=_LAST_SLIDE) for name in ("qwen2_vl_text", "qwen2_5_vl_text")),
    DenseFamily("qwen3_vl_text", targets=("qwen3_vl_moe_text",)),
)
"""Text models that exist only inside wrappers."""
TEXTS: Mapping[str, DenseFamily] = {row.model_type: row for row in (*_ROWS, *_TEXT_ROWS)}
"""The text models that wrappers may hold."""
