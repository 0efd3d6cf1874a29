"""Completeness: is a directory the whole, unchanged result of a conversion, by its own word?

What can be seen without the dense model and without torch, at once: for a push, which must not
publish half a model or one that its own record does not describe. Whether tensors and config.json
belong to each other is not asked again: the record has digests of both, of the headers and config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, RECORD_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.models.families import is_target
from upcycle_cli.old_verification.sizes import DamagedError, find_target
from upcycle_cli.old_verification.structure import own_failures


def open_upcycled(directory: Path) -> Checkpoint:
    """Open the MoE in a directory; UpcycleError for no checkpoint, or one that is not upcycle's."""
    if directory.is_dir() and not (directory / RECORD_NAME).is_file():
        raise UpcycleError(
            f"{directory} was not made by upcycle (no {RECORD_NAME}).",
            f"To upload any other directory: hf upload REPO {directory}",
        )
    moe = open_checkpoint(directory)
    if not is_target(moe.config):
        raise UpcycleError(
            f"{directory} is no MoE that upcycle makes: its model type is "
            f"{shown(moe.config.get('model_type'))}.",
            "Give the directory that `upcycle convert` wrote.",
        )
    return moe


def find_incomplete(moe: Checkpoint) -> tuple[str, ...]:
    """Return what an upcycled checkpoint lacks to be complete and unchanged, if anything."""
    try:
        target = find_target(moe)
    except DamagedError as error:
        return (error.message,)
    record = read_json(moe.storage.local(RECORD_NAME))
    return (
        *own_failures(moe, target, moe.storage.names(), target.architecture),
        *record_failures(moe, record),
    )


def record_failures(moe: Checkpoint, record: Mapping[str, Any]) -> Iterator[str]:
    """Name what `upcycle.json` says of the MoE beside it that is not so."""
    recorded, model_type = record.get("target_type"), moe.config["model_type"]
    if recorded != model_type:
        yield f"{RECORD_NAME}: target_type is {shown(recorded)}, {CONFIG_NAME} says {model_type}"
    routers = record.get("routers")
    if not isinstance(routers, dict) or not routers:
        yield f"{RECORD_NAME}: routers is missing"
        return
    for name, digest in routers.items():
        if name not in moe.tensors:
            yield f"{RECORD_NAME} records the router {name}, which is not there"
        elif moe.tensor_digest(name) != digest:
            yield f"{name} is not the router that {RECORD_NAME} records (SHA-256 differs)"
