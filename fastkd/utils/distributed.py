"""The processes of one job, and their collectives."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StreamError, TrainError, WorkRemains
from .signals import grouped

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Reduce = Callable[[list[int]], Callable[[], list[int]]]
"""Begins an elementwise sum of a list over all ranks; the returned function waits for it and returns it."""


def summed_over(group: Any = None) -> Reduce:
    """A `Reduce` over a torch.distributed process group on the CPU (gloo). Default: the default group.

    Raises StreamError if there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise StreamError("group: torch.distributed has no process group; call init_process_group first.")

    def begin(values: list[int]) -> Callable[[], list[int]]:
        total = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(total, group=group, async_op=True)

        def wait() -> list[int]:
            work.wait()
            numbers: list[int] = total.tolist()
            return numbers

        return wait

    return begin


def in_group(reduce: Reduce | None = None) -> tuple[int, int, Reduce | None]:
    """This process's rank, the number of processes, and a `Reduce` over them (or the given one), of torch.distributed's
    default group; 0, 1 and None without one. All processes call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0, 1, reduce
    return dist.get_rank(), dist.get_world_size(), reduce or summed_over(dist.new_group(backend="gloo"))


# Both modules take a second to import, and whoever made such an object has imported them.
def is_dtensor(tensor: Any) -> TypeGuard["DTensor"]:
    """Whether a tensor is divided over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fsdp(module: Any) -> TypeGuard["FSDPModule"]:
    """Whether a module is divided by FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@dataclass(frozen=True, eq=False)
class Processes:
    """This process and the others of its job. group: a process group on the CPU, for counts; None if it is alone."""

    rank: int
    world_size: int
    device: torch.device
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes logs and results."""
        return self.rank == 0

    @property
    def reduce(self) -> Reduce | None:
        """Sums the counts of a `CachedSource`."""
        return None if self.group is None else summed_over(self.group)

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, values: list[int]) -> Callable[[], list[int]]:
        """Begin a sum of integers over all processes; the returned function waits for it and returns it."""
        return (lambda: values) if self.group is None else summed_over(self.group)(values)

    def agree(self, value: int) -> int:
        """The first process's value, on all."""
        return self.begin_sum([value if self.first else 0])()[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks. It has to be picklable."""
        values = [value] * self.world_size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """If the block fails on one process with an OSError, an OSError is raised on all of them."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = error
        failed = self.begin_sum([int(problem is not None)])()[0]
        if problem is not None:
            raise problem
        if failed:
            raise OSError(f"{failed} of {self.world_size} processes failed; their own messages say why")

    def wait(self) -> None:
        self.begin_sum([0])()


ALONE = Processes(0, 1, torch.device("cpu"))


# what torch's backends say of a process that is gone, or silent
_LOST = re.compile(r"(?i)connection (closed|reset|refused)|timed out|timeout|broken pipe|remote process")


def lost(error: BaseException, count: int, limit: str, environment: Mapping[str, str] = os.environ) -> str:
    """That another of `count` processes has ended, or has been silent for `limit`, if an error of torch's back ends
    says so; otherwise ""."""
    if count < 2 or not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return ""
    silent = re.search("(?i)timed out|timeout", str(error))
    how = f"has not answered for {limit}" if silent else "has ended"
    rank = environment.get("RANK", "?")
    return f"process {rank} of {count}: another process of the job {how}. Its own message says why, if any"


@contextmanager
def joined_processes(
    device: str | None, environment: Mapping[str, str] = os.environ, *, timeout_minutes: float = 10.0
) -> Iterator[Processes]:
    """The processes that torchrun started, or those of an initialized process group; otherwise this one alone.

    device: None for this process's GPU, or the CPU without one. timeout_minutes: how long to wait for another process.
    Raises TrainError if there is no such device, and WorkRemains if another process has ended or does not answer.
    """
    where = local_device(device, TrainError, environment)
    if began := not dist.is_initialized() and int(environment.get("WORLD_SIZE", "1")) > 1:
        grouped()
    timeout, count = timedelta(minutes=timeout_minutes), int(environment.get("WORLD_SIZE", "1"))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        if began:
            dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout=timeout)
        if dist.is_initialized() and dist.get_world_size() > 1:
            count = dist.get_world_size()
            group = dist.new_group(backend="gloo", timeout=timeout)
            yield Processes(dist.get_rank(), dist.get_world_size(), where, group)
        else:
            yield Processes(0, 1, where)
    except BaseException as error:
        began = False  # the others may wait in a collective: destroying the group would wait for them
        if said := lost(error, count, f"{timeout_minutes:g} minutes (timeout_minutes)", environment):
            raise WorkRemains(f"{said}; run the same command again, with all processes, to resume.") from error
        if isinstance(error, dist.DistError):
            raise TrainError(f"the processes of the job cannot meet: {error}") from error
        raise
    finally:
        if began:
            dist.destroy_process_group()


def local_device(
    device: str | torch.device | None, error: type[Exception], environment: Mapping[str, str] = os.environ
) -> torch.device:
    """A device; None for the GPU of this process's local rank, or the CPU without one. Raises `error` if there is no
    such device."""
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as problem:
        raise error(f"device: got {str(device)!r} ({problem}); expected cpu, cuda or cuda:N.") from problem
    if found.type == "meta":
        raise error("device: got 'meta', whose tensors have no values; expected cpu, cuda or cuda:N.")
    return found
