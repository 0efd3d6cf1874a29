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
from typing import TYPE_CHECKING, Self, TypeVar

from upcycle_cli.core.errors import ResumableError, UpcycleError, shown
from upcycle_cli.hub.client import run_interruptibly
from upcycle_cli.plan.output import Shard

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # ranks wait for the slowest one, however large the model
_JOIN_SECONDS = 300
"""By then all have to be there, unless UPCYCLE_JOIN_SECONDS says otherwise."""
_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "RANK")


class Team:
    """The processes of one conversion, or one process alone; a context that joins and leaves."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def launched(cls) -> Self:
        """Return the team that a launcher has started, if any; UpcycleError for a half of one."""
        size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
        if not 0 <= rank < size:
            raise _leftover(f"RANK is {rank} and WORLD_SIZE is {size}: there is no such process.")
        if size > 1:
            missing = [name for name in _NEEDED if not os.environ.get(name)]
            if missing:
                raise _leftover(f"WORLD_SIZE is {size}, without {', '.join(missing)}.")
            _number("MASTER_PORT", 0)
        return cls(rank, size)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.size > 1:
            run_interruptibly(self._join)
        return self

    def _join(self) -> None:
        """Make all a process group; UpcycleError when some do not come."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        seconds = _number("UPCYCLE_JOIN_SECONDS", _JOIN_SECONDS)
        try:
            store: Store
            store, _, _ = next(
                rendezvous("env://", self.rank, self.size, timeout=timedelta(seconds=seconds))
            )
            names = [f"upcycle/{rank}" for rank in range(self.size)]
            store.set(names[self.rank], "here")
            store.wait(names, timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            raise _leftover(
                f"WORLD_SIZE says that {self.size} processes share this, and within {seconds} s "
                f"not all of them came to {place}."
            ) from error
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
        )

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def exchange(self, value: _T) -> list[_T]:
        """Give every rank the values of all, once all are here; ResumableError if one has died."""
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

    def agree(self, make: Callable[[], _T]) -> _T:
        """Make a value, and return it once all ranks have; raise what the first to fail raised."""
        failure: UpcycleError | None = None
        try:
            own = make()
        except OSError as error:
            failure = ResumableError(
                f"writing {error.filename or 'the output'} failed: {error.strerror}.",
                "What is complete is kept: the same command goes on from there.",
            )
        except UpcycleError as error:
            failure = error
        for rank, found in enumerate(self.exchange(failure)):
            if found is not None and self.size > 1:
                raise type(found)(f"rank {rank}: {found.message}", found.hint)
            if found is not None:
                raise found
        return own

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """Let every rank make a value, and give all of them to every rank, or raise as `agree`."""
        return self.exchange(self.agree(make))

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


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise _leftover(f"{variable} is {shown(text)}, which is no number.") from None


def _leftover(message: str) -> UpcycleError:
    return UpcycleError(
        message,
        "Start all of them with torchrun. If you started one process, unset WORLD_SIZE and RANK.",
    )
