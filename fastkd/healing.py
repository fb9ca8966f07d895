"""A damaged model, healed from a cache: layers removed, trained on cached targets, compared over held-out windows.

It knows a model as hidden states and a head, and a cache as the arrays that were read from it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from .cache import CacheSpec
from .intervals import Interval, interval
from .kernels import SparseTargets, kd_loss, linear_kd_loss

Arrays = dict[str, NDArray[Any]]
IGNORED = -100


class CausalModel(nn.Module):
    """What capture and training ask of a model."""

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """The weight `[V, D]` that makes hidden states into logits."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers, first to last."""

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, L]` to the last hidden states `[B, L, D]`."""

    @abstractmethod
    def keep_layers(self, numbers: list[int]) -> None:
        """Leave only these layers."""


class Scores(NamedTuple):
    """Of each held-out window: cross-entropy and KL from the teacher (nats), share of positions that agree with it."""

    cross_entropy: list[float]
    kl: list[float]
    agreement: list[float]


def kept_layers(count: int, every: int) -> list[int]:
    """The layers that stay when of each `every` the middle one is removed: the first and the last do too much."""
    return [i for i in range(count) if i % every != every // 2]


def targets_of(spec: CacheSpec, arrays: Arrays) -> SparseTargets:
    """The targets of a cache's rows, compact: a row without entries was not captured, and gets none."""
    index = torch.from_numpy(np.flatnonzero((arrays["logprobs"] > -np.inf).any(1)))
    tensors = {
        name: torch.from_numpy(arrays[name])
        for name in ("ids", "logprobs", "tail", "outcomes", "draws")
        if name in arrays
    }
    return SparseTargets(
        **{name: tensor[index] for name, tensor in tensors.items()},
        index=index,
        vocab_size=spec.vocab_size,
        temperatures=spec.temperatures,
        draw_temperature=spec.draw_temperature,
    )


def batch_of(
    spec: CacheSpec, arrays: Arrays, windows: Sequence[int], length: int
) -> tuple[Tensor, Tensor, SparseTargets]:
    """Tokens `[B, L]`, labels `[B, L]` (a window's last position has none) and targets of some of the windows."""
    rows = (np.asarray(windows)[:, None] * length + np.arange(length)).ravel()
    tokens = torch.from_numpy(arrays["tokens"][rows].astype(np.int64)).view(-1, length)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1)
    per_row = ("ids", "logprobs", "tail", "outcomes", "draws")
    return tokens, labels, targets_of(spec, {name: arrays[name][rows] for name in per_row if name in arrays})


def heal(
    model: CausalModel,
    spec: CacheSpec,
    arrays: Arrays,
    *,
    length: int,
    order: Sequence[Sequence[int]],
    rate: float,
    alpha: float,
    title: str,
) -> list[float]:
    """Train on the cached targets of these windows, a step for each group; the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(order))
    losses: list[float] = []
    with tqdm(order, desc=title, unit="step") as bar:
        for windows in bar:
            tokens, labels, targets = batch_of(spec, arrays, windows, length)
            out = linear_kd_loss(model.hidden(tokens), model.head, targets, labels, alpha=alpha)
            optimizer.zero_grad()
            out.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
            losses.append(float(out.loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    model.eval()
    return losses


@torch.no_grad()
def evaluate(model: CausalModel, spec: CacheSpec, arrays: Arrays, *, length: int, title: str) -> Scores:
    """Scores on every window of the arrays, against the cached targets: KL with the tail as one outcome."""
    model.eval()
    scores = Scores([], [], [])
    for window in tqdm(range(len(arrays["tokens"]) // length), desc=title, unit="window"):
        tokens, labels, targets = batch_of(spec, arrays, [window], length)
        logits = model.hidden(tokens).flatten(0, 1) @ model.head.T
        out = kd_loss(logits, targets, labels.flatten(), treatment="bucket")
        # the cache's steps make equals of near equals: any of the teacher's best will do
        best = targets.logprobs == targets.logprobs.amax(1, keepdim=True)
        agrees = (best & (targets.ids == logits[targets.index].argmax(1, keepdim=True))).any(1)
        scores.cross_entropy.append(float(out.hard))
        scores.kl.append(float(out.soft))
        scores.agreement.append(float(agrees.float().mean()))
    return scores


def paired(ours: Scores, theirs: Scores) -> dict[str, Interval]:
    """Our scores minus theirs, window by window."""
    return {
        name: interval([a - b for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True)])
        for name in Scores._fields
    }
