"""Teachers and students for the tests on Ray, in a module that its workers can import."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from capture_cases import Causal, documents
from torch import Tensor
from train_cases import Tiny


class Slow(Causal):
    """A teacher whose batches take `pause` seconds, and that leaves its process number in a folder."""

    def __init__(self, folder: Path, pause: float) -> None:
        super().__init__()
        self.folder, self.pause = folder, pause

    def forward(self, tokens: Tensor) -> Any:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.pause)
        return super().forward(tokens)


def slow() -> Slow:
    """By the environment, for the command line."""
    return Slow(Path(os.environ["FASTKD_TEST_FOLDER"]), 0.2)


def data() -> list[list[int]]:
    return documents()


class Killed(Tiny):
    """A student whose process is killed at its n-th forward pass, once."""

    def __init__(self, mark: Path, after: int) -> None:
        super().__init__(seed=1)
        self.mark, self.left = mark, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= self.training
        if self.left < 0 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)


def killed_once(mark: Path, after: int) -> Killed:
    return Killed(mark, after)
