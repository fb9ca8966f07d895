"""Several processes as one worker, for a teacher that is divided over their devices."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous as meet

from ..cache import CacheError
from ..errors import TeacherError, WorkRemains, passes
from ..models.hub import brief
from ..utils.distributed import local_device, lost
from ..utils.signals import grouped

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # of collective operations
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ParallelGroup:
    """The processes of one worker; made by `join_group`. By default this process alone.

    worker, workers: this worker's rank, and the number of workers. size: processes per worker. leader: whether this
    process reads, writes and reports for its worker.
    """

    worker: int = 0
    workers: int = 1
    size: int = 1
    leader: bool = True
    device: torch.device = _CPU

    def share(self, value: Value) -> Value:
        """The leader's value, in each process of the worker; all of them call it. Any value that can be pickled."""
        if self.size == 1:
            return value
        box = [value if self.leader else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def distributed_config(self) -> Any:
        """The `distributed_config` of `from_pretrained`. TeacherError if this transformers has none."""
        try:
            from transformers.distributed import DistributedConfig

            return DistributedConfig(tp_size=self.size)
        except (ImportError, TypeError) as error:
            raise TeacherError(
                f"teacher parallel: this transformers ({brief(error)}) has no tensor parallelism. Upgrade it."
            ) from error

    def check(self, source: str | Path, model: Any) -> None:
        """TeacherError if the model's attention heads cannot be divided evenly."""
        text = model.config.get_text_config()
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads, what = getattr(text, key, None), key.removeprefix("num_").replace("_", " ")
            if isinstance(heads, int) and heads % self.size:
                raise TeacherError(
                    f"{source}: got {self.size} processes; expected a number that divides the model's {heads} {what}."
                )

    def leave(self) -> None:
        """Destroy the process group that `join_group` created: its threads would sometimes abort an exiting process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class LeaderFailed:
    """What the leader of a worker shares when it fails. later: whether the same call may succeed later."""

    later: bool

    @property
    def error(self) -> Exception:
        """What the other processes raise."""
        if self.later:
            return WorkRemains("the leading process of this worker stopped; see its message.")
        return CacheError("the leading process of this worker failed; see its error message.")


@contextmanager
def heeding_others(size: int) -> Iterator[None]:
    """Within the context, WorkRemains is raised if another of the `size` processes of this worker has ended, or does
    not answer."""
    try:
        yield
    except RuntimeError as error:
        if said := lost(error, size, f"{TIMEOUT.total_seconds() / 60:g} minutes"):
            raise WorkRemains(f"{said}.") from error
        raise


def led(group: ParallelGroup, make: Callable[[], Value]) -> Value:
    """What a call returns in the leader, in each process of the worker; all of them call it. If it raises there, the
    others raise CacheError, or WorkRemains where the same call may succeed later."""
    value, problem = None, None
    if group.leader:
        try:
            value = make()
        except BaseException as error:
            problem = error
    shared = group.share(value if problem is None else LeaderFailed(passes(problem)))
    if problem is not None:
        raise problem
    if isinstance(shared, LeaderFailed):
        raise shared.error
    return shared  # type: ignore[return-value]


def join_group(
    rank: int, world_size: int, n: int, *, device: str | None = None, rendezvous: str = "env://"
) -> ParallelGroup:
    """Join the n processes of this process's worker: ranks 0 to n - 1 are worker 0, and so on.

    device: "cpu" (over gloo) or "cuda" (over nccl); default: cuda if there is a GPU. Of cuda, that of the local rank.
    rendezvous: where all processes meet, as `torch.distributed.init_process_group` takes it; env:// reads MASTER_ADDR
        and MASTER_PORT, which torchrun sets.

    Each worker is a separate torch.distributed world: transformers divides a model over the whole world, and a worker
    that dies must not block the others. An existing process group is used only if it is exactly these n processes.
    TeacherError otherwise, or if the numbers do not fit together.
    """
    if n < 1 or world_size % n or not 0 <= rank < world_size:
        raise TeacherError(
            f"teacher parallel: got n = {n}, rank {rank} of {world_size}; expected an n that divides the number of "
            "processes, and a rank from 0 on."
        )
    # transformers reads it to choose the device of the process
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", str(rank)))
    where = local_device(None if device == "cuda" else device, TeacherError)
    group = ParallelGroup(rank // n, world_size // n, n, rank % n == 0, where)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if n == 1:
        return group
    grouped()
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank % n, n):
            raise TeacherError(
                f"teacher parallel: got a torch.distributed of {dist.get_world_size()} processes; expected "
                f"{n}, as the teacher is divided over all of them. Initialize it after this, or with {n}."
            )
        return group
    try:
        store, _, _ = next(iter(meet(rendezvous, rank, world_size, timeout=TIMEOUT)))
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=PrefixStore(f"fastkd/worker {group.worker}", store),
            rank=rank % n,
            world_size=n,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise TeacherError(
            f"teacher parallel: the processes cannot connect at {rendezvous} ({brief(error)}). Start them with "
            "torchrun, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    return group


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
