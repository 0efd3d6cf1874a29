"""`upcycle.json`: what a conversion says about itself, for `verify`, `inspect` and people.

And how it and the other JSON files are written. It holds no time, no duration and no absolute path:
two runs give the same file, and nobody's home directory ends up on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, INDEX_NAME, RECORD_NAME
from upcycle_cli.core.dir_handle import Folder
from upcycle_cli.core.safe_files import (
    CHECKSUMS_NAME,
    checksums_text,
    header_digest,
    locate,
    open_regular,
)
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.running_stats import Moments
from upcycle_cli.write.writer import Written

FORMAT = 1


def record(
    plan: Plan,
    routers: Mapping[str, str],
    folder: Folder,
    drawn: Mapping[str, Moments] | None = None,
) -> dict[str, Any]:
    """Return the record of a conversion; `routers` maps tensor names to SHA-256 digests.

    `drawn` is what the draws of experts went by, by stream; `folder` holds the output but for the
    record, the card and the checksums. Raises OSError or UpcycleError when one of its files is not
    there, or is not of our making.
    """
    how = plan.how
    return {
        "format": FORMAT,
        "tool": {"name": "upcycle-cli", "version": version("upcycle-cli")},
        "numpy": version("numpy"),
        **described(plan),
        "source": _origin(plan.source),
        **_merged(plan),
        "routers": dict(routers),
        **_picked(how, "calibration", "router_file", "order_file"),
        **({"perturbation": _perturbation(drawn)} if drawn else {}),
        "plan_sha256": plan.digest,
        "files": list(_listed(plan, folder)),
    }


def described(plan: Plan) -> dict[str, Any]:
    """Return what the record says of a conversion by its plan alone, whatever data it reads."""
    how = plan.how
    return {
        "source_type": plan.source.config["model_type"],
        "target_type": plan.target.outer_type,
        **({"target": plan.family.choice} if isinstance(plan, Plan) else {}),
        **_picked(how, "recipe", "growth"),
        "moe_layers": list(plan.layers),
        "expert_layout": plan.expert_layout,
        "dtype": plan.options.dtype,
        "max_shard_bytes": plan.options.max_shard_bytes,
        "untie_embeddings": plan.options.untie_embeddings,
        **_picked(how, "factors"),
        "promise": plan.promise,
        "parameters": {
            "total": plan.total_parameters,
            "active": plan.active_parameters,
            "source" if "growth" in how else "dense": plan.dense_parameters,
        },
    }


def _origin(source: Checkpoint) -> dict[str, Any]:
    return {
        "name": source.name,
        "revision": source.revision,
        "config_sha256": source.config_digest,
        "files": [
            {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
            for shard in source.shards
        ],
    }


def _merged(plan: Plan) -> dict[str, Any]:
    found = plan.merge_record
    if found is None:
        return {}
    # Headers do not tell fine-tuned models of one base apart: a matrix that made experts does.
    dense, last = plan.family.dense, plan.family.layers[-1]
    name = dense.prefix(last) + dense.mlp(plan.source.tensors, last)[0].name
    models = [
        _origin(other) | {"sample": {"tensor": name, "sha256": other.tensor_digest(name)}}
        for other in plan.sources[1:]
    ]
    return {"experts_from": found | {"models": models}}


def _picked(how: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: how[key] for key in keys if key in how}


def _perturbation(found: Mapping[str, Moments]) -> list[dict[str, Any]]:
    """Return the mean and standard deviation that draws followed, by layer and part.

    They are taken over all experts of a layer: over the matrices that got noise, or over the
    neurons that were replaced. `found` is by stream.
    """
    layers: dict[int, dict[str, list[Moments]]] = {}
    for stream, moments in found.items():
        _, layer, _, _, part = stream.split(".")
        layers.setdefault(int(layer), {}).setdefault(part, []).append(moments)
    return [
        {"layer": layer}
        | {
            part: {"mean": every.mean, "std": every.std}
            for part in sorted(parts)
            for every in [Moments.pooled(parts[part])]
        }
        for layer, parts in sorted(layers.items())
    ]


def _listed(plan: Plan, folder: Folder) -> Iterator[dict[str, Any]]:
    for name in sorted(plan.file_names):
        with folder.read_own(name) as file:
            entry = {"name": name, "size": os.fstat(file.fileno()).st_size}
            if name.endswith(".safetensors"):
                yield entry | {"header_sha256": header_digest(file)}
            else:
                yield entry | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_index(plan: Plan, folder: Folder) -> None:
    """Write the index that says which file holds which tensor, when there are several."""
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.total_parameters},
        "weight_map": {
            tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors
        },
    }
    write_json(folder, INDEX_NAME, index)


def write_json(folder: Folder, name: str, value: object) -> None:
    """Write a value as indented JSON with a final newline."""
    folder.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_metadata(plan: Plan, folder: Folder, written: Written) -> None:
    """Write every file of the output except the weights, the card and the checksums."""
    write_index(plan, folder)
    write_json(folder, CONFIG_NAME, plan.config)
    if plan.code is not None:
        folder.write(CODE_NAME, plan.code.encode())
    for file in plan.source.companions:
        with (
            open_regular(locate(plan.source.path, file.name)) as original,
            open(folder.create(file.name), "wb") as copy,  # noqa: PTH123 - a descriptor
        ):
            shutil.copyfileobj(original, copy)
    write_json(folder, RECORD_NAME, record(plan, written.routers, folder, written.moments))


def write_checksums(plan: Plan, folder: Folder) -> None:
    """Write SHA256SUMS without the card, which changes when it is edited or pushed."""
    digests = {}
    for name in (*plan.file_names, RECORD_NAME):
        with folder.read(name) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    folder.write(CHECKSUMS_NAME, checksums_text(digests).encode())
