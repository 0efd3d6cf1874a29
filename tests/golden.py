"""Digests of what a reference converter writes, so that a later one can be held to the same bytes.

    PYTHONPATH=<a worktree of the reference> python tests/golden.py --write COMMIT

converts tiny dense models by the `upcycle_cli` that is installed, or is on PYTHONPATH, and records
the digests of the cases of fixtures/golden.json again, with the commit that it was. The models are
made of whole numbers that numpy's frozen generator draws, so that they are the same bytes whatever
version of torch, transformers or numpy is here; and only the public functions are called, so that
an old converter and a new one can both be run.

The digests leave out the zeros of qwen2_moe's shared expert (`*.shared_expert.*`): no promise says
how wide they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from upcycle_cli import Options, Recipe, convert

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIXTURE = Path(__file__).parent / "fixtures" / "golden.json"
HEAD_DIMS = {"llama": 12, "mistral": 16, "qwen2": 12, "qwen3": 16}
"""12 is what hidden size and heads come to; 16 has to be stated."""
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 48, 96, 2, 4, 2
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OPTIONS = (
    *("recipe", "routing", "scaling", "scale_split", "expert_layout", "dtype", "virtual_groups"),
    *("embeddings", "seed", "router_logit_std"),
)
"""Each of their values comes with each source and target, and with each value of each other option
in some case. The embeddings "untie" are a tied source whose output has a head of its own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversion: which model, into what, the value of each option, and the digest of it."""

    source: str
    target: str
    digest: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """All of it in one line."""
        values = " ".join(f"{option}={self.options[option]}" for option in OPTIONS)
        return f"{self.source} {self.target} {values}"


def cases() -> dict[str, Case]:
    """Return every case of the fixture by its name."""
    rows = json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]
    ends = ("source", "target", "digest")
    found = (
        Case(**{end: row[end] for end in ends}, options={name: row[name] for name in OPTIONS})
        for row in rows
    )
    return {case.name: case for case in found}


def write_dense(directory: Path, model_type: str, *, tied: bool) -> Path:
    """Write a dense model of bf16 weights, the same bytes on every machine."""
    directory.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": [f"{model_type.title()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIMS[model_type],
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.from_numpy(_bf16(name, shape)).view(torch.bfloat16)
        for name, shape in _shapes(model_type, tied=tied).items()
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def _shapes(model_type: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    head_dim = HEAD_DIMS[model_type]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        for matrix, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{prefix}.self_attn.{matrix}_proj.weight"] = (heads * head_dim, HIDDEN)
            if model_type == "qwen2":
                shapes[f"{prefix}.self_attn.{matrix}_proj.bias"] = (heads * head_dim,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * head_dim)
        if model_type == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def _bf16(name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Return a tensor's bits: seven of mantissa, and magnitudes down to 2^-24.

    Norm weights lie between 1/2 and 2. Of the others some are zeros of either sign, and some too
    small to be anything but subnormal in float16.
    """
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
    # Whole numbers alone: what a logarithm comes to differs between libraries in its last bit.
    random = np.random.RandomState(seed)
    mantissas = random.randint(0, 1 << 7, shape)
    if "norm" in name:
        exponents = random.randint(126, 128, shape)
        return (exponents << 7 | mantissas).astype("<u2")
    signs = random.randint(0, 2, shape)
    exponents = 126 - random.randint(0, 5, shape) * random.randint(0, 7, shape)
    bits = signs << 15 | exponents << 7 | mantissas
    return np.where(random.randint(0, 50, shape) == 0, signs << 15, bits).astype("<u2")


def run(case: Case, dense: Path, output: Path) -> str:
    """Convert a case's model, made in `dense` if it is not there; return the digest of `output`."""
    o = dict(case.options)
    tied = o["embeddings"] != "untied"
    source = dense / f"{case.source}-{'tied' if tied else 'untied'}"
    if not source.exists():
        write_dense(source, case.source, tied=tied)
    sizes = dict(zip(("expansion", "granularity", "top_k"), o.pop("recipe"), strict=True))
    options = Options(
        dtype=o.pop("dtype"),
        expert_layout=o.pop("expert_layout"),
        untie_embeddings=o.pop("embeddings") == "untie",
        max_shard_bytes=100_000,  # several files: the digest depends on none
    )
    convert(source, output, Recipe(**sizes, **o), target=case.target, options=options)
    return digest(output)


def digest(directory: Path) -> str:
    """Return the SHA-256 of every tensor's name, dtype, shape and bytes, in the names' order."""
    result, tensors = hashlib.sha256(), dict[str, torch.Tensor]()
    for path in directory.glob("*.safetensors"):
        found = load_file(path)
        assert not found.keys() & tensors.keys()
        tensors |= found
    for name, tensor in sorted(tensors.items()):
        if ".shared_expert." not in name:
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
            result.update(f"{name} {dtype} {shape} {len(data)}\n".encode())
            result.update(data)
    return result.hexdigest()


def main() -> None:
    """Rewrite the fixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="COMMIT", required=True, help="of the converter")
    made_with, rows = parser.parse_args().write, []
    with tempfile.TemporaryDirectory() as temporary:
        for i, case in enumerate(cases().values()):
            found = run(case, Path(temporary) / "dense", Path(temporary) / "moe" / str(i))
            row = {"source": case.source, "target": case.target, **case.options, "digest": found}
            rows.append(f"  {json.dumps(row)}")
    lines = ",\n".join(rows)
    text = f'{{\n "made_with": "{made_with}",\n "cases": [\n{lines}\n ]\n}}\n'
    FIXTURE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
