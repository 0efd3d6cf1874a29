"""Which layers of a dense model have a window, by the rules of their types."""

from __future__ import annotations

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.dense import FULL, SLIDING, Windows
from upcycle_cli.models.settings import Values


def all_slide(values: Values, count: int) -> Windows:
    """Read the one window of all layers, or that they have none."""
    return (values["sliding_window"],) * count


def some_slide(values: Values, count: int) -> Windows:
    """Read the windows by the rule of qwen2 and qwen3.

    A layer slides when `use_sliding_window` is true and its index is at least
    `max_window_layers`, unless `layer_types` says otherwise.
    """
    window = values["sliding_window"] if values["use_sliding_window"] else None
    kinds = values.config.get("layer_types")
    if kinds is None:
        first_sliding = count if window is None else values["max_window_layers"]
        kinds = [SLIDING if i >= first_sliding else FULL for i in range(count)]
    return _read_kinds(kinds, window, count)


def _read_kinds(kinds: object, window: int | None, count: int) -> Windows:
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


def by_kinds(values: Values, count: int) -> Windows:
    """Read the windows where layer_types alone says which layers slide; all do without it."""
    window, kinds = values["sliding_window"], values.config.get("layer_types")
    if kinds is None:
        return (window,) * count
    return _read_kinds(kinds, window, count)


def three_of_four(values: Values, count: int) -> Windows:
    """Read the windows where, unless layer_types says it, only layers 0, 4, 8 and so on see all."""
    kinds = values.config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if layer % 4 else FULL for layer in range(count)]
    return _read_kinds(kinds, values["sliding_window"], count)


def all_but_each_fourth(values: Values, count: int) -> Windows:
    """Read the windows by the rule of cohere2, whose pattern may be another number than four."""
    window, kinds = values["sliding_window"], values.config.get("layer_types")
    if window is None:
        return (None,) * count
    if kinds is None:
        pattern = values.config.get("sliding_window_pattern", 4)
        kinds = [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]
    return _read_kinds(kinds, window, count)
