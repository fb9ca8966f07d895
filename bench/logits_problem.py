"""Logits to measure the loss on: more than any cache holds, restored before each run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd import kd_loss
from fastkd.bench.cases import known_targets, student_logits
from fastkd.bench.harness import rotation
from fastkd.bench.timing import Run, interleaved

FLOOR = "one read and one write"
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class LogitsProblem:
    """Logits of one size, more than a cache holds, restored from a pristine copy; targets and labels."""

    temperature = 2.0

    def __init__(self, device: str, n: int, v: int, k: int = 64, *, certain: bool = False) -> None:
        self.device, self.n, self.v, self.k = device, n, v, k
        self.targets, self.bucket = (known_targets(n, v, k, draws, device) for draws in (16, 0))
        dtype = DTYPES[device]
        self.pristine = student_logits(n, v, self.bucket, device, dtype, certain=certain)
        self.bytes = self.pristine.numel() * dtype.itemsize
        self.ring = rotation(self.pristine.clone, self.bytes, device)
        self.labels = torch.randint(v, (n,), device=device)

    def restore(self) -> None:
        """Restore the logits that the last run overwrote. The next run takes others, which are in no cache."""
        self.ring.last.copy_(self.pristine)

    def copy(self) -> None:
        """The limit."""
        self.ring.take().copy_(self.ring.take())

    def step(self, loss: Callable[[Tensor], Tensor], upstream: float = 1.0) -> Callable[[], list[Tensor | None]]:
        """A run of forward and backward of a loss on the next logits."""
        one = torch.tensor(upstream, device=self.device)

        def run() -> list[Tensor | None]:
            leaf = self.ring.take().detach().requires_grad_()
            loss(leaf).backward(one)
            # a gradient in the memory of the logits is not counted as returned
            return [] if leaf.grad is not None and leaf.grad.data_ptr() == leaf.data_ptr() else [leaf.grad]

        return run

    def ours(self, upstream: float = 1.0, inplace: bool = True, **settings: Any) -> Callable[[], list[Tensor | None]]:
        """kd_loss."""
        targets = self.targets if settings.get("treatment") == "sampled" else self.bucket
        return self.step(lambda leaf: kd_loss(leaf, targets, self.labels, inplace=inplace, **settings).loss, upstream)

    def evaluation(self, **settings: Any) -> Run:
        """kd_loss without a gradient."""
        targets = self.targets if settings.get("treatment") == "sampled" else self.bucket
        return lambda: kd_loss(self.ring.take(), targets, self.labels, **settings)

    @property
    def name(self) -> str:
        """The case."""
        return f"logits: N={self.n} V={self.v} k={self.k} {str(self.pristine.dtype)[6:]} T={self.temperature:g}"

    @property
    def at(self) -> dict[str, float]:
        """The sizes."""
        return {"N": self.n, "V": self.v, "k": self.k}


def timed(problem: LogitsProblem, runs: dict[str, Run], rounds: int, **more: Any) -> Any:
    """Times of alternating runs, each on restored logits."""
    return interleaved(runs, device=problem.device, rounds=rounds, before=dict.fromkeys(runs, problem.restore), **more)
