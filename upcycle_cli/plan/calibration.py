"""The results of a calibration: statistics of each layer, and router rows fitted to it.

Legend: I dense intermediate size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOWN_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """How a layer's router routes the text; without virtual groups, each expert is a group."""

    layer: int
    mean_share: float
    """The share of the MLP input's energy that lies in its mean over all tokens."""
    logit_std: float
    """The standard deviation of a group's logit over the tokens, averaged over the groups."""
    logit_spread: float
    """The standard deviation of the groups' mean logits."""
    load_cv: float
    """The coefficient of variation of the groups' loads."""
    idle: int
    """The number of groups that no token chooses."""
    gates: float
    """The sum of a token's chosen gates under softmax over all experts, averaged over tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFound:
    """The results for a layer that becomes a mixture of experts."""

    statistics: RouterStatistics
    activity: NDArray[np.float32]
    """The mean magnitude of each neuron's activation (I,)."""
    rows: bytes
    """The router's rows in the dtype in which they are stored, one for each group."""
    order: bytes | None = None
    """The order of the neurons (I,) as 32-bit integers, where the recipe clusters them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """The results for all layers, in their order."""

    tokens: int
    layers: Mapping[int, LayerFound] = field(default_factory=dict)

    @property
    def gates(self) -> float:
        """The sum of the chosen gates, averaged over tokens and layers."""
        found = [layer.statistics.gates for layer in self.layers.values()]
        return sum(found) / len(found)

    @property
    def digest(self) -> str:
        """The SHA-256 of all results."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def summary(self) -> Iterator[dict[str, Any]]:
        """Yield the statistics of each layer, rounded for people."""
        for layer in self.layers.values():
            yield {
                key: float(f"{value:.{_SHOWN_DIGITS}g}") if isinstance(value, float) else value
                for key, value in asdict(layer.statistics).items()
            }

    def to_bytes(self) -> bytes:
        """Return the results as JSON, with arrays in hexadecimal digits."""
        layers = [
            {
                **asdict(layer.statistics),
                "activity": layer.activity.astype("<f4").tobytes().hex(),
                "rows": layer.rows.hex(),
                "order": "" if layer.order is None else layer.order.hex(),
            }
            for layer in self.layers.values()
        ]
        return json.dumps({"tokens": self.tokens, "layers": layers}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the output of `to_bytes`; ValueError, KeyError or TypeError for anything else."""
        import numpy as np

        found, layers = json.loads(data), {}
        for each in found["layers"]:
            activity, rows, order = (
                bytes.fromhex(each.pop(name)) for name in ("activity", "rows", "order")
            )
            layers[each["layer"]] = LayerFound(
                statistics=RouterStatistics(**each),
                activity=np.frombuffer(activity, "<f4"),
                rows=rows,
                order=order or None,
            )
        return cls(tokens=found["tokens"], layers=layers)
