"""`upcycle.json`, the record of a conversion, and the other files beside the weights.

The record has no time, duration or absolute path: two runs write the same file, and no home
directory is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.storage import CONFIG_NAME, INDEX_NAME, RECORD_NAME
from upcycle_cli.core import safe_files
from upcycle_cli.models.shipped import CODE_NAME
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.ownership import entry_of
from upcycle_cli.write.staging import Staging
from upcycle_cli.write.writer import Written

FORMAT = 1


def record(plan: Plan, written: Written, staging: Staging) -> dict[str, Any]:
    """Return the record of a conversion, after all files but record, card and checksums exist."""
    return {
        "format": FORMAT,
        "tool": {"name": "upcycle-cli", "version": version("upcycle-cli")},
        "numpy": version("numpy"),
        **described(plan),
        "source": plan.source.origin,
        **_merged(plan),
        "routers": dict(written.routers),
        **_picked(plan.how, "calibration", "router_file", "order_file"),
        "plan_sha256": plan.digest,
        "files": [entry_of(staging.path / name, name) for name in sorted(plan.file_names)],
    }


def described(plan: Plan) -> dict[str, Any]:
    """Return the part of the record that follows from the plan alone."""
    how = plan.how
    return {
        "source_type": plan.source.config["model_type"],
        "target_type": plan.target.outer_type,
        **({} if plan.growing else {"target": plan.family.choice}),
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


def _merged(plan: Plan) -> dict[str, Any]:
    found = plan.how.get("experts_from")
    if found is None:
        return {}
    # Models of one base have equal headers: a matrix that made experts, or an adapter's, differs.
    dense, last, models = plan.family.dense, plan.family.layers[-1], []
    for other in plan.sources[1:]:
        name = dense.prefix(last) + dense.mlp(plan.source.tensors, last)[0].name
        name = name if other.adapter is None else other.changed[-1]
        sample = {"tensor": name, "sha256": other.tensor_digest(name)}
        models.append(other.origin | {"sample": sample})
    return {"experts_from": found | {"models": models}}


def _picked(how: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: how[key] for key in keys if key in how}


def index_of(plan: Plan) -> dict[str, Any] | None:
    """Return the index that maps tensors to files; None where there is one file."""
    if len(plan.shards) == 1:
        return None
    return {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.total_parameters},
        "weight_map": {
            tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors
        },
    }


def json_bytes(value: object) -> bytes:
    """Return a value as indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_metadata(plan: Plan, staging: Staging, written: Written) -> None:
    """Write every file of the output except the weights, the card and the checksums."""
    staging.write(CONFIG_NAME, json_bytes(plan.config))
    if (index := index_of(plan)) is not None:
        staging.write(INDEX_NAME, json_bytes(index))
    if plan.code is not None:
        staging.write(CODE_NAME, plan.code.encode())
    for file in plan.source.companions:
        staging.write(file.name, plan.source.storage.companion(file))
    staging.write(RECORD_NAME, json_bytes(record(plan, written, staging)))


def write_checksums(plan: Plan, directory: Path) -> None:
    """Write SHA256SUMS, without the card: an edit or a push changes that."""
    names = (*plan.file_names, RECORD_NAME)
    digests = {name: safe_files.sha256_of(directory / name) for name in names}
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))  # as sha256sum's
    safe_files.write_whole(directory / safe_files.CHECKSUMS_NAME, "".join(lines).encode())
