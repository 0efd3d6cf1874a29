"""The choices that a recipe names, and the promises that it can make.

Notation is the paper's (He et al., arXiv 2410.07524), as in `recipe.py`.
"""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.text import any_of, choose_from

_Choice = TypeVar("_Choice", bound=StrEnum)

SHIPPED = "upcycled"
"""The `target` that ships its modeling code with the model."""


class Routing(StrEnum):
    """How a token's gates come from its router logits."""

    SOFTMAX_TOPK = "softmax-topk"
    """Softmax over all experts, then top-k without renormalisation."""
    TOPK_SOFTMAX = "topk-softmax"
    """Top-k, then gates that sum to 1: softmax over the chosen, or renormalised."""
    SIGMOID_TOPK = "sigmoid-topk"
    """Sigmoid, top-k of its output plus a correction bias, then gates that sum to 1."""


class ExpertLayout(StrEnum):
    """How expert weights are named on disk."""

    PER_EXPERT = "per-expert"
    """A tensor for each matrix of each expert, as in most released checkpoints."""
    STACKED = "stacked"
    """A tensor for each matrix of all experts of a layer, as some models are released."""
    FUSED = "fused"
    """A tensor for all gates and ups of a layer and one for all downs, as in transformers 5."""


class Scaling(StrEnum):
    """A named rule for the factors on the expert matrices; a number sets c itself."""

    EXACT = "exact"
    PAPER = "paper"
    NONE = "none"
    MEASURED = "measured"
    """As exact, but with softmax-topk a calibration finds the c for which the mean gain is 1. Once
    it has run, the recipe holds c itself."""


class RouterInit(StrEnum):
    """Where router rows come from."""

    NORMAL = "normal"
    """Drawn at random, without looking at inputs."""
    BALANCED = "balanced"
    """Drawn at random, then fitted to a calibration so that experts are chosen evenly."""
    CENTROIDS = "centroids"
    """The centroids of the MLP inputs of a calibration, clustered."""
    PROMPTS = "prompts"
    """The mean hidden states of each model's prompts."""
    FILE = "file"
    """Read from the user's file."""


class ScaleSplit(StrEnum):
    """Where the factor c goes."""

    CONFIG = "config"
    """In the config, where the target has a factor on its gates: experts stay plain slices."""
    BALANCED = "balanced"
    DOWN = "down"


class NeuronOrder(StrEnum):
    """The order in which the dense MLP's neurons are sliced; any order is exact."""

    SLICED = "sliced"
    """The dense MLP's order: groups are copies of one another."""
    SHUFFLED = "shuffled"
    """A random order for each group but the first, drawn from the seed."""
    CLUSTERED = "clustered"
    """Neurons that are active together in a calibration lie together, the same in each group."""
    FILE = "file"
    """The permutations of the user's file."""


class Promise(StrEnum):
    """How the converted model's function relates to the dense model's."""

    EXACT = "exact"
    """The same function, up to the rounding of the arithmetic."""
    APPROXIMATE = "approximate"
    """The same function in the limit of a uniform router: an error of order `router_logit_std`."""
    NONE = "none"
    """A starting point for training only."""


def member(kind: type[_Choice], value: str, name: str, *others: str) -> _Choice:
    """Return the member that equals a string; UpcycleError, with the argument, for another one."""
    try:
        return kind(value)
    except ValueError:
        advice = choose_from(value, [*kind, *others])
        raise UpcycleError(f"`{name}` cannot be {value!r}.", advice) from None


@cache
def _types_of(kind: type) -> dict[str, tuple[type, ...]]:
    hints = get_type_hints(kind)
    found = {field.name: hints[field.name] for field in fields(kind)}
    return {name: get_args(hint) or (hint,) for name, hint in found.items()}


def check_kind(value: object, kind: str) -> None:
    """Raise UpcycleError unless a value is None or of the class with this name."""
    if value is not None and type(value).__name__ != kind:  # importing it could take long
        raise UpcycleError(f"{shown(value)} is not {kind}.", f"Pass {kind}(…).")


def check_types(made: Any) -> None:  # noqa: ANN401 - a dataclass
    """Check the fields of a dataclass, and replace strings by the enum members that they equal.

    Raises UpcycleError for a value of another type.
    """
    for name, types in _types_of(made.__class__).items():
        value = getattr(made, name)
        numbers = ("a number",) if float in types else ()
        for kind in types:
            if issubclass(kind, StrEnum) and type(value) is str:
                value = member(kind, value, name, *numbers)
                object.__setattr__(made, name, value)
        if type(value) not in types and (type(value) is not int or float not in types):
            wanted = any_of(kind.__name__ for kind in types if kind is not NoneType)
            raise UpcycleError(f"`{name}` cannot be {shown(value)}.", f"Its type is {wanted}.")
