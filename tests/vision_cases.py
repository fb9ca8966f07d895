"""Tiny images, classifiers and caches of them, importable by the processes that the tests of training start."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.data.examples import Examples

CLASSES, IMAGES, COPIES = 7, 60, 2
CAPTURE: dict[str, Any] = {"k": 4, "draws": 2, "shard_positions": 16, "batch_tokens": 10, "held_out": 0.2}
SMALL: dict[str, Any] = {"batch_size": 9, "micro_tokens": 4, "steps": 10, "rate": 0.01, "evaluate_every": 0}


class Net(nn.Module):
    """Convolution, mean, linear classifier; remembers its inputs."""

    def __init__(self, seed: int = 1, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(1, 5, 3, dtype=dtype)
            self.head = nn.Linear(5, CLASSES, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.given: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(images.clone())
        states = self.convolution(images.to(self.head.weight.dtype)).relu().mean((2, 3))
        logits: Tensor = self.head(self.dropout(4 * states))
        return logits


def double() -> Net:
    """A factory for module:factory."""
    return Net(dtype=torch.float64)


def dropping() -> Net:
    return Net(dropout=0.2)


def shifted(images: Tensor, seeds: NDArray[np.int64]) -> Tensor:
    """Rolled and dimmed by their seeds; exact in any batch."""
    return torch.stack(
        [
            image.roll((s % 6, s // 6 % 6), (1, 2)) * 2.0 ** -(s % 3)
            for image, s in zip(images, seeds.tolist(), strict=True)
        ]
    )


def examples(**changes: Any) -> Examples:
    """A factory for module:factory."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.normal(size=(IMAGES, 1, 6, 6)).astype(np.float32))
    labels = random.integers(0, CLASSES, IMAGES)
    given = {
        "inputs": images,
        "labels": labels,
        "augment": shifted,
        "fingerprint": "rolled",
        "copies": COPIES,
    } | changes
    return Examples(given.pop("inputs"), **given)


def make_cache(folder: Path, data: Examples | None = None, teacher: Net | None = None, **changes: Any) -> Cache:
    fastkd.capture(
        Net(seed=7) if teacher is None else teacher, examples() if data is None else data, folder, **CAPTURE | changes
    )
    return open_cache(folder)
