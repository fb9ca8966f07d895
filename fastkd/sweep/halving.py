"""Successive halving: many arms are trained a little, and the better half of them goes on, until one is left.

Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016; the inner
loop of Hyperband (Li et al., JMLR 2018). n arms and K = ceil(log2 n) halvings: rung k, from 0 on, ends after the step
steps * 2^(k - K), and an arm that goes on does so from its checkpoint.

Every arm is trained with the schedules of the full run: at a rung they all are in the middle of it, with the same high
learning rate, and an arm that goes on is the full run itself. The alternative, a schedule that ends at each rung, would
rank annealed students, but then no rung could begin where the one before ended, and all of them would cost twice as
much.

Halving assumes that who is behind early stays behind. Of distillation that is not so for the temperature, nor for hard
labels: a student at a high temperature is late in cross-entropy, and one without a teacher learns slower at first. So
arms are in groups, one for each temperature and one for hard labels alone, and the best arm of every group goes on up
to the last halving, at half of the run. With 16 arms in four groups: 16, 8, 4, 4 arms and one, 3.5 full runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TrainError


@dataclass(frozen=True)
class Rung:
    """The arms (a number) that are trained up to a step."""

    step: int
    arms: int


def plan_rungs(arms: int, steps: int, groups: int = 1) -> list[Rung]:
    """The rungs of a number of arms, the last one with one arm at the end of the run, those before it with at least one
    arm for each of the groups. Raises TrainError if there are not enough steps."""
    halvings = max(1, math.ceil(math.log2(arms)))
    if steps < 2**halvings:
        raise TrainError(
            f"auto: got {steps} steps; expected at least {2**halvings} for {arms} arms, as the first of "
            f"{halvings + 1} rungs is 1/{2**halvings} of the run. Train longer, or give fewer values."
        )
    rungs = []
    for k in range(halvings + 1):
        rungs.append(Rung(round(steps / 2 ** (halvings - k)), arms))
        arms = 1 if k == halvings - 1 else max(math.ceil(arms / 2), min(arms, groups))
    return rungs


def cost_of(rungs: Sequence[Rung]) -> float:
    """What the rungs cost, in full runs: arms that go on do so from where they are."""
    before, total = 0, 0
    for rung in rungs:
        total += rung.arms * (rung.step - before)
        before = rung.step
    return total / rungs[-1].step


def going_on(order: Sequence[str], most: int, groups: Mapping[str, Any]) -> list[str]:
    """Which arms of a rung go on: the best ones, up to `most`, in their order; if there is place for one of each group,
    the best of each group among them.

    order: the names of those that did not diverge, the best first. groups: of each name.
    """
    first = {groups[name]: name for name in reversed(order)}
    found = set(first.values()) if len(first) <= most else set()
    for name in order:
        if len(found) < most:
            found.add(name)
    return [name for name in order if name in found]


def ranked(values: Mapping[str, float], sign: int) -> list[str]:
    """The names, the best first; equal ones in their order. sign: 1 if lower values are better, else -1. NaN: last."""
    return sorted(values, key=lambda name: math.inf if math.isnan(values[name]) else sign * values[name])
