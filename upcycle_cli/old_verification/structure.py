"""Structure: do the MoE's files hold what its config.json implies, and the dense model's settings?

Names and shapes are held against transformers' own model, made without memory on the meta device;
the settings of the forward pass against the dense model's, each with its own architecture's
defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.header import TORCH_DTYPES
from upcycle_cli.checkpoint.storage import INDEX_NAME, WEIGHTS_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_LISTING_BYTES
from upcycle_cli.models.moe import Target
from upcycle_cli.old_verification.dtypes import dtype_failures
from upcycle_cli.old_verification.facts import Facts
from upcycle_cli.old_verification.headers import geometry_failures
from upcycle_cli.old_verification.listing import listing_failures
from upcycle_cli.old_verification.settings import (
    own_setting_failures,
    setting_failures,
    setting_notes,
)
from upcycle_cli.run.models import class_of
from upcycle_cli.verification.result import CheckResult, Findings

NAME = "structure"


def check_structure(facts: Facts, by_header: Sequence[str]) -> CheckResult:
    """Check names, shapes, dtypes, index and settings; `by_header` is what headers show wrong."""
    # This imports torch, which a push, the other caller of this module, does without.
    from upcycle_cli.old_verification.twin import twin_failures

    # Only the first few are shown, and a wrong setting is why many tensors seem to be.
    failures = (
        *setting_failures(facts),
        *by_header,
        # A config of other tensors can ask for more memory than there is.
        *(() if by_header else (*geometry_failures(facts), *twin_failures(facts))),
        *own_failures(facts.moe, facts.target, facts.moe_names, class_of(facts.target)),
        *dtype_failures(facts),
    )
    passed = (
        f"{len(facts.moe.tensors)} tensors have the names, shapes and dtypes that transformers "
        "gives them by config.json, and the settings of the forward pass are the dense model's."
    )
    metrics = {"tensors": len(facts.moe.tensors)}
    return Findings(failures).result(NAME, passed, metrics, " ".join(setting_notes(facts)))


def own_failures(
    moe: Checkpoint, target: Target, names: Sequence[str], architecture: str
) -> Iterator[str]:
    """Name what shows without the dense model and headers; `names` are all files beside the MoE."""
    for name, entry in moe.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            yield f"{name} is {entry.dtype}, and weights are {', '.join(TORCH_DTYPES)}"
    yield from _index_failures(moe)
    yield from listing_failures(names, moe)
    yield from own_setting_failures(moe, target, architecture)


def _index_failures(moe: Checkpoint) -> Iterator[str]:
    path = moe.path
    if not (path / INDEX_NAME).exists():
        return
    try:
        metadata = read_json(moe.storage.local(INDEX_NAME), MOST_LISTING_BYTES).get("metadata")
    except UpcycleError as error:
        yield error.message
        return
    if (path / WEIGHTS_NAME).exists():
        yield f"{INDEX_NAME} is there beside {WEIGHTS_NAME}, which loaders read instead"
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != moe.nbytes:
        yield (
            f"{INDEX_NAME}: metadata.total_size is {shown(total)}, and the tensors take "
            f"{moe.nbytes} bytes"
        )
