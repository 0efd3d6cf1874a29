"""Which layers become mixtures of experts: the --layers option, and how each config states it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown

_Layers = Sequence[int]
_Config = Mapping[str, Any]
_HINT = "Write 4-31, 0,2,4- or every:2."
_RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?")
_EVERY = re.compile(r"every:(\d{1,6})")


def parse_layers(text: str | None, having: _Layers, num_layers: int) -> tuple[int, ...]:
    """Return the layers that --layers selects from those `having` an MLP; None selects all.

    `4-31` and `4-` are ranges, commas separate several, and `every:2` is every second layer that
    has an MLP, from the first. Raises UpcycleError for other text and for a layer without an MLP.
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
            raise UpcycleError(
                f"layer {item.strip()} has no dense MLP to make experts of.",
                f"These have one: {format_layers(having)}.",
            )
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


def layer_finder(template: str) -> Callable[[str], int | None]:
    """Return a function from a tensor's name to its layer; `template` is a layer's name prefix."""
    start, end = template.split("{layer}")
    pattern = re.compile(rf"{re.escape(start)}(\d+){re.escape(end)}")

    def layer_of(name: str) -> int | None:
        match = pattern.match(name)
        return None if match is None else int(match[1])

    return layer_of


@dataclass(frozen=True)
class LayerChoice:
    """How configs of an architecture state which layers are mixtures of experts."""

    write: Callable[[_Layers, Sequence[str]], dict[str, Any]]
    """From the MoE layers, and the kinds of all dense layers, to config keys."""
    read: Callable[[_Config, int], tuple[int, ...]]
    """From a config with its defaults, and its number of layers, to the MoE layers. Raises
    ValueError for an inconsistent config."""
    count: Callable[[_Config], int | None] = lambda _: None
    """The number of layers; None if num_hidden_layers states it."""
    mlps: Callable[[_Config], int | None] = lambda _: None
    """How many layers are MLPs or mixtures of experts; None if all are."""
    objection: Callable[[_Layers, int], str | None] = lambda _layers, _count: None
    """Why a config cannot state these layers of so many, or None if it can."""

    @property
    def scope(self) -> str:
        """The choices that it can express: "any", "a range", "the last ones" or "all"."""
        scopes = {"any": (0, 2), "a range": (1, 2), "the last ones": (2, 3)}
        return next((name for name, ls in scopes.items() if not self.objection(ls, 4)), "all")


def _checked(config: _Config, key: str, is_valid: Callable[[Any], bool]) -> Any:  # noqa: ANN401
    """Return a config's value; raises ValueError if it is invalid."""
    value = config.get(key)
    if not is_valid(value):
        raise ValueError(f"{key} is {shown(value)}")
    return value


def _integer(config: _Config, key: str, least: int, most: int | None = None) -> int:
    def is_valid(value: object) -> bool:
        return type(value) is int and value >= least and (most is None or value <= most)

    value: int = _checked(config, key, is_valid)
    return value


def _are_layers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _others(layers: _Layers, count: int) -> list[int]:
    return [layer for layer in range(count) if layer not in layers]


def _only_all(layers: _Layers, count: int) -> str | None:
    return "all its layers are mixtures of experts" if len(layers) < count else None


def _are_last(layers: _Layers, count: int) -> bool:
    return list(layers) == list(range(count - len(layers), count))


def _first_dense(key: str) -> LayerChoice:
    """Return the choice of configs whose `key` counts the dense layers at the start."""

    def objection(layers: _Layers, count: int) -> str | None:
        if _are_last(layers, count):
            return None
        return f"its dense layers can only be the first ones ({key})"

    return LayerChoice(
        lambda layers, kinds: {key: len(kinds) - len(layers)},
        lambda config, count: tuple(range(_integer(config, key, 0, count - 1), count)),
        objection=objection,
    )


def _read_mlp_only(config: _Config, count: int) -> tuple[int, ...]:
    step = _integer(config, "decoder_sparse_step", 1)
    dense = _checked(config, "mlp_only_layers", lambda value: not value or _are_layers(value))
    return tuple(layer for layer in _others(dense or [], count) if (layer + 1) % step == 0)


_RANGE_KEYS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def _write_range(layers: _Layers) -> dict[str, Any]:
    interval = layers[1] - layers[0] if len(layers) > 1 else 1
    return dict(zip(_RANGE_KEYS, (layers[0], layers[-1], interval), strict=True))


def _read_range(config: _Config, count: int) -> tuple[int, ...]:
    bounds = zip(_RANGE_KEYS, (0, -1, 1), strict=True)
    first, last, interval = (_integer(config, key, least) for key, least in bounds)
    last = count - 1 if last == -1 else min(last, count - 1)
    return tuple(layer for layer in range(first, last + 1) if (layer + 1) % interval == 0)


def _only_range(layers: _Layers, count: int) -> str | None:
    if not layers or _read_range(_write_range(layers), count) == tuple(layers):
        return None
    return "its experts can only be in a range of layers, or in 1, 3, 5, in 2, 5, 8 and so on of it"


def _read_named(config: _Config, count: int) -> tuple[int, ...]:
    def are_some(value: Any) -> bool:  # noqa: ANN401
        return _are_layers(value) and value and sorted({*value} & {*range(count)}) == value

    return tuple(_checked(config, "moe_layers", are_some))


def _read_mlp_types(config: _Config, count: int) -> tuple[int, ...]:
    def are_types(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, list) and len(value) == count and {*value} <= {"sparse", "dense"}

    types = _checked(config, "mlp_layer_types", are_types)
    return tuple(layer for layer, kind in enumerate(types) if kind == "sparse")


def _read_switch(config: _Config, count: int) -> tuple[int, ...]:
    enabled = _checked(config, "enable_moe_block", lambda value: type(value) is bool)
    return tuple(range(count if enabled else 0))


_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""The letters of hybrid_override_pattern with the names of layers_block_type."""
OLD_BLOCKS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Older names, which released models and engines use."""


def block_types(config: _Config) -> tuple[str, ...]:
    """Return the kind of each layer of a hybrid; raises ValueError for an invalid config."""
    kinds = config.get("layers_block_type")
    if kinds is None:
        pattern = config.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not pattern or not {*pattern} <= {*_BLOCKS}:
            raise ValueError(f"hybrid_override_pattern is {shown(pattern)}")
        return tuple(_BLOCKS[letter] for letter in pattern)
    found = [OLD_BLOCKS.get(str(kind), str(kind)) for kind in kinds if isinstance(kinds, list)]
    if not found or not {*found} <= {*_BLOCKS.values()}:
        raise ValueError(f"layers_block_type is {shown(kinds)}")
    return tuple(found)


def _write_blocks(layers: _Layers, kinds: Sequence[str]) -> dict[str, Any]:
    # Each engine reads one of the two notations.
    found = ["moe" if layer in layers else kind for layer, kind in enumerate(kinds)]
    letters = {kind: letter for letter, kind in _BLOCKS.items()}
    pattern = "".join(letters[kind] for kind in found)
    return {"layers_block_type": found, "hybrid_override_pattern": pattern}


ALL = LayerChoice(lambda *_: {}, lambda _, count: tuple(range(count)), objection=_only_all)
ALL_OR_NONE = replace(  # the model is dense if it has no experts
    ALL,
    read=lambda config, count: tuple(
        range(count if _integer(config, "num_local_experts", 0) else 0)
    ),
)
ENABLED = LayerChoice(lambda *_: {"enable_moe_block": True}, _read_switch, objection=_only_all)
FIRST_K_DENSE = _first_dense("first_k_dense_replace")
NUM_DENSE_LAYERS = _first_dense("num_dense_layers")
MOE_LAYERS = LayerChoice(lambda layers, _: {"moe_layers": list(layers)}, _read_named)
MOE_RANGE = LayerChoice(lambda layers, _: _write_range(layers), _read_range, objection=_only_range)
MLP_ONLY_LAYERS = LayerChoice(
    lambda layers, kinds: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": _others(layers, len(kinds)),
    },
    _read_mlp_only,
)
MLP_TYPES = LayerChoice(
    lambda layers, kinds: {
        "mlp_layer_types": ["sparse" if i in layers else "dense" for i in range(len(kinds))]
    },
    _read_mlp_types,
)
MLP_TYPES_AND_FIRST_DENSE = replace(
    MLP_TYPES,
    write=lambda layers, kinds: {
        **MLP_TYPES.write(layers, kinds),
        # vLLM reads this key. It can state only that the first layers are dense.
        **(FIRST_K_DENSE.write(layers, kinds) if _are_last(layers, len(kinds)) else {}),
    },
)
BLOCK_TYPES = LayerChoice(
    _write_blocks,
    lambda config, _: tuple(i for i, kind in enumerate(block_types(config)) if kind == "moe"),
    count=lambda config: len(block_types(config)),
    mlps=lambda config: sum(kind in ("mlp", "moe") for kind in block_types(config)),
)
