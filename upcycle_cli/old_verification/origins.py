"""Which virtual group is of which dense model, where an MoE was made of several.

What `upcycle.json` says of that is what the weights are then held to, group by group, against the
models that are given. Without it groups take their turns: the dense model's, and each of the others
in the order in which they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import RECORD_NAME
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.merged import Merged
from upcycle_cli.old_verification.sizes import DamagedError, dense_sizes, read_tensors

FIRST, MEAN = "first", "mean"


def find_merged(facts: Facts, others: Sequence[Checkpoint]) -> Merged | None:
    """Return what the MoE is made of, None where of the dense model alone.

    Raises UpcycleError where the record says that there are others and none is given, and for
    models of another shape; DamagedError for a record that makes no sense.
    """
    recorded = facts.record.data.get("experts_from")
    groups, mean = tuple(g % (len(others) + 1) for g in range(facts.expansion)), False
    if recorded is not None:
        groups, mean = _read_groups(recorded, facts.expansion), recorded["rest"] == MEAN
    if not others:
        if recorded is None:
            return None
        names = (shown(each.get("name")) for each in _models(recorded))
        raise UpcycleError(
            f"{facts.moe.path} has experts of several models, says its {RECORD_NAME}, and only "
            f"{facts.dense.path} is given.",
            f"Name the others with --experts-from, once for each: {', '.join(names)}.",
        )
    for other in others:
        _check_shapes(facts, other)
    if recorded is not None:
        others = _in_order(_models(recorded), others)
    return Merged(tuple(others), groups, mean)


def _models(recorded: object) -> list[Mapping[str, Any]]:
    models = recorded.get("models") if isinstance(recorded, dict) else None
    return [each for each in models if isinstance(each, dict)] if isinstance(models, list) else []


def _read_groups(recorded: Any, expansion: int) -> tuple[int, ...]:  # noqa: ANN401 - any JSON
    """Return the recorded model of each group; DamagedError where it is none."""
    models, held = _models(recorded), recorded if isinstance(recorded, dict) else {}
    listed = held.get("groups")
    groups = listed if isinstance(listed, list) else []
    known = all(type(group) is int and 0 <= group <= len(models) for group in groups)
    whole = len(groups) == expansion and 0 < len(models) == len(held["models"])
    if not (known and whole and held.get("rest") in (FIRST, MEAN)):
        raise DamagedError(
            f"{RECORD_NAME}: experts_from must have models, the model of each of {expansion} "
            f"groups, and whose the rest is ({FIRST} or {MEAN})"
        )
    return tuple(groups)


def _in_order(
    models: Sequence[Mapping[str, Any]], others: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """Return the models that are given in the order of the record; UpcycleError for others.

    A directory can have any name: they are known by config, headers and one of their matrices.
    """
    left, found = list(others), []
    for model in models:
        fits = next((each for each in left if _is_that(each, model)), None)
        if fits is None:
            raise UpcycleError(
                f"none of the models that are given is {shown(model.get('name'))}, of which there "
                f"are experts, says {RECORD_NAME}: their config or weights are not those.",
                "Name each model of which it was made with --experts-from.",
            )
        left.remove(fits)
        found.append(fits)
    if left:
        raise UpcycleError(f"no expert is of {left[0].path}, says {RECORD_NAME}.", "Leave it out.")
    return found


def _is_that(model: Checkpoint, recorded: Mapping[str, Any]) -> bool:
    """Whether a model is the recorded one, as far as that can be told without reading it all."""
    files = [
        {"name": shard.name, "size": shard.size, "header_sha256": shard.digest}
        for shard in model.shards
    ]
    said = {"config_sha256": model.config_digest, "files": files}
    if not said.items() <= recorded.items():
        return False
    sample = recorded.get("sample")
    held = sample if isinstance(sample, dict) else {}
    name = str(held.get("tensor"))
    return name in model.tensors and held.get("sha256") == model.tensor_digest(name)


def _check_shapes(facts: Facts, other: Checkpoint) -> None:
    dense_sizes(other, facts.family)  # raises
    here, there = (
        {name: entry.shape for name, entry in read_tensors(model).items()}
        for model in (facts.dense, other)
    )
    if here != there:
        name = min(name for name in here | there if here.get(name) != there.get(name))
        raise UpcycleError(
            f"{other.path} has other tensors than {facts.dense.path}: {name} differs.",
            "Experts of one MoE are made of models of one shape.",
        )
