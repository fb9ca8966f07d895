"""Processes forked from one that has imported what tests need: each begins at once, without another's state."""

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
TESTS = str(Path(__file__).parent)


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process. The first one starts the server, which has to find preloaded.py: it is not told of sys.path."""
    process = SERVER.Process(target=target, args=arguments)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = TESTS if before is None else f"{TESTS}{os.pathsep}{before}"
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


class Forked:
    """A function in a process of its own, with variables of its environment; its output is read as a Popen's."""

    def __init__(self, function: Callable[..., None], *arguments: Any, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        self._process = start(_begin, function, arguments, environment, self._files)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status: minus the number of the signal that ended it, if one did."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} seconds"
        out, err = (path.read_text() for path in self._files)
        self._folder.cleanup()
        return out, err

    def kill(self) -> None:
        """End it, if it is still running."""
        self._process.kill()
        self._process.join()
        self._folder.cleanup()


def command(*arguments: str) -> None:
    """`python -m fastkd`, as a person runs it."""
    from fastkd.__main__ import run

    sys.argv = ["fastkd", *arguments]
    run()


def code(text: str, rank: int, arguments: list[str]) -> None:
    """Run code that knows its `rank` and `arguments`."""
    warnings.simplefilter("ignore")
    exec(text, {"__name__": "__main__", "rank": rank, "arguments": arguments})


def _begin(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], files: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= environment
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    function(*arguments)
