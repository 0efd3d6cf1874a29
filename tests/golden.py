"""Digests of what a reference converter writes, so that a later one can be held to the same bytes.

    PYTHONPATH=<a worktree of the reference> python tests/golden.py --write COMMIT

converts tiny dense models by the `upcycle_cli` that is installed, or is on PYTHONPATH, and records
the digests of the cases of fixtures/golden.json again, with the commit that it was. The models are
made of whole numbers that numpy's frozen generator draws, so that they are the same bytes whatever
version of torch, transformers or numpy is here; and only the public functions are called, so that
an old converter and a new one can both be run.

The zeros of qwen2_moe's shared expert (`*.shared_expert.*`) are left out: how wide they are is no
promise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_cli import Options, Recipe, convert

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIXTURE = Path(__file__).parent / "fixtures" / "golden.json"

PAIRS = (
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("mistral", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
)
HEAD_DIMS = {"llama": 12, "mistral": 16, "qwen2": 12, "qwen3": 16}
"""12 is what hidden size and heads come to; 16 has to be stated."""
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 48, 96, 2, 4, 2

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "recipe": ((4, 1, 2), (2, 2, 2), (4, 2, 4), (2, 3, 3), (2, 8, 8)),
    "routing": ("softmax-topk", "topk-softmax", None),
    "scaling": ("exact", "paper", "none", 2.5),
    "scale_split": ("balanced", "down"),
    "expert_layout": ("per-expert", "fused"),
    "dtype": (None, "float32", "float16", "bfloat16"),
    "virtual_groups": (True, False),
    "embeddings": ("untied", "tied", "untie"),
    "seed": (0, 7, 2**63 - 1),
    "router_logit_std": (None, 0.25),
}
"""Every value of every option: each comes with each pair, and with each value of each other option
in some pair. "untie" is a tied source whose output has a head of its own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversion: which model, into what, the value of each option, and the digest of it."""

    source: str
    target: str
    digest: str
    options: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        """Whether the dense model's head shares the embedding."""
        return bool(self.options["embeddings"] != "untied")

    @property
    def name(self) -> str:
        """All of it in one line."""
        o = self.options
        expansion, granularity, top_k = o["recipe"]
        words = [
            f"{self.source} {self.target} E{expansion}G{granularity}T{top_k}",
            o["routing"] or "default-routing",
            f"scaling-{o['scaling']} {o['scale_split']} {o['expert_layout']}",
            o["dtype"] or "same-dtype",
            "groups" if o["virtual_groups"] else "no-groups",
            f"{o['embeddings']} seed-{o['seed']} std-{o['router_logit_std'] or 'default'}",
        ]
        return " ".join(words)


def cases() -> dict[str, Case]:
    """Return every case of the fixture by its name."""
    found = {}
    for row in json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]:
        options = {option: row[option] for option in CHOICES}
        options["recipe"] = tuple(options["recipe"])
        case = Case(
            source=row["source"], target=row["target"], digest=row["digest"], options=options
        )
        found[case.name] = case
    return found


def write_dense(directory: Path, model_type: str, *, tied: bool) -> Path:
    """Write a dense model of bf16 weights, the same bytes on every machine."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_config(model_type, tied=tied)))
    tensors = {
        name: _bf16(name, shape).tobytes() for name, shape in _shapes(model_type, tied=tied).items()
    }
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in _shapes(model_type, tied=tied).items():
        end = position + len(tensors[name])
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    content = b"".join([struct.pack("<Q", len(header)), header, *tensors.values()])
    (directory / "model.safetensors").write_bytes(content)
    return directory


def _config(model_type: str, *, tied: bool) -> dict[str, Any]:
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
    return config


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


def run(case: Case, source: Path, output: Path) -> str:
    """Convert `source` as the case says, and return the digest of `output`."""
    o = dict(case.options)
    sizes = dict(zip(("expansion", "granularity", "top_k"), o.pop("recipe"), strict=True))
    written = {key: o.pop(key) for key in ("dtype", "expert_layout", "embeddings")}
    recipe = Recipe(**sizes, **o)
    options = Options(
        dtype=written["dtype"],
        expert_layout=written["expert_layout"],
        untie_embeddings=written["embeddings"] == "untie",
        max_shard_bytes=100_000,  # several files: where a tensor lies is no part of the digest
    )
    convert(source, output, recipe, target=case.target, options=options)
    return digest(output)


def digest(directory: Path) -> str:
    """Return the SHA-256 of every tensor's name, dtype, shape and bytes, in the names' order."""
    result = hashlib.sha256()
    tensors = sorted(_tensors(directory))
    names = [name for name, *_ in tensors]
    assert len(names) == len(set(names))
    for name, dtype, shape, data in tensors:
        if ".shared_expert." not in name:
            assert len(data) == {"F32": 4, "F16": 2, "BF16": 2}[dtype] * math.prod(shape)
            result.update(f"{name} {dtype} {list(shape)} {len(data)}\n".encode())
            result.update(data)
    return result.hexdigest()


def _tensors(directory: Path) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        (header_bytes,) = struct.unpack_from("<Q", content)
        start = 8 + header_bytes
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                yield name, entry["dtype"], shape, content[start + begin : start + end]


class Sources:
    """The dense models, each made once, in a directory that is somebody else's to remove."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, case: Case) -> Path:
        """Return the dense model of a case."""
        path = self._directory / f"{case.source}-{'tied' if case.tied else 'untied'}"
        return path if path.exists() else write_dense(path, case.source, tied=case.tied)


def main() -> None:
    """Rewrite the fixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="COMMIT", required=True, help="of the converter")
    made_with = parser.parse_args().write
    with tempfile.TemporaryDirectory() as temporary:
        sources, rows = Sources(Path(temporary) / "dense"), []
        for i, case in enumerate(cases().values()):
            found = run(case, sources.of(case), Path(temporary) / "moe" / str(i))
            row = {"source": case.source, "target": case.target, **case.options, "digest": found}
            rows.append(f"  {json.dumps(row)}")
    lines = ",\n".join(rows)
    text = f'{{\n "made_with": "{made_with}",\n "cases": [\n{lines}\n ]\n}}\n'
    FIXTURE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
