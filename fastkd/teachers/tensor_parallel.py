"""Several processes as one worker: a teacher that is larger than one device is divided over them."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous as meet

from ..errors import TeacherError
from ..models.hub import brief
from ..utils.exit import grouped

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # for the slowest process, when all are to do something together


@dataclass(frozen=True)
class ParallelGroup:
    """The processes of one worker; made by `join_group`.

    worker, workers: this worker's number, from 0, and how many there are. leader: whether this process is the one that
    reads, writes and reports for its worker. size: processes in it.
    """

    worker: int
    workers: int
    size: int
    leader: bool
    device: torch.device

    def share(self, value: Value) -> Value:
        """The leader's value, in all processes of the worker, which all call it; anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value if self.leader else None]
        dist.broadcast_object_list(box, src=0)
        found: Value = box[0]  # type: ignore[assignment]
        return found

    def plan(self) -> Any:
        """What `from_pretrained` divides a model by. TeacherError where transformers cannot."""
        try:
            from transformers.distributed import DistributedConfig

            return DistributedConfig(tp_size=self.size)
        except (ImportError, TypeError) as error:
            raise TeacherError(
                f"teacher parallel: this transformers ({brief(error)}) cannot divide a model. Use a newer one."
            ) from error

    def check(self, place: str | Path, model: Any) -> None:
        """Refuse a model whose heads of attention would be cut through."""
        text = model.config.get_text_config()
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads, what = getattr(text, key, None), key.removeprefix("num_").replace("_", " ")
            if isinstance(heads, int) and heads % self.size:
                raise TeacherError(
                    f"{place}: its {heads} {what} cannot be divided over {self.size} processes. Choose a number that "
                    "divides them."
                )

    def leave(self) -> None:
        """End what `join_group` began."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_group(
    rank: int, world_size: int, n: int, *, device: str | None = None, rendezvous: str = "env://"
) -> ParallelGroup:
    """Join the n processes that are this one's worker: ranks 0 to n - 1 are worker 0, and so on.

    device: "cpu" (over gloo) or "cuda" (over nccl); default: cuda where there is one.
    rendezvous: where all processes meet, as `torch.distributed.init_process_group` takes it; env:// reads MASTER_ADDR
        and MASTER_PORT, which torchrun sets.

    A worker is a torch.distributed world of its own, for two reasons: transformers divides a model over the whole world
    and nothing less, and a worker that dies must not hold up the others. So a process group that is there already is
    taken only if it is just these n. TeacherError otherwise, or where the numbers do not fit together.
    """
    if n < 1 or world_size % n or not 0 <= rank < world_size:
        raise TeacherError(
            f"teacher parallel: found n = {n}, rank {rank} of {world_size}; a number of processes that n divides, and "
            "ranks from 0 on, are needed."
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
    if kind == "cuda":
        where = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(where)
    else:
        where = torch.device(kind)
    group = ParallelGroup(rank // n, world_size // n, n, rank % n == 0, where)
    if n == 1:
        return group
    grouped()
    # transformers reads it, to choose the process's device
    os.environ.setdefault("LOCAL_RANK", str(local))
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank % n, n):
            raise TeacherError(
                f"teacher parallel: torch.distributed is there already, with {dist.get_world_size()} processes; a "
                f"teacher is divided over all of them, and {n} were asked for. Start it after this, or with {n}."
            )
        return group
    try:
        store, _, _ = next(iter(meet(rendezvous, rank, world_size, timeout=PATIENCE)))
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=PrefixStore(f"fastkd/worker {group.worker}", store),
            rank=rank % n,
            world_size=n,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise TeacherError(
            f"teacher parallel: the processes do not find each other at {rendezvous} ({brief(error)}). Start them with "
            "torchrun, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    return group
