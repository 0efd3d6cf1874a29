"""Tensors that native targets hold in another form, as data: split, or with rows moved.

Most of what is no expert's is copied under its name. Some types fuse what the usual attention has
as three matrices, or turn neighbouring rows of a head against each other where the usual rotary
embedding turns one half against the other. The function is the same, and so are the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a dense tensor, and the tensor of a native target that holds them."""

    name: str
    """Within the layer, as its own."""
    rows: str
    """How many, a product of config keys: "num_attention_heads*head_dim"."""
    halves: bool = False
    """Whether the rotary part of each head has its even rows first, then its odd ones."""


Pieces = Mapping[str, tuple[Piece, ...]]
"""By the names of dense tensors within the layer; their rows from the first to the last."""

_QUERIES, _KEYS = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"

QKV: Pieces = {
    "self_attn.qkv_proj.weight": (
        Piece("self_attn.q_proj.weight", _QUERIES),
        Piece("self_attn.k_proj.weight", _KEYS),
        Piece("self_attn.v_proj.weight", _KEYS),
    )
}
"""Queries, keys and values in one matrix."""
GATE_UP: Pieces = {
    "mlp.gate_up_proj.weight": (
        Piece("mlp.gate_proj.weight", "intermediate_size"),
        Piece("mlp.up_proj.weight", "intermediate_size"),
    )
}
"""Gate and up in one matrix, in the layers that stay dense."""
INTERLEAVED: Pieces = {
    f"self_attn.{matrix}_proj.{kind}": (Piece(f"self_attn.{matrix}_proj.{kind}", rows, True),)
    for matrix, rows in (("q", _QUERIES), ("k", _KEYS))
    for kind in ("weight", "bias")
}
"""Rotary embeddings that turn row 2i of a head against row 2i + 1, for those that turn i against
i + half of them."""
