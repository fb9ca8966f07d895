"""Starts workers that capture, to be killed in tests. Each is a process forked after all imports.

Commands are lines of JSON: {"run": {...}} is answered with a process id, {"wait": id} with the exit status, 75 if a
store failed. Arguments of a worker: folder (or URL), rank, world_size; pause: minimum seconds per batch; features:
names; at: the monotonic time to start at; step: the number of the system call to die at (0: report the call that
creates each object); gently: whether SIGTERM stops it (it reports "ready" once it does).
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from capture_cases import SMALL, Causal, Layered, documents
from torch import Tensor

from fastkd.cache import StoreError
from fastkd.capture.api import capture
from fastkd.kernels import prepare_topk
from fastkd.utils.signals import Stopped, stopping

CALLS = ("open", "write", "fsync", "link", "unlink", "mkdir")
_write = os.write


def say(answer: Any) -> None:
    """Write a line to the test in one call, since workers and their server write at the same time."""
    _write(1, json.dumps(answer).encode() + b"\n")


class Slow(Causal):
    """A teacher whose batches take at least `pause` seconds."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def forward(self, tokens: Tensor) -> Any:
        time.sleep(self.pause * 2 * random.random())
        return super().forward(tokens)


class SlowLayered(Layered):
    """Likewise, with layers."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def forward(self, tokens: Tensor) -> Any:
        time.sleep(self.pause * 2 * random.random())
        return super().forward(tokens)


def run(folder: Path | str, *, pause: float = 0.0, features: Any = None, **place: Any) -> Any:
    """A worker's part of a capture. features: names; None: of a teacher without layers."""
    if features is not None:
        return capture(SlowLayered(pause), documents(), folder, **SMALL, features=tuple(features), **place)
    return capture(Slow(pause), documents(), folder, **SMALL, **place)


def die_at(step: int) -> None:
    """Die at this system call; with step 0, report the call that creates each object."""
    calls = 0

    def counted(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if not step and name == "link":
                say({"call": calls, "object": args[1]})
            return original(*args, **options)

        setattr(os, name, call)

    for name in CALLS:
        counted(name)


def worker(folder: str, at: float = 0.0, step: int | None = None, gently: bool = False, **rest: Any) -> int:
    """Run as a worker. Returns the exit status."""
    random.seed(os.getpid())
    while time.monotonic() < at:
        pass
    if step is not None:
        die_at(step)
    place = folder if "://" in folder else Path(folder)
    try:
        if not gently:
            return int(run(place, **rest).status)
        with stopping() as stop:
            say("ready")
            return int(run(place, stop=stop, **rest).status)
    except (Stopped, StoreError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 75


def main() -> None:
    """Serve commands until the input ends."""
    torch.set_num_threads(1)
    prepare_topk(torch.device("cpu"))  # otherwise each worker compiles it, which takes longer than a test lets it live
    gc.freeze()  # what was imported is no worker's garbage
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        if "wait" in command:
            answer = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
        elif not (answer := os.fork()):
            status = 1
            try:
                status = worker(**command["run"])
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        say(answer)


if __name__ == "__main__":
    main()
