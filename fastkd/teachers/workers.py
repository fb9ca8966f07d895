"""The worker that this process belongs to: its rank among the workers, and the processes that make it up."""

import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar

from ..cache import CacheError
from .tensor_parallel import ParallelGroup

T = TypeVar("T")


class Group(Protocol):
    """The processes that make up one worker; one of them is the leader."""

    @property
    def leader(self) -> bool:
        """Whether this process is the leader."""
        ...

    def share(self, value: T) -> T:
        """The leader's value, in each process. All of them have to call it."""
        ...


class SingleProcess:
    """The group of a worker that is one process."""

    leader = True

    def share(self, value: T) -> T:
        """The value."""
        return value


class Worker(NamedTuple):
    """A worker: its rank, the number of workers, and the processes that make it up."""

    rank: int
    world_size: int
    group: Group

    def leave(self) -> None:
        """Destroy the process group, if there is one: its threads would sometimes abort an exiting process."""
        if isinstance(self.group, ParallelGroup):
            self.group.leave()


def rank_and_world_size(
    rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """The rank of this process and the number of processes: as given, else by torchrun's variables, else by SLURM's,
    else 0 of 1. CacheError if they do not fit together."""
    if (rank is None) != (world_size is None):
        raise CacheError(f"rank, world_size: got {rank} and {world_size}; expected both, or neither.")
    if rank is None or world_size is None:
        rank, world_size = 0, 1
        for rank_name, size_name in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank_name in environment and size_name in environment:
                rank, world_size = int(environment[rank_name]), int(environment[size_name])
                break
    if not 0 <= rank < world_size:
        raise CacheError(f"rank: got {rank} of a world_size of {world_size}; expected 0 to {world_size - 1}.")
    return rank, world_size
