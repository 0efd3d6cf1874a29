"""What can be chosen of a recipe, by name, and what a recipe can promise.

Notation is the paper's (He et al., arXiv 2410.07524), as in `recipe.py`.
"""

from __future__ import annotations

from enum import StrEnum

SHIPPED = "upcycled"
"""What --target calls the code that is shipped with the model."""


class Routing(StrEnum):
    """How a token's gates come from its router logits."""

    SOFTMAX_TOPK = "softmax-topk"
    """Softmax over all experts, then top-k; the gates are used as they are."""
    TOPK_SOFTMAX = "topk-softmax"
    """Top-k, then gates that sum to 1 (softmax over the chosen, or renormalised)."""
    SIGMOID_TOPK = "sigmoid-topk"
    """Sigmoid, top-k of it plus a correction bias, then gates that sum to 1."""


class ExpertLayout(StrEnum):
    """How expert weights are named on disk."""

    PER_EXPERT = "per-expert"
    """A tensor per matrix and expert, as in the released checkpoints; every engine reads it."""
    STACKED = "stacked"
    """A tensor per matrix and layer for all experts, as in the released checkpoints of some."""
    FUSED = "fused"
    """A tensor per layer for gate and up, one for down, as transformers 5 holds them in memory."""


class Scaling(StrEnum):
    """A named rule for the factors on the expert matrices; a number sets c itself."""

    EXACT = "exact"
    PAPER = "paper"
    NONE = "none"
    MEASURED = "measured"
    """As exact, but for softmax-topk: there c is such that the mean gain is 1 in a calibration.
    Once that has run, the recipe has c itself."""


class RouterInit(StrEnum):
    """Where router rows come from."""

    NORMAL = "normal"
    """Drawn at random, blind to what they will see."""
    BALANCED = "balanced"
    """Drawn at random, and fitted to a calibration such that the experts are chosen evenly."""
    CENTROIDS = "centroids"
    """The centres of clusters of what a calibration has seen."""
    PROMPTS = "prompts"
    """What the prompts of each of several models look like."""
    FILE = "file"
    """Given by the user."""


class ScaleSplit(StrEnum):
    """Where the factor c goes."""

    CONFIG = "config"
    """Into the config, where the target multiplies its gates by a factor: experts are slices."""
    BALANCED = "balanced"
    DOWN = "down"


class NeuronOrder(StrEnum):
    """In which order the neurons of the dense MLP are sliced; any is exact."""

    SLICED = "sliced"
    """As they come: the groups are copies of one another."""
    SHUFFLED = "shuffled"
    """Each group but the first in an order of its own, drawn from the seed."""
    CLUSTERED = "clustered"
    """Those together that are active together in a calibration, the same in each group."""
    FILE = "file"
    """By permutations that are given."""


class Promise(StrEnum):
    """What the converted model owes the dense one."""

    EXACT = "exact"
    """The same function, up to the rounding of the arithmetic."""
    APPROXIMATE = "approximate"
    """The same function in the limit of a uniform router: an error of order `router_logit_std`."""
    NONE = "none"
    """A starting point for training only."""
