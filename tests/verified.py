"""Small conversions to verify, ways to damage them, and what a report says.

Both this and refusals.py are plugins in conftest.py, for their fixtures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, convert
from upcycle_cli.core.callbacks import Progress
from upcycle_cli.recipe.recipe import Routing
from upcycle_cli.verification.result import Report

Tensors = dict[str, torch.Tensor]

MIXTRAL_EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = MIXTRAL_EXPERT.format(1, 2, "w1")


def save_llama(path: Path, seed: int = 0, **config: Any) -> Path:  # noqa: ANN401
    """Save a llama in bfloat16, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 600,
        "initializer_range": 0.3,  # large enough for damage to show in the logits
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes | config))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import save_companions  # which imports this module

    path = save_llama(tmp_path_factory.mktemp("dense") / "llama")
    save_companions(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a tiny model's tokenizer splits into bytes."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} sheep and {i * i % 97} goats went by.\n" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def mixtral(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "mixtral"
    convert(dense, path, Recipe("E2G2T2"))
    return path


@pytest.fixture(scope="session")
def qwen2_moe(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "qwen2_moe"
    recipe = Recipe("E4G2T2", routing=Routing.SOFTMAX_TOPK)
    convert(dense, path, recipe, target="qwen2_moe")
    return path


@pytest.fixture
def moe(mixtral: Path, tmp_path: Path) -> Path:
    """A copy of the mixtral to damage."""
    return Path(shutil.copytree(mixtral, tmp_path / "moe"))


@pytest.fixture
def qwen(qwen2_moe: Path, tmp_path: Path) -> Path:
    """A copy of the qwen2_moe to damage."""
    return Path(shutil.copytree(qwen2_moe, tmp_path / "qwen"))


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def flip_bit(path: Path, name: str) -> None:
    """Flip the lowest bit of an element in the middle of a tensor of 16-bit floats."""

    def edit(held: Tensors) -> None:
        bits = held[name].view(torch.int16).flatten()
        bits[len(bits) // 2] ^= 1

    edit_tensors(path, edit)


def text_of(report: Report) -> str:
    """Return all that a report says."""
    return "\n".join(
        f"{check.name} {check.status}: {check.detail} {' '.join(check.failures)}"
        for check in report.checks
    )


class Heard(Progress):
    def __init__(self) -> None:
        self.names: list[str] = []
        self.done: dict[str, list[tuple[int, int, str]]] = {}

    def begins(self, what: str) -> None:
        self.names.append(what.removeprefix("checking "))

    def checked(self, done: int, total: int, unit: str) -> None:
        self.done.setdefault(self.names[-1], []).append((done, total, unit))


@pytest.fixture
def sharded(dense: Path, tmp_path: Path) -> Path:
    convert(
        dense,
        tmp_path / "sharded",
        Recipe("E2G2T2"),
        options=Options(max_shard_bytes=20_000),
    )
    return tmp_path / "sharded"
