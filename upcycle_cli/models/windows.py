"""How model types state the sliding window of each layer."""

from __future__ import annotations

from collections.abc import Callable

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.dense import FULL, SLIDING, Windows
from upcycle_cli.models.settings import ConfigValues


def all_slide(values: ConfigValues, count: int) -> Windows:
    """All layers have the same window, or none."""
    return (values["sliding_window"],) * count


def some_slide(values: ConfigValues, count: int) -> Windows:
    """The rule of qwen2 and qwen3.

    With `use_sliding_window`, layers from `max_window_layers` on slide, unless `layer_types` is
    given.
    """
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = count if window is None else values["max_window_layers"]
    return _by_layer_types(values, count, window, lambda layer: layer >= first)


def by_kinds(values: ConfigValues, count: int) -> Windows:
    """`layer_types` states which layers slide; all slide without it."""
    if values.config.get("layer_types") is None:
        return all_slide(values, count)
    return _by_layer_types(values, count, values["sliding_window"], bool)


def three_of_four(values: ConfigValues, count: int) -> Windows:
    """All layers but 0, 4, 8, … slide, unless `layer_types` is given."""
    return _by_layer_types(values, count, values["sliding_window"], lambda layer: layer % 4 != 0)


def all_but_each_fourth(values: ConfigValues, count: int) -> Windows:
    """The rule of cohere2: all but each fourth layer slide (`sliding_window_pattern`)."""
    window = values["sliding_window"]
    if window is None:
        return (None,) * count
    pattern = values.config.get("sliding_window_pattern", 4)
    return _by_layer_types(values, count, window, lambda layer: (layer + 1) % pattern != 0)


def _by_layer_types(
    values: ConfigValues, count: int, window: int | None, slides: Callable[[int], bool]
) -> Windows:
    """Return windows as `layer_types` states them, or else `slides`."""
    kinds = values.config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if slides(layer) else FULL for layer in range(count)]
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UpcycleError(
            f"config.json: layer_types may hold {FULL} and {SLIDING}, not {shown(kinds)}."
        )
    if len(kinds) != count:
        raise UpcycleError(f"config.json: layer_types has {len(kinds)} entries for {count} layers.")
    if SLIDING in kinds and window is None:
        raise UpcycleError(
            "config.json: layer_types has sliding layers, but use_sliding_window is false "
            "or sliding_window is null."
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)
