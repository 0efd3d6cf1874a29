"""Reads a mergekit-moe file as options of `convert`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, read_small

_TARGETS = {"mixtral": "mixtral", "qwen3": "qwen3_moe", "qwen3 moe": "qwen3_moe"}
"""mergekit's names of the architectures that both tools write alike."""
_GATES = {
    "hidden": "prompts",
    "random": "normal",
    "uniform_random": "normal",
}
"""mergekit's gate_mode, and the --router-init that means the same."""
_KNOWN = {
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture"),
    "shared_experts",
}
_EXPERT = {"source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"}
_UNIFORM_STD = 1 / math.sqrt(3)
"""The logit std of rows uniform in ±1/√H, on inputs of root mean square 1."""

Value = str | bool | list[str]


def read_mergekit(path: Path) -> dict[str, Value]:
    """Return a file's settings as options of `convert`.

    Raises UpcycleError, which names the key, for a setting that has no equivalent here.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise _refused(path, "base_model", "is missing")
    for key in content.keys() - _KNOWN:
        raise _refused(path, str(key), "is not a key that upcycle reads")
    if content.get("shared_experts"):
        raise _refused(path, "shared_experts", "asks for a shared expert made of a model")
    experts = content.get("experts")
    if not isinstance(experts, list) or not experts:
        raise _refused(path, "experts", "must be a list of models")
    places = [_expert(path, number, expert) for number, expert in enumerate(experts)]
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
    return found | _gates(path, content) | _files(path, content)


def _gates(path: Path, content: Mapping[str, Any]) -> dict[str, Value]:
    mode = content.get("gate_mode", "hidden")
    if mode not in _GATES:
        raise _refused(
            path,
            "gate_mode",
            f"is {shown(mode)}; use hidden, random or uniform_random",
        )
    if mode == "hidden":
        return {"positive_prompts": str(path)}
    found: dict[str, Value] = {"router_init": _GATES[mode]}
    if mode == "uniform_random":
        found["router_logit_std"] = f"{_UNIFORM_STD:.6g}"
    return found


def _files(path: Path, content: Mapping[str, Any]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    dtype, architecture = content.get("dtype"), content.get("architecture")
    if dtype is not None:
        if dtype not in ("bfloat16", "float16", "float32"):
            raise _refused(path, "dtype", f"is {shown(dtype)}; use bfloat16, float16 or float32")
        found["dtype"] = dtype
    if architecture is not None:
        target = _TARGETS.get(str(architecture).lower())
        if target is None:
            raise _refused(
                path,
                "architecture",
                f"is {shown(architecture)}, which mergekit writes with a shared expert or another "
                "routing; use mixtral or qwen3",
            )
        found["target"] = target
    return found


def _expert(path: Path, number: int, expert: object) -> str:
    key = f"experts[{number}]"
    if not isinstance(expert, dict):
        raise _refused(path, key, "must have a source_model")
    for odd in expert.keys() - _EXPERT:
        raise _refused(path, f"{key}.{odd}", "is not a key that upcycle reads")
    for name, neutral in (("noise_scale", 0), ("residual_scale", 1)):
        if expert.get(name) not in (None, neutral):
            raise _refused(
                path,
                f"{key}.{name}",
                "changes weights, but experts keep their model's weights bit for bit",
            )
    return place_of(expert.get("source_model"), path, f"{key}.source_model")


def place_of(value: object, path: Path, key: str = "source_model") -> str:
    """Return a model in the form of `--experts-from`; raises UpcycleError."""
    held: Any = value
    if isinstance(held, dict):
        for odd in held.keys() - {"model"}:
            if held[odd] is not None:
                raise _refused(path, f"{key}.{odd}", "asks for a change of the model")
        held = held.get("model")
    if isinstance(held, dict):
        name, revision = held.get("path"), held.get("revision")
        held = name if revision is None else f"{name}@{revision}"
    if not isinstance(held, str) or not held.strip():
        raise _refused(path, key, f"must name a model, not {shown(value)}")
    if "+" in held and not Path(held).exists():
        raise _refused(path, key, f"is {shown(held)}: merge the adapter into its model first")
    return held


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any value
    """Return the plain values of a small YAML or JSON file; raises UpcycleError."""
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(read_small(path, MOST_JSON_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} is not YAML: {shown(str(error))}.") from error


def _refused(path: Path, key: str, why: str) -> UpcycleError:
    return UpcycleError(f"{path}: {key} {why}.", "docs/merging.md lists the keys that are read.")
