"""Non-expert tensors that native targets store in another form: split, or with permuted rows.

Most other tensors are copied under their names. Some dense types fuse the three attention matrices,
or rotate adjacent rows of a head where most rotary embeddings rotate its first half against its
second. The function and the numbers stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a dense tensor, and the target's tensor that holds them."""

    name: str
    """Within the layer."""
    rows: str
    """Their number, as a product of config keys: "num_attention_heads*head_dim"."""
    halves: bool = False
    """Whether each head's rotary part is reordered: even rows first, then odd rows."""


Pieces = Mapping[str, tuple[Piece, ...]]
"""The pieces of each dense tensor (by its name within the layer), from the first row on."""

_QUERIES, _KEYS = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"

QKV: Pieces = {
    "self_attn.qkv_proj.weight": (
        Piece("self_attn.q_proj.weight", _QUERIES),
        Piece("self_attn.k_proj.weight", _KEYS),
        Piece("self_attn.v_proj.weight", _KEYS),
    )
}
GATE_UP: Pieces = {
    "mlp.gate_up_proj.weight": (
        Piece("mlp.gate_proj.weight", "intermediate_size"),
        Piece("mlp.up_proj.weight", "intermediate_size"),
    )
}
"""For layers that stay dense."""
INTERLEAVED: Pieces = {
    f"self_attn.{matrix}_proj.{kind}": (Piece(f"self_attn.{matrix}_proj.{kind}", rows, True),)
    for matrix, rows in (("q", _QUERIES), ("k", _KEYS))
    for kind in ("weight", "bias")
}
"""From rotating row 2i of a head against row 2i + 1, to rotating i against i + half."""
