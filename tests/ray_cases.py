"""Teachers and students for the tests on Ray, in a module that its workers can import."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from capture_cases import Causal, documents
from torch import Tensor
from train_cases import Tiny

from fastkd.errors import TeacherUnavailable


class Slow(Causal):
    """A teacher whose batches take `pause` seconds, and that leaves its process number in a folder."""

    def __init__(self, folder: Path, pause: float) -> None:
        super().__init__()
        self.folder, self.pause = folder, pause

    def forward(self, tokens: Tensor) -> Any:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.pause)
        return super().forward(tokens)


class Away(Causal):
    """A teacher that does not answer the first `times` batches; a file in a folder for each of them."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self.folder, self.times = folder, times

    def forward(self, tokens: Tensor) -> Any:
        if tokens.shape[1] > 4 and (already := len(list(self.folder.iterdir()))) < self.times:  # not a probe
            (self.folder / str(already)).touch()
            raise TeacherUnavailable("a-server: nothing answers")
        return super().forward(tokens)


def slow() -> Slow:
    """By the environment, for the command line."""
    return Slow(Path(os.environ["FASTKD_TEST_FOLDER"]), 0.2)


def data() -> list[list[int]]:
    return documents()


class Killed(Tiny):
    """A student whose process is killed at its n-th forward pass, once."""

    def __init__(self, mark: Path, after: int, dtype: torch.dtype) -> None:
        super().__init__(seed=1, dtype=dtype)
        self.mark, self.left = mark, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= self.training
        if self.left < 0 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)


def killed_once(mark: Path, after: int, dtype: torch.dtype = torch.float32) -> Killed:
    return Killed(mark, after, dtype)
