"""Small teachers for the tests of capture, the expected contents of their caches, and failures of a capture."""

import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastkd
from fastkd import topk_targets
from fastkd.cache import StoreError, open_cache, verify_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture.claims import Claims
from fastkd.capture.runner import CaptureReport
from fastkd.kernels.lm_head import LMHead
from fastkd.models.protocol import Hidden

VOCAB, WIDTH = 97, 8


class Causal(nn.Module):
    """Each position sees a decaying sum of those up to it. Logits, or (hidden=True) hidden states and an LM head."""

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
        return Hidden(stacked, LMHead(self.head)) if self.hidden else stacked @ self.head.T


class Mixed(nn.Module):
    """A layer: each position sees itself and the one before it. Elementwise, so that batches change no bit."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, states: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return states + torch.sin(self.scale * states + before.roll(1, 2))


class Layered(nn.Module):
    """A teacher with a list of layers. Logits, or (hidden=True) hidden states and an LM head.

    The first position of a document has states a hundred times as large as the others (a sink).
    """

    def __init__(self, *, hidden: bool = False, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
        self.layers = nn.ModuleList(Mixed(generator) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.head = nn.Parameter(2 * torch.randn(VOCAB, WIDTH, generator=generator))
        self.hidden = hidden
        self.calls: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Any:
        self.calls.append(tuple(tokens.shape))
        states = self.embedding[tokens]
        states = torch.cat([100 * states[:, :1], states[:, 1:]], 1)
        for layer in self.layers:
            states = layer(states)
        states = self.norm(states)
        return Hidden(states, LMHead(self.head)) if self.hidden else states @ self.head.T


def documents(count: int = 30, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Documents of ids, of many lengths, one of them empty."""
    random = np.random.default_rng(seed)
    found = [random.integers(0, VOCAB, int(n)).tolist() for n in random.integers(1, longest, count)]
    found[count // 3] = []
    return found


def reference(data: list[list[int]], context: int, overlap: int = 0, **ask: Any) -> dict[tuple[int, int], Any]:
    """The teacher's answer by document and token, each segment run alone."""
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


def contents(folder: Any) -> dict[int, str]:
    """The hash of the contents of each shard."""
    return {row["shard"]: row["content_sha256"].hex() for row in open_cache(folder).manifest.to_pylist()}


def feature_contents(folder: Any) -> dict[str, dict[int, str]]:
    """The hash of the contents of each feature's shards."""
    features = open_cache(folder).features
    return {name: {i: features[name].attributes(i)["content"] for i in features[name].shards} for name in features}


# --- captures that are interrupted -----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "k": 5,
    "draws": 3,
    "context": 16,
    "shard_positions": 64,
    "batch_tokens": 40,
    "held_out": 0.2,
    "fingerprint": "the same",
}


def capture(out: Any, data: Any = None, teacher: Any = None, **changes: Any) -> CaptureReport:
    return fastkd.capture(teacher or Causal(), documents() if data is None else data, out, **{**SMALL, **changes})


@cache
def uninterrupted() -> dict[int, str]:
    """The contents of an uninterrupted capture."""
    store: Any = MemoryStore()
    assert capture(store).complete
    return contents(store)


def consistent(store: Any, whole: dict[int, str]) -> int:
    """Check that the shards after a failure are valid and no thread is left; the number of shards."""
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastkd") and "topk" not in t.name]
    if not any(entry.key == "spec.json" for entry in store.list("")):
        assert not list(store.list("shards/"))
        return 0
    problems = verify_cache(store, deep=True).problems
    assert [problem for problem in problems if "it is missing" not in problem.what] == []
    there = contents(store)
    assert there.items() <= whole.items()
    return len(there)


def nobody_waits(store: Any) -> None:
    """Check that a worker on another machine can claim all unwritten shards immediately."""
    names = {entry.key.split("/")[1] for entry in store.list("claims/")}
    there = {Path(entry.key).name.split(".")[0] for entry in store.list("shards/")}
    if any(entry.key == "lengths.npz" for entry in store.list("")):
        there.add("lengths")
    other = Claims(store, 7, 8)
    other._me["host"] = "elsewhere"
    assert {name: other.take(name) for name in names - there} == dict.fromkeys(names - there, 0.0)
    for name in other.held:
        other.drop(name)


def completes(store: Any, whole: dict[int, str], **changes: Any) -> None:
    """Check that a later call writes the missing shards, and the cache equals that of an uninterrupted capture."""
    before = len(list(store.list("shards/")))
    report = capture(store, **changes)
    assert report.complete
    assert report.shards_written == len(whole) - before
    assert contents(store) == whole
    assert verify_cache(store, deep=True).ok
    assert open_cache(store).sealed


class Then(Causal):
    """Calls a function at its n-th batch."""

    def __init__(self, after: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.after, self.action = after, action

    def forward(self, tokens: Tensor) -> Any:
        if len(self.calls) == self.after:
            self.action()
        return super().forward(tokens)


class Without(MemoryStore):
    """A store that is full for objects of these names while `full` is set."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern, self.full, self.refused = re.compile(pattern), True, 0

    def create(self, key: str, data: Any) -> bool:
        if self.full and self.pattern.fullmatch(key):
            self.refused += 1
            raise StoreError(f"memory: creation of {key!r} failed: No space left on device.")
        return super().create(key, data)
