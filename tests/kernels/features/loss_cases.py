"""Inputs of the tests of feature losses, and what a call allocates."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels import HiddenTargets
from fastkd.kernels.features.attention import QueriesKeysValues


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(seed: int = 0, rows: int = 40, width: int = 12, *, sinks: tuple[int, ...] = (0, 17)) -> Tensor:
    """States with correlated components, a mean, and rows of a hundred times the norm."""
    x = draw(rows, width, seed=seed) @ draw(width, width, seed=seed + 100) + 2
    for row in sinks:
        x[row] *= 100
    return x


def rotated64(targets: HiddenTargets) -> HiddenTargets:
    """The targets with a basis that is orthonormal to float64."""
    q, r = torch.linalg.qr(targets.basis.double())
    return replace(targets, basis=q * r.diagonal().sign(), mean=targets.mean.double())


def hidden_targets(seed: int = 0, rows: int = 40, width: int = 12, **options: Any) -> HiddenTargets:
    return rotated64(HiddenTargets.from_states(hidden(seed, rows, width, **options), step=0.1))


def layer(seed: int, rows: int, heads: int, key_heads: int, width: int, **options: Any) -> QueriesKeysValues:
    q, k, v = (draw(rows, h, width, seed=seed + i) * 1.5 for i, h in enumerate((heads, key_heads, key_heads)))
    return QueriesKeysValues(q, k, v, **options)


def leaves_of(x: Any) -> tuple[Any, list[Tensor]]:
    """A copy of a tensor, or of a layer's tensors, that gradients are computed for; and its leaves."""
    if isinstance(x, Tensor):
        leaf = x.clone().requires_grad_()
        return leaf, [leaf]
    leaves = {n: t.clone().requires_grad_() for n, t in x._asdict().items() if isinstance(t, Tensor)}
    return x._replace(**leaves), list(leaves.values())


def value_and_gradients(function: Callable[..., Tensor], student: Any, *args: Any, **options: Any) -> list[Tensor]:
    copy, leaves = leaves_of(student)
    value = function(copy, *args, **options)
    (value * 3).backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def close(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * scale, rtol=0)


class Allocations(TorchDispatchMode):
    """The bytes of storages that operators made and that live, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._seen:
                size = x.untyped_storage().nbytes()
                self._seen.add(key)
                self.live += size
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        return out
