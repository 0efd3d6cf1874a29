"""An MLP as data: which tensors hold its parts, of a dense layer and of experts alike.

The parts are gate, up and down, each a matrix, and the biases that go with them. A weight holds one
part or several, one after the other along the dimension that counts the intermediate size. From
that follow the shards, the fused layouts and the place of every expert.

Legend: N experts, H hidden size, I intermediate size (of the dense MLP, or of one expert).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol, Self, TypeAlias, TypeVar

Index: TypeAlias = tuple[int | slice | EllipsisType, ...]


class _Array(Protocol):
    """What numpy and torch have in common."""

    def __getitem__(self, index: Index, /) -> Self: ...
    def swapaxes(self, one: int, other: int, /) -> Self: ...


_Matrix = TypeVar("_Matrix", bound=_Array)
BIAS = "_bias"
"""How the name of a part ends that is a bias: gate_bias, up_bias, down_bias."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of an MLP; a row of the tables below says one."""

    name: str
    """Within its layer. With `{expert}` a tensor of each, of experts without it a stack (N, …)."""
    holds: tuple[str, ...]
    """The parts, in order along `cut`."""
    cut: int | None
    """The dimension that counts the intermediate size, in a stack that of one expert's matrix;
    None for a down bias, which every shard needs whole."""

    @property
    def is_bias(self) -> bool:
        """Whether it holds biases, which a model may lack."""
        return self.holds[0].endswith(BIAS)

    def shape(self, width: int, hidden_size: int) -> tuple[int, ...]:
        """Return its shape, in a stack that of one, where `width` is I and `hidden_size` H."""
        wide = width * len(self.holds)
        if self.is_bias:
            return (hidden_size,) if self.cut is None else (wide,)
        return (wide, hidden_size) if self.cut == 0 else (hidden_size, wide)

    def fits(self, shape: Sequence[int], hidden_size: int) -> bool:
        """Whether the matrices of a stack of this shape can lie as they do here."""
        if self.is_bias or self.cut is None:
            return True
        return len(shape) == 3 and shape[2 - self.cut] == hidden_size


@dataclass(frozen=True, slots=True)
class Place:
    """Where one part of one expert, or of a shard of a dense MLP, lies."""

    tensor: str
    """The name of the tensor within its layer."""
    part: str
    row: int | None
    """Which of a stack; None where the tensor is no stack."""
    cut: int | None
    start: int
    stop: int
    """The entries along `cut`."""

    @property
    def index(self) -> Index:
        """What to select of the tensor, for numpy and torch."""
        stack = () if self.row is None else (self.row,)
        if self.cut is None:
            return (*stack, ...)
        return (*stack, *(slice(None),) * self.cut, slice(self.start, self.stop))

    def of(self, tensor: _Matrix, cut: int | None) -> _Matrix:
        """Return the part of its tensor, of numpy or torch, turned if `cut` is to count I there."""
        found = tensor[self.index]
        return found.swapaxes(0, 1) if {cut, self.cut} == {0, 1} else found

    @property
    def dimension(self) -> int | None:
        """The dimension of the tensor, stack and all, that counts the intermediate size."""
        return None if self.cut is None else self.cut + (self.row is not None)

    @property
    def label(self) -> str:
        """The place in words."""
        return self.tensor if self.row is None else f"{self.tensor}[{self.row}] ({self.part})"


def place(
    weights: Sequence[Weight],
    part: str,
    *,
    width: int,
    expert: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Place:
    """Return where a part lies; `width` is I, the intermediate size of what the weights are of.

    `expert` picks one of several; `shard` is the range of the intermediate size that is meant, all
    of it unless given. Raises KeyError when no weight holds the part.
    """
    weight = holder(weights, part)
    name = weight.name.format(expert=expert)
    row = None if expert is None or name != weight.name else expert
    start, stop = shard or (0, width)
    before = weight.holds.index(part) * width
    return Place(name, part, row, weight.cut, before + start, before + stop)


def holder(weights: Sequence[Weight], part: str) -> Weight:
    """Return the weight that holds a part; KeyError when none does."""
    for weight in weights:
        if part in weight.holds:
            return weight
    raise KeyError(part)


def parts_of(weights: Sequence[Weight]) -> tuple[str, ...]:
    """Return the parts of an MLP in the order of its weights."""
    return tuple(part for weight in weights for part in weight.holds)


def present(weights: Sequence[Weight], names: Collection[str], layer: str) -> tuple[Weight, ...]:
    """Return the weights that a layer has: biases are there or not; `layer` is its prefix."""
    return tuple(w for w in weights if not w.is_bias or layer + w.name in names)


def without_biases(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return the matrices alone."""
    return tuple(weight for weight in weights if not weight.is_bias)


def degree(parts: Collection[str], activation: str) -> int:
    """Return d where multiplying up by a multiplies the MLP's output by a**d; 0: by nothing known.

    down(act(gate·x) ⊙ up·x) is linear in up whatever the activation.
    """
    if "gate" in parts:
        return 1
    return {"relu": 1, "linear": 1, "relu2": 2}.get(activation, 0)


def separate(gate: str, up: str, down: str, *, transposed: bool = False) -> tuple[Weight, ...]:
    """Return the rows of an MLP of linear layers of these names, with the biases they may have.

    Their matrices are (out, in), or (in, out) where they are `transposed`, as GPT-2's Conv1D.
    """
    rows, columns = int(transposed), int(not transposed)
    linear = (("gate", gate, rows), ("up", up, rows), ("down", down, columns))
    matrices = (Weight(f"{name}.weight", (part,), cut) for part, name, cut in linear if name)
    biases = (
        Weight(f"{name}.bias", (part + BIAS,), None if part == "down" else 0)
        for part, name, _ in linear
        if name
    )
    return (*matrices, *biases)


def swiglu(prefix: str) -> tuple[Weight, ...]:
    """Return the rows of an MLP whose linear layers have the usual names."""
    return separate(f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")


def stacked(
    prefix: str, *, gated: bool, biases: bool = False, transposed: bool = False
) -> tuple[Weight, ...]:
    """Return the rows of experts as transformers 5 holds them in memory: a tensor per layer.

    gate_up_proj is (N, 2·I, H), or up_proj (N, I, H), and down_proj (N, H, I); each (N, in, out)
    where it is `transposed`.
    """
    first, down = ("gate", "up") if gated else ("up",), f"{prefix}.down_proj"
    name = f"{prefix}.{'_'.join(first)}_proj"
    rows: tuple[Weight, ...] = (
        Weight(name, first, int(transposed)),
        Weight(down, ("down",), int(not transposed)),
    )
    if biases:
        held = tuple(part + BIAS for part in first)
        rows += (Weight(f"{name}_bias", held, 0), Weight(f"{down}_bias", (f"down{BIAS}",), None))
    return rows
