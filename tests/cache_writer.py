"""A process that writes a small cache, or a feature of one, and is killed or paused within a step of a commit."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cache_cases import make_shard, make_spec
from feature_cases import write_feature
from forked import SERVER, start

from fastkd.cache import create_cache, drop_feature, open_cache

STEPS = ("open", "write", "fsync", "link", "unlink", "mkdir", "rmdir")  # functions of os


class CacheWriter:
    """Write three shards in another process, which tells of each; at its step number `step` it dies or pauses.

    job: "targets", or of an existing cache "feature": write one, and "drop": drop it.
    """

    def __init__(self, path: Path, step: int = 0, mode: str = "kill", job: str = "targets") -> None:
        self.pipe, theirs = SERVER.Pipe()
        self.process = start(_write, theirs, path, step, mode, job)
        theirs.close()

    def line(self) -> str:
        """The next line that it sends; "" after the last."""
        assert self.pipe.poll(120)
        try:
            return str(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            return ""

    def wake_up(self) -> None:
        """Let a paused process continue."""
        self.pipe.send("wake up")

    def rest(self) -> list[str]:
        """The lines up to its end."""
        lines = list(iter(self.line, ""))
        self.process.join(120)
        self.pipe.close()
        return lines

    @property
    def status(self) -> int | None:
        """Its exit status: minus the number of the signal that ended it, if one did."""
        return self.process.exitcode


def _write(pipe: Connection, path: Path, step: int, mode: str, job: str) -> None:
    calls = 0

    def counted(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                if mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                pipe.send("paused")
                pipe.recv()
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in STEPS:
        counted(name)
    pipe.send("ready")
    if job == "feature":
        write_feature(path, open_cache(path).spec, seal=True)
    elif job == "drop":
        drop_feature(path, "20")
    else:
        _targets(pipe, path)
    pipe.send(f"done {calls}")


def _targets(pipe: Connection, path: Path) -> None:
    spec = make_spec(vocab_size=40, k=3)
    with create_cache(path, spec) as writer:
        for i in range(3):
            done = writer.write_shard(i, **make_shard(spec, positions=12, seed=i), first_sequence=4 * i)
            pipe.send(f"{i} {done}")
