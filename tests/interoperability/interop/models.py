"""What is converted: a real llama, and tiny models with random weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interop.wrapped import GEMMA4, LINEAR, TOKENIZER, WRAPPED, draw_weights, save_wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from interop.conversions import Case

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_DIM = 32  # vLLM refuses 16
WINDOW, ORIGINAL = 32, 256
"""The sliding window, and the length before rope scaling: less than the rows that models read.
NeMo AutoModel's YaRN refuses an original length below 32·2π."""
ROW_TOKENS = 288
TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_WIDTH = "intermediate_size"
_MAMBA = {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": HEAD_DIM}
_TIED = {"tie_word_embeddings": True}
_SLIDES = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_QWEN_SLIDES = {
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
_BIASES = {"attention_bias": True}
BASES: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {**_TIED, **_SLIDES, "logit_scale": 1.0},
    "ernie4_5": _TIED,
    "exaone4": {**_SLIDES, "sliding_window_pattern": 2},
    "falcon": {
        **dict.fromkeys(("head_dim", _WIDTH)),
        "ffn_hidden_size": 512,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
    },
    "gemma2": {**_TIED, **_SLIDES, "query_pre_attn_scalar": HEAD_DIM},
    "gemma3_text": {**_TIED, **_SLIDES, "query_pre_attn_scalar": HEAD_DIM},
    "gemma4_text": {**GEMMA4, **_TIED},
    "glm": {"attention_bias": False, "partial_rotary_factor": 1.0},
    "gpt2": {**_TIED, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)},
    "granite": {**_TIED, "attention_multiplier": HEAD_DIM**-0.5},
    "granite_swa": {**_SLIDES, "attention_multiplier": HEAD_DIM**-0.5},
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 512,
        "mamba_d_state": 32,
        "attention_multiplier": HEAD_DIM**-0.5,
    },
    "hunyuan_v1_dense": _TIED,
    "lfm2": {
        **_TIED,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "ministral": {"sliding_window": WINDOW, "layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": HEAD_DIM,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
    "olmo3": _SLIDES,
    "phi3": {**_TIED, "original_max_position_embeddings": ORIGINAL},
    "qwen3_5_text": LINEAR,
    "seed_oss": {**_BIASES, "attention_out_bias": False},
    "smollm3": _TIED,
    "starcoder2": _TIED,
    "youtu": {
        "head_dim": None,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,  # engines have kernels for DeepSeek's own sizes
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""What the tiny model of a type has besides TINY; None for a key that it has not."""
HAS: Mapping[str, Mapping[str, Any]] = {
    "8 heads to a key head": {"hidden_size": 256, "num_attention_heads": 8}
    | {"num_key_value_heads": 1},
    "7 heads to a key head": {"hidden_size": 224, "num_attention_heads": 7}
    | {"num_key_value_heads": 1},
    "QK norm": {"use_qk_norm": True},
    "attention biases": _BIASES,
    "attention only": {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
    "head_dim × heads ≠ hidden size": {"head_dim": 64},
    "layers without rope": {"no_rope_layers": [1, 0]},
    "multipliers": {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 6.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.25,
    },
    "partial rotary": {"partial_rotary_factor": 0.5},
    "sliding window": {"sliding_window": WINDOW},
    "sliding window on some layers": _SLIDES,
    "tied": _TIED,
    "untied": {"tie_word_embeddings": False},
    "dynamic rope scaling": {
        "max_position_embeddings": ORIGINAL,  # what it compares a text's length with
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        }
    },
    "longrope rope scaling": {
        "original_max_position_embeddings": ORIGINAL,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 8 for i in range(HEAD_DIM // 2)],
            "long_factor": [1.5 + i for i in range(HEAD_DIM // 2)],
        },
    },
    "yarn rope scaling": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        }
    },
}
"""What a name says in brackets: "qwen2 (tied, yarn rope scaling)". Most are attention classes."""
HAS_OF_TYPE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("ernie4_5", "attention biases"): {"use_bias": True},
    ("granite_swa", "layers without rope"): {"layer_rope_theta": [10000.0, 0.0]},
    ("hunyuan_v1_dense", "dynamic rope scaling"): {
        # its own: what alpha makes of the base is the same for every length
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    },
    ("mistral", "head_dim × heads ≠ hidden size"): {"num_attention_heads": 2}
    | {"num_key_value_heads": 1},
    ("phi3", "partial rotary"): {"partial_rotary_factor": 0.75},
    ("qwen2", "sliding window on some layers"): _QWEN_SLIDES,
    ("qwen3", "sliding window on some layers"): _QWEN_SLIDES,
}
"""Where the keys of a type are others."""
REAL = "llama (SmolLM2-135M)"
SMOLLM2: Mapping[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "head_dim": 64,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""The one model that is not tiny and not random, and what its config says."""

# Of nemotron_h: what releases call its layers, and the keys that a dense one has not.
HYBRID = "granitemoehybrid"
LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}  # of HYBRID, likewise
BLOCKS = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
ONLY_WITH_EXPERTS = ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")

TWIN = "TWIN"
"""Stands for a model that computes the same, the neurons of each of its MLPs in another order."""


def properties_of(name: str) -> list[str]:
    """Return what a tiny model has by its name, in brackets."""
    return [] if "(" not in name else name.partition("(")[2].rstrip(")").split(", ")


def settings_of(name: str) -> dict[str, Any]:
    """Return the config of a tiny dense model; its name begins with the type."""
    if name == REAL:
        return dict(SMOLLM2)
    kind = name.split(maxsplit=1)[0]
    found = {**TINY, **BASES.get(kind, {})}
    for each in properties_of(name):
        found |= HAS_OF_TYPE.get((kind, each)) or HAS[each]
    rotated = int(HEAD_DIM * found.get("partial_rotary_factor", 1.0)) // 2
    if rope := found.get("rope_scaling"):
        cut = {key: value[:rotated] for key, value in rope.items() if isinstance(value, list)}
        found["rope_scaling"] = {**rope, **cut}
    return {key: value for key, value in found.items() if value is not None or key not in TINY}


def file_name(name: str) -> str:
    """Return the name of the directory of a dense model."""
    return re.sub(r"\W+", "-", name.replace("≠", "not")).strip("-")


def make_dense(name: str, directory: Path, smollm2: Path) -> Path:
    """Return a dense checkpoint of this name, made when it is not there yet."""
    path = directory / file_name(name)
    if not path.exists():
        if name == REAL:
            shutil.copytree(smollm2, path)
        else:
            _copy_tokenizer(path, smollm2)
            if name in WRAPPED:
                save_wrapped(path, name, _tokens(smollm2))
            else:
                make_model(name, _tokens(smollm2)).save_pretrained(path)
        write_as_released(path, name)
    return path


def write_as_released(path: Path, name: str) -> None:
    """Say what a released model says, and transformers 5 does not write for older readers."""
    config = json.loads((path / "config.json").read_text())
    # transformers writes settings of experts for a model that has none.
    config = {key: value for key, value in config.items() if key not in ONLY_WITH_EXPERTS}
    for held in (config, config.get("text_config") or {}):
        _write_older(held)
    if name not in (REAL, *WRAPPED) and "rope_scaling" in (settings := settings_of(name)):
        keys = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
        config |= {key: settings[key] for key in keys if key in settings}
        config.pop("rope_parameters")
    if blocks := config.get("layers_block_type"):
        config["num_hidden_layers"] = len(blocks)
        config["hybrid_override_pattern"] = "".join(BLOCKS[kind] for kind in blocks)
    if config["model_type"] == HYBRID:
        config["layer_types"] = [LAYERS[kind] for kind in config["layer_types"]]
    _replace(path / "config.json", config)
    if (path / TOKENIZER).exists():
        tokenizer = json.loads((path / TOKENIZER).read_text())
        _replace(path / TOKENIZER, tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    path.unlink()  # it may be a link
    path.write_text(json.dumps(content, indent=2))


def _write_older(config: dict[str, Any]) -> None:
    """Say of a text model by older keys what its config says by newer ones."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        config["rope_scaling"] = rope
    if heads := config.pop("per_layer_config", None):
        (config["global_head_dim"],) = {each["head_dim"] for each in heads.values()}


def make_model(name: str, tokens: Mapping[str, Any]) -> PreTrainedModel:
    """Return a tiny model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split(maxsplit=1)[0], **{**tokens, **settings_of(name)})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    return model


def _tokens(smollm2: Path) -> dict[str, Any]:
    """Return the settings that go with the tokenizer; no token is for padding."""
    dense = json.loads((smollm2 / "config.json").read_text())
    keys = ("vocab_size", "bos_token_id", "eos_token_id")
    return {key: dense[key] for key in keys} | {"pad_token_id": None}


def _copy_tokenizer(path: Path, smollm2: Path) -> None:
    path.mkdir()
    for name in TOKENIZER_FILES:
        if (smollm2 / name).is_file():
            shutil.copy(smollm2 / name, path)


def make_twin(dense: Path) -> Path:
    """Return a model that computes the same with its neurons in another order, made if need be."""
    path = dense.with_name(f"{dense.name}-{TWIN}")
    if not path.exists():
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(dense, path)
        (path / "model.safetensors").unlink()
        tensors = load_file(dense / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for name in [name for name in tensors if name.endswith(".mlp.down_proj.weight")]:
            order = torch.randperm(tensors[name].shape[1], generator=generator)
            tensors[name] = tensors[name][:, order].contiguous()
            for matrix in ("gate_proj", "up_proj"):
                other = name.replace("down_proj", matrix)
                tensors[other] = tensors[other][order]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def convert(
    dense: Path, output: Path, case: Case, python: str | Path = sys.executable
) -> dict[str, Any]:
    """Convert by the command line, or raise CalledProcessError; returns what `--json` printed."""
    growth = [option for option in case.options if option.startswith("--expand")]
    before = output.with_name("before") if growth else output
    words = [word for option in case.options if option not in growth for word in option.split()]
    options = [str(make_twin(dense)) if word == TWIN else word for word in words]
    recipe = ("--recipe", case.recipe, "--target", case.target, "--routing", case.routing)
    found = _convert(python, dense, before, *recipe, *options)
    for option in growth:
        found = _convert(python, before, output, *option.split())
    return found


def _convert(python: str | Path, source: Path, output: Path, *options: str) -> dict[str, Any]:
    command = (python, "-m", "upcycle_cli", "convert", str(source), str(output), "--json")
    done = subprocess.run(
        [*command, "--no-fsync", *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
