"""Lists the language models of the installed transformers that nobody has looked at.

    python tests/find_families.py [TYPE ...]

prints each model type that has no row, no reason in knowledge/refused.json and no place in OTHERS;
and a row for each model type around a text model that has a row. For a TYPE it prints the classes
and the tensors of a tiny model, from which you write its row: see docs/contributing/families.md.
"""

from __future__ import annotations

import sys

import torch
import transformers
from conftest import sizes_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from upcycle_cli.models.dense_rows import DENSE, TEXTS
from upcycle_cli.models.lookup import REFUSED
from upcycle_cli.models.wrappers import WRAPPERS

MIXTURES = """
afmoe aria_text axk1 axk2 bailing_hybrid cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe
glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3
hy_v4 inkling2_loop_text inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna
lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2
minimax_m3_vl_text mixtral olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe
qwen3_next qwen4_exp qwen4_exp_text sarvam_mla sarvam_moe solar_open zaya
"""
ENCODERS = """
bart beam bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert
data2vec-text electra ernie lara_mini marian mbart megatron-bert moshi musicgen musicgen_melody
mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer whisper
xlm-roberta xlm-roberta-xl xmod
"""
"""Encoders that can be configured as decoders, and decoders of an encoder."""
AROUND_OTHERS = """
blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git
got_ocr2 gpt-sw3 mllama moss_transcribe_diarize phi4_multimodal qwen3_5
"""
"""Models around a text model of another type, and other names of a type."""
OTHERS = {*f"{MIXTURES} {ENCODERS} {AROUND_OTHERS}".split()}


def unknown() -> set[str]:
    """Return the causal language models that are in no table."""
    return {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*DENSE, *REFUSED, *OTHERS}


def unknown_wrappers() -> set[str]:
    """Return the models around a text model of `TEXTS` that have no row."""
    around = {
        name
        for name in {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*WRAPPERS} - {*REFUSED}
        if "text_config" in getattr(CONFIG_MAPPING[name], "sub_configs", {})
    }
    return {name for name in around if CONFIG_MAPPING[name]().text_config.model_type in TEXTS}


def wrapper_row(model_type: str) -> str:
    """Return the row of a wrapper, by the names that transformers has in memory and writes."""
    config = CONFIG_MAPPING[model_type]()
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ImportError, TypeError, ValueError) as error:
        return f"{model_type}: its default config makes no model: {str(error).strip()[:80]!r}"
    state = model.state_dict()
    written = {id(tensor): name for name, tensor in revert_weight_conversion(model, state).items()}
    pairs = {(written.get(id(tensor), "?"), name) for name, tensor in state.items()}
    moved = dict.fromkeys(_beginnings(*pair) for pair in sorted(pairs) if pair[0] != pair[1])
    parts = model.base_model.named_children()
    text = next(n for n, each in parts if getattr(each, "config", None) is config.text_config)
    settings = [f'"{model_type}", ("{config.text_config.model_type}",)']
    settings += [f"names=({tuple(moved)},)"] if moved else []
    settings += [] if text == "language_model" else [f'text="{text}"']
    changed = CONFIG_MAPPING[model_type](text_config={"tie_word_embeddings": True})
    ties = [getattr(each, "tie_word_embeddings", False) for each in (config, changed)]
    return f"Wrapper({', '.join([*settings, *['ties_by_text=True'] * (ties == [False, True])])}),"


def _beginnings(written: str, loaded: str) -> tuple[str, str]:
    """Return how two names of a tensor begin, up to the part in which they are the same."""
    old, new = written.split("."), loaded.split(".")
    while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return f"{'.'.join(old)}.", f"{'.'.join(new)}."


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    for model_type in sys.argv[1:]:
        print(f"{model_type}: {REFUSED.get(model_type, 'no reason against it is known')}")
        with torch.device("meta"):
            config = CONFIG_MAPPING[model_type](**sizes_of(model_type))
            model = AutoModelForCausalLM.from_config(config)
        print(*(type(each).__name__ for each in (config, model.base_model, model)))
        for name, tensor in model.state_dict().items():
            print(f"    {name} {tuple(tensor.shape)}")
    if not sys.argv[1:]:
        print(*sorted(unknown()), *map(wrapper_row, sorted(unknown_wrappers())), sep="\n")


if __name__ == "__main__":
    main()
