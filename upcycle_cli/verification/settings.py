"""Compare settings by value: config.json and the record with the plan, key by key.

Where config.json differs, it may still be what transformers saves of the plan's config. Then
transformers' own config class reads both, and they are compared by what they mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME
from upcycle_cli.core.errors import shown
from upcycle_cli.models.wrappers import nested_configs
from upcycle_cli.plan.output import Role
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.record import described

Settings = Mapping[str, Any]
_REWRITTEN: Mapping[str, str] = {
    "_name_or_path": "names the directory that the model was loaded from",
    "transformers_version": "names the version that saved it",
}
"""Keys of config.json that transformers sets when it saves a model, each with its meaning."""
_LEFT_OUT = ("dtype", "tie_word_embeddings")
"""Keys that some versions of transformers save under another name, or only if no default."""


def same(one: object, other: object) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true are three."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def differences(wanted: object, held: object, path: str = "") -> Iterator[str]:
    """Yield each difference of a JSON value from the one that it should be, in words."""
    if same(wanted, held):
        return
    if isinstance(wanted, Mapping) and isinstance(held, Mapping):
        for key in {**wanted, **held}:
            where = f"{path}.{key}" if path else str(key)
            if key not in held:
                yield f"{where} is missing, and should be {shown(wanted[key])}"
            elif key not in wanted:
                yield f"{where} is {shown(held[key])}, and should not be there"
            else:
                yield from differences(wanted[key], held[key], where)
    elif isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held):
        for index, (one, other) in enumerate(zip(wanted, held, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    else:
        yield f"{path} is {shown(held)} instead of {shown(wanted)}"


def config_failures(
    plan: Plan, moe: Checkpoint, record: Settings, notes: list[str]
) -> Iterator[str]:
    """Compare config.json with the plan's."""
    wanted: Settings = json.loads(json.dumps(plan.config))
    found, stored = [*differences(wanted, moe.config)], _main_dtype(moe)
    if not found:
        return
    if _means_the_same(_with_dtype(wanted, moe.config, stored), moe.config):
        notes.append(f"{CONFIG_NAME} was saved again by transformers, and says the same.")
        return
    yield from (f"{CONFIG_NAME}: {each}" for each in found)
    tool, this = record.get("tool"), version("upcycle-cli")
    before = tool.get("version") if isinstance(tool, dict) else None
    if before != this:
        notes.append(
            f"It was made by upcycle {before}, and this is {this}: that version may have written "
            "other settings. Verify with it, or convert again."
        )


def _main_dtype(moe: Checkpoint) -> str:
    """Return the dtype that most bytes of an MoE have, by torch's name."""
    nbytes = Counter[str]()
    for entry in moe.tensors.values():
        nbytes[entry.dtype] += entry.nbytes
    return TORCH_DTYPES.get(nbytes.most_common(1)[0][0], "")


def _with_dtype(wanted: Settings, held: Settings, stored: str) -> Settings:
    """Name the dtype where transformers names the one it loaded, which `weights` compares."""
    named = {key: stored for key in ("dtype", "torch_dtype") if held.get(key) == stored}
    nested = {
        key: _with_dtype(wanted[key], held[key], stored)
        for key in nested_configs(wanted)
        if isinstance(held.get(key), dict)
    }
    return {**wanted, **nested, **named}


def _means_the_same(wanted: Settings, held: Settings) -> bool:
    """Whether a config is one that transformers may save of another one.

    Each key must mean the same to transformers. Since other engines read the file itself, each
    value must also be the other config's, or the one that transformers writes for it, and no key
    may be missing that transformers writes.
    """
    from upcycle_cli.run.models import TransformersError, saved_config

    try:
        (written, meant), (_, held_meant) = saved_config(wanted), saved_config(held)
    except TransformersError:
        return False
    for key in {*meant, *held_meant, *held} - _REWRITTEN.keys():
        if not same(meant.get(key), held_meant.get(key)):
            return False
        known = [side[key] for side in (wanted, written, meant) if key in side]
        if key in held and not any(same(held[key], value) for value in known):
            return False
    kept = {key for key in wanted.keys() & written if wanted[key] is not None}
    return kept <= {*held, *_REWRITTEN, *_LEFT_OUT}


def record_failures(plan: Plan, record: Settings) -> Iterator[str]:
    """Compare what the record states beside its recipe with the plan of that recipe."""
    wanted: dict[str, Any] = json.loads(json.dumps(described(plan)))
    layout = wanted.pop("expert_layout")
    held = {key: record[key] for key in wanted}
    if layout == record["expert_layout"]:  # else transformers has changed it, and names with it
        wanted["routers"] = sorted(t.name for t in plan.tensors if t.role is Role.ROUTER)
        routers = record["routers"]  # training changes their digests
        held["routers"] = sorted(routers) if isinstance(routers, dict) else routers
    source, dense = record.get("source"), plan.source
    # A conversion of a local directory recorded no revision; the weights are compared all the same.
    if dense.repo is not None and isinstance(source, dict) and source.get("revision") is not None:
        wanted["source"] = {"name": dense.name, "revision": dense.revision}
        held["source"] = {key: source.get(key) for key in wanted["source"]}
    yield from (f"{RECORD_NAME}: {each}" for each in differences(wanted, held))
