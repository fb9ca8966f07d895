"""Successive halving: many arms are trained a little, and the better half of them goes on, until one is left.

Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016; the inner
loop of Hyperband (Li et al., JMLR 2018). n arms and K = ceil(log2 n) halvings: rung k, from 0 on, ends after the step
steps * 2^(k - K), so that every rung costs about as much as the others: with 16 arms and an arm that goes on from its
checkpoint 1 + 4 * 1/2 = 3 full runs.

Every arm is trained with the schedules of the full run: at a rung they all are in the middle of it, with the same high
learning rate, and an arm that goes on is the full run itself. The alternative, a schedule that ends at each rung, would
rank annealed students, but then no rung could begin where the one before ended, and all of them would cost twice as
much. What is lost: an arm that gains more than others from the end of the schedule is underestimated. The last halving
is therefore as late as half of the run. For the same reason hard labels alone, the arm that does not distil, takes part
in it whatever its rank (`going_on`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import TrainError


@dataclass(frozen=True)
class Rung:
    """The arms (a number) that are trained up to a step."""

    step: int
    arms: int


def plan_rungs(arms: int, steps: int) -> list[Rung]:
    """The rungs of a number of arms, the last one with one arm at the end of the run. Raises TrainError if there are
    not enough steps."""
    halvings = max(1, math.ceil(math.log2(arms)))
    if steps < 2**halvings:
        raise TrainError(
            f"auto: got {steps} steps; expected at least {2**halvings} for {arms} arms, as the first of "
            f"{halvings + 1} rungs is 1/{2**halvings} of the run. Train longer, or give fewer values."
        )
    rungs = []
    for k in range(halvings + 1):
        rungs.append(Rung(round(steps / 2 ** (halvings - k)), arms))
        arms = math.ceil(arms / 2)
    return rungs


def cost_of(rungs: Sequence[Rung]) -> float:
    """What the rungs cost, in full runs: arms that go on do so from where they are."""
    before, total = 0, 0
    for rung in rungs:
        total += rung.arms * (rung.step - before)
        before = rung.step
    return total / rungs[-1].step


def going_on(order: Sequence[str], most: int, hard: str) -> list[str]:
    """Which arms of a rung go on: the best ones, up to `most`. While there are several, hard labels alone are always
    among them: students of a teacher learn faster at first, and whether they end up better shows late.

    order: the names of those that did not diverge, the best first. hard: that of the hard labels alone.
    """
    found = list(order[:most])
    if most > 1 and hard in order and hard not in found:
        found[-1] = hard
    return found


def ranked(values: Mapping[str, float], sign: int) -> list[str]:
    """The names, the best first; equal ones in their order. sign: 1 if lower values are better, else -1. NaN: last."""
    return sorted(values, key=lambda name: math.inf if math.isnan(values[name]) else sign * values[name])
