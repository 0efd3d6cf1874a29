"""`upcycle.json`: what a conversion says about itself, for `verify`, `inspect` and people.

It holds no time, no duration and no absolute path: two runs give the same file, and nobody's home
directory ends up on the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from upcycle_cli.plan import Plan

FORMAT = 1


def record(plan: Plan, routers: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a conversion; `routers` maps tensor names to SHA-256 digests."""
    return {
        "format": FORMAT,
        "tool": {"name": "upcycle-cli", "version": version("upcycle-cli")},
        "numpy": version("numpy"),
        "source_type": plan.family.dense.model_type,
        "target_type": plan.family.target.model_type,
        "recipe": {"name": plan.recipe.name, **asdict(plan.recipe)},
        "expert_layout": plan.options.expert_layout,
        "dtype": plan.options.dtype,
        "untie_embeddings": plan.options.untie_embeddings,
        "factors": asdict(plan.factors),
        "promise": plan.promise,
        "parameters": {
            "total": plan.total_parameters,
            "active": plan.active_parameters,
            "dense": plan.dense_parameters,
        },
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "config_sha256": plan.source.config_digest,
            "files": [
                {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
                for shard in plan.source.shards
            ],
        },
        "routers": dict(routers),
        "plan_sha256": plan.digest,
    }
