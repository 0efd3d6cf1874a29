"""Several processes on one conversion, started by PyTorch's launcher on a shared file system.

`torchrun --nnodes … --nproc-per-node … -m upcycle_cli convert …` sets RANK and WORLD_SIZE. Rank 0
leads: it checks, owns the output directory, writes what only one can write, and publishes after
all have succeeded. Every rank writes its share of the shards. Without a launcher there is a team of
one, and nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from upcycle_cli.errors import ResumableError, UpcycleError
from upcycle_cli.plan import Shard

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # ranks wait for the slowest one, however large the model


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, 0 without one."""
    return int(os.environ.get("RANK", "0")) if launched_size() > 1 else 0


def launched_size() -> int:
    """Return the number of processes that the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """The processes of one conversion; a context that joins and leaves the process group."""

    def __init__(self) -> None:
        self.rank, self.size = launched_rank(), launched_size()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def exchange(self, value: _T) -> list[_T]:
        """Give every rank the values of all, by rank; returns when all have come this far.

        Raises ResumableError when a rank has died.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[_T] = [value] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ResumableError(
                "another rank has died; nothing was published.",
                "Its own output says why. The same command goes on from what is complete.",
            ) from error
        return values

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """Let every rank make a value, and give all of them to every rank.

        Raises what the first rank to fail raised, on every rank.
        """
        outcome: _T | UpcycleError
        try:
            outcome = make()
        except OSError as error:
            outcome = ResumableError(
                f"writing {error.filename or 'the output'} failed: {error.strerror}.",
                "What is complete is kept: the same command goes on from there.",
            )
        except UpcycleError as error:
            outcome = error
        values = []
        for rank, found in enumerate(self.exchange(outcome)):
            if isinstance(found, UpcycleError):
                if self.size > 1:
                    raise type(found)(f"rank {rank}: {found.message}", found.hint)
                raise found
            values.append(found)
        return values

    def share_of(self, shards: Sequence[Shard], rank: int) -> list[Shard]:
        """Return the shards that a rank is to write, balanced by bytes."""
        loads = [0] * self.size
        own = []
        for shard in sorted(shards, key=lambda shard: -shard.nbytes):
            writer = loads.index(min(loads))
            loads[writer] += shard.nbytes
            if writer == rank:
                own.append(shard)
        return sorted(own, key=lambda shard: shard.name)
