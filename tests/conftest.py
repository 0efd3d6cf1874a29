"""Tiny dense checkpoints, made by transformers itself, and what tests ask of a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from engine_fixtures import contents as contents  # noqa: PLC0414 - tests import it from here
from hub.server import TOKEN, Hub
from hypothesis import settings
from shapes import save_tokenizer

from upcycle_cli.recipe.recipe import ExpertLayout

pytest_plugins = ("refusals", "verified")

# Before the first import of transformers: nothing here may look for a network, nor draw bars.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# For models this small threads only wait for one another, and for whatever else is running.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and in the processes that tests start

# CI tries the same examples each time, so that it fails for what a change did; a person's runs try
# new ones. No deadline: a busy machine is no failure.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each worker begin with its share of the long tests, so that none is left for the end."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    total = len(items)
    items.clear()
    for worker in range(workers):
        share = long[worker::workers]
        row = (total - len(items)) // (workers - worker) - len(share)  # as xdist divides
        items += share + others[:row]
        del others[:row]


LAYOUTS = (ExpertLayout.PER_EXPERT, ExpertLayout.FUSED)
"""What mixtral and most other targets have."""
VOCAB_SIZE = 260  # a token per byte, and a few of special meaning

TINY: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "mistral": TINY,
    "qwen2": TINY,
    # qwen3 does not derive head_dim from the other sizes.
    "qwen3": {**TINY, "head_dim": 16},
    "granite": {**TINY, "attention_multiplier": 0.35, "residual_multiplier": 0.7},
    "olmo2": {**TINY, "eos_token_id": 2},  # its own default is beyond the vocabulary
    "nemotron": TINY,
    "nemotron_h": {
        **{key: value for key, value in TINY.items() if key != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
    },
}

_LATENT: Mapping[str, Any] = {
    **TINY,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_LONG: Mapping[str, Any] = {**TINY, "head_dim": 8, "max_position_embeddings": 1 << 18}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "apertus": _LONG,
    "apertus1p5_text": _LONG,
    "bamba": {
        **TINY,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "cwm": _LONG,  # whose rotary embeddings are stretched unless a config says otherwise
    "ministral3": _LONG,
    "cohere_compass_text": {
        **TINY,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 99.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
        },
    },
    "codegen": {**TINY, "rotary_dim": 4},
    "falcon": TINY,
    "gemma3n_text": {
        **TINY,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "head_dim": 8,
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **TINY,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 12,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "gemma4_unified_text": {
        **TINY,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 16,
    },
    "gpt_neo": {**TINY, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {**TINY, "rotary_dim": 4},
    "granitemoehybrid": {
        **TINY,
        "shared_intermediate_size": 48,
        "intermediate_size": 11,  # which no dense model reads
        "num_local_experts": 0,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
        "residual_multiplier": 0.7,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
    },
    "lfm2": {
        **TINY,
        "intermediate_size": 72,  # of which two thirds are wide
        "block_multiple_of": 16,
        "layer_types": ["conv", "full_attention"],
    },
    "lfm3": {
        **TINY,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "minicpm3": _LATENT,
    "ministral": {**TINY, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "modernbert-decoder": {**TINY, "cls_token_id": 0, "sep_token_id": 0},
    "qwen3_5_text": {
        **TINY,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {**TINY, "num_hidden_layers": 3, "lru_width": 32},
    "youtu": _LATENT,
}
"""Of types that are tried once, those that need other sizes than the usual."""

OWN_TOKENIZERS = {"qwen2": "Qwen2Tokenizer", "qwen3_5_text": "Qwen3_5Tokenizer"}
"""What transformers makes of any tokenizer beside such a model, or its MoE, so it must be one."""
PADDED = ("modernbert-decoder",)
"""Types whose config must have a token for padding."""


def sizes_of(model_type: str) -> dict[str, Any]:
    """The sizes of a tiny model of a type; those that are not in `SIZES` have what tokens need."""
    if model_type in SIZES:
        return dict(SIZES[model_type])
    from transformers import CONFIG_MAPPING

    sizes = dict(SPECIAL.get(model_type, TINY))
    usual = CONFIG_MAPPING[model_type]()
    if model_type not in SPECIAL and hasattr(usual, "head_dim"):
        sizes["head_dim"] = 8
    if getattr(usual, "sliding_window", None):
        sizes["sliding_window"] = 8  # texts here are longer
    # The usual ones of many a type are beyond this vocabulary.
    # Without one for padding, since some classes load no row for it.
    padding = 0 if model_type in PADDED else None
    return sizes | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": padding}


REMOVED: object = ...  # with the same repr in every worker of pytest
"""As a value for `clone`: the key is taken out of config.json."""


class MakeDense:
    """Makes a checkpoint with random weights, once per set of arguments."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._made: dict[str, Path] = {}

    def __call__(
        self,
        model_type: str,
        *,
        dtype: str = "float32",
        max_shard_size: str = "1GB",
        minimal: bool = False,
        seed: int = 0,
        **config: Any,  # noqa: ANN401 - JSON values
    ) -> Path:
        chosen = [model_type, dtype, max_shard_size, minimal, seed, config]
        key = json.dumps(chosen, sort_keys=True)
        if key not in self._made:
            path = self._factory.mktemp(model_type) / "dense"
            sizes = {**sizes_of(model_type), **config}
            _save_model(path, model_type, sizes, dtype, max_shard_size, seed)
            save_companions(path)
            if model_type in OWN_TOKENIZERS:
                import transformers

                tokenizer = getattr(transformers, OWN_TOKENIZERS[model_type])
                tokenizer.from_pretrained(path).save_pretrained(path)
            if minimal:
                write_minimal_config(path)
            self._made[key] = path
        return self._made[key]


@pytest.fixture(scope="session")
def make_dense(tmp_path_factory: pytest.TempPathFactory) -> MakeDense:
    return MakeDense(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Spare tests what takes most of their time, and what none of them is about.

    The command line, which runs in a process of its own, is left as it is.
    """
    from transformers.utils import logging as transformers_logging

    # Else it is set and set back thousands of times, each of them a walk over all loggers.
    transformers_logging.set_verbosity(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        # transformers copies code that a model ships to a folder that all workers would share.
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        # Of what is written here nothing has to survive a loss of power.
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def llama(make_dense: MakeDense) -> Path:
    """The dense checkpoint for tests that do not care which it is. Read only: it is shared."""
    return make_dense("llama")


@pytest.fixture(scope="session")
def e2g2t2(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama converted to a mixtral of 4 experts, 2 active. Read only: it is shared."""
    from upcycle_cli import Recipe, convert

    path = tmp_path_factory.mktemp("e2g2t2") / "moe"
    return convert(llama, path, Recipe("E2G2T2")).output


def _save_model(
    path: Path,
    model_type: str,
    config: Mapping[str, Any],
    dtype: str,
    max_shard_size: str,
    seed: int,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator).to(torch_dtype)
    # Other buffers (rotary frequencies) stay as they are: they are not saved.
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.data = random_weight(name, buffer.shape, generator)
    model.config.dtype = torch_dtype
    model.save_pretrained(path, max_shard_size=max_shard_size)


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights large enough for every part of the model to matter to its logits."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * noise.clamp(-2, 2)
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed" in name:
        return noise
    # Unit gain would be 1/√32 = 0.18; more of it on q and k makes attention choose.
    return (0.4 if "q_proj" in name or "k_proj" in name else 0.2) * noise


def save_companions(path: Path) -> None:
    from transformers import GenerationConfig

    save_tokenizer(path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(path)
    (path / "LICENSE").write_text("Do as you like.\n")
    (path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- fr\ntags:\n- tiny\n---\n\n# Tiny\n"
    )


def write_minimal_config(path: Path) -> None:
    """Leave out of config.json what the model type implies, as many released models do."""
    from transformers import AutoConfig

    config = read_json(path / "config.json")
    defaults = type(AutoConfig.for_model(config["model_type"]))().to_dict()
    minimal = {
        key: value
        for key, value in config.items()
        if key in ("model_type", "architectures") or value != defaults.get(key)
    }
    num_heads = minimal.get("num_attention_heads", defaults["num_attention_heads"])
    hidden_size = minimal.get("hidden_size", defaults["hidden_size"])
    own = (
        *("qwen3", "nemotron_h", "iquestcoder", "seed_oss", "ministral", "glm"),
        *("ernie4_5", "hunyuan_v1_dense", "cohere2", "qwen3_5_text", "gemma4_text", "helium"),
        *("gemma4_unified_text", "gemma3n_text"),
    )
    derives = config["model_type"] not in own
    derived = minimal.get("qk_rope_head_dim", hidden_size // num_heads)
    if minimal.get("head_dim") == derived and derives:
        del minimal["head_dim"]
    # llama alone takes an absent number of KV heads for the number of heads.
    if minimal.get("num_key_value_heads") == num_heads and config["model_type"] == "llama":
        del minimal["num_key_value_heads"]
    full = set(minimal.get("layer_types", ["full_attention"])) == {"full_attention"}
    if full and "sliding_window" not in minimal:
        minimal.pop("layer_types", None)
    write_json(path / "config.json", minimal)


def clone(source: Path, target: Path, **changes: Any) -> Path:  # noqa: ANN401
    """Copy a checkpoint, so that a test may spoil it, with `changes` to its config.json."""
    shutil.copytree(source, target)
    if changes:
        config = read_json(target / "config.json") | changes
        kept = {key: value for key, value in config.items() if value is not REMOVED}
        write_json(target / "config.json", kept)
    return target


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by safetensors' own code."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def logits(path: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Run a checkpoint by transformers, which must load all of it and have no complaint."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers")
    # warning_once stays silent about what an earlier model was already warned of.
    logger.warning_once.cache_clear()
    collect = BufferingHandler(1000)
    logger.addHandler(collect)
    transformers_logging.set_verbosity(logging.WARNING)
    try:
        # The experts' other implementations do not know float64.
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            experts_implementation="eager",
            trust_remote_code="auto_map" in read_json(path / "config.json"),
        )
        with torch.no_grad():
            result: torch.Tensor = model.eval()(ids).logits
    finally:
        transformers_logging.set_verbosity(logging.CRITICAL)
        logger.removeHandler(collect)
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems
    # A CUDA kernel of xIELU's and Mamba's implementation are no trouble with a model.
    harmless = ("xIELU", "falling back to its reference PyTorch implementation")
    messages = (record.getMessage() for record in collect.buffer)
    assert not [text for text in messages if not any(words in text for words in harmless)]
    return result


def random_ids(length: int = 24, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCAB_SIZE - 2, (rows, length), generator=generator)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two logit tensors, relative to their scale."""
    return float((one - other).abs().max() / other.std())


def snapshot(path: Path) -> dict[str, tuple[str, int]]:
    """Every file below a directory with the digest of its bytes and its modification time."""
    found = contents(path)
    return {name: (digest, (path / name).lstat().st_mtime_ns) for name, digest in found.items()}


def others(directory: Path) -> list[str]:
    """What lies beside the usual `dense` and `moe`."""
    return sorted({entry.name for entry in directory.iterdir()} - {"dense", "moe"})


def spoil(weights: Path) -> None:
    """Change the last byte, as a disk would: neither the size nor the time tells."""
    status = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def validate_json(command: str, text: str) -> dict[str, Any]:
    """Return what a command printed with --json, once docs/reference/schema.json allows it."""
    from jsonschema import Draft202012Validator

    value: dict[str, Any] = json.loads(text)  # fails on anything before or after it
    schema = read_json(Path(__file__).parent.parent / "docs" / "reference" / "schema.json")
    kind = "error" if value.get("status") == "error" else command
    Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}).validate(value)
    return value


def run_forked(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line where its libraries are imported already; see forked.py."""
    return forked.run(arguments, cwd=cwd, environment=os.environ | {"COLUMNS": "80"} | environment)


RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Run the command line."""
    return run_forked


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub on loopback, with nothing on it."""
    with Hub(tmp_path / "hub") as server:
        yield server


IMPATIENT = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
from upcycle_cli.__main__ import main
main()
"""
"""The tool, which waits only a moment before it repeats a request."""

RunOnHub = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> RunOnHub:
    """Run a command as somebody who takes the server for the Hub; the token must never show."""

    def run_here(
        *arguments: str | Path,
        token: str | None = TOKEN,
        home: Path | None = None,
        expect: int = 0,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        variables = hub.environment(home or tmp_path / "home", token=token) | {"COLUMNS": "80"}
        result = forked.run(
            arguments, program=IMPATIENT, cwd=tmp_path, environment=variables | environment
        )
        assert result.returncode == expect, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run_here
