"""Which of how many workers this process is of, and the processes that make that worker up."""

import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar

from ..cache import CacheError
from .tensor_parallel import ParallelGroup

T = TypeVar("T")


class Group(Protocol):
    """The processes that make up one worker; one of them leads."""

    @property
    def leader(self) -> bool:
        """Whether this one does."""
        ...

    def share(self, value: T) -> T:
        """The leader's value, in each of them. All have to call it."""
        ...


class Alone:
    """A worker that is one process."""

    leader = True

    def share(self, value: T) -> T:
        """The value."""
        return value


class Place(NamedTuple):
    """Which of how many workers this process is of, and the processes that make that worker up."""

    worker: int
    workers: int
    group: Group

    def leave(self) -> None:
        """End what joined the processes of a worker: threads that wait for others would now and then abort one."""
        if isinstance(self.group, ParallelGroup):
            self.group.leave()


def place_of(
    rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Which of how many processes this is: as said, else by torchrun's variables, else SLURM's, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise CacheError(f"rank, world_size: got {rank} and {world_size}; expected both, or neither.")
    if rank is None or world_size is None:
        rank, world_size = 0, 1
        for mine, all_of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if mine in environment and all_of in environment:
                rank, world_size = int(environment[mine]), int(environment[all_of])
                break
    if not 0 <= rank < world_size:
        raise CacheError(f"rank: got {rank} of a world_size of {world_size}; expected 0 to {world_size - 1}.")
    return rank, world_size
