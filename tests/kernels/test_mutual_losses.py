"""Students that learn from each other in one pass: the same losses and gradients as targets and losses apart."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS
from torch import Tensor

from fastkd.kernels import (
    KDError,
    KDLoss,
    LMHead,
    LossConfig,
    SparseTargets,
    TopKConfig,
    linear_kd_loss,
    linear_kd_losses,
    linear_topk_targets,
)  # fmt: skip

N, V = 23, 70
TOPK = TopKConfig(k=6, draws=3, temperatures=(1.0, 2.0))
INDEX = torch.tensor([0, 1, 2, 5, 6, 7, 8, 12, 13, 14, 20, 21, 22])


def students(count: int = 2, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[LMHead], Tensor]:
    """Hidden states and LM heads of students of several widths, one with a bias, one with a cap and a scale."""
    g = torch.Generator().manual_seed(3)
    hidden, heads = [], []
    for i in range(count):
        hidden.append(torch.randn(N, 5 + i, generator=g).to(dtype).requires_grad_())
        weight = torch.randn(V, 5 + i, generator=g).to(dtype).requires_grad_()
        bias = torch.randn(V, generator=g).to(dtype).requires_grad_() if i == 1 else None
        heads.append(LMHead(weight, bias, *((4.0, 1.5) if i == 0 else (None, None))))
    labels = torch.full((N,), -100)
    labels[INDEX] = torch.randint(V, (len(INDEX),), generator=g)
    return hidden, heads, labels


def leaves(hidden: Sequence[Tensor], heads: Sequence[LMHead]) -> list[Tensor]:
    return [x for h, head in zip(hidden, heads, strict=True) for x in (h, head.weight, head.bias) if x is not None]


def apart(
    learns: Sequence[Sequence[int]], hidden: Sequence[Tensor], heads: Sequence[LMHead], labels: Tensor, items: int,
    config: LossConfig,
) -> list[KDLoss]:  # fmt: skip
    """The same by the two functions for one student."""
    with torch.no_grad():
        targets = [
            replace(linear_topk_targets(h[INDEX], head, config=TOPK, positions=INDEX + 100), index=INDEX)
            for h, head in zip(hidden, heads, strict=True)
        ]
    found = []
    for own, head, sources in zip(hidden, heads, learns, strict=True):
        named: dict[str, Any] = {"labels": labels, "num_items": items}
        each = [linear_kd_loss(own, head, targets[j], config=config, **named) for j in sources]
        if not each:
            each = [linear_kd_loss(own, head, targets[0], config=replace(config, alpha=1.0), **named)]
        found.append(KDLoss(*(torch.stack(parts).mean() for parts in zip(*each, strict=True))))
    return found


def together(
    learns: Sequence[Sequence[int]], hidden: Sequence[Tensor], heads: Sequence[LMHead], labels: Tensor, items: int,
    config: LossConfig, chunk: int | None = 4,
) -> list[KDLoss]:  # fmt: skip
    def sources(at: slice, own: Sequence[SparseTargets | None]) -> list[list[SparseTargets]]:
        return [[one for j in row if (one := own[j]) is not None] for row in learns]

    return linear_kd_losses(
        hidden, heads, labels, INDEX, sources, topk=[TOPK] * len(heads), config=config, num_items=items,
        positions=INDEX + 100, chunk_tokens=chunk,
    )  # fmt: skip


@pytest.mark.parametrize(("divergence", "treatment"), CELLS)
@pytest.mark.parametrize("learns", [[[1], [0]], [[1, 2], [0, 2], [0, 1]], [[], [0]]])
def test_equal_to_targets_and_losses_apart(learns: list[list[int]], divergence: str, treatment: str) -> None:
    hidden, heads, labels = students(len(learns))
    config = LossConfig(alpha=0.3, temperature=2.0, divergence=divergence, treatment=treatment)
    expected = apart(learns, hidden, heads, labels, 17, config)
    found = together(learns, hidden, heads, labels, 17, config)
    for ours, theirs, row in zip(found, expected, learns, strict=True):
        for name, a, b in zip(KDLoss._fields, ours, theirs, strict=True):
            if row or name != "soft":  # the soft loss of a student that learns from none has no weight
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    scale = [1.0, 3.0, 0.5]
    gradients = [
        torch.autograd.grad(sum(s * one.loss for s, one in zip(scale, some, strict=False)), leaves(hidden, heads))
        for some in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_chunks_and_types_change_nothing_but_rounding() -> None:
    hidden, heads, labels = students(dtype=torch.float64)
    config = LossConfig(temperature=1.0)
    results = [together([[1], [0]], hidden, heads, labels, 9, config, chunk) for chunk in (1, 5, None)]
    for one in results[1:]:
        for ours, theirs in zip(one, results[0], strict=True):
            torch.testing.assert_close(ours.loss, theirs.loss)
    with torch.autocast("cpu", torch.bfloat16):
        half, heads_half, _ = students()
        one, two = together([[1], [0]], half, heads_half, labels, 9, config)
    assert abs(float(one.loss.detach() - results[0][0].loss.detach())) < 0.05
    (one.loss + two.loss).backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves(half, heads_half))


def test_equal_students_have_no_soft_gradient() -> None:
    """Of the bucket; draws give a gradient of expectation 0."""
    hidden, heads, labels = students(1)
    config = LossConfig(alpha=0.0, temperature=2.0, treatment="bucket")
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        one, two = together([[1], [0]], hidden * 2, heads * 2, labels, 13, replace(config, divergence=divergence))
        for gradient in torch.autograd.grad(one.loss + two.loss, leaves(hidden, heads)):
            assert float(gradient.abs().max()) < 1e-6
        assert abs(float(one.soft.detach())) < 1e-6


def test_no_rows_no_gradients_and_what_is_refused() -> None:
    hidden, heads, labels = students()
    config, none = LossConfig(), INDEX[:0]
    make = lambda h, heads, index: linear_kd_losses(  # noqa: E731
        h, heads, labels, index, lambda at, own: [[own[1]], [own[0]]], topk=[TOPK] * 2, config=config, num_items=3
    )
    one, two = make(hidden, heads, none)
    assert float(one.loss.detach()) == 0.0
    assert all(not x.any() for x in torch.autograd.grad(one.loss + two.loss, leaves(hidden, heads)))
    with torch.no_grad():
        assert not make(hidden, heads, INDEX)[0].loss.requires_grad
    with pytest.raises(KDError, match="got float16; expected bfloat16"):
        make([h.half() for h in hidden], [LMHead(head.weight.half()) for head in heads], INDEX)
    narrow = [hidden[0], hidden[1]], [LMHead(heads[0].weight[:60]), heads[1]]
    with pytest.raises(KDError, match="got 60 logits a position, narrower"):
        make(*narrow, INDEX)
