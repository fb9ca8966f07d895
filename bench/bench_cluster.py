"""Many machines, simulated: N workers fill one cache in an S3 on loopback with latency and faults.

    python bench/bench_cluster.py [--workers 1,2,4,8] [--shards 48] [--kills 2] [--ray] [--json PATH]

Each worker is a process whose teacher takes a fixed time for a batch without using the processor, as one on a GPU
would. Some workers are killed and begin again, some join late, and their clocks differ by up to two seconds. Printed,
for each N: positions/s, also of a worker against one alone; requests a shard; work that was done twice or lost; core
time of a shard, which says how many workers fill this machine. Then the plan of 1,000 workers and 10^12 positions from
these figures, with S3's prices.
--ray: two workers of Ray against one, on a local cluster (fastkd[ray]).
"""

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastkd
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.s3_server import BUCKET, S3Server
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.cache import open_cache, verify_cache
from fastkd.capture.claims import Claims
from fastkd.kernels import prepare_topk
from fastkd.utils.numbers import duration

VOCAB, CONTEXT, SHARD, BATCH = 1000, 256, 4096, 1024  # tokens; positions of a shard and of a batch
BATCH_SECONDS = 0.25  # of the teacher
LATENCY, RATE, SKEW = 0.02, 0.05, 2.0  # seconds, fraction of requests, seconds
POSITIONS, MACHINES = 10**12, 1000  # of the plan
SHARD_PLANNED, SPEED, PREEMPTIONS = 1 << 20, 20_000.0, 0.05  # positions; positions/s a worker; per worker and hour
PUT_PRICE, GET_PRICE = 5e-6, 4e-7  # of one request, in dollars; a LIST is priced as a PUT


class Teacher(torch.nn.Module):
    """Logits of a table, after a wait. ran: counts positions over all processes."""

    def __init__(self, ran: Any = None, seconds: float = BATCH_SECONDS) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)))
        self.ran, self.seconds = ran, seconds

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.numel() > 1:
            time.sleep(self.seconds)
            if self.ran is not None:
                with self.ran.get_lock():
                    self.ran.value += tokens.numel()
        return self.table[tokens % 64]


def documents(shards: int) -> list[list[int]]:
    """Documents of whole windows, that fill this number of shards."""
    numbers = np.random.default_rng(0).integers(0, VOCAB, (shards * SHARD // CONTEXT, CONTEXT))
    return [row.tolist() for row in numbers]


@dataclass(frozen=True)
class Found:
    """What N workers took. requests: by kind. ran: positions of the teachers. core: seconds of the workers."""

    workers: int
    seconds: float
    positions: int
    shards: int
    requests: dict[str, int]
    faults: int
    ran: int
    core: float
    kills: int

    @property
    def speed(self) -> float:
        return self.positions / self.seconds

    @property
    def wasted(self) -> float:
        return self.ran / self.positions - 1


def work(url: str, data: Sequence[Sequence[int]], rank: int, workers: int, ran: Any, skew: float, core: Any) -> None:
    """A worker: begins again after an error of the store, as a scheduler would start it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    Claims.__init__.__defaults__ = (lambda: time.time() + skew,)
    for _ in range(50):
        try:
            report = fastkd.capture(
                Teacher(ran), data, url, k=16, draws=4, context=CONTEXT, shard_positions=SHARD, batch_tokens=BATCH,
                held_out=0.0, fingerprint="bench", rank=rank, world_size=workers,
            )  # fmt: skip
        except fastkd.cache.StoreError:
            continue
        if report.complete:
            break
    used = resource.getrusage(resource.RUSAGE_SELF)
    with core.get_lock():
        core.value += used.ru_utime + used.ru_stime
    os._exit(0 if report.complete else 75)


def verify(url: str) -> None:
    report = verify_cache(url, deep=True)
    print(*report.problems, sep="\n", end="", file=sys.stderr)
    os._exit(0 if report.ok and open_cache(url).sealed else 1)


def run(workers: int, shards: int, kills: int, *, seed: int = 0) -> Found:
    """Fill a cache with this number of workers."""
    fork, generator = multiprocessing.get_context("fork"), random.Random(seed)
    server = S3Server(LATENCY, RATE, seed)
    os.environ.update(server.environment())
    data, url = documents(shards), f"s3://{BUCKET}/cache"
    ran, core = fork.Value("q", 0), fork.Value("d", 0.0)
    begun: dict[int, Any] = {}

    def start(rank: int) -> None:
        skew = generator.uniform(-SKEW, SKEW)
        begun[rank] = fork.Process(target=work, args=(url, data, rank, workers, ran, skew, core))
        begun[rank].start()

    late = [rank for rank in range(workers) if rank % 4 == 3]
    for rank in range(workers):
        if rank not in late:
            start(rank)
    # after the processes are forked, which take no thread of it with them
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    started, killed = time.perf_counter(), 0
    due = [generator.uniform(1, 4) for _ in range(kills)]
    while any(one.is_alive() for one in begun.values()) or late:
        time.sleep(0.1)
        elapsed = time.perf_counter() - started
        if late and elapsed > 2:
            start(late.pop())
        if killed < kills and elapsed > sum(due[: killed + 1]):
            rank = generator.choice([r for r, one in begun.items() if one.is_alive()] or [-1])
            if rank >= 0 and begun[rank].pid:
                os.kill(begun[rank].pid, signal.SIGKILL)
                begun[rank].join()
                start(rank)
            killed += 1
        if elapsed > 600:
            raise RuntimeError(f"{workers} workers have not filled {shards} shards in 10 minutes")
    seconds = time.perf_counter() - started
    requests, faults = dict(server.requests), sum(server.faults.values())
    twice = [key for key, count in server.created.items() if count > 1]
    assert not twice, f"created twice: {twice}"
    server.rate = server.latency = 0
    # in a process of its own: one that has used the store cannot be forked
    check = fork.Process(target=verify, args=(url,))
    check.start()
    check.join()
    assert check.exitcode == 0, f"{url}: the cache is not complete and whole"
    server.shutdown()
    server.server_close()
    return Found(workers, seconds, shards * SHARD, shards, requests, faults, ran.value, core.value, kills)


def measured(table: Table, found: Found, one: Found | None) -> None:
    """Rows of a table for N workers. one: a worker alone."""
    name = f"{found.workers} workers"
    alone = one or found
    each = sum(found.requests.values()) / found.shards
    kinds = ", ".join(f"{kind} {count / found.shards:.1f}" for kind, count in sorted(found.requests.items()))
    table.value(f"{name}: speed", found.speed, "positions/s")
    table.value(f"{name}: a worker, of one alone", found.speed / found.workers / alone.speed, "")
    table.value(f"{name}: requests a shard ({kinds})", each, "")
    table.value(f"{name}: wasted work, {found.kills} kills, {found.faults} faults", 100 * found.wasted, "%")
    table.value(f"{name}: core time a shard", found.core / found.shards, "s")


def plan_text(found: Found) -> str:
    """A capture of 10^12 positions by 1,000 workers, from what was measured of the largest number of workers."""
    shards = -(-POSITIONS // SHARD_PLANNED)
    hours = POSITIONS / (MACHINES * SPEED) / 3600
    counts = {kind: count / found.shards * shards for kind, count in found.requests.items()}
    pages = shards / 1000
    counts["LIST"] = counts.get("LIST", 0) + 2 * MACHINES * pages  # each worker lists all shards, at first and at last
    price = sum(n * (GET_PRICE if kind in ("GET", "HEAD") else PUT_PRICE) for kind, n in counts.items())
    lost = PREEMPTIONS * SHARD_PLANNED / 2 / SPEED / 3600
    lines = [
        f"{POSITIONS:.0e} positions by {MACHINES:,} workers of {SPEED:,.0f} positions/s each, on paper:",
        f"  {shards:,} shards of 2^20; {hours:,.1f} hours; a shard takes a worker {duration(SHARD_PLANNED / SPEED)}",
        f"  {sum(counts.values()):,.0f} requests ({', '.join(f'{k} {n:,.0f}' for k, n in sorted(counts.items()))}), "
        f"{sum(counts.values()) / hours / 3600:,.0f} a second; ${price:,.0f} at S3's prices",
        f"  {PREEMPTIONS:.0%} of the workers preempted an hour, half a shard each: {lost:.2%} of the work lost",
        f"  clocks may differ by seconds: claims of {found.workers} workers wasted {found.wasted:.1%}, kills included",
        f"  on Ray, the driver lists {pages:,.0f} pages once, and no shard is claimed: a PUT and a HEAD for each",
    ]
    return "\n".join(lines)


def on_ray(shards: int, *, workers: Sequence[int] = (1, 2)) -> dict[int, tuple[float, float]]:
    """Positions/s by number of Ray's workers, and the load of the machine (runnable processes a core) meanwhile.

    The speed is that between the first and the last commit: actors begin at different times.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    import ray

    from fastkd.integrations.ray import capture

    found = {}
    with tempfile.TemporaryDirectory(prefix="fk") as short:
        ray.init(
            address="local", num_cpus=max(workers), include_dashboard=False, object_store_memory=100 << 20,
            _temp_dir=short, log_to_driver=False, logging_level="error",
        )  # fmt: skip
        try:
            for count in workers:
                times: list[tuple[float, int]] = []

                def note(event: Any, times: list[tuple[float, int]] = times) -> None:
                    if event["event"] == "shard":
                        times.append((time.perf_counter(), event["positions"]))

                with tempfile.TemporaryDirectory() as folder:
                    capture(
                        Busy(), documents(shards), f"{folder}/cache", workers=count, progress=note, k=16, draws=4,
                        context=CONTEXT, shard_positions=SHARD, batch_tokens=BATCH, held_out=0.0, fingerprint="bench",
                    )  # fmt: skip
                # while all of them work: the first shards of a worker come after it has begun
                times = times[count * 2 :]
                speed = sum(n for _, n in times[1:]) / (times[-1][0] - times[0][0])
                found[count] = speed, os.getloadavg()[0] / (os.cpu_count() or 1)
        finally:
            ray.shutdown()
    return found


class Busy(Teacher):
    """A teacher that uses a core."""

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.numel() > 1:
            begun = time.thread_time()
            while time.thread_time() - begun < self.seconds:
                torch.randn(64, 64) @ torch.randn(64, 64)
        return self.table[tokens % 64]


def cases(ask: RunConfig, counts: Sequence[int] = (), shards: int = 0, kills: int = 2) -> list[Case]:
    """One case for each number of workers, and the plan."""
    counts = counts or ask.size((1, 4), (1, 2, 4, 8, 16))
    shards = shards or ask.size(24, 96)
    done: dict[int, Found] = {}

    def case(count: int) -> Callable[[Table], None]:
        def measure(table: Table) -> None:
            prepare_topk(torch.device("cpu"))
            done[count] = run(count, shards, min(kills, count - 1))
            measured(table, done[count], done.get(1))
            if count == counts[-1]:
                print(plan_text(done[count]), file=sys.stderr)

        return measure

    return [Case(f"{count} workers", case(count)) for count in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table = Table("cpu", "cluster")
    if given.ray:
        found = on_ray(given.shards)
        for count, (speed, load) in found.items():
            table.value(f"Ray, {count} workers, {load:.1f} runnable processes a core", speed, "positions/s")
        table.value("Ray: two workers / one", found[2][0] / found[1][0], "")
    else:
        counts = [int(text) for text in given.workers.split(",")]
        run_cases(cases(RunConfig("cpu"), counts, given.shards, given.kills), table, to_stderr)
    table.save(given.json)


if __name__ == "__main__":
    main()
