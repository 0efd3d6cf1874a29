"""What a calibration has found: statistics of each layer, and the router rows fitted to it.

Legend: H hidden size, I dense intermediate size, E groups, G shards.
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
    """What the router of a layer makes of the text. Where groups are no groups, of experts."""

    layer: int
    mean_share: float
    """Of the squares of the MLP's input: how much lies in its mean, which all tokens share."""
    logit_std: float
    """The standard deviation of a group's logit over the tokens, mean over the groups."""
    logit_spread: float
    """The standard deviation over the groups of their mean logits, which no token changes."""
    load_cv: float
    """The standard deviation of the groups' loads, relative to their mean."""
    idle: int
    """Groups that no token chooses."""
    gates: float
    """Under softmax over all experts: what the gates of a token's chosen ones sum to, on
    average."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFound:
    """What was found in a layer that becomes a mixture of experts."""

    statistics: RouterStatistics
    input_mean: NDArray[np.float32]
    """The mean of the MLP's input (H,)."""
    input_square: NDArray[np.float32]
    """The mean of the squares of each of its dimensions (H,)."""
    activity: NDArray[np.float32]
    """The mean magnitude of what each neuron gives to the down matrix (I,)."""
    rows: bytes
    """The router's rows in the dtype that they are stored in, one for each group."""
    order: bytes | None = None
    """The order of the neurons (I,) as 32-bit integers, where it was asked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """All that was found, in the order of the layers."""

    tokens: int
    layers: Mapping[int, LayerFound] = field(default_factory=dict)

    @property
    def gates(self) -> float:
        """What the gates of the chosen experts sum to, mean over tokens and layers."""
        found = [layer.statistics.gates for layer in self.layers.values()]
        return sum(found) / len(found)

    @property
    def digest(self) -> str:
        """The SHA-256 of all that was found."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def summary(self) -> Iterator[dict[str, Any]]:
        """Yield what is said of each layer, in so many digits that a person reads them."""
        for layer in self.layers.values():
            yield {
                key: float(f"{value:.{_SHOWN_DIGITS}g}") if isinstance(value, float) else value
                for key, value in asdict(layer.statistics).items()
            }

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file."""
        import numpy as np
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {}
        for number, layer in self.layers.items():
            tensors[f"layers.{number}.input_mean"] = layer.input_mean
            tensors[f"layers.{number}.input_square"] = layer.input_square
            tensors[f"layers.{number}.activity"] = layer.activity
            tensors[f"layers.{number}.rows"] = np.frombuffer(layer.rows, "u1")
            if layer.order is not None:
                tensors[f"layers.{number}.order"] = np.frombuffer(layer.order, "u1")
        statistics = [asdict(layer.statistics) for layer in self.layers.values()]
        found = json.dumps({"tokens": self.tokens, "layers": statistics})
        return save(tensors, {"calibration": found})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` has made; ValueError or KeyError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        size = int.from_bytes(data[:8], "little")
        found = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["calibration"])
        layers = {}
        for each in found["layers"]:
            prefix = f"layers.{each['layer']}."
            order = tensors.get(f"{prefix}order")
            layers[each["layer"]] = LayerFound(
                statistics=RouterStatistics(**each),
                input_mean=tensors[f"{prefix}input_mean"],
                input_square=tensors[f"{prefix}input_square"],
                activity=tensors[f"{prefix}activity"],
                rows=tensors[f"{prefix}rows"].tobytes(),
                order=None if order is None else order.tobytes(),
            )
        return cls(tokens=found["tokens"], layers=layers)
