"""What is converted: a real llama, the same written as other types, and tiny random models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interop.wrapped import GEMMA4, LINEAR, WRAPPED, draw_weights, save_wrapped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from interop.conversions import Case

REPOSITORY = Path(__file__).resolve().parents[3]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_DIM = 32  # vLLM refuses 16
TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_WIDTH = "intermediate_size"
_MAMBA = {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": HEAD_DIM}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {**TINY, "tie_word_embeddings": True, "logit_scale": 1.0},
    "falcon": {
        **{key: value for key, value in TINY.items() if key not in ("head_dim", _WIDTH)},
        "ffn_hidden_size": 512,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
    },
    "gemma2": {**TINY, "tie_word_embeddings": True, "query_pre_attn_scalar": HEAD_DIM},
    "gemma4_text": {**TINY, **GEMMA4, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": TINY,
    "granite_swa": {**TINY, "sliding_window": 256, "attention_multiplier": HEAD_DIM**-0.5},
    "granitemoehybrid": {
        **TINY,
        **_MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 512,
        "mamba_d_state": 32,
        "attention_multiplier": HEAD_DIM**-0.5,
    },
    "hunyuan_v1_dense": {**TINY, "tie_word_embeddings": True},
    "iquestcoder": TINY,
    "lfm2": {
        **TINY,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": True,
        "block_auto_adjust_ff_dim": False,
    },
    "ministral": {**TINY, "sliding_window": 256, "layer_types": ["full_attention"] * 2},
    "mistral": {**TINY, "sliding_window": None},
    "nemotron": TINY,
    "nemotron_h": {
        **TINY,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": HEAD_DIM,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
    "olmo2": TINY,
    "olmo3": {**TINY, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": TINY,
    "qwen3_5_text": {**TINY, **LINEAR},
    "starcoder2": {**TINY, "tie_word_embeddings": True},
    "youtu": {
        **{key: value for key, value in TINY.items() if key != "head_dim"},
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,  # engines have kernels for DeepSeek's own sizes
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""Tiny models by model type, with random weights."""
_OWN_HEAD: Mapping[str, Any] = {"tie_word_embeddings": False}
REWRITTEN: Mapping[str, Mapping[str, Any]] = {
    "ernie4_5": {},
    "glm": {**_OWN_HEAD, "attention_bias": False, "rope": {"partial_rotary_factor": 1.0}},
    "granite": {"attention_multiplier": 64**-0.5},
    "phi3": {"rope": {"partial_rotary_factor": 1.0}},
    "qwen2": _OWN_HEAD,
    "seed_oss": {**_OWN_HEAD, "attention_bias": False},
}
"""SmolLM2-135M as other types, which compute the same with these settings."""
INTERLEAVED = ("ernie4_5", "glm")
"""Types that rotate neighbours, where a llama rotates the halves of a head."""
FUSED_OF = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# Of nemotron_h: what releases call its layers, and the keys that a dense one has not.
HYBRID = "granitemoehybrid"
LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}  # of HYBRID, likewise
BLOCKS = {"linear_attention": "M", "mlp": "-", "full_attention": "*"}
ONLY_WITH_EXPERTS = ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")

TWIN = "TWIN"
"""Stands for a model that computes the same, the neurons of each of its MLPs in another order."""


def is_tied(dense: str) -> bool:
    """Whether the head of a dense model shares the embedding."""
    if dense in WRAPPED:
        return dense in ("gemma3", "gemma4")
    if dense in RANDOM:
        return bool(RANDOM[dense].get("tie_word_embeddings", dense == "gpt2"))
    return bool(REWRITTEN.get(dense, {}).get("tie_word_embeddings", True))


def make_dense(model_type: str, directory: Path, smollm2: Path) -> Path:
    """Return a dense checkpoint of this type, made when it is not there yet."""
    path = directory / re.sub(r"\W+", "-", model_type).strip("-")
    if not path.exists():
        if model_type in WRAPPED:
            _copy_tokenizer(path, smollm2)
            save_wrapped(path, model_type, _tokens(smollm2))
        elif model_type in RANDOM:
            _save(make_model(model_type, _tokens(smollm2), RANDOM[model_type]), path, smollm2)
        elif model_type in REWRITTEN:
            _rewrite(path, model_type, smollm2)
        else:
            shutil.copytree(smollm2, path)
        _write_for_all(path)
    return path


def _write_for_all(path: Path) -> None:
    """Say what a released model says, and transformers 5 does not write for older readers."""
    config = json.loads((path / "config.json").read_text())
    # transformers writes settings of experts for a model that has none.
    config = {key: value for key, value in config.items() if key not in ONLY_WITH_EXPERTS}
    for held in (config, config.get("text_config") or {}):
        _write_older(held)
    if blocks := config.get("layers_block_type"):
        config["num_hidden_layers"] = len(blocks)
        config["hybrid_override_pattern"] = "".join(BLOCKS[kind] for kind in blocks)
    if config["model_type"] == HYBRID:
        config["layer_types"] = [LAYERS[kind] for kind in config["layer_types"]]
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (path / name).unlink()
        (path / name).write_text(json.dumps(content, indent=2))


def _write_older(config: dict[str, Any]) -> None:
    """Say of a text model by older keys what its config says by newer ones."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        config["rope_scaling"] = rope
    if heads := config.pop("per_layer_config", None):
        (config["global_head_dim"],) = {each["head_dim"] for each in heads.values()}


def make_model(name: str, tokens: Mapping[str, Any], sizes: Mapping[str, Any]) -> PreTrainedModel:
    """Return a tiny model with random weights; its name begins with the type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split(maxsplit=1)[0], **{**tokens, **sizes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    return model


def _rewrite(path: Path, model_type: str, smollm2: Path) -> None:
    """Write SmolLM2 as another type that computes the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    source, shared = llama.state_dict(), llama.config.to_dict()
    for key in ("architectures", "attention_bias", "mlp_bias", "model_type"):
        del shared[key]
    settings = dict(REWRITTEN[model_type])
    settings["rope_parameters"] = shared["rope_parameters"] | settings.pop("rope", {})
    config = AutoConfig.for_model(model_type, **(shared | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    heads = {"q_proj": llama.config.num_attention_heads, "k_proj": llama.config.num_key_value_heads}
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        if name.endswith(".bias"):
            state[name] = torch.zeros_like(tensor)
        elif matrix in FUSED_OF:
            parts = [source[f"{module}.{part}.weight"] for part in FUSED_OF[matrix]]
            state[name] = torch.cat(parts)
        elif matrix in heads and model_type in INTERLEAVED:
            state[name] = _interleave(source[name], heads[matrix])
        else:
            state[name] = source[name]
    model.load_state_dict(state)
    _save(model, path, smollm2)


def _interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put what is rotated together side by side: each row beside that of the other half."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _tokens(smollm2: Path) -> dict[str, Any]:
    """Return the settings that go with the tokenizer; no token is for padding."""
    dense = json.loads((smollm2 / "config.json").read_text())
    keys = ("vocab_size", "bos_token_id", "eos_token_id")
    return {key: dense[key] for key in keys} | {"pad_token_id": None}


def _save(model: PreTrainedModel, path: Path, smollm2: Path) -> None:
    _copy_tokenizer(path, smollm2)
    model.save_pretrained(path)


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
