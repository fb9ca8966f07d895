"""`sampled` on average: the gradient in a student's hidden states, over many draw sets, against the dense teacher's."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from cases import GRID, sparse
from torch import Tensor

from fastkd import SparseTargets, linear_kd_loss

ROWS, VOCAB, WIDTH = 8, 1000, 16
SETS = 400
HEAD, DRAWS = 48, 16


@cache
def student_and_teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[ROWS, WIDTH]`, a head `[VOCAB, WIDTH]` and a teacher's logits with a Zipf-like tail. float64."""
    g = torch.Generator().manual_seed(20)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64) * 0.5
    hidden_ND = torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    teacher_ND = hidden_ND + 0.7 * torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    rank_NV = torch.rand(ROWS, VOCAB, generator=g).argsort(1) + 1
    return hidden_ND, weight_VD, teacher_ND @ weight_VD.T - 0.8 * rank_NV.double().log()


def dense_gradient(t: float) -> Tensor:
    """Of T²·KL(teacher_T, student_T), each row's own, `[ROWS, WIDTH]`."""
    hidden_ND, weight_VD, logits_NV = student_and_teacher()
    p, q = ((z / t).softmax(1) for z in (hidden_ND @ weight_VD.T, logits_NV))
    return t * (p - q) @ weight_VD


def sampler(draw_temperature: float, head: int = HEAD, draws: int = DRAWS) -> SparseTargets:
    """Every row SETS times over, with the draws of different positions."""
    logits_NV = student_and_teacher()[2].repeat(SETS, 1)
    return SparseTargets.from_logits(
        logits_NV, head, temperatures=GRID, draws=draws, draw_temperature=draw_temperature, seed=5
    )


def multinomial(draw_temperature: float) -> SparseTargets:
    """The same by torch's own sampling: what the sampler is held against."""
    logits_NV = student_and_teacher()[2].repeat(SETS, 1)
    g = torch.Generator().manual_seed(6)
    return sparse(logits_NV, HEAD, DRAWS, grid=GRID, draw_temperature=draw_temperature, generator=g)


@cache
def targets(make: Callable[[float], SparseTargets], draw_temperature: float) -> SparseTargets:
    return make(draw_temperature)


def gradients(targets: SparseTargets, t: float, treatment: str) -> Tensor:
    """Every draw set's gradient in the hidden states, each row's own, `[SETS, ROWS, WIDTH]`."""
    hidden_ND, weight_VD, _ = student_and_teacher()
    leaf = hidden_ND.repeat(SETS, 1).requires_grad_()
    linear_kd_loss(leaf, weight_VD, targets, None, temperature=t, treatment=treatment, num_items=1).loss.backward()
    return leaf.grad.view(SETS, ROWS, WIDTH)


class Figures(NamedTuple):
    """Relative to the dense gradient's norm: one draw set's error (root of the mean square), the error of the mean over
    all sets, and the standard error of that mean, from the sets' spread."""

    one: float
    mean: float
    expected: float


def figures(make: Callable[[float], SparseTargets], draw_temperature: float, t: float, treatment: str) -> Figures:
    sets = gradients(targets(make, draw_temperature), t, treatment)
    true = dense_gradient(t)
    mean = sets.mean(0)
    spread = ((sets - mean).square().sum() / (SETS - 1)).sqrt()
    size = true.norm()
    result = Figures(
        one=float((sets - true).square().sum((1, 2)).mean().sqrt() / size),
        mean=float((mean - true).norm() / size),
        expected=float(spread / size / SETS**0.5),
    )
    print(
        f"\n{treatment:>11} {make.__name__:<11} T_d={draw_temperature} T={t}: one set {result.one:.3f}, "
        f"mean of {SETS} {result.mean:.4f}, expected of an unbiased one {result.expected:.4f}",
        end="",
    )
    return result


MAKERS = pytest.mark.parametrize("make", [sampler, multinomial])


@MAKERS
@pytest.mark.parametrize("t", [1.0, 1.5])
def test_unbiased_at_the_temperature_of_the_draws(make: Callable[[float], SparseTargets], t: float) -> None:
    sampled = figures(make, t, t, "sampled")
    assert sampled.mean < 2 * sampled.expected  # a hundred components: near 1 where nothing is biased
    assert sampled.mean < 0.1 * sampled.one
    for treatment in ("bucket", "renormalize"):
        biased = figures(make, t, t, treatment)
        assert biased.mean > 5 * sampled.mean
        assert biased.mean > 5 * sampled.expected


@MAKERS
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_little_bias_near_the_temperature_of_the_draws(make: Callable[[float], SparseTargets], t: float) -> None:
    sampled = figures(make, 1.5, t, "sampled")
    assert sampled.mean < 0.25 * sampled.one
    for treatment in ("bucket", "renormalize"):
        assert figures(make, 1.5, t, treatment).mean > 2 * sampled.mean


# A short head or none (Random Sampling KD): most draws are of few tokens, merged with their counts.
@pytest.mark.parametrize("shape", [(HEAD, DRAWS), (4, 40), (0, 50)])
@pytest.mark.parametrize("t", [1.0, 1.5])
def test_every_component_lies_within_its_own_error(t: float, shape: tuple[int, int]) -> None:
    made = sampler(t, *shape)
    assert int(made.draws.sum(1).min()) == shape[1]
    sets = gradients(made, t, "sampled")
    score = (sets.mean(0) - dense_gradient(t)) / (sets.std(0) / SETS**0.5)
    worst, overall = float(score.abs().max()), float(score.square().mean().sqrt())
    merged = float((made.draws > 1).sum(1).double().mean())
    print(
        f"\nT=T_d={t} {shape}: {merged:.1f} merged entries a row; worst of {score.numel()} components {worst:.2f} "
        f"standard errors off, all of them {overall:.2f}",
        end="",
    )
    assert worst < 4
    assert overall < 1.25
