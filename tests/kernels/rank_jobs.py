"""Jobs that every rank of a gloo group runs in the same order: see topk_jobs.py and vocab_jobs.py."""

import json
import os
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def run_jobs(
    rank: int,
    ranks: int,
    folder: str,
    make: Callable[[int, int], T],
    jobs: Iterable[tuple[str, Callable[[T], None]]],
    *,
    seconds: float,
) -> None:
    """One rank: every job, and what it raised, as JSON in the folder, by name ("" for nothing).

    make: returns the argument of the jobs from rank and ranks, with the group there. seconds: the group's timeout.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    own, raised = make(rank, ranks), {}
    for name, job in jobs:
        try:
            job(own)
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()
            if "gloo" in raised[name].lower():  # a rank waits for one that has left: what follows would too
                break
    Path(folder, f"{rank}.json").write_text(json.dumps(raised))
    dist.barrier()  # a rank that leaves early aborts the others' last messages
    dist.destroy_process_group()
