"""Starts workers that capture, each a process of its own, forked when all is imported: to be killed in tests.

Commands come as JSON, a line each: {"run": {...}} answers with a process number, {"wait": number} with how that one
ended. A worker is told: folder, rank, world_size; pause, seconds a batch takes at least; at, the monotonic time to
begin at; step, the how-manieth call to the operating system to die at (0: it says where each object is made); gently,
whether SIGTERM stops it (it says "ready", when it does).
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from capture_cases import SMALL, Causal, documents
from torch import Tensor

from fastkd.capture.api import capture
from fastkd.kernels import prepare_topk
from fastkd.utils.signals import Stopped, stopping

CALLS = ("open", "write", "fsync", "link", "unlink", "mkdir")
_write = os.write


def say(answer: Any) -> None:
    """A line to the test, in one piece: workers and their server say something at the same time."""
    _write(1, json.dumps(answer).encode() + b"\n")


class Slow(Causal):
    """A teacher of which each batch takes a while."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def forward(self, tokens: Tensor) -> Any:
        time.sleep(self.pause * 2 * random.random())
        return super().forward(tokens)


def run(folder: Path, *, pause: float = 0.0, **place: Any) -> Any:
    """A worker's part."""
    return capture(Slow(pause), documents(), folder, **SMALL, **place)


def die_at(step: int) -> None:
    """Die at that call to the operating system; with step 0, say at which each object is made."""
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
    """Be a worker; its exit status."""
    random.seed(os.getpid())
    while time.monotonic() < at:
        pass
    if step is not None:
        die_at(step)
    if not gently:
        status: int = run(Path(folder), **rest).status
        return status
    try:
        with stopping() as stop:
            say("ready")
            return int(run(Path(folder), stop=stop, **rest).status)
    except Stopped:
        return 75


def main() -> None:
    """Serve commands until there are no more."""
    torch.set_num_threads(1)
    prepare_topk(torch.device("cpu"))  # else each worker would, for longer than a test lets it live
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
