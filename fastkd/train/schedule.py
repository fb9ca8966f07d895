"""Schedules of the learning rate and of numbers of the loss, as pure functions of (step, steps)."""

import math

RATES = ("cosine", "wsd", "linear", "constant")
RAMPS = ("linear", "cosine")


def rate_at(
    step: int, steps: int, *, peak: float, schedule: str, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The learning rate of a step (from 0 on) of `steps`.

    Linear warm-up over the fraction `warmup` of the steps; the first step after it has `peak`. Then the schedule:
    "cosine" (half a cosine) or "linear" down to `floor` times the peak at the last step; "wsd", constant and then
    linear over the last fraction `decay` of the steps; "constant". If warm-up and decay overlap, the lower one counts.
    """
    rising = round(warmup * steps)
    if step < rising:
        up = (step + 1) / (rising + 1)
    else:
        up = 1.0
    if schedule == "constant":
        return peak * up
    begin = max(rising, steps - max(1, round(decay * steps))) if schedule == "wsd" else rising
    # the first step has the peak, the last one the floor
    part = min(1.0, max(0.0, (step - begin) / max(1, steps - 1 - begin)))
    return peak * min(up, floor + (1.0 - floor) * _left("cosine" if schedule == "cosine" else "linear", part))


def ramp_at(step: int, steps: int, *, start: float, end: float | None, schedule: str = "linear") -> float:
    """A value that changes from `start` at the first step to `end` at the last. end=None: it is constant."""
    if end is None:
        return start
    part = min(1.0, step / max(1, steps - 1))
    if part in (0.0, 1.0):  # exactly, without rounding
        return end if part else start
    return end + (start - end) * _left(schedule, part)


def _left(schedule: str, part: float) -> float:
    """What is left of a decay, from 1 to 0, after a fraction of it."""
    return 0.5 * (1.0 + math.cos(math.pi * part)) if schedule == "cosine" else 1.0 - part
