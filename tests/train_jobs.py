"""Jobs of the processes that the tests of training start, forked from a process that has imported everything."""

import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
from moments import Moments

from fastkd.utils.signals import DONE, WORK_REMAINS


def start(job: Callable[..., None], *arguments: Any, ranks: int = 1) -> list[BaseProcess]:
    """Start a job in several processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [forked.start(_begin, job, arguments, rank, ranks, port) for rank in range(ranks)]


def finish(running: list[BaseProcess], *, seconds: float = 240) -> list[int | None]:
    """Wait for the processes. Returns exit statuses. If one fails, the others are killed; a stop is no failure."""
    waited = list(running)
    while waited:
        ready = wait([process.sentinel for process in waited], seconds)
        waited = [process for process in waited if process.sentinel not in ready]
        if not ready or any(process.exitcode not in (None, DONE, WORK_REMAINS) for process in running):
            for process in waited:
                process.kill()
    for process in running:
        process.join()
    return [process.exitcode for process in running]


def run(job: Callable[..., None], *arguments: Any, ranks: int = 1) -> None:
    """Run a job that must succeed."""
    assert finish(start(job, *arguments, ranks=ranks)) == [0] * ranks


def _begin(job: Callable[..., None], arguments: tuple[Any, ...], rank: int, ranks: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job(*arguments)


def train(student: Any, cache: Path, out: Path, changes: dict[str, Any]) -> None:
    """Train to the end; several students together."""
    import fastkd

    run: Any = fastkd.mutual if isinstance(student, (list, dict)) else fastkd.train
    assert run(student, cache, out, **changes).status == 0


def train_toy(student: Any, cache: Path, out: Path, changes: dict[str, Any]) -> None:
    """Train with an objective from outside the package."""
    import train_cases

    train(student, cache, out, changes | {"objective": train_cases.toy_objective(0.01)})


def on_images(
    job: Callable[..., None], student: Any, cache: Path, out: Path, changes: dict[str, Any], *more: Any
) -> None:
    """A job with the dataset of a cache of images, which each process builds."""
    import vision_cases

    job(student, cache, out, changes | {"data": vision_cases.examples()}, *more)


def train_all(runs: list[tuple[Any, Path, Path, dict[str, Any]]]) -> None:
    """Several jobs, one after another, in one process group."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for arguments in runs:
        train(*arguments)
    dist.destroy_process_group()


def train_and_stop(student: Any, cache: Path, out: Path, changes: dict[str, Any], step: int) -> None:
    """Train up to a step at which only the last process gets a stop, as signals do not reach all at once."""
    import fastkd
    from fastkd.utils.signals import Stop

    stop, last = Stop(), os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def measure(student: Any) -> dict[str, float]:
        if last:
            stop()
        return {"cross_entropy": 0.0}

    report = fastkd.train(
        student, cache, out, stop=stop, evaluate=measure, **{**changes, "evaluate_every": step, "best": "cross_entropy"}
    )
    assert report.status == 75
    assert step < report.step <= step + 2


def count(cache: Path, out: Path, changes: dict[str, Any]) -> None:
    """The positions that count of this rank in each step."""
    import torch.distributed as dist

    from fastkd import DistillLoader
    from fastkd.utils.distributed import summed_over

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loader = DistillLoader(
        cache, batch_tokens=changes["batch_tokens"], rank=rank, world_size=dist.get_world_size(), reduce=summed_over()
    )
    counts = [sum(b.count for b in step.micro_batches) for step in loader]
    (out / f"counts-{rank}").write_text(" ".join(map(str, counts)))
    dist.destroy_process_group()


def count_steps(cache: str, out: Path) -> None:
    """The positions that count of all ranks in each step."""
    import torch.distributed as dist

    from fastkd.stream import DistillLoader, summed_over

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loader = DistillLoader(cache, batch_size=5, rank=rank, world_size=dist.get_world_size(), reduce=summed_over())
    (out / f"counts-{rank}").write_text(str([step.count for step in loader]))
    dist.destroy_process_group()


def measure(cache: Path, out: Path, batch_tokens: int) -> None:
    """An evaluation by all processes; each writes its result and its number of forwards."""
    import json

    import torch
    from train_cases import Tiny

    from fastkd.evaluate.api import evaluate
    from fastkd.train.student import of_module
    from fastkd.utils.distributed import joined_processes

    student, calls = of_module(Tiny(seed=3), "measured"), 0

    def counted(batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return student.eval().logits(batch)

    with joined_processes("cpu") as processes:
        found = evaluate(counted, cache, batch_tokens=batch_tokens, processes=processes).to_json()
        (out / f"{processes.world_size}-{processes.rank}.json").write_text(json.dumps([calls, found]))


def train_and_die(student: Any, cache: Path, out: Path, changes: dict[str, Any], moment: int, of: int = 0) -> None:
    """Send SIGKILL to itself at the n-th moment of rank `of`."""
    if int(os.environ.get("RANK", "0")) == of:
        die_at(moment)
    train(student, cache, out, changes)


def generations_and_die(arguments: tuple[Any, ...], settings: dict[str, Any], moment: int) -> None:
    """Train generations, and send SIGKILL to itself at the n-th moment; 0: not at all."""
    import fastkd

    die_at(moment)
    assert fastkd.generations(*arguments, **settings).status == 0


def die_at(moment: int) -> None:
    """Send SIGKILL to itself at the n-th moment: before a step, a line of the log, or any change of the files."""
    from fastkd.train import checkpoint, metrics
    from fastkd.train.trainer import Trainer
    from fastkd.utils import atomic

    places: tuple[tuple[Any, str], ...] = (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (atomic.shutil, "rmtree"),
        (checkpoint, "_save"), (checkpoint.FileSystemWriter, "write_data"),
        (metrics.MetricsLog, "write"), (Trainer, "_make"),
    )  # fmt: skip
    # of this process, which ends
    Moments(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)).watch(places, pytest.MonkeyPatch())


def train_slowly(student: Any, cache: Path, out: Path, changes: dict[str, Any]) -> None:
    """Train as the command does, with time between steps for a signal; exits with the report's status."""
    import sys
    import time

    import fastkd
    from fastkd.train.trainer import Trainer
    from fastkd.utils.signals import stopping

    make = Trainer._make

    def slow(self: Any, step: Any) -> Any:
        time.sleep(0.05)
        return make(self, step)

    Trainer._make = slow  # type: ignore[method-assign]
    with stopping() as stop:
        report = fastkd.train(student, cache, out, stop=stop, **changes)
    sys.exit(report.status)


def refused(student: Any, cache: Path, out: Path, changes: dict[str, Any], message: str) -> None:
    """Every process raises the error with its reason."""
    import re

    import fastkd
    from fastkd.errors import StreamError, TrainError

    try:
        fastkd.train(student, cache, out, **changes)
    except (StreamError, TrainError) as error:
        assert re.search(message, str(error)), error
        return
    raise AssertionError("nothing was refused")


def train_and_lose(
    student: Any, cache: Path, out: Path, changes: dict[str, Any], step: int, of: int, number: int, said: Path
) -> None:
    """Rank `of` sends itself a signal before a step. The message of the others' error is written to `said`."""
    import sys

    import fastkd
    from fastkd.errors import WorkRemains
    from fastkd.train.trainer import Trainer

    make = Trainer._make

    def losing(self: Any, batch: Any) -> Any:
        if self.step == step and os.environ["RANK"] == str(of):
            os.kill(os.getpid(), number)
        return make(self, batch)

    Trainer._make = losing  # type: ignore[method-assign]
    try:
        fastkd.train(student, cache, out, **changes)
    except WorkRemains as error:
        said.write_text(str(error))
        sys.stdout.flush()
        os._exit(WORK_REMAINS)


def train_within(
    student: Any, cache: Path, out: Path, changes: dict[str, Any], size: int, said: Path, method: str
) -> None:
    """Train where no file can grow beyond a size, as on a full disk, once a method of the trainer is called. Exits as
    the command does."""
    import resource
    import sys

    import fastkd
    from fastkd.errors import TrainError, WorkRemains
    from fastkd.train.trainer import Trainer

    function = getattr(Trainer, method)

    def limited(self: Any, *arguments: Any, **named: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return function(self, *arguments, **named)

    setattr(Trainer, method, limited)
    try:
        report = fastkd.train(student, cache, out, **changes)
    except TrainError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))
        sys.exit(WORK_REMAINS if isinstance(error, WorkRemains) else 1)
    sys.exit(report.status)


def train_live(student: Any, cache: Any, out: Path, changes: dict[str, Any], stop_at: int = 0) -> None:
    """Train beside a teacher. stop_at: the forward of the last rank's teacher before which that rank is asked to stop;
    exits with the report's status."""
    import sys

    import train_cases

    import fastkd
    from fastkd.settings import LiveSettings
    from fastkd.teachers.module import ModuleTeacher
    from fastkd.utils.signals import Stop

    stop, model = Stop(), train_cases.Tiny(seed=7)
    if stop_at and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        calls = iter(range(stop_at))
        model.register_forward_pre_hook(lambda *_: None if next(calls, None) is not None else stop())
    by = ModuleTeacher(model, vocab_size=train_cases.VOCAB, fingerprint="the same")
    given = {"teacher": by, "data": train_cases.documents(), "live": LiveSettings(**train_cases.CAPTURE), "stop": stop}
    student = train_cases.Tiny(seed=1) if student is None else student
    sys.exit(fastkd.train(student, cache, out, **given | changes).status)
