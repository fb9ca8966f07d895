"""A source with rollouts over a small cache, its student and its teacher."""

from pathlib import Path
from typing import Any

import torch
from train_cases import CAPTURE, Tiny, documents

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.live.rollouts import RolloutSource
from fastkd.settings import CaptureSettings, RolloutSettings
from fastkd.stream import CachedSource
from fastkd.teachers.module import ModuleTeacher
from fastkd.train.student import of_module

ROLLOUTS: dict[str, Any] = {"rollouts": 0.5, "rollout_every": 3, "rollout_tokens": 5, "rollout_eos": 22}


def teacher() -> ModuleTeacher:
    """The teacher of `make_cache`; also a factory for module:factory."""
    return ModuleTeacher(Tiny(seed=7), probe=torch.zeros((1, 1), dtype=torch.int64))


def plain_cache(folder: Path) -> Cache:
    """A cache in which tokens are told apart by their documents: each is a sequence."""
    fastkd.capture(teacher(), documents(), folder, **{**CAPTURE, "packing": "keep", "context": 40})
    return open_cache(folder)


def score(tokens: Path, cache: Path, settings: CaptureSettings) -> None:
    fastkd.capture(teacher(), tokens, cache, settings)


def rollout_source(cache: Any, folder: Path, *, seed: int = 0, bound: bool = True, **changes: Any) -> RolloutSource:
    settings = {name: changes.pop(name) for name in list(changes) if name.startswith("rollout")}
    scorer = changes.pop("score", score)
    base = CachedSource(cache, seed=seed, **{"batch_size": 6, "micro_tokens": 64, **changes})
    source = RolloutSource(base, folder, RolloutSettings(**{**ROLLOUTS, **settings}), seed=seed, score=scorer)
    if bound:
        source.bind(of_module(Tiny(seed=3), "student"))
    return source
