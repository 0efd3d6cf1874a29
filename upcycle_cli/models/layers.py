"""Which layers become mixtures of experts: the choice `layers`, and how each config states it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown

_Layers = Sequence[int]
_Config = Mapping[str, Any]
_HINT = "Write 4-31, 0,2,4- or every:2."
_RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?")
_EVERY = re.compile(r"every:(\d{1,6})")


def parse_layers(text: str | None, having: _Layers, num_layers: int) -> tuple[int, ...]:
    """Return the selected layers of those `having` an MLP; None selects all.

    `4-31` and `4-` are ranges, commas separate several, and `every:2` is every second layer with an
    MLP. Raises UpcycleError for other text and for a layer without an MLP.
    """
    if text is None:
        return tuple(having)
    every = _EVERY.fullmatch(text.strip())
    if every is not None and int(every[1]) > 0:
        return tuple(having[:: int(every[1])])
    chosen: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise UpcycleError(f"'{text}' is not a choice of layers.", _HINT)
        start, last = int(match[1]), int(match[3] or (num_layers - 1 if match[2] else match[1]))
        if max(start, last) >= num_layers or last < start:
            raise UpcycleError(
                f"there are no layers {item.strip()}: the model has layers 0 to {num_layers - 1}.",
                _HINT,
            )
        found = [layer for layer in range(start, last + 1) if layer in having]
        if not found:
            words = f"layer {item.strip()} has no dense MLP."
            raise UpcycleError(words, f"Choose from layers {format_layers(having)}.")
        chosen.update(found)
    return tuple(sorted(chosen))


def format_layers(layers: _Layers) -> str:
    """Return layers as people write them: 0, 2, 4-31."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def by_layer(names: Iterable[str], template: str) -> dict[int | None, list[str]]:
    """Return tensors by layer, those of no layer under None; `template` is a layer's prefix."""
    start, end = map(re.escape, template.split("{layer}"))
    pattern, found = re.compile(rf"{start}(\d+){end}"), dict[int | None, list[str]]()
    for name in names:
        match = pattern.match(name)
        found.setdefault(match and int(match[1]), []).append(name)
    return found


@dataclass(frozen=True)
class LayerChoice:
    """How configs of an architecture state which layers are mixtures of experts."""

    write: Callable[[_Layers, Sequence[str]], dict[str, Any]]
    """From the MoE layers, and the kinds of all dense layers, to config keys."""
    read: Callable[[_Config, int], Iterable[int]]
    """From a config with defaults, and its number of layers, to the MoE layers. Raises any of
    INVALID or UpcycleError for an inconsistent config."""
    limits: str = ""
    """The limits of the keys, to follow "X cannot express this model: …"."""
    kinds: Callable[[_Config], Sequence[str]] = lambda _: ()
    """The kinds of all layers; empty if num_hidden_layers states their number."""

    def objection(self, layers: _Layers, kinds: Sequence[str]) -> str | None:
        """Return why a config cannot state these layers, or None if it can."""
        if not self.limits or not layers:
            return None
        read = self.read(self.write(layers, kinds), len(kinds))
        return None if tuple(read) == tuple(layers) else self.limits

    @property
    def scope(self) -> str:
        """The choices that it can express: "any", "a range", "the last ones" or "all"."""
        scopes = {"any": (0, 2), "a range": (1, 2), "the last ones": (2, 3)}
        able = (name for name, ls in scopes.items() if not self.objection(ls, ("mlp",) * 4))
        return next(able, "all")


INVALID = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_RANGE_KEYS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def _first_dense(key: str) -> LayerChoice:
    """Return the choice of configs with a `key` that counts the dense layers at the start."""
    return LayerChoice(
        lambda layers, kinds: {key: len(kinds) - len(layers)},
        lambda config, count: [layer for layer in range(count) if layer >= config[key]],
        f"its dense layers can only be the first ones ({key})",
    )


def _read_mlp_only(config: _Config, count: int) -> list[int]:
    dense, step = config["mlp_only_layers"] or (), config["decoder_sparse_step"]
    return [layer for layer in range(count) if (layer + 1) % step == 0 and layer not in dense]


def _write_range(layers: _Layers, _kinds: Sequence[str]) -> dict[str, Any]:
    interval = layers[1] - layers[0] if len(layers) > 1 else 1
    return dict(zip(_RANGE_KEYS, (layers[0], layers[-1], interval), strict=True))


def _read_range(config: _Config, count: int) -> list[int]:
    first, last, interval = (config[key] for key in _RANGE_KEYS)
    inside = range(count)[first:] if last == -1 else range(count)[first : last + 1]
    return [layer for layer in inside if (layer + 1) % interval == 0]


_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""The letters of hybrid_override_pattern with the names of layers_block_type."""
OLD_BLOCKS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Older names, which released models and engines use."""


def block_types(config: _Config) -> tuple[str, ...]:
    """Return the kind of each layer of a hybrid; UpcycleError for an invalid config."""
    kinds = config.get("layers_block_type")
    if kinds is None:
        pattern = config.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not pattern or not {*pattern} <= {*_BLOCKS}:
            raise UpcycleError(f"config.json: hybrid_override_pattern is {shown(pattern)}.")
        return tuple(_BLOCKS[letter] for letter in pattern)
    found = [OLD_BLOCKS.get(str(kind), str(kind)) for kind in kinds if isinstance(kinds, list)]
    if not found or not {*found} <= {*_BLOCKS.values()}:
        raise UpcycleError(f"config.json: layers_block_type is {shown(kinds)}.")
    return tuple(found)


def _write_blocks(layers: _Layers, kinds: Sequence[str]) -> dict[str, Any]:
    # Each engine reads one of the two notations.
    found = ["moe" if layer in layers else kind for layer, kind in enumerate(kinds)]
    letters = {kind: letter for letter, kind in _BLOCKS.items()}
    pattern = "".join(letters[kind] for kind in found)
    return {"layers_block_type": found, "hybrid_override_pattern": pattern}


_ONLY_ALL = "all its layers are mixtures of experts"
ALL = LayerChoice(lambda *_: {}, lambda _, count: range(count), _ONLY_ALL)
ALL_OR_NONE = replace(  # the model is dense if it has no experts
    ALL, read=lambda config, count: range(count if config.get("num_local_experts", 1) else 0)
)
ENABLED = LayerChoice(
    lambda *_: {"enable_moe_block": True},
    lambda config, count: range(count if config["enable_moe_block"] else 0),
    _ONLY_ALL,
)
FIRST_K_DENSE = _first_dense("first_k_dense_replace")
NUM_DENSE_LAYERS = _first_dense("num_dense_layers")
MOE_LAYERS = LayerChoice(
    lambda layers, _: {"moe_layers": list(layers)},
    lambda config, count: [layer for layer in range(count) if layer in config["moe_layers"]],
)
MOE_RANGE = LayerChoice(
    _write_range,
    _read_range,
    "its experts can only be in a range of layers, or in 1, 3, 5, in 2, 5, 8 and so on of it",
)
MLP_ONLY_LAYERS = LayerChoice(
    lambda layers, kinds: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(len(kinds)) if layer not in layers],
    },
    _read_mlp_only,
)
MLP_TYPES = LayerChoice(
    lambda layers, kinds: {
        "mlp_layer_types": ["sparse" if i in layers else "dense" for i in range(len(kinds))]
    },
    lambda config, count: [i for i in range(count) if config["mlp_layer_types"][i] == "sparse"],
)
# vLLM reads the second key, which can state only that the first layers are dense.
MLP_TYPES_AND_FIRST_DENSE = replace(
    MLP_TYPES,
    write=lambda layers, kinds: (
        MLP_TYPES.write(layers, kinds)
        | ({} if FIRST_K_DENSE.objection(layers, kinds) else FIRST_K_DENSE.write(layers, kinds))
    ),
)
BLOCK_TYPES = LayerChoice(
    _write_blocks,
    lambda config, _: [i for i, kind in enumerate(block_types(config)) if kind == "moe"],
    kinds=block_types,
)
