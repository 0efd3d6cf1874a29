"""One conversion by several processes, which torchrun starts on a shared file system.

torchrun sets RANK and WORLD_SIZE. Rank 0 checks, owns the staging directory, writes the small files
and publishes once all have succeeded. Every rank writes its share of the shards. Without torchrun
the team is one process, and nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Self, TypeVar

from upcycle_cli.core.callbacks import Progress
from upcycle_cli.core.errors import ResumableError, UpcycleError, shown
from upcycle_cli.hub.client import run_interruptibly
from upcycle_cli.plan.output import Shard
from upcycle_cli.plan.plan import Plan
from upcycle_cli.write.staging import Staging
from upcycle_cli.write.writer import WriteOptions, Written, write_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # ranks wait for the slowest one, however large the model
_JOIN_SECONDS = 300
"""How long ranks wait for all to start, unless UPCYCLE_JOIN_SECONDS says otherwise."""
_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "RANK")


class Team:
    """The processes of one conversion, or one process alone; a context that leaves it."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.group: ProcessGroup | None = None

    @classmethod
    def launched(cls) -> Self:
        """Join the team that torchrun has started, or return a team of one; UpcycleError."""
        size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
        missing = [name for name in _NEEDED if not os.environ.get(name)] if size > 1 else []
        if missing or not 0 <= rank < size:
            words = f", without {', '.join(missing)}" if missing else ""
            raise _leftover(f"RANK is {rank} and WORLD_SIZE is {size}{words}.")
        team = cls(rank, size)
        if size > 1:
            run_interruptibly(team._join)
        return team

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def _join(self) -> None:
        """Form a process group; UpcycleError if some processes do not connect."""
        import torch.distributed as dist

        seconds = _number("UPCYCLE_JOIN_SECONDS", _JOIN_SECONDS)
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
            self.group = dist.new_group(timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise _leftover(
                f"WORLD_SIZE is {self.size}, but not all of these processes connected to "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {seconds} s."
            ) from error

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def exchange(self, value: _T) -> list[_T]:
        """Give every rank the values of all ranks; ResumableError if one has died."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[_T] = [value] * self.size
        try:
            dist.all_gather_object(values, value, self.group)
        except RuntimeError as error:
            raise ResumableError(
                "another rank has died; nothing was published.",
                "Its own output says why. The same command resumes from the finished files.",
            ) from error
        return values

    def agree(self, make: Callable[[], _T]) -> _T:
        """Make a value, and return it once all ranks have; raise the first failure on all."""
        failure: UpcycleError | None = None
        try:
            own = make()
        except OSError as error:
            failure = ResumableError(
                f"writing {error.filename or 'the output'} failed: {error.strerror}.",
                "Finished files are kept: the same command resumes from there.",
            )
        except UpcycleError as error:
            failure = error
        for rank, found in enumerate(self.exchange(failure)):
            if found is not None:
                where = f"rank {rank}: " if self.size > 1 else ""
                raise type(found)(where + found.message, found.hint)
        return own

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """Let every rank make a value; give all values to every rank, or raise as `agree`."""
        return self.exchange(self.agree(make))

    def share_of(self, shards: Sequence[Shard], rank: int) -> list[Shard]:
        """Return the shards that a rank writes, balanced by bytes."""
        loads = [0] * self.size
        own = []
        for shard in sorted(shards, key=lambda shard: -shard.nbytes):
            writer = loads.index(min(loads))
            loads[writer] += shard.nbytes
            if writer == rank:
                own.append(shard)
        return sorted(own, key=lambda shard: shard.name)


def write_together(
    plan: Plan, enter: Callable[[], Staging], options: WriteOptions, team: Team, progress: Progress
) -> Written:
    """Write this rank's share of the shards; return what all ranks have written."""
    own = team.share_of(plan.shards, team.rank)
    total = Written()

    def write_own() -> Written:
        return write_weights(plan, own, enter(), progress=progress.advance, options=options)

    for part in team.gather(write_own):
        total.add(part)
    # By layer, so that the record does not depend on the number of ranks.
    names = [tensor.name for tensor in plan.tensors if tensor.name in total.routers]
    return replace(total, routers={name: total.routers[name] for name in names})


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise _leftover(f"{variable} is {shown(text)}, which is not a number.") from None


def _leftover(message: str) -> UpcycleError:
    return UpcycleError(
        message,
        "Start all processes with torchrun. For a single process, unset WORLD_SIZE and RANK.",
    )
