"""Dense checkpoints made without transformers: of any size without weights, or tiny with them."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from upcycle_cli.checkpoint.checkpoint import open_checkpoint, raw_bytes
from upcycle_cli.models.dense import read_dense
from upcycle_cli.models.lookup import dense_family
from upcycle_cli.plan.expressions import Expr, type_of
from upcycle_cli.plan.output import Options
from upcycle_cli.plan.plan import Plan
from upcycle_cli.plan.upcycle import build_plan
from upcycle_cli.recipe.recipe import ExpertLayout, Recipe, Routing
from upcycle_cli.write.evaluate import evaluate

FIXTURES = Path(__file__).parent / "fixtures"
PAIRS = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
}
"""Dense types and targets for grids of options; the contracts have all rows."""
BIG = ("llama-3.1-70b", "llama-3.1-405b", "mistral-7b-v0.1", "qwen2.5-72b", "qwen3-32b")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

TINY: Mapping[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": False,
}

Shapes = dict[str, tuple[int, ...]]


def big_config(name: str) -> dict[str, Any]:
    """The config.json of a released model."""
    config = json.loads((FIXTURES / f"{name}.json").read_text())
    assert isinstance(config, dict)
    return config


def tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    return {"model_type": model_type, **TINY, **changes}


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a dense model; tests/models/test_dense.py holds them to transformers."""
    return dict(read_dense(dense_family(config), config).shapes)


def model_shapes(config: Mapping[str, Any], layout: ExpertLayout = ExpertLayout.FUSED) -> Shapes:
    """The tensors of transformers' own model without a tied head, as it writes or holds it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    held = model.state_dict()
    if layout is ExpertLayout.PER_EXPERT:
        held = revert_weight_conversion(model, held)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    if theirs.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def wrapper_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a whole model that takes pictures, as transformers writes them."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(theirs)
    held = revert_weight_conversion(model, model.state_dict())
    is_tied = getattr(theirs, "tie_word_embeddings", False)
    names = (name for name in held if not (is_tied and name.endswith("lm_head.weight")))
    return {name: tuple(held[name].shape) for name in names}


def write_hollow(
    directory: Path,
    config: Mapping[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str = "BF16",
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a checkpoint with valid headers and holes instead of data: it takes no space."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in (tensor_shapes(config) if shapes is None else shapes).items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    if len(shards) == 1:
        _write_hollow_shard(directory / "model.safetensors", shards[0], dtype)
        return directory
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_hollow_shard(directory / file_name, shard, dtype)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _write_hollow_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    entries: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # unaligned data is copied to memory
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + position)


def write_model(
    directory: Path, config: Mapping[str, Any], *, dtype: str = "BF16", seed: int = 0
) -> Path:
    """Write a tiny checkpoint with random weights, odd ones among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: random_bits(shape, TORCH[dtype], generator)
        for name, shape in tensor_shapes(config).items()
    }
    for name, tensor in tensors.items():
        if "layernorm" in name:  # a norm must have a length for a router to be drawn
            tensors[name] = tensor.sign() + 0.5
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def random_bits(
    shape: Iterable[int], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Finite values of every magnitude up to 100: subnormal ones and negative zeros too."""
    bits, shape = BITS[dtype], tuple(shape)
    values = torch.randint(
        torch.iinfo(bits).min, torch.iinfo(bits).max, shape, generator=generator, dtype=bits
    ).view(dtype)
    ordinary = torch.randn(shape, generator=generator).to(dtype)
    # NaN compares false, and what is larger would overflow float16 once it is scaled.
    return torch.where(values.abs() <= 100, values, ordinary)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes: unlike ==, this tells −0 from 0."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    bits = BITS[one.dtype]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def value_of(expr: Expr, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """What an expression comes to, as a tensor; `read` gives a dense tensor by name."""
    kind = type_of(expr)
    data = evaluate(expr, lambda name: raw_bytes(read(name)))
    empty = torch.empty(kind.shape, dtype=TORCH[kind.dtype])
    if data.nbytes == empty.nbytes == 0:
        return empty
    return torch.frombuffer(bytearray(data), dtype=empty.dtype).reshape(kind.shape)


def save_tokenizer(path: Path, chat_template: str | None = None) -> None:
    """Save a tokenizer that has a token for each byte and two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    fast.save_pretrained(path)


def write_orders(path: Path, *, alike: int, shape: tuple[int, int, int] = (2, 2, 48)) -> Path:
    """Write orders of neurons (groups, layers, neurons); groups agree on the first `alike`."""
    generator = torch.Generator().manual_seed(3)
    groups, layers, size = shape
    orders = {}
    for layer in range(layers):
        first = torch.randperm(size, generator=generator)
        rest = (torch.randperm(size - alike, generator=generator) for _ in range(groups - 1))
        others = [torch.cat([first[:alike], first[alike:][each]]) for each in rest]
        orders[f"layers.{layer}.neuron_order"] = torch.stack([first, *others])
    save_file(orders, path)
    return path


def hollow_plan(
    path: Path,
    recipe: str,
    routing: Routing | None = None,
    *,
    model_type: str = "llama",
    target: str = "auto",
    options: Options | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,  # noqa: ANN401
) -> Plan:
    """Plan the conversion of a tiny model that has no weights."""
    source = write_hollow(path / "dense", tiny_config(model_type, **(config or {})))
    wanted = Recipe(recipe, routing=routing, **settings)
    return build_plan(wanted, open_checkpoint(source), target=target, options=options)
