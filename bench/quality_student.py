"""The students of the quality suite: model, arms, training and evaluation."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import SparseTargets, linear_kd_loss
from fastkd.bench.quality_problem import LENGTH, Problem

INNER = 1024  # width of the hidden layer
BATCH = LENGTH  # positions per step
RATE = 3e-4
_ROWS = 1024  # of logits at a time


@dataclass(frozen=True)
class Shape:
    """What a cache keeps of a position: k top-k entries, and draws from the tail at temperature t_d."""

    k: int
    draws: int = 0
    t_d: float = 1.0

    def targets(self, problem: Problem, seed: int) -> SparseTargets:
        """Targets of all training positions. seed: of the draws, which are fixed as in a cache."""
        found = [
            SparseTargets.from_logits(
                problem.logits(rows), self.k, draws=self.draws, draw_temperature=self.t_d, seed=seed, positions=rows
            )
            for rows in torch.arange(problem.trained).split(_ROWS)
        ]
        return SparseTargets.cat(found)


@dataclass(frozen=True)
class Arm:
    """What a student is trained on, soft loss alone. shape: None for the live teacher's logits, and for `labels`, the
    hard labels alone. treatment: "dense", "labels", or one of `fastkd.kernels.treatment.TREATMENTS`."""

    temperature: float
    treatment: str
    shape: Shape | None = None


class Score(NamedTuple):
    """Means over held-out positions at T = 1, in nats: KL(teacher, student), and cross-entropy of the labels."""

    kl: float
    ce: float


class Student(nn.Module):
    """A map from a teacher's early states to its last ones, plus a hidden layer that starts at zero; frozen LM head.

    It is initialized by least squares, so that it is not random, as a student cut from its teacher is not.
    """

    gain_D: Tensor

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__()
        width = problem.inputs_ND.shape[1]
        gain_D = problem.states_ND[: problem.trained].square().mean(0).sqrt()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.skip = nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, INNER), nn.Linear(INNER, width)
        with torch.no_grad():
            self.skip.weight.copy_(problem.fit_DD.T / gain_D[:, None])
            self.down.weight.zero_()
            self.down.bias.zero_()
        self.register_buffer("gain_D", gain_D)

    def forward(self, inputs_ND: Tensor) -> Tensor:
        states_ND = self.skip(inputs_ND) + self.down(F.gelu(self.up(inputs_ND)))
        return F.rms_norm(states_ND, states_ND.shape[1:]) * self.gain_D


def train(problem: Problem, arm: Arm, targets: SparseTargets | None, *, seed: int) -> Student:
    """Train for one epoch, in the order of the seed. targets: of the arm's shape."""
    student = Student(problem, seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    order = torch.randperm(problem.trained, generator=torch.Generator().manual_seed(seed))
    steps = problem.trained // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1.0 - step / steps)
    )
    for rows in order[: steps * BATCH].split(BATCH):
        loss(problem, arm, targets, student(problem.inputs_ND[rows]), rows).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student


def loss(problem: Problem, arm: Arm, targets: SparseTargets | None, hidden_ND: Tensor, rows: Tensor) -> Tensor:
    """The mean loss of an arm over some positions."""
    t = arm.temperature
    if targets is not None:
        some = targets[rows]
        return linear_kd_loss(
            hidden_ND, problem.head_VD, some, None, alpha=0.0, temperature=t, treatment=arm.treatment
        ).loss
    logits_NV = hidden_ND @ problem.head_VD.T
    if arm.treatment == "labels":
        return F.cross_entropy(logits_NV, problem.labels_N[rows])
    log_p, log_q = (logits_NV / t).log_softmax(1), (problem.logits(rows) / t).log_softmax(1)
    return t * t * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@torch.no_grad()
def evaluate(problem: Problem, student: nn.Module) -> Score:
    """The scores over the held-out positions."""
    kl = ce = 0.0
    for rows in torch.arange(problem.trained, len(problem.states_ND)).split(_ROWS):
        log_p = (student(problem.inputs_ND[rows]) @ problem.head_VD.T).log_softmax(1)
        log_q = problem.logits(rows).log_softmax(1)
        kl += float(F.kl_div(log_p, log_q, log_target=True, reduction="sum"))
        ce += float(F.nll_loss(log_p, problem.labels_N[rows], reduction="sum"))
    return Score(kl / problem.held, ce / problem.held)
