"""The student's mass off S, from all of it to e^-80: 1 - Σ_S p has no digits left where it is small."""

import math

import pytest
import torch
from test_matrix import DEVICE_ON, INTERPRETED

from fastkd import SparseTargets, kd_loss
from fastkd.kernels.loss.reference import divergence_rows

# log p_tail of the student, at the temperature of the test; −inf: every logit off S is −inf
STUDENT = (0.0, -0.7, -2.0, -4.0, -6.0, -9.0, -12.0, -15.0, -18.4, -25.0, -40.0, -80.0, -math.inf)
TEACHER = (0.9, 0.1, 1e-3, 1e-6)
K = 4


def targets_and_logits(t: float, v: int = 120) -> tuple[SparseTargets, torch.Tensor]:
    """One row for each pair of the student's and the teacher's mass off S; S lies anywhere."""
    g = torch.Generator().manual_seed(3)
    rows = len(STUDENT) * len(TEACHER)
    order = torch.rand(rows, v, generator=g).argsort(1)

    def logits(log_off: torch.Tensor, spread: float) -> torch.Tensor:
        log_on = torch.log1p(-log_off.exp().clamp(max=1 - 1e-7))
        on = (torch.randn(rows, K, generator=g, dtype=torch.float64) * spread).log_softmax(1) + log_on[:, None]
        off = (torch.randn(rows, v - K, generator=g, dtype=torch.float64) * spread).log_softmax(1) + log_off[:, None]
        return torch.empty(rows, v, dtype=torch.float64).scatter_(1, order, torch.cat([on, off], 1) * t)

    student = logits(torch.tensor(STUDENT, dtype=torch.float64).repeat_interleave(len(TEACHER)), 1.0)
    # a narrow one, so that the teacher's top-k are the first K of `order`
    teacher = logits(torch.tensor(TEACHER, dtype=torch.float64).log().repeat(len(STUDENT)), 0.01)
    lp = teacher.log_softmax(1)
    rest = lp.scatter(1, order[:, :K], -math.inf)
    grid = (1.0, 2.0, 4.0)
    targets = SparseTargets(
        ids=order[:, :K].int(),
        logprobs=lp.gather(1, order[:, :K]).float(),
        tail=torch.stack([(rest / x).logsumexp(1) for x in grid], 1).float(),
        outcomes=v - K,
        vocab_size=v,
        temperatures=grid,
    )
    return targets, student.float()


@DEVICE_ON
@pytest.mark.parametrize(
    ("divergence", "t"),
    [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 2.0), ("skew_kl", 1.0), ("tvd", 1.5)],
)
def test_any_mass_off_the_top_k(divergence: str, t: float, on) -> None:
    """Each row's value to 1e-5 and gradient to 1e-5 (|p| + |q|), in evaluation and training, in place and not."""
    impl, device = on
    targets, logits = targets_and_logits(t)
    exact = logits.double().requires_grad_()
    at = targets.at(t, "bucket", dtype=torch.float64)
    rows = t * t * divergence_rows(exact / t, targets.ids, at, divergence, 0.5)
    finite = rows.isfinite()
    assert int((~finite).sum()) <= len(TEACHER)
    rows[finite].sum().backward()
    settings = {"temperature": t, "divergence": divergence, "beta": 0.5, "skew": 0.5, "impl": impl, "num_items": 1}
    allowed = t * 1e-5 * ((logits.double() / t).softmax(1).norm(dim=1) + at.log_q.exp().norm(dim=1))
    for inplace in (False, True):
        leaf = logits.to(device).clone().requires_grad_()
        given = leaf * 1 if inplace else leaf
        kd_loss(given, targets.to(device), None, inplace=inplace, mask=finite.to(device), **settings).loss.backward()
        assert bool(((leaf.grad.cpu().double() - exact.grad).norm(dim=1) <= allowed)[finite].all())
    for row in range(0, len(logits), 5):
        with torch.no_grad():
            value = kd_loss(logits[row : row + 1].to(device), targets[row : row + 1].to(device), None, **settings).soft
        assert float(value) == pytest.approx(float(rows[row].detach()), rel=1e-5, abs=1e-5)


@INTERPRETED
@pytest.mark.parametrize("grad", [False, True], ids=["evaluation", "training"])
def test_only_a_mass_too_small_to_know_is_summed_again(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the student's mass off S is an eighth of the teacher's or more, evaluation reads a row once."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    load, elements = interpreter.InterpreterBuilder.create_masked_load, [0]

    def counting(self, pointers, mask, *rest):
        elements[0] += int(mask.data.sum())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    v, passes = 1024, 2 if grad else 1  # whole tiles
    targets, logits = targets_and_logits(1.0, v)
    for row, (student, teacher) in enumerate((s, q) for s in STUDENT for q in TEACHER):
        ratio = math.exp(student) / teacher
        if row % 3 == 0 and not 0.12 < ratio < 0.13:
            elements[0] = 0
            with torch.set_grad_enabled(grad):
                kd_loss(logits[row : row + 1].requires_grad_(grad), targets[row : row + 1], None, impl="triton")
            again = ratio < 0.125 or student < -14
            assert (passes + again) * v <= elements[0] <= (passes + again) * v + 200


@DEVICE_ON
@pytest.mark.parametrize("log_q_tail", [-100.0, -1000.0])
def test_a_sharp_teacher_under_reverse_kl(log_q_tail: float, on) -> None:
    """The loss has log(p_tail / q_tail) times p_tail, of which rounding must not be multiplied."""
    impl, device = on
    v, rows = 1000, 4
    logits = torch.randn(rows, v, generator=torch.Generator().manual_seed(5))
    logits[:, 0] += torch.tensor([11.5, 13.0, 16.0, 18.0])
    probability = logits.double().softmax(1)
    tail = probability[:, 1:].sum(1)
    expected = probability[:, 0] * probability[:, 0].log() + tail * (tail.log() - log_q_tail)
    targets = SparseTargets(
        ids=torch.zeros(rows, 1, dtype=torch.int32), logprobs=torch.zeros(rows, 1),
        tail=torch.full((rows, 1), log_q_tail), outcomes=v - 1, vocab_size=v, temperatures=(1.0,),
    ).to(device)  # fmt: skip
    for row in range(rows):
        given = logits[row : row + 1].to(device)
        found = kd_loss(given, targets[row : row + 1], None, divergence="reverse_kl", treatment="bucket", impl=impl)
        assert abs(float(found.loss) - float(expected[row])) <= 1e-5 * max(1.0, float(expected[row]))
