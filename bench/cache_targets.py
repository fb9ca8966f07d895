"""Real targets for measurements of the cache, as shards of any length."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.bench.suites import RunConfig
from fastkd.cache import CacheSpec

TARGETS = Path("build/smollm2_targets.npz")
FEW = Path("build/smollm2_targets_32.npz")  # windows
WINDOW = 512
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)
Arrays = dict[str, Any]


def targets(ask: RunConfig) -> Arrays:
    """Real targets: all of them, or the first 32 windows, which are made unless they exist."""
    if not ask.full and not TARGETS.exists() and not FEW.exists():
        from fastkd.bench.make_targets import make

        make(FEW, 32)
    found = load(TARGETS if ask.full or TARGETS.exists() else FEW)
    rows = len(found["tokens"]) if ask.full else 32 * WINDOW
    return {name: array[:rows] if array.ndim else array for name, array in found.items()}


def load(path: Path) -> Arrays:
    """The targets of a file."""
    if not path.exists():
        raise SystemExit(
            f"{path} does not exist: run `python bench/make_targets.py` first (its docstring lists the requirements)."
        )
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def shard_of(data: Arrays, name: str, mass: float | None = None) -> Arrays:
    """Arguments of `write_shard`."""
    ids, logprobs, tail = data[f"{name}_ids"], data[f"{name}_logprobs"], data[f"{name}_tail"]
    if mass is not None:
        before = np.exp(logprobs).cumsum(1)
        keep = np.concatenate([np.ones((len(ids), 1), bool), before[:, :-1] < mass], 1)
        cut = [np.logaddexp.reduce(np.where(keep, -np.inf, logprobs / t), 1) for t in TEMPERATURES]
        tail = np.stack([np.logaddexp(tail[:, m], c) for m, c in enumerate(cut)], 1).astype(np.float32)
        ids, logprobs = np.where(keep, ids, 0), np.where(keep, logprobs, np.float32(-np.inf))
    shard = {"inputs": {"tokens": data["tokens"]}, "ids": ids, "logprobs": logprobs, "tail": tail}
    if f"{name}_draws" in data:
        shard["draws"] = data[f"{name}_draws"]
    return shard | {"sequence_lengths": [WINDOW] * (len(ids) // WINDOW)}


def repeated(shard: Arrays, times: int) -> Arrays:
    """A shard as long as a real one, with the same rows repeated."""
    longer = {n: np.concatenate([a] * times) for n, a in shard.items() if isinstance(a, np.ndarray)}
    inputs = {n: np.concatenate([a] * times) for n, a in shard["inputs"].items()}
    return longer | {"inputs": inputs, "sequence_lengths": list(shard["sequence_lengths"]) * times}


def spec_of(data: Arrays, **changes: Any) -> CacheSpec:
    return CacheSpec(vocab_size=int(data["vocab_size"]), **({"k": 64} | changes))


def one_core() -> None:
    """Bind this process to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
