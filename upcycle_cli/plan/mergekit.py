"""Reads a mergekit-moe file as options of `convert`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.plan.texts import place_of, read_yaml

_KNOWN = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts")
_NEUTRAL = {"shared_experts": [], "noise_scale": 0, "residual_scale": 1}
"""Unsupported keys, with the values that change nothing."""
Value = str | bool | list[str]
_UNIFORM_STD = 1 / math.sqrt(3)
"""The logit std of rows uniform in ±1/√H, on inputs of root mean square 1."""
_NORMAL: dict[str, Value] = {"router_init": "normal"}
_MEANINGS: dict[str, dict[str, dict[str, Value]]] = {
    "gate_mode": {
        "hidden": {},
        "random": _NORMAL,
        "uniform_random": {**_NORMAL, "router_logit_std": f"{_UNIFORM_STD:.6g}"},
    },
    "dtype": {name: {"dtype": name} for name in ("bfloat16", "float16", "float32")},
    # The architectures that both tools write alike: no shared expert, and the same routing.
    "architecture": {
        "mixtral": {"target": "mixtral"},
        "qwen3": {"target": "qwen3_moe"},
        "qwen3 moe": {"target": "qwen3_moe"},
    },
}
"""Options of `convert` that mean the same as a value of a mergekit key."""


def read_mergekit(path: Path) -> dict[str, Value]:
    """Return a file's settings as options of `convert`.

    Raises UpcycleError, which names the key, for a setting that has no equivalent here.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise _refused(path, "base_model", "is missing")
    _check_keys(path, content, _KNOWN)
    experts = content.get("experts")
    if not isinstance(experts, list) or not experts:
        raise _refused(path, "experts", "must be a list of models")
    places = []
    for i, expert in enumerate(experts):
        held = expert if isinstance(expert, dict) else {}
        _check_keys(path, held, _EXPERT, f"experts[{i}].")
        places.append(place_of(held.get("source_model"), path, f"experts[{i}].source_model"))
    top_k = content.get("experts_per_token", 2)
    if type(top_k) is not int or top_k < 1:
        raise _refused(path, "experts_per_token", f"must be a positive integer, not {shown(top_k)}")
    base, at, revision = place_of(content.get("base_model"), path, "base_model").partition("@")
    found: dict[str, Value] = {
        "source": base,
        "recipe": f"E{len(places)}G1T{top_k}",
        "experts_from": places,
        "source_experts": False,
    }
    if at:
        found["revision"] = revision
    if content.get("gate_mode", "hidden") == "hidden":
        found["positive_prompts"] = str(path)
    for key, meanings in _MEANINGS.items():
        value = content.get(key)
        meaning = {} if value is None else meanings.get(str(value).lower())
        if meaning is None:
            raise _refused(path, key, f"is {shown(value)}; use {', '.join(meanings)}")
        found |= meaning
    return found


def _check_keys(path: Path, given: dict[Any, Any], known: tuple[str, ...], at: str = "") -> None:
    for key, value in given.items():
        if key not in known and value is not None and value != _NEUTRAL.get(key):
            raise _refused(path, f"{at}{key}", "is not supported")


def _refused(path: Path, key: str, why: str) -> UpcycleError:
    return UpcycleError(f"{path}: {key} {why}.", f"upcycle reads {', '.join(_KNOWN)}.")
