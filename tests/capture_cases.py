"""Small teachers for the tests of capture, and what a cache of theirs must hold."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import topk_targets
from fastkd.cache import open_cache
from fastkd.teacher.protocol import Head, Hidden

VOCAB, WIDTH = 97, 8


class Causal(nn.Module):
    """Each position sees a decaying sum of all up to it. Logits, or (hidden=True) states and a head."""

    def __init__(self, *, hidden: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
        self.head = nn.Parameter(2 * torch.randn(VOCAB, WIDTH, generator=generator))
        self.dropout = nn.Dropout(0.5)  # must be off
        self.hidden = hidden
        self.calls: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Any:
        self.calls.append(tuple(tokens.shape))
        state, states = self.embedding.new_zeros(len(tokens), WIDTH), []
        for embedded in self.embedding[tokens].unbind(1):
            state = torch.tanh(0.7 * state + embedded)
            states.append(state)
        stacked = self.dropout(torch.stack(states, 1))
        return Hidden(stacked, Head(self.head)) if self.hidden else stacked @ self.head.T


def documents(count: int = 30, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Documents of ids, of many lengths, one of them empty."""
    random = np.random.default_rng(seed)
    found = [random.integers(0, VOCAB, int(n)).tolist() for n in random.integers(1, longest, count)]
    found[count // 3] = []
    return found


def reference(data: list[list[int]], context: int, overlap: int = 0, **ask: Any) -> dict[tuple[int, int], Any]:
    """By document and token: what the teacher says there, each piece run alone."""
    model = Causal().eval()
    found = {}
    for number, tokens in enumerate(data):
        start = 0
        while start < len(tokens):
            piece = tokens[start : start + context]
            places = torch.arange(start, start + len(piece))
            with torch.inference_mode():
                logits = model(torch.tensor([piece]))[0]
                targets = topk_targets(logits, positions=(number << 31) + places, **ask)
            skipped = overlap if start else 0
            for i in range(skipped, len(piece)):
                found[number, start + i] = targets[i : i + 1]
            if start + context >= len(tokens):
                break
            start += context - overlap
    return found


def contents(folder: Path) -> dict[int, str]:
    """The hash of what each shard holds."""
    cache = open_cache(folder)
    return {row["shard"]: row["content_sha256"].hex() for row in cache.manifest.to_pylist()}
