"""An MLP as data: the tensors that hold its matrices, in dense layers and in experts.

A part is gate, up or down, or the bias of one of them. A weight is one tensor with one or several
parts, concatenated along the intermediate size.

Legend: N experts, H hidden size, I intermediate size (of the dense MLP, or of one expert).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias

Index: TypeAlias = tuple[int | slice | EllipsisType, ...]

BIAS = "_bias"
"""The suffix of the parts gate_bias, up_bias and down_bias."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of an MLP."""

    name: str
    """Within its layer. Experts are separate tensors if the name contains `{expert}`, or else one
    tensor (N, …)."""
    parts: tuple[str, ...]
    """The parts it holds, in order along `split_dim`."""
    split_dim: int | None
    """The dimension of the intermediate size, not counting N; None for a down bias, which is not
    split."""

    @property
    def is_bias(self) -> bool:
        """Whether it holds biases, which are optional."""
        return self.parts[0].endswith(BIAS)

    def shape(self, width: int, hidden_size: int) -> tuple[int, ...]:
        """Return the shape for I = `width` and H = `hidden_size`, without the stack's dimension."""
        wide = width * len(self.parts)
        if self.is_bias:
            return (hidden_size,) if self.split_dim is None else (wide,)
        return (wide, hidden_size) if self.split_dim == 0 else (hidden_size, wide)


@dataclass(frozen=True, slots=True)
class Location:
    """Where one part of one expert, or of one shard of a dense MLP, is stored."""

    tensor: str
    """The tensor's name within its layer."""
    row: int | None
    """The index in a stack; None if the tensor is not a stack."""
    split_dim: int | None
    start: int
    stop: int
    """The range along `split_dim`."""

    @property
    def index(self) -> Index:
        """The index that selects the part in numpy and torch."""
        stack = () if self.row is None else (self.row,)
        if self.split_dim is None:
            return (*stack, ...)
        return (*stack, *(slice(None),) * self.split_dim, slice(self.start, self.stop))


def locate(
    weights: Sequence[Weight],
    part: str,
    *,
    width: int,
    expert: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Location:
    """Return where a part is stored; `width` is the intermediate size of the whole weights.

    `expert` selects one expert; `shard` is a range of the intermediate size (default: all of it).
    Raises KeyError if no weight holds the part.
    """
    weight = find_weight(weights, part)
    name = weight.name.format(expert=expert)
    row = None if expert is None or name != weight.name else expert
    start, stop = shard or (0, width)
    before = weight.parts.index(part) * width
    return Location(name, row, weight.split_dim, before + start, before + stop)


def find_weight(weights: Sequence[Weight], part: str) -> Weight:
    """Return the weight that holds a part; raises KeyError if none does."""
    return {own: weight for weight in weights for own in weight.parts}[part]


def parts_of(weights: Sequence[Weight]) -> tuple[str, ...]:
    """Return the parts of an MLP in the order of its weights."""
    return tuple(part for weight in weights for part in weight.parts)


def present_weights(
    weights: Sequence[Weight], names: Collection[str], prefix: str
) -> tuple[Weight, ...]:
    """Return all matrices, and the biases that are among `names`; `prefix` is the layer's."""
    return tuple(w for w in weights if not w.is_bias or prefix + w.name in names)


def matrices_of(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return the weights without the biases."""
    return tuple(weight for weight in weights if not weight.is_bias)


def degree(parts: Collection[str], activation: str) -> int:
    """Return d such that scaling up by a scales the MLP's output by a**d; 0 if there is none."""
    if "gate" in parts:
        return 1
    return {"relu": 1, "linear": 1, "relu2": 2}.get(activation, 0)


def linear_layers(gate: str, up: str, down: str, *, transposed: bool = False) -> tuple[Weight, ...]:
    """Return the matrices and optional biases of linear layers; `gate` is "" if there is none.

    Matrices are (out, in), or (in, out) if `transposed`, as in GPT-2's Conv1D.
    """
    dims = {"gate": int(transposed), "up": int(transposed), "down": int(not transposed)}
    layers = [(part, name) for part, name in zip(dims, (gate, up, down), strict=True) if name]
    matrices = (Weight(f"{name}.weight", (part,), dims[part]) for part, name in layers)
    biases = (
        Weight(f"{name}.bias", (part + BIAS,), None if part == "down" else 0)
        for part, name in layers
    )
    return (*matrices, *biases)


def swiglu(prefix: str) -> tuple[Weight, ...]:
    """Return the weights of an MLP with linear layers gate_proj, up_proj and down_proj."""
    return linear_layers(f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")


def gated_linear(first: str, down: str) -> tuple[Weight, ...]:
    """Return the weights of an MLP with gate and up in one tensor."""
    return Weight(f"{first}.weight", ("gate", "up"), 0), Weight(f"{down}.weight", ("down",), 1)


def stacked(
    prefix: str, *, gated: bool = True, biases: bool = False, transposed: bool = False
) -> tuple[Weight, ...]:
    """Return the weights of experts as transformers 5 holds them in memory, one tensor per layer.

    gate_up_proj is (N, 2·I, H), or up_proj (N, I, H), and down_proj is (N, H, I); matrices are
    (in, out) if `transposed`.
    """
    first, down = ("gate", "up") if gated else ("up",), f"{prefix}.down_proj"
    name = f"{prefix}.{'_'.join(first)}_proj"
    rows: tuple[Weight, ...] = (
        Weight(name, first, int(transposed)),
        Weight(down, ("down",), int(not transposed)),
    )
    if biases:
        parts = tuple(part + BIAS for part in first)
        rows += (Weight(f"{name}_bias", parts, 0), Weight(f"{down}_bias", (f"down{BIAS}",), None))
    return rows
