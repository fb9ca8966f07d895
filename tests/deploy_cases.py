"""Tiny trained students and their caches, for the tests of deployment, importable by the processes that they start."""

from pathlib import Path
from typing import Any

import numpy as np
import train_cases
import vision_cases
from hf_cases import saved
from numpy.typing import NDArray

import fastkd
from fastkd.cache import Cache

LLAMA: dict[str, Any] = {"max_position_embeddings": 64}


def text_run(folder: Path, name: str = "llama", **changes: Any) -> tuple[Path, Cache]:
    """The folder of a student of transformers that was trained for a few steps, and its cache."""
    cache = train_cases.make_cache(folder / "cache")
    student = saved(folder / "began", name, **(LLAMA | changes))
    report = fastkd.train(student, cache, folder / "run", **train_cases.SMALL)
    return Path(report.student), cache


def classifier_run(folder: Path) -> tuple[Path, Cache]:
    """The folder of a trained classifier, whose run knows what made it, and its cache of examples."""
    cache = vision_cases.make_cache(folder / "cache")
    report = fastkd.train("deploy_cases:net", cache, folder / "run", data=vision_cases.examples(), **vision_cases.SMALL)
    return Path(report.student), cache


def net() -> Any:
    """A factory for module:factory."""
    return vision_cases.Net(seed=3)


def next_ids(count: int, vocab: int) -> NDArray[np.int64]:
    """Token ids `[count]`."""
    return np.random.default_rng(1).integers(0, vocab, count)
