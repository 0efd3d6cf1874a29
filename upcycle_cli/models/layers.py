"""Which layers become mixtures of experts, as a person says it and as each config does.

Configs say it in four ways; a target has one of them, or none, and then all layers are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown

_HINT = "Write 4-31, 0,2,4- or every:2."
_RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?")
_EVERY = re.compile(r"every:(\d{1,6})")


def parse_layers(text: str | None, having: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers that a choice names, of those that have an MLP; None is all of them.

    `4-31` and `4-` are ranges, several choices have commas between, and `every:2` is every second
    of the layers that have an MLP, from the first one on. Raises UpcycleError for a text of another
    form, and for a layer that has no MLP or is not there.
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
                f"These have one: {listed(having)}.",
            )
        chosen.update(found)
    return tuple(sorted(chosen))


def listed(layers: Sequence[int]) -> str:
    """Return layers as a person writes them: 0, 2, 4-31."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class LayerChoice:
    """How a config says which layers are mixtures of experts."""

    write: Callable[[Sequence[int], Sequence[str]], dict[str, Any]]
    """From the layers, and the kinds of all layers of the dense model, to keys of the config."""
    read: Callable[[Mapping[str, Any], int], tuple[int, ...]]
    """The reverse, of a config with its defaults filled in; ValueError when it makes no sense."""
    keys: tuple[str, ...] = ()
    """The keys that say it."""
    count: Callable[[Mapping[str, Any]], int | None] = lambda _: None
    """How many layers a config has; None where num_hidden_layers says it."""
    mlps: Callable[[Mapping[str, Any]], int | None] = lambda _: None
    """How many of them are MLPs or mixtures of experts; None where all are."""
    objection: Callable[[Sequence[int], int], str | None] = lambda _layers, _count: None
    """Why the layers cannot be expressed, if they cannot."""

    @property
    def words(self) -> str:
        """Which choices it can express: "any", "a range", "the last ones" or "all"."""
        if self.objection((0, 2), 4) is None:
            return "any"
        if self.objection((1, 2), 4) is None:
            return "a range"
        return "the last ones" if self.objection((2, 3), 4) is None else "all"


def _said(config: Mapping[str, Any], key: str, is_sound: Callable[[Any], bool]) -> Any:  # noqa: ANN401
    """Return what a config says under a key; ValueError where that makes no sense."""
    value = config.get(key)
    if not is_sound(value):
        raise ValueError(f"{key} is {shown(value)}")
    return value


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _are_layers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _all_if_any(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """Of an architecture whose model is dense where it has no experts."""
    return tuple(range(count if _said(config, "num_local_experts", _at_least(0)) else 0))


def _enabled(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """Of an architecture that says so by a switch."""
    enabled = _said(config, "enable_moe_block", lambda value: type(value) is bool)
    return tuple(range(count if enabled else 0))


def _rest(layers: Sequence[int], count: int) -> list[int]:
    return [layer for layer in range(count) if layer not in layers]


def _only_all(layers: Sequence[int], count: int) -> str | None:
    return "all its layers are mixtures of experts" if len(layers) < count else None


def _are_last(layers: Sequence[int], count: int) -> bool:
    return list(layers) == list(range(count - len(layers), count))


def _first_dense(key: str) -> LayerChoice:
    """Return the choice of configs that say how many of the first layers are dense."""

    def read(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
        first = _said(config, key, lambda value: type(value) is int and 0 <= value < count)
        return tuple(range(first, count))

    def objection(layers: Sequence[int], count: int) -> str | None:
        if _are_last(layers, count):
            return None
        return f"its dense layers can only be the first ones ({key})"

    return LayerChoice(
        lambda layers, kinds: {key: len(kinds) - len(layers)}, read, (key,), objection=objection
    )


def _without(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    step = _said(config, "decoder_sparse_step", _at_least(1))
    dense = _said(config, "mlp_only_layers", lambda value: not value or _are_layers(value))
    return tuple(layer for layer in _rest(dense or [], count) if (layer + 1) % step == 0)


_RANGE_KEYS = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def _spaced(layers: Sequence[int]) -> tuple[int, int, int]:
    """Return the first layer, the last one, and how far one is from the next."""
    return layers[0], layers[-1], layers[1] - layers[0] if len(layers) > 1 else 1


def _in_range(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    ends = zip(_RANGE_KEYS, (0, -1, 1), strict=True)
    first, last, interval = (_said(config, key, _at_least(least)) for key, least in ends)
    last = count - 1 if last == -1 else min(last, count - 1)
    return tuple(layer for layer in range(first, last + 1) if (layer + 1) % interval == 0)


def _only_range(layers: Sequence[int], count: int) -> str | None:
    said = dict(zip(_RANGE_KEYS, _spaced(layers), strict=True)) if layers else {}
    if not layers or _in_range(said, count) == tuple(layers):
        return None
    return "its experts can only be in a range of layers, or in 1, 3, 5, in 2, 5, 8 and so on of it"


def _named(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    def are_some(value: Any) -> bool:  # noqa: ANN401
        return _are_layers(value) and value and sorted({*value} & {*range(count)}) == value

    return tuple(_said(config, "moe_layers", are_some))


def _sparse(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    def are_kinds(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, list) and len(value) == count and {*value} <= {"sparse", "dense"}

    kinds = _said(config, "mlp_layer_types", are_kinds)
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")


_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""The letters of hybrid_override_pattern, and what layers_block_type calls them."""
OLD_BLOCKS = {"mamba": "linear_attention", "attention": "full_attention"}
"""Other names of the same, which released models and engines have."""
BLOCK_KEYS = ("layers_block_type", "hybrid_override_pattern")


def block_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kind of each layer of a hybrid's config; ValueError when it does not say."""
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


def _write_blocks(layers: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    """Say it in both notations: engines read the one or the other."""
    found = ["moe" if layer in layers else kind for layer, kind in enumerate(kinds)]
    letters = {kind: letter for letter, kind in _BLOCKS.items()}
    pattern = "".join(letters[kind] for kind in found)
    return {"layers_block_type": found, "hybrid_override_pattern": pattern}


ALL = LayerChoice(lambda *_: {}, lambda _, count: tuple(range(count)), objection=_only_all)
MLP_ONLY_LAYERS = LayerChoice(
    lambda layers, kinds: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": _rest(layers, len(kinds)),
    },
    _without,
    ("decoder_sparse_step", "mlp_only_layers"),
)
FIRST_K_DENSE = _first_dense("first_k_dense_replace")
NUM_DENSE_LAYERS = _first_dense("num_dense_layers")
BLOCK_TYPES = LayerChoice(
    _write_blocks,
    lambda config, _: tuple(i for i, kind in enumerate(block_types(config)) if kind == "moe"),
    BLOCK_KEYS,
    lambda config: len(block_types(config)),
    lambda config: sum(kind in ("mlp", "moe") for kind in block_types(config)),
)
MOE_RANGE = LayerChoice(
    lambda layers, _: dict(zip(_RANGE_KEYS, _spaced(layers), strict=True)),
    _in_range,
    _RANGE_KEYS,
    objection=_only_range,
)
MLP_TYPES = LayerChoice(
    lambda layers, kinds: {
        "mlp_layer_types": ["sparse" if i in layers else "dense" for i in range(len(kinds))]
    },
    _sparse,
    ("mlp_layer_types",),
)
MLP_TYPES_TOO = replace(
    MLP_TYPES,
    write=lambda layers, kinds: {
        **MLP_TYPES.write(layers, kinds),
        # What vLLM reads, where it can be said.
        **(FIRST_K_DENSE.write(layers, kinds) if _are_last(layers, len(kinds)) else {}),
    },
)
ENABLED = LayerChoice(
    lambda *_: {"enable_moe_block": True}, _enabled, ("enable_moe_block",), objection=_only_all
)
ALL_OR_NONE = replace(ALL, read=_all_if_any)
MOE_LAYERS = LayerChoice(lambda layers, _: {"moe_layers": list(layers)}, _named, ("moe_layers",))


def layer_finder(template: str) -> Callable[[str], int | None]:
    """Return what tells the layer of a tensor by its name; `template` is how those names begin."""
    start, end = template.split("{layer}")
    pattern = re.compile(rf"{re.escape(start)}(\d+){re.escape(end)}")

    def layer_of(name: str) -> int | None:
        match = pattern.match(name)
        return None if match is None else int(match[1])

    return layer_of
