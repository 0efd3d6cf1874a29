"""Completeness: is a directory the whole, unchanged result of a conversion, by its own word?

What can be seen without the dense model, in seconds: for a push, which must not publish half a
model or one that its own record does not describe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from upcycle_cli.checkpoint import CONFIG_NAME, RECORD_NAME, Checkpoint, open_checkpoint, read_json
from upcycle_cli.errors import UpcycleError
from upcycle_cli.families import TARGETS
from upcycle_cli.verification.facts import DamagedError, check_sizes
from upcycle_cli.verification.structure import own_failures


def find_incomplete(moe: Path) -> tuple[str, ...]:
    """Return what a directory lacks to be a complete upcycled checkpoint; nothing when it is one.

    Raises UpcycleError when it is no checkpoint at all, or one that upcycle did not make.
    """
    if moe.is_dir() and not (moe / RECORD_NAME).is_file():
        raise UpcycleError(
            f"{moe} was not made by upcycle (no {RECORD_NAME}).",
            f"To upload any other directory: hf upload REPO {moe}",
        )
    checkpoint = open_checkpoint(moe)
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in TARGETS:
        raise UpcycleError(
            f"{moe} is no MoE that upcycle makes: its model type is '{model_type}'.",
            "Give the directory that `upcycle convert` wrote.",
        )
    target = TARGETS[model_type]
    try:
        check_sizes(checkpoint, target)
    except DamagedError as error:
        return (error.message,)
    return (
        *own_failures(checkpoint, target, checkpoint.storage.names()),
        *_record_failures(checkpoint),
    )


def _record_failures(moe: Checkpoint) -> Iterator[str]:
    record = read_json(moe.path / RECORD_NAME)
    if record.get("target_type") != moe.config["model_type"]:
        yield (
            f"{RECORD_NAME}: target_type is {record.get('target_type')!r}, "
            f"{CONFIG_NAME} says {moe.config['model_type']}"
        )
    routers = record.get("routers")
    if not isinstance(routers, dict) or not routers:
        yield f"{RECORD_NAME}: routers is missing"
        return
    for name, digest in routers.items():
        entry = moe.tensors.get(name)
        if entry is None:
            yield f"{RECORD_NAME} records the router {name}, which is not there"
            continue
        with (moe.path / entry.shard).open("rb") as file:
            file.seek(entry.offset)
            found = hashlib.sha256(file.read(entry.nbytes)).hexdigest()
        if found != digest:
            yield f"{name} is not the router that {RECORD_NAME} records: it was changed since"
            return
