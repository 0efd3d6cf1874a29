"""A request to merge several models, which opens them and checks that they fit the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.hub.remote_checkpoint import open_source, split_revision
from upcycle_cli.plan.compatibility import check_compatible
from upcycle_cli.plan.merge import Merge, Rest


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Other models whose MLPs become experts: directories, or repos as REPO or REPO@REVISION.

    With `source_too` the source makes the first experts; without it, only the named models do, and
    the source can be one of them.
    """

    experts_from: Sequence[Path | str]
    rest: Rest = Rest.FIRST
    source_too: bool = True

    def open(self, source: Checkpoint) -> Merge | None:
        """Open the models; None if all are the source. UpcycleError if one does not fit it."""
        models, cycle = [source], [0] * self.source_too
        for place in self.experts_from:
            model = open_source(*split_revision(str(place)))
            same = (i for i, each in enumerate(models) if each.path.samefile(model.path))
            cycle.append(next(same, len(models)))
            models += [model] * (cycle[-1] == len(models))
        if len(models) == 1:
            return None
        others = check_compatible(source, models[1:])
        return Merge(others=others, cycle=tuple(cycle), rest=Rest(self.rest))
